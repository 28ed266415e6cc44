"""What the views have in common: lines, tables, bars, durations in few characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from poolkit.cli.latency import EIGHTHS

BAD, DOUBTFUL = "bold red", "yellow"

MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0
NAME = 18
"""Columns of the longest name in a table; it is cut there."""

_TENTHS_BELOW = 10.0
_HALF = 4  # of eight


def line(*parts: Text) -> Text:
    """One line: what does not fit is left out, and said so by an ellipsis."""
    joined = Text(no_wrap=True, overflow="ellipsis", end="\n")
    for part in parts:
        joined.append_text(part)
    return joined


def table(*columns: str, last_takes_rest: bool = False, gap: int = 2) -> Table:
    """A table without rules, its rows one line high.

    Args:
        columns: Their titles; ``>`` before one is for numbers.
        last_takes_rest: Whether the last one has all the width that is left.
        gap: Blanks between them.
    """
    drawn = Table(
        box=None,
        pad_edge=False,
        padding=(0, gap, 0, 0),
        header_style="cyan",
        expand=last_takes_rest,
    )
    for place, title in enumerate(columns):
        is_last = last_takes_rest and place == len(columns) - 1
        drawn.add_column(
            title.removeprefix(">"),
            justify="right" if title.startswith(">") else "left",
            no_wrap=True,
            overflow="ellipsis",
            ratio=1 if is_last else None,
            max_width=None if is_last else NAME,
        )
    return drawn


def bar(value: float, scale: float, width: int, style: str, *, ascii_only: bool) -> Text:
    """A bar of that width, filled to the value's share of the scale; never empty for some."""
    share = min(1.0, value / scale) if scale else 0.0
    whole, part = divmod(max(round(8 * width * share), 1) if value else 0, 8)
    if ascii_only:
        filled = "#" * max(whole + (part >= _HALF), 1 if value else 0)
    else:
        filled = "█" * whole + EIGHTHS[part].strip()
    rest = ("." if ascii_only else "·") * (width - len(filled))
    return Text(filled, style) + Text(rest, "dim")


def stacked(parts: Sequence[tuple[int, str]], scale: int, width: int, *, ascii_only: bool) -> Text:
    """Several numbers and their styles as one bar; told apart without colours, too."""
    marks, rest = ("#=+", ".") if ascii_only else ("█▒░", "·")
    drawn, reached, drawn_to = Text(), 0, 0
    for mark, (number, style) in zip(marks, parts, strict=True):
        reached += number
        upto = min(width, max(round(width * reached / scale), drawn_to + (number > 0)))
        drawn.append(mark * (upto - drawn_to), style)
        drawn_to = upto
    return drawn.append(rest * (width - drawn_to), "dim")


def age(seconds: float | None) -> str:
    """How long something has lasted, in at most six characters: ``0.3 s``, ``47 s``, ``12 min``."""
    if seconds is None:
        return ""
    if seconds < 2 * MINUTE:
        return f"{seconds:.1f} s" if seconds < _TENTHS_BELOW else f"{seconds:.0f} s"
    if seconds < 2 * HOUR:
        return f"{seconds / MINUTE:.0f} min"
    return f"{seconds / HOUR:.0f} h" if seconds < 2 * DAY else f"{seconds / DAY:.0f} d"


def rounded(value: Any) -> Any:
    """The same for JSON, its seconds to the millisecond."""
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    return value
