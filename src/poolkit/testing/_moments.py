"""Moments in the protocol, what is to happen at them, and waiting for them."""

import asyncio
import re
from collections.abc import Callable, Generator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from poolkit.testing._dialogue import EXECUTING, MESSAGE_TYPES, OUTCOMES, Message, Sender

_T = TypeVar("_T")

Edge = Literal["before", "after"]

PATIENCE = 10.0
"""Seconds that a wait in a test is given unless it says otherwise."""


class FaultProxyError(RuntimeError):
    """The proxy cannot do what was asked: it is not running, or the connection is encrypted."""


@dataclass(frozen=True, slots=True)
class At:
    """A message of PostgreSQL's protocol, as the moment at which something is to happen.

    Attributes:
        type: Its name in PostgreSQL's documentation, such as `Parse` or `ReadyForQuery`.
        text: How its text (see `Message`) begins, in any case; or a pattern found in it.
        sender: Whose; needed only where both may send it, as with CopyData.
    """

    type: str
    text: str | re.Pattern[str] | None = None
    sender: Sender | None = None

    def __post_init__(self) -> None:
        if self.type not in MESSAGE_TYPES:
            raise ValueError(
                f"{self.type!r} is no message of PostgreSQL's protocol: {sorted(MESSAGE_TYPES)}"
            )

    def matches(self, message: Message) -> bool:
        return (
            message.type == self.type
            and self.sender in {None, message.sender}
            and (self.text is None or _says(message.text, self.text))
        )


Moment = str | re.Pattern[str] | At
"""How a statement's SQL begins, in any case; or a pattern found in it; or one message."""


@dataclass(frozen=True, slots=True)
class Point:
    """Where exactly a moment is: before or after the relaying of a message that fits."""

    edge: Edge
    fits: Callable[[Message], bool]
    told: str


def point(before: Moment | None, after: Moment | None) -> Point:
    """The point of one moment: a statement's is where it goes to the server, or is answered."""
    if before is not None and after is not None:
        raise TypeError("give before= or after=, not both")
    if isinstance(before, At):
        return Point("before", before.matches, f"before {before}")
    if isinstance(after, At):
        return Point("after", after.matches, f"after {after}")
    if before is not None:
        return Point("before", executes(before), f"before {before!r}")
    if after is not None:
        return Point("before", _answers(after), f"after {after!r}")
    raise TypeError("give before= or after=")


def executes(statement: str | re.Pattern[str]) -> Callable[[Message], bool]:
    """Whether a message has the server execute the statement."""
    return lambda message: (
        message.sender == "client" and message.type in EXECUTING and _says(message.text, statement)
    )


def _answers(statement: str | re.Pattern[str]) -> Callable[[Message], bool]:
    return lambda message: (
        message.sender == "server"
        and message.type in OUTCOMES
        and _says(message.statement, statement)
    )


def _says(text: str | None, wanted: str | re.Pattern[str]) -> bool:
    if text is None:
        return False
    if isinstance(wanted, re.Pattern):
        return wanted.search(text) is not None
    start = r"\s+".join(re.escape(word) for word in wanted.split())
    return re.match(rf"\s*{start}(?!\w)", text, re.IGNORECASE) is not None


class Signal(Generic[_T]):
    """Something that will happen; `await` it, or `wait()` for it in sync code.

    Waiting has an end: `await signal` and `wait()` raise TimeoutError after 10 s.
    """

    def __init__(self, told: str) -> None:
        self._told = told
        self._future: Future[_T] = Future()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._told}: {'yes' if self.happened else 'not yet'}>"

    @property
    def happened(self) -> bool:
        """Whether it has."""
        return self._future.done() and self._future.exception() is None

    def wait(self, timeout: float = PATIENCE) -> _T:
        """Block until it happens, at most `timeout` seconds; not in a thread with an event loop."""
        try:
            return self._future.result(timeout)
        except FutureTimeout:
            raise self._late(timeout) from None

    async def reached(self, timeout: float = PATIENCE) -> _T:
        """Wait in asyncio until it happens, at most `timeout` seconds."""
        ours = asyncio.wrap_future(self._future)
        ours.add_done_callback(_look)  # asyncio reports errors that nobody looked at
        try:
            # Shielded: giving up one wait is no end of the signal.
            return await asyncio.wait_for(asyncio.shield(ours), timeout)
        except TimeoutError:
            raise self._late(timeout) from None

    def __await__(self) -> Generator[Any, None, _T]:
        return self.reached().__await__()

    def _late(self, timeout: float) -> TimeoutError:
        return TimeoutError(f"not within {timeout:g} s: {self._told}")

    def happen(self, value: _T) -> None:
        """It has happened; only the first time counts."""
        if not self._future.done():
            self._future.set_result(value)

    def fail(self, error: BaseException) -> None:
        """It cannot happen any more."""
        if not self._future.done():
            self._future.set_exception(error)


def _look(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()
