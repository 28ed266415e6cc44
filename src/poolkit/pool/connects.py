"""The connects under way: who gets what comes of them, and when another may begin."""

from __future__ import annotations

import asyncio
import math
import weakref
from typing import TYPE_CHECKING, Any

from sqlalchemy.util import greenlet_spawn

from poolkit.driver import is_ours
from poolkit.errors import Attempt, ConnectTimeout, PoolTimeout
from poolkit.events import ConnectionOpened
from poolkit.faults import classify
from poolkit.pool import keeper
from poolkit.pool.circuit import Circuit

if TYPE_CHECKING:
    from poolkit.pool.handoff import HandoffPool
    from poolkit.pool.queue import Waiter
    from poolkit.pool.record import PooledRecord

MARGIN = 0.25
"""Seconds that the creator has beyond the bound, to end a connect with an error that says more."""

Task = asyncio.Task["BaseException | None"]


class Opening:
    """A connect under way.

    Attributes:
        began: When, in the event loop's seconds.
        owner: The caller that gets its error if it fails.
        probes: Whether it only finds out if the database is back, for nobody in particular.
        task: What does it.
    """

    __slots__ = ("began", "owner", "probes", "task")

    def __init__(self, began: float, owner: Waiter | None, *, probes: bool = False) -> None:
        self.began = began
        self.probes = probes
        self.task: asyncio.Task[Any] | None = None
        self.belong_to(owner)

    def belong_to(self, owner: Waiter | None) -> None:
        """Note on both sides who gets the error."""
        self.owner = owner
        if owner is not None:
            owner.opening = self

    def disown(self) -> Waiter | None:
        """Have nobody get the error; returns who was to."""
        owner, self.owner = self.owner, None
        if owner is not None:
            owner.opening = None
        return owner


