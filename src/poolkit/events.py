"""What happens to an engine's connections, as records, and who may watch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, TypeVar, overload

from poolkit.faults import FaultKind

_log = logging.getLogger("poolkit.events")


@dataclass(frozen=True, slots=True)
class Event:
    """The base of all events."""


@dataclass(frozen=True, slots=True)
class ConnectionOpened(Event):
    """A physical connection was made.

    Attributes:
        address: The server, without credentials.
        duration: Seconds it took, all attempts counted in.
        attempts: Physical connects started, this one counted in.
        pooler: ``none``, ``session`` or ``transaction``: what was found or set.
    """

    address: str
    duration: float
    attempts: int
    pooler: str


@dataclass(frozen=True, slots=True)
class ConnectionOpenFailed(Event):
    """No connection could be made, and the caller was told so.

    Attributes:
        address: The server, without credentials.
        duration: Seconds until giving up.
        attempts: Physical connects started.
        error: What the caller got.
    """

    address: str
    duration: float
    attempts: int
    error: Exception


class CloseReason(StrEnum):
    """Why a connection was closed."""

    RECYCLED = "recycled"
    IDLE = "idle"
    OVERFLOW = "overflow"
    LOST = "lost"
    PING_FAILED = "ping_failed"
    INVALIDATED = "invalidated"
    DETACHED = "detached"
    GARBAGE_COLLECTED = "garbage_collected"
    DISPOSED = "disposed"
    DRAINED = "drained"


@dataclass(frozen=True, slots=True)
class CheckedOut(Event):
    """A caller got a connection.

    Attributes:
        wait: Seconds in the queue; 0 if a connection was idle.
        ping: Seconds that the liveness check took; 0 if none was due.
        open: Seconds that the connect took, if the connection was new; 0 otherwise.
    """

    wait: float
    ping: float
    open: float = 0.0


@dataclass(frozen=True, slots=True)
class CheckedIn(Event):
    """A connection came back.

    Attributes:
        use: Seconds it was in use.
    """

    use: float


@dataclass(frozen=True, slots=True)
class ConnectionInvalidated(Event):
    """A connection was found dead, or was declared so.

    Attributes:
        error: What showed it, if anything did.
    """

    error: BaseException | None


@dataclass(frozen=True, slots=True)
class ConnectionClosed(Event):
    """A connection left the pool.

    Attributes:
        reason: Why.
        age: Seconds since it was opened.
    """

    reason: CloseReason
    age: float


@dataclass(frozen=True, slots=True)
class CheckoutTimedOut(Event):
    """A caller waited in vain for ``pool_timeout``.

    Attributes:
        waited: Seconds.
        error: What the caller got.
    """

    waited: float
    error: Exception


@dataclass(frozen=True, slots=True)
class CheckoutRefused(Event):
    """A caller was turned away: ``pool_max_waiting`` is reached, or the pool is draining.

    Attributes:
        error: What the caller got.
    """

    error: Exception


@dataclass(frozen=True, slots=True)
class LongHolder(Event):
    """A connection has been in use for longer than ``leak_threshold``.

    Attributes:
        held: Seconds so far.
        task: The holder's task name, or None if it has ended.
        stack: Where that task stands now, as a traceback prints it.
    """

    held: float
    task: str | None
    stack: str


@dataclass(frozen=True, slots=True)
class LongHolderReturned(Event):
    """A reported long holder gave its connection back.

    Attributes:
        held: Seconds in all.
        task: The holder's task name, if it was known.
    """

    held: float
    task: str | None


@dataclass(frozen=True, slots=True)
class OverloadBegan(Event):
    """The first in line has waited for too long: the newest are served first from now on.

    Attributes:
        waiting: Callers in the queue.
    """

    waiting: int


@dataclass(frozen=True, slots=True)
class OverloadEnded(Event):
    """The queue is empty again: first come, first served.

    Attributes:
        lasted: Seconds.
    """

    lasted: float


@dataclass(frozen=True, slots=True)
class TransactionRetried(Event):
    """``run_in_transaction`` does the work again after a fault.

    Attributes:
        attempt: The attempt that failed; the first is 1.
        pause: Seconds until the next one begins.
        kind: What went wrong.
        error: What was raised.
    """

    attempt: int
    pause: float
    kind: FaultKind
    error: Exception


class Observer(Protocol):
    """Any callable that takes one event; ``list.append`` is one."""

    def __call__(self, event: Event, /) -> object:
        """Take note of the event, quickly: it is called where the event happens."""


E = TypeVar("E", bound=Event)


class Observers:
    """Who watches an engine; shared by its connects and by every pool that it has.

    Which of them wants an event is known beforehand, so that one that nobody wants is not made.

    Args:
        observers: Told of every event.
    """

    def __init__(self, observers: Iterable[Observer] = ()) -> None:
        self._watching: list[_Watching] = [(observer, Event) for observer in observers]
        self._wanting: dict[type[Event], list[Observer]] = {}

    def __len__(self) -> int:
        return len(self._watching)

    def __iter__(self) -> Iterator[Observer]:
        return iter([observer for observer, _ in self._watching])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self)!r})"

    @overload
    def add(self, observer: Observer, events: None = None) -> Callable[[], None]: ...

    @overload
    def add(
        self, observer: Callable[[E], object], events: Iterable[type[E]]
    ) -> Callable[[], None]: ...

    def add(
        self, observer: Callable[[Any], object], events: Iterable[type[Event]] | None = None
    ) -> Callable[[], None]:
        """Tell one more of every event, or of these kinds; what is returned ends that."""
        watching: _Watching = (observer, Event if events is None else tuple(events))
        self._watching.append(watching)
        self._sort()

        def end() -> None:
            kept = [each for each in self._watching if each is not watching]
            self._watching[:] = kept
            self._sort()

        return end

    def wanting(self, kind: type[Event]) -> list[Observer]:
        """Those to be told of a kind of event: always the same list, whoever comes and goes."""
        if kind not in self._wanting:
            self._wanting[kind] = self._sorted_out(kind)
        return self._wanting[kind]

    def notify(self, event: Event) -> None:
        """Tell those who want it; one that raises is logged and breaks nothing."""
        notify(self.wanting(type(event)), event)

    def _sort(self) -> None:
        for kind, observers in list(self._wanting.items()):
            observers[:] = self._sorted_out(kind)

    def _sorted_out(self, kind: type[Event]) -> list[Observer]:
        return [observer for observer, kinds in self._watching if issubclass(kind, kinds)]


def notify(observers: Iterable[Observer], event: Event) -> None:
    """Tell each observer; one that raises is logged and breaks nothing."""
    for observer in tuple(observers):  # one may end its watch while it is told
        try:
            observer(event)
        except Exception:  # noqa: BLE001 (it is logged; a checkout must not break on it)
            _log.exception("observer %r failed on %s", observer, type(event).__name__)


def shared(observers: Iterable[Observer] | None) -> Observers:
    """The same if they are shared already, otherwise shared from now on."""
    return observers if isinstance(observers, Observers) else Observers(observers or ())


_Watching = tuple[Observer, type[Event] | tuple[type[Event], ...]]
