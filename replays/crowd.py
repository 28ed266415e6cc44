"""Those who use the database during the soak, and the watch over what they are promised."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from poolkit import (
    ConnectionClosed,
    ConnectionOpenFailed,
    Event,
    FaultKind,
    classify,
    run_in_transaction,
)
from replays.ledger import Ledger
from replays.model import SERVED, Request, Timeline

PING_TIMEOUT, POOL_TIMEOUT, CONNECTION_TIMEOUT, STATEMENT_TIMEOUT = 0.5, 2.0, 3.0, 1.0
OPERATION = 2 * (STATEMENT_TIMEOUT + 1.0)
"""Seconds for one statement on a dead network: the client's limit, and as long for the driver's
attempt to cancel."""

CHECKOUT_BOUND = PING_TIMEOUT + POOL_TIMEOUT + CONNECTION_TIMEOUT
REQUEST_BOUND = CHECKOUT_BOUND + 3 * OPERATION
DEADLINE = 5.0
UNIT_BOUND = DEADLINE + 2 * OPERATION
"""Of ``run_in_transaction``: the leave-taking of the attempt that the deadline ends, and COMMIT."""

SLACK = 1.0
"""Seconds that a loaded machine may add, on top of what the event loop was seen to lag."""

CANCELLED = "cancelled"
_NOT_EXPECTED = frozenset({FaultKind.OTHER, FaultKind.CONFIGURATION, FaultKind.INTEGRITY})
_GIVE_UP, _TWICE, _DEADLINES = 0.2, 0.05, 0.1
_RECENT = 3.0
_MOST, _ALIKE, _AGAIN = 20, 30, 1.0


@dataclass(slots=True)
class Watch:
    """What must hold, and what did not.

    Attributes:
        broken: In words, with the time.
        say: Told of each at once.
        weather: What goes on.
        lag: Seconds that the event loop came late at most, lately.
        timeline: The longest request of each second.
    """

    say: Callable[[str], None]
    timeline: Timeline
    weather: str = "calm"
    broken: list[str] = field(default_factory=list)
    lag: float = 0.0
    ended: Counter[str] = field(default_factory=Counter)
    _told: dict[str, float] = field(default_factory=dict)
    _zero: float = field(default_factory=time.monotonic)
    _ends: deque[float] = field(default_factory=deque)
    _older: deque[tuple[float, int]] = field(default_factory=deque)

    def now(self) -> float:
        """Seconds since the soak began."""
        return time.monotonic() - self._zero

    def require(self, holds: bool, otherwise: str) -> None:  # noqa: FBT001 (reads like assert)
        """Note that something does not hold; what goes on not to hold, once a second."""
        if holds or len(self.broken) >= _MOST:
            return
        kind = "".join(letter for letter in otherwise if not letter.isdigit())[:_ALIKE]
        if self.now() - self._told.get(kind, -_AGAIN) >= _AGAIN:
            self._told[kind] = self.now()
            self.broken.append(f"at {self.now():.1f} s ({self.weather}): {otherwise}")
            self.say(f"BROKEN {self.broken[-1]}")

    def note(self, began: float, result: str) -> None:
        """A request has ended."""
        self.ended[result] += 1
        request, requests = Request(began, self.now(), result), self.timeline.requests
        if not requests or int(requests[-1].ended) < int(request.ended):
            requests.append(request)
        elif request.took > requests[-1].took:
            requests[-1] = request

    def within(self, began: float, bound: float, what: str) -> None:
        """Nobody waits for longer than that."""
        took = self.now() - began
        self.require(took <= bound + SLACK + self.lag, f"{what} took {took:.1f} s of {bound:g} s")

    def observe(self, event: Event) -> None:
        """Count connections that are on their way out."""
        if isinstance(event, ConnectionClosed | ConnectionOpenFailed):
            self._ends.append(self.now())

    def disposed(self, used: int) -> None:
        """So many are in use of a pool that is no more."""
        self._older.append((self.now() + REQUEST_BOUND, used))

    def on_their_way_out(self) -> int:
        """Connections that may be there besides the pool's; each with its cancel request."""
        now = self.now()
        while self._ends and self._ends[0] < now - _RECENT:
            self._ends.popleft()
        while self._older and self._older[0][0] < now:
            self._older.popleft()
        return 2 * len(self._ends) + sum(used for _, used in self._older)


