"""The lost reply to COMMIT: the connection dies around COMMIT, and nobody can tell if it took."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from functools import partial

from sqlalchemy import exc, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from poolkit import Outcome, run_in_transaction
from poolkit.testing import FaultProxy, PostgresServer, Trap
from replays.engines import POOLKIT, make_engine
from replays.ledger import Ground, Ledger
from replays.model import Recorder, Timeline

TITLE = "The lost reply to COMMIT"
STORY = """\
Two hundred transactions write a row each. At about half of them the connection dies around COMMIT:
in some, COMMIT never reaches the server; in others it was done and only the answer is lost; in a
few nothing comes back at all. The program sees the same in each case.

poolkit reports the outcome as unknown, and `run_in_transaction`, which does the work again after a
deadlock or a connection lost earlier, does not do it again here. The recipe is a loop that repeats
after every error of the database: it writes rows twice. And without a limit on the client's side it
waits for an answer that does not come until the operating system gives the socket up.
"""
TRANSACTIONS, FROZEN = 200, 4
STATEMENT_TIMEOUT = 0.3
ATTEMPTS = 5

LOST = "transactions whose COMMIT or its reply was lost"
UNKNOWN = "of them reported as unknown"
AGAIN = "of them done again"
THERE = "of them committed all the same"
DISAGREE = "rows that contradict what was reported"

_ALL_BUT_FROZEN = ("before", "after", "before, reset", "after, reset")


class Writer:
    """Writes rows, and counts how often the work was begun.

    Attributes:
        begun: For each row.
        ledger: What was reported.
    """

    def __init__(self, engine: AsyncEngine, *, by_poolkit: bool) -> None:
        self.begun = Counter[int]()
        self.ledger = Ledger()
        self._engine = engine
        self._in_transaction = run_in_transaction if by_poolkit else _again_and_again

    async def write(self, row: int) -> None:
        """One request."""
        try:
            await self._in_transaction(self._engine, partial(self._insert, row))
        except BaseException as error:
            self.ledger.failed(row, error)
            raise
        self.ledger.committed(row)

    async def _insert(self, row: int, connection: AsyncConnection) -> None:
        self.begun[row] += 1
        await connection.execute(text("INSERT INTO written VALUES (:id)"), {"id": row})


async def _again_and_again(engine: AsyncEngine, work: partial) -> None:  # type: ignore[type-arg]
    """What is often written."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            async with engine.begin() as connection:
                await work(connection)
        except (exc.DBAPIError, OSError):
            if attempt == ATTEMPTS:
                raise
        else:
            return


async def run(
    server: PostgresServer,
    contestant: str,
    *,
    patience: float = 5.0,
    transactions: int = TRANSACTIONS,
    frozen: int = FROZEN,
    seed: int = 5,
) -> Timeline:
    """Replay it."""
    ground, recorder = await Ground.make(server), Recorder(contestant, patience)
    by_poolkit = contestant == POOLKIT
    limits = {"statement_timeout": STATEMENT_TIMEOUT} if by_poolkit else {}
    lost: list[int] = []
    async with FaultProxy(ground.url) as proxy:
        engine = make_engine(contestant, proxy.url, **limits)
        writer = Writer(engine, by_poolkit=by_poolkit)
        for how in _fates(transactions, frozen, seed):
            row = writer.ledger.new_row()
            trap = _armed(proxy, how)
            await recorder.request(partial(writer.write, row))
            if trap is not None:
                assert trap.happened
                lost.append(row)
        await engine.dispose()
    _find(recorder.timeline, writer, lost, await ground.rows())
    return recorder.timeline


def _fates(transactions: int, frozen: int, seed: int) -> Sequence[str]:
    """What happens to each; the same for everybody."""
    chance = random.Random(seed)
    fates = [
        chance.choice(_ALL_BUT_FROZEN) if chance.getrandbits(1) else "" for _ in range(transactions)
    ]
    for number, at in enumerate(chance.sample(range(transactions), frozen)):
        fates[at] = ("before, frozen", "after, frozen")[number % 2]
    return fates


def _armed(proxy: FaultProxy, how: str) -> Trap | None:
    when, _, what = how.partition(", ")
    if not when:
        return None
    before, after = ("COMMIT", None) if when == "before" else (None, "COMMIT")
    if what == "frozen":
        return proxy.freeze_at(before=before, after=after)
    return proxy.cut(before=before, after=after, reset=what == "reset")


def _find(timeline: Timeline, writer: Writer, lost: Sequence[int], rows: Counter[int]) -> None:
    told = writer.ledger.told_of
    timeline.findings |= {
        LOST: str(len(lost)),
        UNKNOWN: str(sum(told(row) == Outcome.UNKNOWN for row in lost)),
        AGAIN: str(sum(writer.begun[row] > 1 for row in lost)),
        THERE: str(sum(rows[row] > 0 for row in lost)),
        DISAGREE: writer.ledger.disagreements(rows),
    }
