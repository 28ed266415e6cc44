"""CPU of a checkout and check-in, on a driver without a network."""

from __future__ import annotations

import gc
import time
from collections.abc import Awaitable, Callable
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.util import greenlet_spawn

from benchmarks.engines import STOCK
from benchmarks.fake import fake_engine
from benchmarks.model import Chart, Row, Section, Spread, ratios, rotated
from poolkit.pool import HandoffPool
from poolkit.testing import PostgresServer

BARE = "poolkit, no liveness, no observer"
FULL = "poolkit, liveness and statistics"
WATCHED = "poolkit, liveness, statistics and an observer"
LIMITS = {BARE: 1.00, FULL: 1.05, WATCHED: None}

Measured = Callable[[AsyncEngine, int], Awaitable[None]]


async def run(_: PostgresServer, *, quick: bool) -> Section:
    """Measure the pool alone, and the whole of ``async with engine.connect()``."""
    engines = {
        STOCK: fake_engine(),
        BARE: fake_engine(HandoffPool, pool_pre_ping=False),
        FULL: fake_engine(HandoffPool, pool_pre_ping=True, pool_recycle=7200),
        WATCHED: fake_engine(HandoffPool, pool_pre_ping=True, observers=[_ignore]),
    }
    rounds = 15 if quick else 81
    pool = await _measure(engines, _pool_only, rounds, 1000)
    engine = await _measure(engines, _engine_connect, rounds, 300)
    for each in engines.values():
        await each.dispose()
    return _section(pool, engine)


def _ignore(_: object) -> None:
    pass


async def _pool_only(engine: AsyncEngine, times: int) -> None:
    pool = engine.sync_engine.pool

    def checkouts() -> None:
        for _ in range(times):
            pool.connect().close()

    await greenlet_spawn(checkouts)


async def _engine_connect(engine: AsyncEngine, times: int) -> None:
    for _ in range(times):
        async with engine.connect():
            pass


async def _measure(
    engines: dict[str, AsyncEngine], work: Measured, rounds: int, times: int
) -> dict[str, list[float]]:
    """Microseconds of CPU for each contestant and round."""
    found: dict[str, list[float]] = {name: [] for name in engines}
    for engine in engines.values():
        await work(engine, times)
    for turn in range(rounds):
        for name in rotated(list(engines), turn):
            gc.collect()
            began = time.process_time_ns()
            await work(engines[name], times)
            found[name].append((time.process_time_ns() - began) / 1000 / times)
    return found


def _section(pool: dict[str, list[float]], engine: dict[str, list[float]]) -> Section:
    kinds = {"the pool alone": pool, "async with engine.connect()": engine}
    return Section(
        title="CPU of a checkout and check-in",
        method=(
            "Process time on SQLAlchemy's asyncpg adapter over a connection that does nothing: the"
            " pool alone (`pool.connect().close()` in one greenlet), and"
            " `async with engine.connect()`. Many short rounds in which the contestants take"
            " turns; ratios are of neighbours in a round."
        ),
        rows=[_row(kind, name, found) for kind, found in kinds.items() for name in LIMITS],
        header=["contestant", *kinds, *(f"{kind}, ratio" for kind in kinds)],
        figures=[
            [name, *(Spread.of(k[name]).show(2, "us") for k in kinds.values())]
            + [ratios(k[name], k[STOCK]).show(3) for k in kinds.values()]
            for name in pool
        ],
        charts=[
            Chart(
                "CPU of a checkout and check-in",
                "us",
                list(kinds),
                {name: [Spread.of(k[name]) for k in kinds.values()] for name in pool},
            )
        ],
    )


def _row(kind: str, name: str, found: dict[str, Any]) -> Row:
    ratio, limit = ratios(found[name], found[STOCK]), LIMITS[name]
    return Row(
        f"CPU / AsyncAdaptedQueuePool, {kind}: {name.removeprefix('poolkit, ')}",
        ratio.show(3),
        f"{STOCK} {Spread.of(found[STOCK]).show(1, 'us')}",
        "" if limit is None else f"at most {limit:.2f}",
        None if limit is None else ratio.median <= limit,
    )