class Crowd:
    """Workers that do one thing after another, and give up at random."""

    def __init__(self, engine: AsyncEngine, ledger: Ledger, watch: Watch, seed: int) -> None:
        self._engine = engine
        self._ledger = ledger
        self._watch = watch
        self._chance = random.Random(seed)
        self._open = asyncio.Event()
        self._open.set()
        self._at_work = 0
        self._idle = asyncio.Event()

    async def work(self) -> None:
        """One worker, until it is cancelled."""
        while True:
            await self._open.wait()
            await self.request()
            await asyncio.sleep(self._chance.uniform(0, 0.03))

    async def burst(self, many: int) -> None:
        """So many at once."""
        await asyncio.gather(*(self.request() for _ in range(many)))

    async def pause(self) -> None:
        """Begin nothing more, and wait until all has ended."""
        self._open.clear()
        while self._at_work:
            self._idle.clear()
            await self._idle.wait()

    def resume(self) -> None:
        """Go on."""
        self._open.set()

    async def request(self) -> None:
        """One of them."""
        self._at_work += 1
        try:
            await self._request()
        finally:
            self._at_work -= 1
            self._idle.set()

    async def _request(self) -> None:
        began = self._watch.now()
        job, bound = self._job()
        task = asyncio.ensure_future(self._perhaps_within(job))
        try:
            for delay in self._cancels():
                await asyncio.wait({task}, timeout=delay)
                task.cancel()
            await asyncio.wait({task}, timeout=2 * bound)
            self._watch.within(began, bound, f"a request ({job.__name__})")
        finally:
            task.cancel()
        self._watch.note(began, self._result(task))

    def _job(self) -> tuple[Callable[[], Awaitable[None]], float]:
        jobs = (self._read, self._write, self._write_in_a_block, self._unit, self._sleep)
        job = self._chance.choices(jobs, (6, 6, 6, 4, 1))[0]
        return job, UNIT_BOUND if job == self._unit else REQUEST_BOUND

    def _cancels(self) -> list[float]:
        lot = self._chance.random()
        if lot >= _GIVE_UP:
            return []
        return [self._chance.uniform(0, 0.1), 0.0][: 1 + (lot < _TWICE)]

    async def _perhaps_within(self, job: Callable[[], Awaitable[None]]) -> None:
        deadline = self._chance.uniform(0, 0.5) if self._chance.random() < _DEADLINES else None
        async with asyncio.timeout(deadline):
            await job()

    def _result(self, task: asyncio.Future[None]) -> str:
        if not task.done():
            self._watch.require(False, "a request hangs")
            return "hangs"
        if task.cancelled():
            return CANCELLED
        error = task.exception()
        if error is None:
            return SERVED
        kind = classify(error).kind
        self._watch.require(kind not in _NOT_EXPECTED, f"an error of an unknown kind: {error!r}")
        return str(kind)

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[AsyncConnection]:
        began, has_begun = self._watch.now(), False
        try:
            async with self._engine.connect() as connection:
                self._watch.within(began, CHECKOUT_BOUND, "a checkout")
                has_begun = True
                yield connection
        finally:
            if not has_begun:
                self._watch.within(began, CHECKOUT_BOUND, "a checkout in vain")

    async def _read(self) -> None:
        async with self._connection() as connection:
            await connection.execute(text("SELECT 1"))

    async def _sleep(self) -> None:
        async with self._connection() as connection:
            seconds = self._chance.choice((0.01, 0.1, 5))
            await connection.execute(text("SELECT pg_sleep(:s)"), {"s": seconds})

    async def _write(self) -> None:
        row = self._ledger.new_row()
        try:
            async with self._connection() as connection:
                await self._insert(row, connection)
                await connection.commit()
                self._ledger.committed(row)
        except BaseException as error:
            self._ledger.failed(row, error)
            raise

    async def _write_in_a_block(self) -> None:
        await self._reported(self._block)

    async def _unit(self) -> None:
        await self._reported(self._in_transaction)

    async def _reported(self, write: Callable[[int], Awaitable[None]]) -> None:
        row = self._ledger.new_row()
        try:
            await write(row)
        except BaseException as error:
            self._ledger.failed(row, error)
            raise
        self._ledger.committed(row)

    async def _block(self, row: int) -> None:
        async with self._engine.begin() as connection:
            await self._insert(row, connection)

    async def _in_transaction(self, row: int) -> None:
        async def insert(connection: AsyncConnection) -> None:
            await self._insert(row, connection)

        await run_in_transaction(self._engine, insert, deadline=DEADLINE)

    async def _insert(self, row: int, connection: AsyncConnection) -> None:
        await connection.execute(text("INSERT INTO written VALUES (:row)"), {"row": row})
