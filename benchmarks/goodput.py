"""Overload: how many callers are served in time when more come than can be served."""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from sqlalchemy.exc import SQLAlchemyError

from benchmarks.engines import (
    POOLKIT,
    STOCK,
    Contestant,
    OnEngine,
    Sizes,
    poolkit_engine,
    side_by_side,
    stock_engine,
)
from benchmarks.model import Chart, Row, Section, Spread, percentile
from poolkit.testing import PostgresServer

DEADLINE = 0.5
WORK_TIME = 0.02
WORK = f"SELECT pg_sleep({WORK_TIME})"
SIZES = Sizes(5, timeout=10)
FIFO = "poolkit, first come first served"
SHARE = 0.95
P50 = 0.060
CALIBRATION = 0.6  # seconds

_MAKERS = {
    POOLKIT: poolkit_engine,
    STOCK: stock_engine,
    FIFO: partial(poolkit_engine, pool_overload_after=0),
}


class Cell(NamedTuple):
    """One combination."""

    load: int
    cancel: bool

    def __str__(self) -> str:
        return f"{self.load}x, {'cancelling' if self.cancel else 'not cancelling'}"


@dataclass(slots=True)
class Outcome:
    """What became of a cell's callers.

    Attributes:
        capacity: Requests a second of a busy pool, measured just before and after.
        seconds: How long callers came.
        settled: Seconds after which the queue's rule has had time to take hold.
        served: When each caller was served that still was there, and how long after it came.
    """

    seconds: float
    settled: float
    capacity: float = 0.0
    served: list[tuple[float, float]] = field(default_factory=list)

    def share(self, *, settled: bool) -> float:
        """Goodput as a share of the capacity."""
        begin = self.settled if settled else 0.0
        good = sum(begin <= when <= self.seconds for when, _ in self.served)
        return good / (self.seconds - begin) / self.capacity

    def p50(self) -> float:
        """Median seconds of those served once settled."""
        times = [took for when, took in self.served if self.settled <= when <= self.seconds]
        return percentile(times, 50) if times else float("nan")


Outcomes = dict[Cell, dict[str, Outcome]]


async def run(server: PostgresServer, *, quick: bool) -> Section:
    """Each cell, the contestants one after the other on fresh engines."""
    seconds = 2.0 if quick else 5.0
    outcomes: Outcomes = {}
    for load in (3,) if quick else (2, 3, 5):
        for cancel in (True, False):
            cell = Cell(load, cancel)
            names = (POOLKIT, STOCK) if quick else tuple(_MAKERS)
            outcomes[cell] = await _measure(server, cell, seconds, names)
    return _section(outcomes)


async def _measure(
    server: PostgresServer, cell: Cell, seconds: float, names: Sequence[str]
) -> dict[str, Outcome]:
    """One capacity for all contestants of a cell: that of the machine at the time."""
    outcomes: dict[str, Outcome] = {}
    capacities = [await _capacity(server, POOLKIT), await _capacity(server, STOCK)]
    for name in names:
        contestant = OnEngine(_MAKERS[name](server.url, SIZES))
        await side_by_side(contestant, SIZES.size, 4)
        rate = cell.load * statistics.median(capacities)
        outcomes[name] = await _overload(contestant, cell, rate, seconds)
        await contestant.close()
        capacities.append(await _capacity(server, name))
    for outcome in outcomes.values():
        outcome.capacity = statistics.median(capacities)
    return outcomes


async def _capacity(server: PostgresServer, name: str) -> float:
    """Requests a second by twice as many workers as there are connections."""
    contestant = OnEngine(_MAKERS[name](server.url, SIZES))
    await side_by_side(contestant, SIZES.size, 4)
    clock = asyncio.get_running_loop().time
    began, done = clock(), 0

    async def worker() -> None:
        nonlocal done
        while clock() < began + CALIBRATION:
            await contestant.request(WORK)
            done += 1

    await asyncio.gather(*(worker() for _ in range(2 * SIZES.size)))
    rate = done / (clock() - began)
    await contestant.close()
    return rate


