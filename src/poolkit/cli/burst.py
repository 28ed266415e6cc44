"""The demo's overload: callers come several times faster than the pool can serve them."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from poolkit.cli.latency import percentile
from poolkit.cli.outcome import Outcome
from poolkit.cli.output import duration
from poolkit.cli.watch import Watch
from poolkit.engine import create_async_engine
from poolkit.errors import PoolTimeout
from poolkit.events import OverloadBegan, OverloadEnded
from poolkit.lifecycle import warm_up

CONNECTIONS = 5
WORK = 0.05
"""Seconds that each caller keeps its connection."""

TIMES = 3
"""How many times as many callers as the pool can serve."""

CALM, BURST = 0.4, 2.0
"""Seconds that the pool's capacity is measured for, and that the overload lasts."""

PATIENCE = 0.5
"""Seconds: the pool timeout, and what the callers give the whole."""

OVERLOAD_AFTER = 0.2
TICK = 0.01

GOODPUT = 0.8
"""Of the capacity: what must be served in time."""

MEDIAN_WAIT = PATIENCE / 4
"""Seconds: what half of the served must not exceed. First come, first served, they would wait for
nearly all of their patience."""

_WORK = text(f"SELECT pg_sleep({WORK})")


@dataclass(slots=True)
class _Tally:
    """Callers that were served in time, with their waits in seconds, too late, and not at all.

    ``seconds`` is what all that took.
    """

    seconds: float = 0.0
    waits: list[float] = field(default_factory=list)
    late: int = 0
    timeouts: int = 0


async def overload(_: AsyncEngine, watch: Watch) -> Outcome:
    """The pool goes on at its capacity, and those it serves are served quickly."""
    engine = create_async_engine(
        pool_size=CONNECTIONS,
        max_overflow=0,
        pool_timeout=PATIENCE,
        pool_overload_after=OVERLOAD_AFTER,
    )
    try:
        await warm_up(engine)
        capacity = await _capacity(engine)
        async with watch(engine) as seen:
            tally = await _offer(engine, TIMES * capacity)
    finally:
        await engine.dispose()
    goodput = len(tally.waits) / tally.seconds
    median = percentile(sorted(tally.waits), 50) if tally.waits else PATIENCE
    turned = seen.events[OverloadBegan] == seen.events[OverloadEnded] > 0
    return Outcome(
        f"{TIMES * capacity:.0f} callers per second on a pool that serves {capacity:.0f}",
        f"{goodput:.0f} per second served in time, half of them within {duration(median)};"
        f" {tally.timeouts} times PoolTimeout",
        turned and goodput >= GOODPUT * capacity and median <= MEDIAN_WAIT,
        seen=seen,
    )


async def _capacity(engine: AsyncEngine) -> float:
    """Callers per second, with no more of them than connections."""
    tally, started = _Tally(), time.perf_counter()

    async def work() -> None:
        while time.perf_counter() < started + CALM:
            await _call(engine, tally)

    async with asyncio.TaskGroup() as group:
        for _ in range(CONNECTIONS):
            group.create_task(work())
    return len(tally.waits) / (time.perf_counter() - started)


async def _offer(engine: AsyncEngine, rate: float) -> _Tally:
    """So many callers per second, whatever becomes of those before them."""
    tally, started, sent = _Tally(), time.perf_counter(), 0
    async with asyncio.TaskGroup() as group:
        while (gone := time.perf_counter() - started) < BURST:
            for _ in range(int(rate * gone) - sent):
                group.create_task(_call(engine, tally))
                sent += 1
            await asyncio.sleep(TICK)
    tally.seconds = time.perf_counter() - started
    return tally


async def _call(engine: AsyncEngine, tally: _Tally) -> None:
    asked = time.perf_counter()
    try:
        async with engine.connect() as connection:
            waited = time.perf_counter() - asked
            await connection.execute(_WORK)
    except PoolTimeout:
        tally.timeouts += 1
        return
    if time.perf_counter() - asked <= PATIENCE:
        tally.waits.append(waited)
    else:
        tally.late += 1
