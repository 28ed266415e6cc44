"""The demo's workload: many workers, few connections, small transactions, each one checked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

WORKERS = 20

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


@dataclass(slots=True)
class Load:
    """What the workload did.

    Attributes:
        seconds: How long it ran.
        checkouts: Seconds that each transaction waited for its connection.
        transactions: Seconds of each, from its connection to the end of its COMMIT.
        stored: Rows that were in the table afterwards.
        misread: Rows that came back different.
    """

    seconds: float = 0.0
    checkouts: list[float] = field(default_factory=list)
    transactions: list[float] = field(default_factory=list)
    stored: int = 0
    misread: int = 0

    @property
    def is_sound(self) -> bool:
        """Whether every transaction is in the table, once, as it was written."""
        return 0 < len(self.transactions) == self.stored and not self.misread


async def run(engine: AsyncEngine, seconds: float, progress: Callable[[float], object]) -> Load:
    """Run the workload.

    Args:
        engine: Its database must be empty.
        seconds: How long.
        progress: Told the seconds gone, several times a second.
    """
    async with engine.begin() as connection:
        await connection.execute(_CREATE)
    load = Load()
    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for worker in range(WORKERS):
            group.create_task(_work(engine, worker, started + seconds, load))
        group.create_task(_report(started, seconds, progress))
    load.seconds = time.perf_counter() - started
    async with engine.connect() as connection:
        load.stored = await connection.scalar(_COUNT) or 0
    return load


async def _work(engine: AsyncEngine, worker: int, end: float, load: Load) -> None:
    while (asked := time.perf_counter()) < end:
        async with engine.connect() as connection:
            got = time.perf_counter()
            note = f"written at {asked}"
            row = await connection.scalar(_INSERT, {"worker": worker, "note": note})
            read = await connection.scalar(_SELECT, {"id": row})
            await connection.commit()
        load.checkouts.append(got - asked)
        load.transactions.append(time.perf_counter() - got)
        load.misread += read != note


async def _report(started: float, seconds: float, progress: Callable[[float], object]) -> None:
    while (gone := time.perf_counter() - started) < seconds:
        progress(gone)
        await asyncio.sleep(0.1)
    progress(seconds)
