"""The demo's workload: few workers, then many, small transactions, each one checked."""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import dataclass, field

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from poolkit.cli.watch import Seen, Watch, came

FEW, MANY = 5, 40
"""Workers: as many as find a connection each, and more than there are connections."""

FEW_SHARE = 0.3
"""Of the time."""

_CREATE = text("""
    CREATE TABLE poolkit_demo (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        worker int NOT NULL,
        note text NOT NULL
    )
""")
_INSERT = text("INSERT INTO poolkit_demo (worker, note) VALUES (:worker, :note) RETURNING id")
_SELECT = text("SELECT note FROM poolkit_demo WHERE id = :id")
_COUNT = text("SELECT count(*) FROM poolkit_demo")

_places = itertools.count(1)


@dataclass(slots=True)
class Phase:
    """What so many workers did.

    Attributes:
        workers: How many.
        seconds: For how long.
        checkouts: Seconds that each transaction waited for its connection.
        transactions: Seconds of each, from its connection to the end of its COMMIT.
        misread: Rows that came back different.
    """

    workers: int
    seconds: float = 0.0
    checkouts: list[float] = field(default_factory=list)
    transactions: list[float] = field(default_factory=list)
    misread: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    """What the workload did.

    Attributes:
        few: Its first phase.
        many: Its second.
        stored: Rows that were in the table afterwards.
        seen: The pool meanwhile.
    """

    few: Phase
    many: Phase
    stored: int
    seen: Seen

    @property
    def committed(self) -> int:
        """Transactions in all."""
        return len(self.few.transactions) + len(self.many.transactions)

    @property
    def is_sound(self) -> bool:
        """Whether every transaction is in the table, once, as it was written."""
        return 0 < self.committed == self.stored and not self.few.misread + self.many.misread

    @property
    def is_fair(self) -> bool:
        """Whether callers had to wait, and were served in the order in which they came."""
        return bool(self.seen.waits) and not self.seen.overtaken


async def run(engine: AsyncEngine, seconds: float, watch: Watch) -> Load:
    """Run the workload.

    Args:
        engine: Its database must be empty.
        seconds: How long.
        watch: Used to watch the engine.
    """
    async with engine.begin() as connection:
        await connection.execute(_CREATE)
    async with watch(engine) as seen:
        few = await _phase(engine, FEW, seconds * FEW_SHARE)
        many = await _phase(engine, MANY, seconds * (1 - FEW_SHARE))
    async with engine.connect() as connection:
        return Load(few, many, await connection.scalar(_COUNT) or 0, seen)


async def _phase(engine: AsyncEngine, workers: int, seconds: float) -> Phase:
    phase, started = Phase(workers), time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for worker in range(workers):
            group.create_task(_work(engine, worker, started + seconds, phase))
    phase.seconds = time.perf_counter() - started
    return phase


async def _work(engine: AsyncEngine, worker: int, end: float, phase: Phase) -> None:
    while (asked := time.perf_counter()) < end:
        came.set(next(_places))
        async with engine.connect() as connection:
            got = time.perf_counter()
            note = f"written at {asked}"
            row = await connection.scalar(_INSERT, {"worker": worker, "note": note})
            read = await connection.scalar(_SELECT, {"id": row})
            await connection.commit()
        phase.checkouts.append(got - asked)
        phase.transactions.append(time.perf_counter() - got)
        phase.misread += read != note
