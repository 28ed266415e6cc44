"""Latencies: percentiles, and a picture of their distribution for the terminal."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Mapping, Sequence

from rich.table import Table
from rich.text import Text

from poolkit.cli.output import duration

BOUNDS = tuple(step * 10.0**power for power in range(-4, 1) for step in (1, 1.5, 2, 3, 5, 7))
"""Seconds; the upper ends of the histogram's steps, evenly spaced on a logarithmic scale."""

BAR = 20  # characters of the longest bar
EIGHTHS = " ▏▎▍▌▋▊▉"
PERCENTILES = (50, 95, 99)


def percentile(times: Sequence[float], percent: float) -> float:
    """The value that ``percent`` of the sorted times do not exceed (nearest rank)."""
    return times[max(0, math.ceil(len(times) * percent / 100) - 1)]


def percentile_table(series: Mapping[str, Sequence[float]]) -> Table:
    """One row of percentiles for each series."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 3, 0, 0))
    table.add_column("")
    for title in (*(f"p{p}" for p in PERCENTILES), "worst"):
        table.add_column(title, justify="right")
    for name, times in series.items():
        ordered = sorted(times)
        values = [percentile(ordered, p) for p in PERCENTILES] + [ordered[-1]]
        table.add_row(Text(name, "cyan"), *map(duration, values))
    return table


def histograms(series: Mapping[str, Sequence[float]], *, ascii_only: bool = False) -> Table:
    """The series side by side: a bar and a share of all for each step."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("took up to", justify="right")
    for name in series:
        table.add_column(name, width=BAR + 6, no_wrap=True)
    shares = [_shares(times) for times in series.values()]
    for step in _steps_in_use(shares):
        label = duration(BOUNDS[step]) if step < len(BOUNDS) else "longer"
        table.add_row(label, *(_bar(s[step], max(s), ascii_only=ascii_only) for s in shares))
    return table


def _shares(times: Sequence[float]) -> list[float]:
    counts = [0] * (len(BOUNDS) + 1)
    for seconds in times:
        counts[bisect.bisect_left(BOUNDS, seconds)] += 1
    return [number / len(times) for number in counts]


def _steps_in_use(shares: Sequence[Sequence[float]]) -> Iterator[int]:
    used = [step for step in range(len(BOUNDS) + 1) if any(s[step] for s in shares)]
    return iter(range(used[0], used[-1] + 1))


def _bar(share: float, longest: float, *, ascii_only: bool) -> Text:
    if not share:
        return Text("")
    length = BAR * share / longest
    bar = "#" * round(length) if ascii_only else _blocks(length)
    percent = f"{share:.0%}" if share >= 0.01 else "<1%"  # noqa: PLR2004 (one percent)
    return Text(bar and f"{bar} ", "cyan") + Text(percent, "default")


def _blocks(length: float) -> str:
    """A bar to an eighth of a character; never none."""
    whole, part = divmod(max(1, round(8 * length)), 8)
    return "█" * whole + EIGHTHS[part].strip()
