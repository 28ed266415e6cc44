"""Percentiles and pictures."""

from __future__ import annotations

from rich.console import Console

from poolkit.cli.latency import histograms, percentile


def test_percentile_is_the_nearest_rank() -> None:
    """The smallest value that the share does not exceed."""
    times = [float(n) for n in range(1, 101)]

    assert [percentile(times, p) for p in (50, 95, 99, 100)] == [50, 95, 99, 100]
    assert percentile([7.0], 50) == 7


def test_histogram_shows_every_step_between_the_extremes() -> None:
    """Bars are in proportion, the empty steps in between are there, in ASCII if it must be."""
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(histograms({"waits": [0.0015] * 60 + [0.004] * 30}, ascii_only=True))

    lines = [line.rstrip() for line in capture.get().splitlines()]
    assert lines[1:] == [
        "    1.5 ms  #################### 67%",
        "      2 ms",
        "      3 ms",
        "      5 ms  ########## 33%",
    ]