async def _overload(contestant: Contestant, cell: Cell, rate: float, seconds: float) -> Outcome:
    """Callers come at their times whatever became of those before."""
    outcome = Outcome(seconds, min(2.0, seconds / 2))
    chance = random.Random(cell.load)  # noqa: S311
    clock = asyncio.get_running_loop().time
    began, due = clock(), 0.0
    tasks: set[asyncio.Task[None]] = set()

    async def caller(due: float) -> None:
        limit = began + due + DEADLINE if cell.cancel else None
        with contextlib.suppress(TimeoutError, OSError, SQLAlchemyError):
            async with asyncio.timeout_at(limit):
                await contestant.request(WORK)
            took = clock() - began - due
            if took <= DEADLINE:
                outcome.served.append((clock() - began, took))

    while due < seconds:
        await asyncio.sleep(began + due - clock())
        while due <= clock() - began and due < seconds:
            task = asyncio.create_task(caller(due))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            due += chance.expovariate(rate)
    await asyncio.sleep(0)
    rest = list(tasks)
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)
    return outcome


def _section(outcomes: Outcomes) -> Section:
    names = list(next(iter(outcomes.values())))
    capacity = statistics.median(o.capacity for c in outcomes.values() for o in c.values())
    return Section(
        title="Overload",
        method=(
            f"Callers come at random times, 2, 3 and 5 times as many as a pool of {SIZES.size}+0"
            f" can serve ({capacity:.0f} a second, the median in this run, measured before and"
            f" after each contestant), each for {WORK_TIME * 1000:g} ms of work on the server"
            f" (`pg_sleep`) in a transaction. After {DEADLINE * 1000:g} ms a caller is gone: those"
            " that cancel stop, those that do not go on for nobody. Goodput is what was served in"
            " time, as a share of capacity, once the rule of the queue has had time (2 s) to take"
            " hold; in brackets from the first caller on. p50 is the median time of those served."
        ),
        rows=[_row(cell, of) for cell, of in outcomes.items()],
        header=["contestant", *(str(cell) for cell in outcomes)],
        figures=[[n, *(_show(of[n]) for of in outcomes.values())] for n in names],
        charts=[
            Chart(
                f"Goodput with a deadline of {DEADLINE * 1000:g} ms, as a share of capacity",
                "share of capacity",
                [str(cell) for cell in outcomes],
                {
                    n: [Spread.of([of[n].share(settled=True)]) for of in outcomes.values()]
                    for n in names
                },
                line=SHARE,
            ),
            Chart(
                "Median time of those served in time",
                "ms",
                [str(cell) for cell in outcomes],
                {n: [_p50(of[n]) for of in outcomes.values()] for n in names},
                line=P50 * 1000,
            ),
        ],
    )


def _row(cell: Cell, of: dict[str, Outcome]) -> Row:
    ours = of[POOLKIT]
    return Row(
        f"goodput at {cell}; p50 of the served",
        _show(ours),
        "; ".join(f"{name} {_show(of[name])}" for name in of if name != POOLKIT),
        f"at least {SHARE:.0%} of capacity; at most {P50 * 1000:g} ms",
        ours.share(settled=True) >= SHARE and ours.p50() <= P50,
    )


def _show(outcome: Outcome) -> str:
    settled, whole = outcome.share(settled=True), outcome.share(settled=False)
    p50 = outcome.p50()
    time = "" if p50 != p50 else f", {p50 * 1000:.0f} ms"  # noqa: PLR0124 (not a number)
    return f"{settled:.0%} ({whole:.0%}){time}"


def _p50(outcome: Outcome) -> Spread | None:
    p50 = outcome.p50()
    return None if p50 != p50 else Spread.of([p50 * 1000])  # noqa: PLR0124 (not a number)
