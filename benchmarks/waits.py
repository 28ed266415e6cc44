"""Fairness: how long callers wait when there are more of them than connections."""

from __future__ import annotations

import asyncio

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from benchmarks.engines import POOLKIT, STOCK, Sizes, poolkit_engine, stock_engine
from benchmarks.model import Chart, Row, Section, Spread, percentile, rotated
from poolkit.testing import PostgresServer

CALLERS = 20
SIZES = Sizes(5)
WORK = text("SELECT pg_sleep(0.01)")
LIMIT = 1.25


async def run(server: PostgresServer, *, quick: bool) -> Section:
    """Let callers come again and again, in rounds, and time their waits."""
    engines = {
        POOLKIT: poolkit_engine(server.url, SIZES),
        STOCK: stock_engine(server.url, SIZES),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for turn in range(2 if quick else 9):
        for name in rotated(list(engines), turn):
            waits = await _round(engines[name], 1.0 if quick else 1.5)
            found[name].append((percentile(waits, 50), percentile(waits, 99)))
    for engine in engines.values():
        await engine.dispose()
    return _section(found)


async def _round(engine: AsyncEngine, seconds: float) -> list[float]:
    clock = asyncio.get_running_loop().time
    waits: list[float] = []
    began = clock()
    steady, end = began + 0.3, began + 0.3 + seconds

    async def caller() -> None:
        while (arrived := clock()) < end:
            async with engine.connect() as connection:
                if arrived >= steady:
                    waits.append(clock() - arrived)
                await connection.execute(WORK)
                await connection.commit()

    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return waits


def _section(found: dict[str, list[tuple[float, float]]]) -> Section:
    ratio = {name: Spread.of([p99 / p50 for p50, p99 in rounds]) for name, rounds in found.items()}
    p50 = {name: Spread.of([1000 * r[0] for r in rounds]) for name, rounds in found.items()}
    p99 = {name: Spread.of([1000 * r[1] for r in rounds]) for name, rounds in found.items()}
    return Section(
        title="Waits of 20 callers on 5 connections",
        method=(
            "Each caller checks out, works for 10 ms on the server (`pg_sleep`), checks in, and"
            " comes again at once. Timed is the wait for the connection, after the first 0.3 s;"
            " quartiles are over rounds."
        ),
        rows=[
            Row(
                "20 callers on 5 connections: p99 wait / p50 wait",
                ratio[POOLKIT].show(),
                f"{STOCK} {ratio[STOCK].show()}",
                f"at most {LIMIT} ({STOCK} 2.5 or more)",
                ratio[POOLKIT].median <= LIMIT,
            )
        ],
        header=["contestant", "p50", "p99", "p99 / p50"],
        figures=[
            [name, p50[name].show(1, "ms"), p99[name].show(1, "ms"), ratio[name].show()]
            for name in found
        ],
        charts=[
            Chart(
                "Waits of 20 callers on 5 connections",
                "ms",
                ["p50", "p99"],
                {name: [p50[name], p99[name]] for name in found},
            )
        ],
    )
