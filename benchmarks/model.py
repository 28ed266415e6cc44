"""What a benchmark gives back, and the statistics that all of them use."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from poolkit.testing import PostgresServer


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of one or more values."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def show(self, decimals: int = 2, unit: str = "") -> str:
        """``median [lower quartile .. upper quartile] unit``."""
        median, low, high = (f"{v:.{decimals}f}" for v in (self.median, self.low, self.high))
        return f"{median}{unit and ' '}{unit} [{low} .. {high}]"


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the one table.

    Attributes:
        what: What was measured.
        poolkit: poolkit's figures.
        others: Those of the others.
        target: What poolkit's are to be.
        met: Whether they are; None where there is no target.
    """

    what: str
    poolkit: str
    others: str
    target: str
    met: bool | None


@dataclass(frozen=True, slots=True)
class Chart:
    """Grouped bars.

    Attributes:
        title: What it shows.
        unit: The label of the axis of values.
        groups: The labels along the other axis.
        series: For each contestant a value for each group; None where there is none.
        logarithmic: Whether the values are.
        line: A target to draw.
    """

    title: str
    unit: str
    groups: Sequence[str]
    series: Mapping[str, Sequence[Spread | None]]
    logarithmic: bool = False
    line: float | None = None


@dataclass(frozen=True, slots=True)
class Section:
    """The outcome of one benchmark.

    Attributes:
        title: What was measured.
        method: How, in one paragraph.
        rows: Its lines of the one table.
        header: Titles of the columns of the figures in full.
        figures: The figures in full.
        charts: Pictures of them.
    """

    title: str
    method: str
    rows: Sequence[Row]
    header: Sequence[str]
    figures: Sequence[Sequence[str]]
    charts: Sequence[Chart] = field(default_factory=tuple)


class Benchmark(Protocol):
    """One module's ``run``."""

    async def __call__(self, server: PostgresServer, *, quick: bool) -> Section:
        """Measure."""


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that ``percent`` of them do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def ratios(values: Sequence[float], reference: Sequence[float]) -> Spread:
    """The spread of the ratios of what was measured side by side, round by round."""
    return Spread.of([value / of for value, of in zip(values, reference, strict=True)])


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """The contestants in this round's order: each comes first as often as the others."""
    start = turn % len(names)
    return [*names[start:], *names[:start]]