class Connects:
    """A pool's connects.

    Each is a task of its own, so that a caller that gives up does not take the connection with
    it, and what it makes goes to whoever is next in line.

    Attributes:
        under_way: Those that have begun.
        circuit: Whether they are worth a caller's time.
    """

    def __init__(self, pool: HandoffPool) -> None:
        self.under_way: set[Opening] = set()
        self.circuit = Circuit()
        self._pool = pool
        self._probe_timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self.under_way)

    def may_begin(self) -> bool:
        """Whether there is room for one more."""
        pool = self._pool
        return pool._total() < pool._limit and len(self.under_way) < pool._max_connecting

    def serve(self) -> None:
        """Start one for each caller in line that has none, as far as there is room."""
        if self.circuit.is_open:
            self._fail_fast()
            return
        while len(self.under_way) < len(self._pool._queue) and self.may_begin():
            self.begin(self._first_without())

    def begin(self, owner: Waiter | None, *, probes: bool = False) -> Task:
        """Start one; its result is the error, if any."""
        pool = self._pool
        opening = Opening(pool.now(), owner, probes=probes)
        self.under_way.add(opening)
        opening.task = task = pool._spawn(self._connect(opening))
        task.add_done_callback(lambda _: self._forget_if_never_begun(opening))
        return task

    async def reach(self, wanted: int) -> list[BaseException | None]:
        """Open connections until so many are there; for each an error, or None."""
        pool = self._pool
        attempts: list[Task] = []
        while pool._total() + _failures(attempts) < wanted:
            if pool._draining or pool._replaced:
                break  # which keep nothing
            if self.may_begin():
                attempts.append(self.begin(None))
            elif self.under_way:
                under_way = [o.task for o in self.under_way if o.task is not None]
                await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
            else:
                break  # callers have taken the room meanwhile
        return list(await asyncio.gather(*attempts, return_exceptions=True))

    def top_up(self) -> None:
        """Open connections in the background until the minimum idle is there."""
        pool = self._pool
        if self.circuit.is_open or pool._draining or pool._replaced:
            return
        while pool.checkedin() + len(self.under_way) < pool.min_idle and self.may_begin():
            self.begin(None)

    async def make(self) -> PooledRecord:
        """A connection of the pool's, ready for use.

        Raises:
            ConnectTimeout: It was made, and what SQLAlchemy asks on an engine's first connection
                was not answered in time; a connect that takes too long is the creator's to end.
        """
        pool = self._pool
        began, bound = pool.now(), pool._connect_timeout
        try:
            async with asyncio.timeout(bound + MARGIN if bound else None) as clock:
                record: PooledRecord = await greenlet_spawn(pool._create_connection)
        except TimeoutError as error:
            if not clock.expired():
                raise  # the creator's own
            raise ConnectTimeout(Attempt("the server", 1, pool.now() - began), error) from error
        if not is_ours(record.driver_connection):  # otherwise the connector has told of it
            took = pool.now() - began
            pool.observers.notify(ConnectionOpened("the server", took, 1, "none"))
        return record

    def take_over_spare(self, waiter: Waiter) -> bool:
        """Have one that nobody waits for any more count as this caller's; tells if one is."""
        spare = next((o for o in self.under_way if o.owner is None and not o.probes), None)
        if spare is not None:
            spare.belong_to(waiter)
        return spare is not None

    def leave_to_the_next(self, waiter: Waiter) -> None:
        """The caller needs its connect no more."""
        opening, waiter.opening = waiter.opening, None
        if opening is not None:
            opening.belong_to(self._first_without())

    def cancel_unowned(self) -> None:
        """End those that nobody waits for."""
        for opening in list(self.under_way):
            if opening.owner is None and opening.task is not None:
                opening.task.cancel()

    def stop_probing(self) -> None:
        """Forget that connects failed."""
        self.circuit.close()
        timer, self._probe_timer = self._probe_timer, None
        if timer is not None:
            timer.cancel()

    # -- One connect -----------------------------------------------------------------------

    async def _connect(self, opening: Opening) -> BaseException | None:
        pool = self._pool
        generation = pool._generation
        try:
            record = await self.make()
        except BaseException as error:
            self.circuit.note_failure(error, opening.began, pool.now())
            self._failed(opening, error)
            if isinstance(error, asyncio.CancelledError | KeyboardInterrupt | SystemExit):
                raise
            return error
        self._note_opened(record, opening, generation)
        owner = opening.disown()
        if pool._line and not record.is_dead():
            pool._hand_over(record)
        else:
            pool._accept(record)
        keeper.start(pool)
        if owner is not None and not owner.future.done():
            self._look_after(owner)
        self.serve()
        return None

    def _note_opened(self, record: PooledRecord, opening: Opening, generation: int) -> None:
        pool, now = self._pool, self._pool.now()
        self.under_way.discard(opening)
        self.circuit.close()
        record.generation = generation
        record.opened_at = record.answered_at = record.idle_since = pool._queue.opened_at = now
        record.open_seconds = now - opening.began
        stale = generation != pool._generation or pool._draining or pool._replaced
        record.expires_at = -math.inf if stale else pool._expiry(now)
        pool.counters.opened += 1
        pool.counters.open_seconds += record.open_seconds

    def _look_after(self, waiter: Waiter) -> None:
        """Its connection went to one before it in line: it takes over that one's connect."""
        if waiter.opening is not None:
            return
        if not self.take_over_spare(waiter) and waiter.late:
            self._pool._time_out(waiter)

    def _failed(self, opening: Opening, error: BaseException) -> None:
        pool = self._pool
        self.under_way.discard(opening)
        pool.counters.open_failed += 1
        pool.counters.open_failures[classify(error).kind] += 1
        owner = opening.disown()
        if owner is not None:
            if isinstance(error, asyncio.CancelledError):
                error = PoolTimeout(pool._describe("the connect was cancelled"))
            pool._fail(owner, error)
        if self.circuit.is_open and self._probe_timer is None and not self.probes():
            self._go_on_probing()
        pool._capacity_freed()

    def _forget_if_never_begun(self, opening: Opening) -> None:
        if opening in self.under_way:
            self._failed(opening, asyncio.CancelledError())

    def _first_without(self) -> Waiter | None:
        return next((w for w in self._pool._queue.in_turn() if w.opening is None), None)

    # -- While the database is down --------------------------------------------------------

    def _fail_fast(self) -> None:
        """Whoever would have to connect is told what the last connect failed with."""
        if not self.is_hopeless():
            return
        for opening in self.under_way:
            if opening.began >= self.circuit.failing_since:
                opening.disown()
                opening.probes = True
        pool, now = self._pool, self._pool.now()
        for waiter in [w for w in pool._queue.in_turn() if w.opening is None]:
            pool._fail(waiter, self.circuit.last_error(now))

    def is_hopeless(self) -> bool:
        """Whether nothing but a connect would do, with the circuit open.

        What is in use may come back soon, unless it has not answered since connects fail.
        """
        pool, since = self._pool, self.circuit.failing_since
        if pool._total() - self.probes() >= pool._limit:
            return False
        return not any(record.answered_at >= since for record in pool._held)

    def probes(self) -> int:
        """How many only find out if the database is back."""
        return sum(opening.probes for opening in self.under_way)

    def _go_on_probing(self) -> None:
        pool = self._pool
        pause = self.circuit.next_pause(pool.now())
        if pause is None:
            self.circuit.close()
            self.serve()
        elif pool._loop is not None and not pool._draining:
            # A timer and no task: it does not keep the pool alive in between.
            self._probe_timer = pool._loop.call_later(pause, _probe, weakref.ref(self))

    def probe(self) -> None:
        """Find out if the database is back."""
        self._probe_timer = None
        if self.may_begin():
            self.begin(None, probes=True)
        else:
            self._go_on_probing()


def _probe(reference: weakref.ref[Connects]) -> None:
    connects = reference()
    if connects is not None:
        connects.probe()


def _failures(attempts: list[Task]) -> int:
    return sum(task.done() and (task.cancelled() or task.result() is not None) for task in attempts)
