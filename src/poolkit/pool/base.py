"""What every pool does around checkout and check-in: its state, its end, and its answers."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import fields
from typing import Any, Self

from sqlalchemy.pool import Pool
from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet

from poolkit import events
from poolkit.driver import CLOSE_TIMEOUT
from poolkit.errors import WrongEventLoop
from poolkit.events import CloseReason, Observer, shared
from poolkit.pool.connects import Connects
from poolkit.pool.queue import WaitQueue
from poolkit.pool.record import PooledRecord
from poolkit.pool.stats import Counters, PoolStats, frozen


class PoolBase(Pool):
    """The state of a pool. Counts are sizes of its collections, never sums of steps."""

    _is_asyncio = True
    _connects: Connects

    # Not keyword-only: SQLAlchemy's create_engine passes only arguments that are not.
    def __init__(  # noqa: PLR0913
        self,
        creator: Any,
        pool_size: int = 5,
        max_overflow: int = 10,
        timeout: float | None = 30.0,
        use_lifo: bool = True,  # noqa: FBT001, FBT002
        pre_ping: bool = True,  # noqa: FBT001, FBT002
        recycle: float = -1,
        pool_recycle_jitter: float = 0.1,
        pool_idle_timeout: float = 600.0,
        pool_min_idle: int = 0,
        pool_keepalive: float = 0.0,
        pool_ping_idle: float = 1.0,
        pool_ping_timeout: float = 1.0,
        pool_max_waiting: int | None = None,
        pool_overload_after: float = 1.0,
        pool_max_connecting: int = 4,
        pool_connect_timeout: float = 0.0,
        leak_threshold: float = 0.0,
        pool_name: str | None = None,
        observers: Iterable[Observer] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(creator, **kwargs)
        self._size = pool_size
        self._max_overflow = max_overflow
        self._timeout = timeout
        self._lifo = use_lifo
        self._liveness = pre_ping
        self._lifetime = recycle
        self._jitter = pool_recycle_jitter
        self.idle_timeout = pool_idle_timeout
        self.keepalive = pool_keepalive
        self._ping_idle = pool_ping_idle
        self._ping_after = pool_ping_idle if pre_ping else math.inf
        self._ping_timeout = pool_ping_timeout
        self._max_waiting = pool_max_waiting
        self._overload_after = pool_overload_after
        self._max_connecting = pool_max_connecting
        self._connect_timeout = pool_connect_timeout
        self.leak_threshold = leak_threshold
        self.name = pool_name
        self.observers = shared(observers)
        self._on_checkout = self.observers.wanting(events.CheckedOut)
        self._on_checkin = self.observers.wanting(events.CheckedIn)
        self.counters = Counters()
        self.lineage: list[weakref.ref[PoolBase]] = [weakref.ref(self)]
        self.serving: Serving | None = None
        unlimited = pool_size == 0 or max_overflow < 0
        self._limit: float = math.inf if unlimited else pool_size + max_overflow
        self._kept: float = pool_size or math.inf
        self.min_idle = int(min(pool_min_idle, self._kept))
        self._generation = 0
        self._reset_state()
        pools.add(self)

    def _reset_state(self) -> None:
        """No connection, no caller, no loop."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._time: Callable[[], float] = _no_time
        self._idle: deque[PooledRecord] = deque()
        self._take = self._idle.pop if self._lifo else self._idle.popleft
        self._held: dict[PooledRecord, None] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._queue = WaitQueue(self._overload_after)
        self._line = self._queue.waiters  # its truth is asked at every checkout and check-in
        self._draining = self._replaced = False
        self._drained: asyncio.Future[None] | None = None
        self.keeper_timer: asyncio.TimerHandle | None = None

    # -- QueuePool's methods ---------------------------------------------------------------

    def size(self) -> int:
        """Connections that are kept."""
        return self._size

    def checkedin(self) -> int:
        """Idle connections."""
        return len(self._idle)

    def checkedout(self) -> int:
        """Connections in use."""
        return len(self._held)

    def overflow(self) -> int:
        """Connections beyond the size; negative as long as there are fewer, as in QueuePool."""
        return self._total() - self._size if self._size else 0

    def timeout(self) -> float | None:
        """Longest wait for a slot, in seconds."""
        return self._timeout

    def status(self) -> str:
        """One line for people."""
        return (
            f"Pool size: {self._size}  Connections in pool: {self.checkedin()} Current Overflow:"
            f" {self.overflow()} Current Checked out connections: {self.checkedout()}"
            f" Opening: {len(self._connects)} Waiting: {len(self._queue)}"
        )

    def recreate(self) -> Self:
        """A new pool with the same settings, listeners, observers and counters."""
        new = type(self)(
            self._creator,
            pool_size=self._size,
            max_overflow=self._max_overflow,
            timeout=self._timeout,
            use_lifo=self._lifo,
            pre_ping=self._liveness,
            recycle=self._lifetime,
            pool_recycle_jitter=self._jitter,
            pool_idle_timeout=self.idle_timeout,
            pool_min_idle=self.min_idle,
            pool_keepalive=self.keepalive,
            pool_ping_idle=self._ping_idle,
            pool_ping_timeout=self._ping_timeout,
            pool_max_waiting=self._max_waiting,
            pool_overload_after=self._overload_after,
            pool_max_connecting=self._max_connecting,
            pool_connect_timeout=self._connect_timeout,
            leak_threshold=self.leak_threshold,
            pool_name=self.name,
            observers=self.observers,
            echo=self.echo,
            logging_name=self._orig_logging_name,
            reset_on_return=self._reset_on_return,
            _dispatch=self.dispatch,
            dialect=self._dialect,
        )
        new.counters, new.lineage, new.serving = self.counters, self.lineage, self.serving
        kept = [weakref.ref(pool) for pool in (*living(self.lineage), new)]
        self.lineage[:] = kept  # at once: other threads read it
        self._replaced = True  # what is still waiting here is served, and nothing is kept
        if self._generation:  # disposed: what was opened while it closed the others goes, too
            self._generation += 1
            self._let_held_expire()
            self._dispose_idle()
        return new

    def stats(self) -> PoolStats:
        """How the pool stands, and what it has done."""
        unlimited = self._limit == math.inf
        return PoolStats(
            used=len(self._held),
            idle=len(self._idle),
            opening=self.opening(),
            waiting=self.waiting(),
            size=self._size,
            limit=None if unlimited else int(self._limit),
            utilisation=0.0 if unlimited else len(self._held) / self._limit,
            overloaded=self.serves_newest_first(),
            draining=self._draining,
            closed=frozen(self.counters.closed),
            **_counted(self.counters),
        )

    # -- The loop it lives on --------------------------------------------------------------

    def here(self) -> Self:
        """The pool for the running event loop: another one where the engine serves several."""
        loop = asyncio.get_running_loop()
        if loop is self._loop or self.serving is None:
            return self
        serving: Self = self.serving(loop)
        return serving

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop that it was used on last; None before its first use."""
        return self._loop

    def abandon(self) -> None:
        """Drop every connection and start anew: their event loop is closed."""
        for record in [*self._idle, *self._held]:
            self._closed(record, CloseReason.DISPOSED)
            record.drop()
        self._reset_state()

    def _bind(self, loop: asyncio.AbstractEventLoop) -> None:
        if self.serving is not None and self._loop is not None and self._loop.is_closed():
            self.abandon()
        if self._loop is not None and (self._total() or self._queue):
            raise WrongEventLoop(
                "this engine's connections belong to another event loop: use one engine per loop,"
                " as poolkit.get_engine() gives it, or dispose of the engine before the next loop"
            )
        self._stop_keeper()  # of a loop that is no more
        self._connects.stop_probing()
        # A loop's own time, as a virtual clock has it; asyncio's is this very function.
        plain = type(loop).time is asyncio.BaseEventLoop.time
        self._loop, self._time = loop, time.monotonic if plain else loop.time

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        assert self._loop is not None
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # -- Counting --------------------------------------------------------------------------

    def _total(self) -> int:
        return len(self._held) + len(self._idle) + len(self._connects)

    def held(self) -> Iterable[PooledRecord]:
        """The connections in use."""
        return list(self._held)

    def has_given(self, record: PooledRecord) -> bool:
        """Whether a connection is in use."""
        return record in self._held

    def idle(self) -> Iterable[PooledRecord]:
        """The idle connections, the longest idle first."""
        return self._idle

    def has_connections(self) -> bool:
        """Whether any connection is there or under way."""
        return self._total() > 0

    def recycles(self) -> bool:
        """Whether connections are replaced by age."""
        return self._lifetime > 0

    def limit(self) -> float:
        """Connections at most; infinity if that is unlimited."""
        return self._limit

    def kept(self) -> float:
        """Idle connections at most; infinity if that is unlimited."""
        return self._kept

    def opening(self) -> int:
        """Connects under way."""
        return len(self._connects)

    def waiting(self) -> int:
        """Callers in line."""
        return len(self._queue)

    def serves_newest_first(self) -> bool:
        """Whether the newest in line are served first."""
        return self._queue.overloaded_since is not None

    def gives_out(self) -> bool:
        """Whether it is its engine's pool, and not one that was replaced."""
        return not self._replaced

    def longest_use(self) -> float:
        """Seconds since the connection was given out that has been in use for longest, or 0."""
        taken = [record.taken_at for record in self.held()]
        return self._time() - min(taken) if taken else 0.0

    def now(self) -> float:
        """The time of the pool's event loop, in seconds."""
        return self._time()

    # -- Ends of connections ---------------------------------------------------------------

    def _closed(self, record: PooledRecord, reason: CloseReason) -> None:
        self.counters.closed[reason] += 1
        if self.observers.wanting(events.ConnectionClosed):
            age = self._time() - record.opened_at
            self.observers.notify(events.ConnectionClosed(reason, age))

    def _gone(self, record: PooledRecord) -> None:
        """It came back without its connection: invalidated, detached or collected."""
        if record.lost:
            self._closed(record, CloseReason.GARBAGE_COLLECTED)
        elif record.invalidated:
            self._tell_invalidated(record.error)
            self._closed(record, CloseReason.LOST if record.died else CloseReason.INVALIDATED)
        else:
            self._closed(record, CloseReason.DETACHED)

    def _tell_invalidated(self, error: BaseException | None) -> None:
        if self.observers.wanting(events.ConnectionInvalidated):
            self.observers.notify(events.ConnectionInvalidated(error))

    def _discard(
        self, record: PooledRecord, reason: CloseReason, error: BaseException | None = None
    ) -> None:
        """Drop a connection that nobody answers on, without waiting for the peer."""
        record.terminate()
        self._tell_invalidated(error)
        self._closed(record, reason)
        # SQLAlchemy's bookkeeping, out of the caller's greenlet: there it would wait for the peer,
        # and a cancellation could interrupt whatever is to be done next.
        if self._in_own_loop() and self._loop is not None:
            self._loop.call_soon(record.invalidate, error)
        else:
            record.invalidate(error)

    def _close(self, record: PooledRecord, reason: CloseReason) -> asyncio.Task[Any]:
        """Close a connection in good order, in the background and within a bound."""
        self._closed(record, reason)
        task = self._spawn(record.close_within(CLOSE_TIMEOUT))
        task.add_done_callback(lambda _: record.drop_if_open())  # cancelled before it began
        return task

    def close_idle(self, record: PooledRecord, reason: CloseReason) -> None:
        """Take a connection out of the idle ones and close it."""
        self._idle.remove(record)
        self._close(record, reason)

    def dispose(self) -> None:
        """Close what is idle, side by side and within 2 s, and what is in use as it comes back.

        From another event loop or thread, or when the loop is closed, the sockets are dropped.
        """
        self._generation += 1
        self._let_held_expire()
        self._connects.stop_probing()
        if self._in_own_loop():
            self._connects.cancel_unowned()
            self._connects.serve()
        closing = self._dispose_idle()
        if closing and in_greenlet():
            await_only(asyncio.wait(closing))  # a cancellation ends the wait, not the closes
        self._stop_keeper()
        self.logger.info("Pool disposed. %s", self.status())

    def _dispose_idle(self) -> list[asyncio.Task[Any]]:
        idle = list(self._idle)
        self._idle.clear()
        if self._in_own_loop():
            return [self._close(record, CloseReason.DISPOSED) for record in idle]
        for record in idle:
            self._closed(record, CloseReason.DISPOSED)
            self._drop_from_outside(record)
        return []

    def _let_held_expire(self) -> None:
        """Have what is in use closed as it comes back."""
        for record in self._held:
            record.expires_at = -math.inf

    def leave_server(self) -> None:
        """Close every connection that is there now, what is in use as it comes back.

        For a server that answers and yet is the wrong one, such as a primary that has become
        read-only: new connections find the right one.
        """
        self._generation += 1
        self._let_held_expire()
        for record in list(self._idle):
            self.close_idle(record, CloseReason.LOST)

    def _in_own_loop(self) -> bool:
        try:
            return asyncio.get_running_loop() is self._loop
        except RuntimeError:
            return False

    def _drop_from_outside(self, record: PooledRecord) -> None:
        if self._loop is None or self._loop.is_closed():
            record.drop()
        else:
            with contextlib.suppress(RuntimeError):  # closed in the meantime
                self._loop.call_soon_threadsafe(record.drop)

    def forget(self) -> object:
        """Start anew in a forked child; returns what must outlive it there."""
        parents = (self._idle, self._held, self._connects, self._tasks, self._queue, self._loop)
        self._reset_state()
        return parents

    def _stop_keeper(self) -> None:
        timer, self.keeper_timer = self.keeper_timer, None
        if timer is not None:
            timer.cancel()


def living(lineage: Iterable[weakref.ref[PoolBase]]) -> list[Any]:
    """Those of an engine's pools that are still there."""
    return [pool for each in tuple(lineage) if (pool := each()) is not None]  # others write it


Serving = Callable[[asyncio.AbstractEventLoop], Any]
"""Which pool serves an event loop."""


def _no_time() -> float:
    raise AssertionError("the pool has no event loop yet")


def _counted(counters: Counters) -> dict[str, Any]:
    numbers = {f.name for f in fields(counters)} - {"closed", "open_failures"}
    return {name: getattr(counters, name) for name in numbers}


pools: weakref.WeakSet[PoolBase] = weakref.WeakSet()
"""All pools of this process, for the child after a fork."""
