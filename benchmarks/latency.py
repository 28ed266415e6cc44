"""Time of a request at several round-trip times, alone and ten at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks.engines import (
    AGAIN,
    PING,
    POOLKIT,
    RECIPE,
    STOCK,
    Contestant,
    Sizes,
    available,
    contest,
    side_by_side,
    through,
)
from benchmarks.model import Chart, Row, Section, Spread, percentile, ratios, rotated
from benchmarks.proxy import proxy
from poolkit.testing import PostgresServer

CONTROL = STOCK + AGAIN
AHEAD = {PING: {0.0: 1.5, 0.02: 1.9}, RECIPE: {0.0: 2.0, 0.02: 2.7}}


class Cell(NamedTuple):
    """One combination."""

    rtt: float
    tasks: int

    def __str__(self) -> str:
        return f"{self.rtt * 1000:g} ms, {self.tasks} task{'s' * (self.tasks > 1)}"


class Effort(NamedTuple):
    """How much is measured."""

    rounds: int
    requests: int


Medians = Mapping[str, Sequence[float]]  # of each contestant, one for each round


async def run(server: PostgresServer, *, quick: bool) -> Section:
    """Measure each cell, the contestants taking turns."""
    cells: dict[Cell, Medians] = {}
    names = [POOLKIT, STOCK, PING, RECIPE, CONTROL] if quick else [*available(), CONTROL]
    for rtt, effort in _efforts(quick=quick).items():
        with proxy(server.port) as latency:
            url = through(server.url, latency.port) if rtt else server.url
            async with contest(names, url, Sizes(10)) as contestants:
                for contestant in contestants.values():
                    await side_by_side(contestant, 10, 8)
                latency.set_rtt(rtt)
                for tasks in (1, 10):
                    requests = effort.requests if tasks == 1 else max(effort.requests // 2, 2)
                    cells[Cell(rtt, tasks)] = await _measure(
                        contestants, tasks, Effort(effort.rounds, requests)
                    )
    return _section(cells)


def _efforts(*, quick: bool) -> dict[float, Effort]:
    if quick:
        return {0.0: Effort(5, 10), 0.02: Effort(2, 2)}
    return {0.0: Effort(25, 40), 0.002: Effort(11, 12), 0.02: Effort(7, 4)}


async def _measure(contestants: Mapping[str, Contestant], tasks: int, effort: Effort) -> Medians:
    medians: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(effort.rounds):
        for name in rotated(list(contestants), turn):
            # The others had their turn for longer than the idle window: hot again first.
            await side_by_side(contestants[name], tasks, 2)
            times = await side_by_side(contestants[name], tasks, effort.requests)
            medians[name].append(percentile(times, 50))
    return medians


def _section(cells: Mapping[Cell, Medians]) -> Section:
    names = list(next(iter(cells.values())))
    return Section(
        title="Time of a request",
        method=(
            "The same request through a proxy that adds the latency (at 0 ms without it), by one"
            " task and by ten on a pool of ten. The contestants take turns in every round; a"
            " figure is the median of the rounds' medians with its quartiles, a ratio that of the"
            f" ratios within a round. `{CONTROL}` is a second engine of the same kind: what lies"
            " within its quartiles is the run's own spread."
        ),
        rows=[_against_stock(cells), *(_ahead_of(cells, other) for other in AHEAD)],
        header=["contestant", *(f"{cell}" for cell in cells)],
        figures=[
            [name, *(_milliseconds(m[name]).show(2, "ms") for m in cells.values())]
            for name in names
        ]
        + [
            [f"{name} / {STOCK}", *(ratios(m[name], m[STOCK]).show() for m in cells.values())]
            for name in names
            if name != STOCK
        ],
        charts=[
            Chart(
                f"Time of a request, as a ratio to {STOCK} without ping",
                "ratio",
                [str(cell) for cell in cells],
                {n: [ratios(m[n], m[STOCK]) for m in cells.values()] for n in names if n != STOCK},
                line=1.0,
            )
        ],
    )


def _milliseconds(seconds: Sequence[float]) -> Spread:
    return Spread.of([1000 * value for value in seconds])


def _against_stock(cells: Mapping[Cell, Medians]) -> Row:
    ours = {cell: ratios(m[POOLKIT], m[STOCK]) for cell, m in cells.items()}
    control = {cell: ratios(m[CONTROL], m[STOCK]) for cell, m in cells.items()}
    return Row(
        f"time of a request / {STOCK} without ping",
        "; ".join(f"{cell}: {ratio.show()}" for cell, ratio in ours.items()),
        "; ".join(f"{cell}: {ratio.show()}" for cell, ratio in control.items()) + " (itself again)",
        "1.00 in every cell, within the spread (that of two equal engines)",
        all(ours[cell].median <= max(1.0, control[cell].high) for cell in cells),
    )


def _ahead_of(cells: Mapping[Cell, Medians], other: str) -> Row:
    ahead = {cell: ratios(m[other], m[POOLKIT]) for cell, m in cells.items()}
    targets = {cell: AHEAD[other].get(cell.rtt) for cell in cells}
    return Row(
        f"time of a request: {other} / poolkit",
        "; ".join(f"{cell}: {ratio.show()}" for cell, ratio in ahead.items()),
        "",
        " and ".join(f"{value:g} at {rtt * 1000:g} ms" for rtt, value in AHEAD[other].items()),
        all(ahead[c].median >= value for c, value in targets.items() if value is not None),
    )
