"""Cancel storm: ten thousand requests, most of them cancelled somewhere on their way."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from poolkit import classify
from poolkit.testing import FaultProxy, PostgresServer
from replays.engines import make_engine
from replays.ledger import Ground, Ledger
from replays.model import SERVED, STILL_WAITING, Recorder, Request, Timeline

TITLE = "Cancel storm"
STORY = """\
Ten thousand requests, ten at a time, on a pool of seven and a slow link: reads, writes in a
transaction, statements that take long. Most are cancelled at some random point, as when browsers
leave and deadlines pass: before they begin, in line, while connecting, in mid-statement, during
COMMIT, while the connection is given back; some twice.

A connection that was cancelled in a transaction is dropped, for nobody knows its state. poolkit
gives its slot to the next in line at once, keeps a connect whose caller has left, and the server's
statement timeout (2 s here) ends what was abandoned. Each cancellation says what became of the
work, and the rows are held against that.
"""
REQUESTS, AT_ONCE = 10_000, 10
SIZE, OVERFLOW = 5, 2
ROUND_TRIP = 0.003
STATEMENT_TIMEOUT = 2.0
LONG = 30.0
"""Seconds that some statements would take."""

CANCELLED = "cancelled"

SLOTS = "slots in use when the last had ended"
LIMIT_PASSED = "looks at the pool that found more connections than its limit"
SESSIONS = "sessions at the server then"
ABANDONED = "until the statements that were abandoned had ended"
LEFT = "sessions after dispose"
TOLD = "what the writers were told"
DISAGREE = "rows that contradict what was reported"

_NONE, _AT_ONCE, _TWICE, _DEADLINES = 0.3, 0.1, 0.2, 0.2
_TYPICAL = 0.06
"""Seconds; about what a request takes."""
_PATIENCE = 0.2

_SELECT, _SLEEP = text("SELECT 1"), text("SELECT pg_sleep(:seconds)")
_INSERT = text("INSERT INTO written VALUES (:id)")


class Storm:
    """The requests, and who cancels them."""

    def __init__(
        self, engine: AsyncEngine, ledger: Ledger, recorder: Recorder, patience: float, seed: int
    ) -> None:
        self._engine = engine
        self._ledger = ledger
        self._recorder = recorder
        self._patience = patience
        self._chance = random.Random(seed)

    async def requests(self, many: int) -> None:
        """One after the other."""
        for _ in range(many):
            await self._request()

    async def _request(self) -> None:
        began = self._recorder.now()
        work, cancels = self._work(), self._cancels()
        begun = work()
        if self._chance.random() < _DEADLINES or (work == self._sleep and not cancels):
            begun, cancels = self._within(sum(cancels) or _PATIENCE, begun), []
        task = asyncio.ensure_future(begun)
        for delay in cancels:
            await asyncio.sleep(delay)
            task.cancel()
        await asyncio.wait({task}, timeout=self._patience)
        ended = Request(began, self._recorder.now(), _result(task))
        self._recorder.timeline.requests.append(ended)
        if not task.done():
            task.cancel()

    def _work(self) -> Callable[[], Awaitable[None]]:
        works = (self._read, self._write, self._write_in_a_block, self._sleep)
        return self._chance.choices(works, (6, 6, 6, 1))[0]

    def _cancels(self) -> list[float]:
        """The pauses before each; 0 is at once."""
        lot = self._chance.random()
        if lot < _NONE:
            return []
        first = 0.0 if lot < _NONE + _AT_ONCE else self._chance.uniform(0, _TYPICAL)
        second = self._chance.choice((0.0, self._chance.uniform(0, 0.01)))
        return [first, second] if self._chance.random() < _TWICE else [first]

    async def _within(self, seconds: float, begun: Awaitable[None]) -> None:
        async with asyncio.timeout(seconds):
            await begun

    async def _read(self) -> None:
        async with self._engine.connect() as connection:
            await connection.execute(_SELECT)

    async def _sleep(self) -> None:
        async with self._engine.connect() as connection:
            await connection.execute(_SLEEP, {"seconds": LONG})

    async def _write(self) -> None:
        row = self._ledger.new_row()
        try:
            async with self._engine.connect() as connection:
                await self._insert(connection, row)
                await connection.commit()
                self._ledger.committed(row)
        except BaseException as error:
            self._ledger.failed(row, error)
            raise

    async def _write_in_a_block(self) -> None:
        row = self._ledger.new_row()
        try:
            async with self._engine.begin() as connection:
                await self._insert(connection, row)
        except BaseException as error:
            self._ledger.failed(row, error)
            raise
        self._ledger.committed(row)

    async def _insert(self, connection: AsyncConnection, row: int) -> None:
        await connection.execute(_INSERT, {"id": row})


def _result(task: asyncio.Future[None]) -> str:
    if not task.done():
        return STILL_WAITING
    if task.cancelled():
        return CANCELLED
    error = task.exception()
    return SERVED if error is None else str(classify(error).kind)


async def run(
    server: PostgresServer,
    contestant: str,
    *,
    patience: float = 30.0,
    requests: int = REQUESTS,
    seed: int = 7,
) -> Timeline:
    """Replay it."""
    ground, ledger, recorder = await Ground.make(server), Ledger(), Recorder(contestant, patience)
    findings, passed = recorder.timeline.findings, [0]
    async with FaultProxy(ground.url) as proxy:
        proxy.latency = ROUND_TRIP
        engine = make_engine(
            contestant,
            proxy.url,
            pool_size=SIZE,
            max_overflow=OVERFLOW,
            statement_timeout=STATEMENT_TIMEOUT,
        )
        looks = asyncio.ensure_future(_look(engine, passed))
        storms = [
            Storm(engine, ledger, recorder, patience, seed + number) for number in range(AT_ONCE)
        ]
        await asyncio.gather(*(storm.requests(requests // AT_ONCE) for storm in storms))
        looks.cancel()
        recorder.mark("the last has ended")
        findings[SLOTS] = str(await _in_use(engine))
        findings[LIMIT_PASSED] = str(passed[0])
        findings[SESSIONS] = str(await ground.sessions())
        ended = await ground.no_more_sessions_than(SIZE + OVERFLOW, within=LONG + 5)
        findings[ABANDONED] = "never" if ended is None else f"{ended:.2f} s"
        await engine.dispose()
        left = await ground.no_more_sessions_than(0, within=2.0)
        findings[LEFT] = "0" if left is not None else str(await ground.sessions())
    findings[TOLD] = ", ".join(f"{many} {what}" for what, many in ledger.told.most_common())
    findings[DISAGREE] = ledger.disagreements(await ground.rows())
    return recorder.timeline


async def _look(engine: AsyncEngine, passed: list[int]) -> None:
    while True:
        there = engine.pool.checkedout() + engine.pool.checkedin()  # type: ignore[attr-defined]
        passed[0] += there > SIZE + OVERFLOW
        await asyncio.sleep(0.002)


async def _in_use(engine: AsyncEngine) -> int:
    """After a moment: one cancelled twice leaves without waiting for its connection's return."""
    for _ in range(100):
        if not engine.pool.checkedout():  # type: ignore[attr-defined]
            break
        await asyncio.sleep(0.01)
    return engine.pool.checkedout()  # type: ignore[attr-defined, no-any-return]
