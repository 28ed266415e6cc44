"""What a checkout costs when many are waiting."""

from __future__ import annotations

import asyncio
import gc
import time

from sqlalchemy.ext.asyncio import AsyncEngine

from benchmarks.engines import POOLKIT, STOCK
from benchmarks.fake import fake_engine
from benchmarks.model import Chart, Row, Section, Spread, ratios, rotated
from poolkit.pool import HandoffPool
from poolkit.testing import PostgresServer

SIZE = 5
CROWDS = (10, 1_000, 10_000)
FLAT = 1.5

Costs = dict[tuple[str, int], list[float]]


async def run(_: PostgresServer, *, quick: bool) -> Section:
    """Crowds of callers that come again and again, on a driver without a network."""
    found: Costs = {(name, crowd): [] for name in (POOLKIT, STOCK) for crowd in CROWDS}
    for turn in range(1 if quick else 5):
        for crowd in CROWDS:
            for name in rotated((POOLKIT, STOCK), turn):
                found[name, crowd].append(
                    await _cost(name, crowd, crowd // 4 + 1_000 if quick else crowd + 2_000)
                )
    return _section(found)


async def _cost(name: str, crowd: int, checkouts: int) -> float:
    """Microseconds of CPU for each checkout, hand-over and check-in while the crowd waits."""
    poolclass = HandoffPool if name == POOLKIT else None
    engine = fake_engine(poolclass, pool_size=SIZE, max_overflow=0, pool_timeout=120)
    done = 0
    enough = asyncio.Event()

    async def caller() -> None:
        nonlocal done
        while True:
            async with engine.connect():
                done += 1
                if done >= checkouts:
                    enough.set()
                await asyncio.sleep(0)

    callers = [asyncio.ensure_future(caller()) for _ in range(SIZE + crowd)]
    await _all_in_line(engine, callers)
    gc.collect()
    done, began = 0, time.process_time_ns()
    await enough.wait()
    cost = (time.process_time_ns() - began) / 1000 / done
    for each in callers:
        each.cancel()
    await asyncio.gather(*callers, return_exceptions=True)
    await engine.dispose()
    return cost


async def _all_in_line(_: AsyncEngine, callers: list[asyncio.Future[None]]) -> None:
    """A few passes of the loop start them all and open the connections."""
    for _ in range(20):
        await asyncio.sleep(0)
    for each in callers:
        if each.done():
            each.result()


def _section(found: Costs) -> Section:
    ours = [Spread.of(found[POOLKIT, crowd]) for crowd in CROWDS]
    theirs = [Spread.of(found[STOCK, crowd]) for crowd in CROWDS]
    growth = {n: ratios(found[n, CROWDS[-1]], found[n, CROWDS[0]]) for n in (POOLKIT, STOCK)}
    sizes = ", ".join(f"{crowd:,}" for crowd in CROWDS)
    return Section(
        title="Cost of a checkout with many waiters",
        method=(
            f"CPU of a checkout, hand-over and check-in while {sizes} callers wait, on a driver"
            f" without a network and a pool of {SIZE}+0. Flat is at most {FLAT} times from the"
            " smallest crowd to the largest: the rest is the memory of so many tasks."
        ),
        rows=[
            Row(
                f"CPU of a checkout with {sizes} waiters",
                " / ".join(f"{s.median:.0f}" for s in ours)
                + f" us, growth {growth[POOLKIT].show()}",
                f"{STOCK}: "
                + " / ".join(f"{s.median:.0f}" for s in theirs)
                + f" us, growth {growth[STOCK].show()}",
                f"flat: at most {FLAT} times",
                growth[POOLKIT].median <= FLAT,
            )
        ],
        header=["waiters", POOLKIT, STOCK],
        figures=[
            [f"{crowd:,}", mine.show(1, "us"), other.show(1, "us")]
            for crowd, mine, other in zip(CROWDS, ours, theirs, strict=True)
        ],
        charts=[
            Chart(
                "CPU of a checkout while others wait",
                "us",
                [f"{crowd:,} waiters" for crowd in CROWDS],
                {POOLKIT: ours, STOCK: theirs},
            )
        ],
    )
