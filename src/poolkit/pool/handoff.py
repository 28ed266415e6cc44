"""The pool: a connection that comes back goes to the first in line, and nothing is stranded."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
import weakref

from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection
from sqlalchemy.util import await_only

from poolkit import events
from poolkit.errors import PoolDraining, PoolOverloaded, PoolTimeout, describe
from poolkit.events import CloseReason, notify
from poolkit.pool import draining, keeper, liveness
from poolkit.pool.base import PoolBase
from poolkit.pool.connects import Connects
from poolkit.pool.draining import DrainReport
from poolkit.pool.queue import Waiter
from poolkit.pool.record import PooledRecord

_AT_ONCE = events.CheckedOut(0.0, 0.0, 0.0)
_running_loop = asyncio._get_running_loop
_log = logging.getLogger("poolkit.pool")


class HandoffPool(PoolBase):
    """A pool for asyncio that hands connections over directly.

    Takes ``QueuePool``'s arguments and answers its methods. It is what
    ``poolkit.create_async_engine`` uses, and works as ``poolclass=`` with SQLAlchemy's own
    ``create_async_engine``, which passes on every argument below by its name (``timeout``,
    ``recycle``, ``pre_ping`` and ``use_lifo`` with ``pool_`` before them). All durations are
    seconds.

    Args:
        creator: Makes a connection; given by the engine.
        pool_size: Connections that are kept; 0 is unlimited.
        max_overflow: Connections beyond that; -1 is unlimited.
        timeout: Longest wait for a slot; 0 does not wait, None waits for ever.
        use_lifo: Whether the most recently used idle connection is taken first.
        pre_ping: Whether a connection that was idle for long is checked before use.
        recycle: Age at which a connection is replaced; -1 or 0 is off.
        pool_recycle_jitter: Fraction by which each lifetime is shortened at random.
        pool_idle_timeout: Idleness after which a connection above the minimum is closed; 0 is off.
        pool_min_idle: Idle connections that are kept ready; no more than ``pool_size``.
        pool_keepalive: Time between heartbeats of idle connections; 0 is off.
        pool_ping_idle: Idleness after which a connection is checked before use.
        pool_ping_timeout: How long the check may take.
        pool_max_waiting: Callers that may wait; None is no limit.
        pool_overload_after: Wait of the first in line after which the newest are served first
            until the queue is empty; sooner where callers give up sooner. 0 is never.
        pool_max_connecting: Connects under way at once.
        pool_connect_timeout: Time until a new connection is ready, what SQLAlchemy asks on an
            engine's first one included; 0 is off.
        leak_threshold: Use after which a connection's holder is reported; 0 is off.
        pool_name: What telemetry calls it; None is the server's address and the database.
        observers: Told of every event.
        kwargs: ``sqlalchemy.pool.Pool``'s own arguments.
    """

    def _reset_state(self) -> None:
        super()._reset_state()
        self._connects = Connects(self)

    # -- Checkout --------------------------------------------------------------------------

    def _create_connection(self) -> PooledRecord:
        return PooledRecord(self)

    def _do_get(self) -> ConnectionPoolEntry:
        # The hot path stands here in one piece: each call that it is spared is a tenth of it.
        if _running_loop() is not self._loop:
            here = self.here()
            if here is not self:
                return here._do_get()
            self._bind(asyncio.get_running_loop())
        idle = self._idle
        if idle and not self._line and not self._draining:
            record = self._take()
            now = self._time()
            self._held[record] = None
            record.taken_at = now
            if (
                now - record.answered_at < self._ping_after
                and now < record.expires_at
                and not record.driver_is_closed()
            ):
                self.counters.checkouts += 1
                if self._on_checkout or self.leak_threshold:
                    self._given(record, 0.0, 0.0)
                return record
            del self._held[record]
            (idle.append if self._lifo else idle.appendleft)(record)
        return self._get_slowly()

    def _get_slowly(self) -> PooledRecord:
        """The rest: a check is due, something has to be cleared away, or the caller must wait."""
        if self._draining:
            text = "the engine was drained and gives out no connection"
            raise self._turned_away(PoolDraining(text))
        now = self._time()
        record = None if self._line else self._take_idle(now)
        if record is None:
            return self._wait()
        if now - record.answered_at < self._ping_after:
            return self._given_after(record, 0.0, 0.0)
        alive = self._answers(record)
        ping = self._time() - now
        return self._given_after(record, 0.0, ping) if alive else self._wait(ping=ping, first=True)

    def _take_idle(self, now: float) -> PooledRecord | None:
        """An idle connection that is not known to be dead or too old, counted as used."""
        idle = self._idle
        while idle:
            record = self._take()
            if record.is_dead():
                self._discard(record, CloseReason.LOST)
            elif record.expires_at <= now:
                self._close(record, CloseReason.RECYCLED)
            else:
                record.taken_at = now
                self._held[record] = None
                return record
        return None

    def _answers(self, record: PooledRecord) -> bool:
        """Whether the server answers in time; if not, the connection is gone and replaced."""
        try:
            error = await_only(liveness.ping(self, record))
        except BaseException:  # cancelled in mid-ping: nobody knows its state any more
            self._held.pop(record, None)
            self._discard(record, CloseReason.PING_FAILED)
            self._capacity_freed()
            raise
        if error is None:
            return True
        self._held.pop(record, None)
        self._discard(record, CloseReason.PING_FAILED, error)
        liveness.check_idle(self)
        self._capacity_freed()
        return False

    def _given(self, record: PooledRecord, wait: float, ping: float) -> PooledRecord:
        """Tell whoever watches that a caller has it."""
        if self.leak_threshold:
            task = asyncio.current_task()
            record.task = None if task is None else weakref.ref(task)
        if self._on_checkout:
            at_once = wait == ping == record.open_seconds == 0.0
            event = _AT_ONCE if at_once else events.CheckedOut(wait, ping, record.open_seconds)
            notify(self._on_checkout, event)
        return record

    def _given_after(self, record: PooledRecord, wait: float, ping: float) -> PooledRecord:
        self.counters.checkouts += 1
        return self._given(record, wait, ping)

    def _wait(self, *, first: bool = False, ping: float = 0.0) -> PooledRecord:
        loop = asyncio.get_running_loop()
        waiter = Waiter(loop.create_future(), self._time())
        self._admit(waiter, first=first)
        self._connects.take_over_spare(waiter)
        self._connects.serve()
        timer = None
        if self._timeout is not None:
            timer = loop.call_later(self._timeout, self._expire, waiter)
            if self._timeout <= 0:
                self._expire(waiter)
        try:
            if waiter.future.done():
                _let_others_run()
            record: PooledRecord = await_only(waiter.future)
        except BaseException:
            self._withdraw(waiter)
            raise
        finally:
            if timer is not None:
                timer.cancel()
        waited = self._time() - waiter.since
        self.counters.waits += 1
        self.counters.wait_seconds += waited
        record.waited = waited
        return self._given_after(record, waited, ping)

    def _admit(self, waiter: Waiter, *, first: bool) -> None:
        if self._draining:
            raise self._turned_away(PoolDraining("the engine is being drained"))
        if self._max_waiting is not None and not first and self._is_full(self._max_waiting):
            if not self._is_overloaded():
                raise self._turned_away(self._overloaded_error())
            self._fail(self._queue.oldest(), self._refused(self._overloaded_error()))
        self._queue.add(waiter, first=first)

    def _is_full(self, max_waiting: int) -> bool:
        """Whether so many wait besides those for whom there is room to connect."""
        room = self._limit - len(self._held) - len(self._idle)
        return len(self._line) >= max_waiting + max(room, 0)

    def _withdraw(self, waiter: Waiter) -> None:
        """A caller has gone: give back what it was granted, leave its connect to the next."""
        if waiter in self._line:
            self._learn_patience(waiter)
            self._queue_discard(waiter)
        self._connects.leave_to_the_next(waiter)
        future = waiter.future
        if future.done() and not future.cancelled() and future.exception() is None:
            record = future.result()
            if self._held.pop(record, self) is None:
                self._accept(record)

    def _expire(self, waiter: Waiter) -> None:
        """Its time is up; a connect that is under way for it has a bound of its own."""
        if waiter.future.done():
            return
        if waiter.opening is not None:
            waiter.late = True
            return
        self._time_out(waiter)

    def _time_out(self, waiter: Waiter) -> None:
        waited = self._time() - waiter.since
        if waiter in self._line:
            self._learn_patience(waiter)
        error = PoolTimeout(self._describe("connection timed out"))
        self.counters.timeouts += 1
        if self.observers.wanting(events.CheckoutTimedOut):  # told while it still counts as waiting
            self.observers.notify(events.CheckoutTimedOut(waited, error))
        self._fail(waiter, error)

    def _learn_patience(self, waiter: Waiter) -> None:
        if waiter is self._queue.oldest():
            self._queue.note_patience(self._time() - waiter.since)

    def _fail(self, waiter: Waiter, error: BaseException) -> None:
        self._queue_discard(waiter)
        self._connects.leave_to_the_next(waiter)
        if not waiter.future.done():
            waiter.future.set_exception(error)

    def _turned_away(self, error: Exception) -> Exception:
        _let_others_run()
        return self._refused(error)

    def _refused(self, error: Exception) -> Exception:
        self.counters.refused += 1
        if self.observers.wanting(events.CheckoutRefused):
            self.observers.notify(events.CheckoutRefused(error))
        return error

    def _overloaded_error(self) -> PoolOverloaded:
        return PoolOverloaded(self._describe(f"pool_max_waiting={self._max_waiting} callers wait"))

    def _describe(self, what: str) -> str:
        """Begins as SQLAlchemy's message does, so that existing alerts match."""
        timeout = math.inf if self._timeout is None else self._timeout
        text = (
            f"QueuePool limit of size {self._size} overflow {self.overflow()} reached, {what},"
            f" timeout {timeout:.2f} (used={len(self._held)}, idle={len(self._idle)},"
            f" opening={len(self._connects)}, waiting={len(self._queue)}"
        )
        longest = min((r.taken_at for r in self._held), default=None)
        if longest is not None:
            text += f"; longest holder {self._time() - longest:.1f} s"
        if self._connects.circuit.error is not None:
            text += f"; last connect error: {describe(self._connects.circuit.error)}"
        return text + ")"

    def renewed(self, record: PooledRecord) -> None:
        """SQLAlchemy reconnected within the record, as after a listener's DisconnectionError."""
        self._closed(record, CloseReason.INVALIDATED)
        self.counters.opened += 1
        now = self._time()
        record.generation = self._generation
        record.opened_at = now - (time.time() - record.starttime)
        record.expires_at = self._expiry(record.opened_at)

    def _expiry(self, now: float) -> float:
        if self._lifetime <= 0:
            return math.inf
        return now + self._lifetime * (1 - random.uniform(0, self._jitter))  # noqa: S311

    async def open(self, wanted: int) -> list[BaseException | None]:
        """Open connections until so many are there; for each an error, or None."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._bind(loop)
        return await self._connects.reach(int(min(wanted, self._limit, self._kept)))

    # -- Check-in --------------------------------------------------------------------------

    def _do_return_conn(self, record: PooledRecord) -> None:  # type: ignore[override]
        if self._held.pop(record, self) is self:
            return  # of a parent process, which still uses its socket
        now = self._time()
        use = now - record.taken_at
        self.counters.used_seconds += use
        if self._on_checkin or record.reported:
            self._note_return(record, use)
        if record.dbapi_connection is None:
            if record.waited:  # most often its caller's time ran out in mid-statement
                self._queue.note_patience(record.waited + use)
            self._gone(record)
            self._capacity_freed()
            return
        record.answered_at = record.idle_since = now
        record.waited = record.open_seconds = 0.0
        if (
            not self._line
            and now < record.expires_at  # dispose() and drain() let it expire
            and not record.driver_is_closed()
            and len(self._idle) < self._kept
        ):
            self._idle.append(record)  # the hot path; _accept() says the same in words
        else:
            self._accept(record)

    def _note_return(self, record: PooledRecord, use: float) -> None:
        if self._on_checkin:
            notify(self._on_checkin, events.CheckedIn(use))
        if record.reported:
            keeper.report_returned(self, record, use)

    def _accept(self, record: PooledRecord) -> None:
        """A live connection nobody has: to the first in line, or among the idle, or closed."""
        reason = self._reason_to_close(record)
        if reason is CloseReason.LOST:
            self._discard(record, reason)
        elif reason is not None:
            self._close(record, reason)
        elif self._queue:
            self._hand_over(record)
            return
        else:
            self._idle.append(record)
            self._settle()
            return
        self._capacity_freed()

    def _reason_to_close(self, record: PooledRecord) -> CloseReason | None:
        if record.is_dead():
            return CloseReason.LOST
        if self._draining:
            return CloseReason.DRAINED
        if record.generation != self._generation:
            return CloseReason.DISPOSED
        if record.expires_at <= self._time():
            return CloseReason.RECYCLED
        if not self._line and len(self._idle) >= self._kept:
            return CloseReason.OVERFLOW
        return None

    def _hand_over(self, record: PooledRecord) -> None:
        self._is_overloaded()
        now = self._time()
        while self._queue:
            waiter = self._queue.pop(now)
            self._end_overload_if_empty()
            if not waiter.future.done():
                record.taken_at = now
                self._held[record] = None
                self._connects.leave_to_the_next(waiter)
                waiter.future.set_result(record)
                return
        self._accept(record)  # all those in line had gone

    def _capacity_freed(self) -> None:
        """Whatever freed it, somebody in line may connect now."""
        if self._queue:
            if self._in_own_loop():
                self._connects.serve()
            elif self._loop is not None and not self._loop.is_closed():
                # The garbage collector may be at work in another thread.
                self._loop.call_soon_threadsafe(self._connects.serve)
        self._settle()

    def _settle(self) -> None:
        if self._drained is not None and not self._held and not self._drained.done():
            self._drained.set_result(None)

    def _queue_discard(self, waiter: Waiter) -> None:
        self._queue.discard(waiter)
        self._end_overload_if_empty()

    def _is_overloaded(self) -> bool:
        before = self._queue.overloaded_since
        overloaded = self._queue.is_overloaded(self._time())
        if overloaded and before is None:
            self.counters.overloads += 1
            if self.observers.wanting(events.OverloadBegan):
                self.observers.notify(events.OverloadBegan(len(self._queue)))
        elif before is not None and self._queue.overloaded_since is None:
            self._tell_overload_ended(before)
        return overloaded

    def _end_overload_if_empty(self) -> None:
        if self._line:
            return
        since = self._queue.overloaded_since
        self._queue.end_overload()
        if since is not None:
            self._tell_overload_ended(since)

    def _tell_overload_ended(self, since: float) -> None:
        if self.observers.wanting(events.OverloadEnded):
            self.observers.notify(events.OverloadEnded(self._time() - since))

    async def drain(self, timeout: float) -> DrainReport:
        """Give out nothing any more, wait for what is in use, drop the rest.

        Args:
            timeout: Seconds to wait for connections in use.
        """
        return await draining.drain(self, timeout)

    # -- Told by SQLAlchemy ----------------------------------------------------------------

    def _invalidate(
        self,
        connection: PoolProxiedConnection,
        exception: BaseException | None = None,
        _checkin: bool = True,  # noqa: FBT001, FBT002
    ) -> None:
        """A statement showed that its connection is dead: have the others checked.

        SQLAlchemy's own drops all connections that are older instead.
        """
        if self._loop is not None:
            liveness.check_idle(self)
        if _checkin and connection.is_valid:
            connection.invalidate(exception)


def _let_others_run() -> None:
    """For a caller that is told at once and tries again at once: it must not starve the loop."""
    await_only(asyncio.sleep(0))
