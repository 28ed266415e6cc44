"""The dashboard as a picture: the JSON's own panels, places and queries, without Grafana."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from observatory.board import Panel, panels
from observatory.phases import Happened
from observatory.prometheus import Prometheus
from observatory.stage import INTERVAL

_COLUMNS = 24
_WIDTH, _ROW = 15.0, 0.34
"""Inches: of the whole, and of one row of the grid."""

_INK, _FAINT, _CARD, _GROUND = "#d8d9da", "#7b8087", "#181b1f", "#111217"
_PALETTE = (
    "#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#b877d9",
    "#f2495c", "#5794f2", "#ffa6b0", "#96d98d", "#fade2a",
)  # fmt: skip
_NAMED = {
    "red": "#e0475b", "orange": "#ff9830", "yellow": "#fade2a", "green": "#73bf69",
    "blue": "#5794f2", "purple": "#b877d9", "text": "#d8d9da",
}  # fmt: skip
_POINTS = 180
_DPI = 110

_LEGEND = 6
"""Series at most that a legend has room for."""

Series = tuple[str, list[float], list[float]]


def draw(prometheus: Prometheus, happened: Sequence[Happened], factor: float, file: Path) -> None:
    """Draw it from a run that is over, with a line where each phase begins."""
    import matplotlib as mpl  # noqa: PLC0415 (not needed for the tests)
    from matplotlib.figure import Figure  # noqa: PLC0415

    mpl.rcParams |= {"font.size": 7.5}
    mpl.rcParams |= {"text.color": _INK, "axes.labelcolor": _FAINT, "axes.edgecolor": _FAINT}
    mpl.rcParams |= {"xtick.color": _FAINT, "ytick.color": _FAINT}
    board = panels(INTERVAL / factor)
    rows = max(panel.place["y"] + panel.place["h"] for panel in board)
    figure = Figure(figsize=(_WIDTH, rows * _ROW), facecolor=_GROUND)
    start, end = happened[0].began, happened[-1].ended
    look = _Look(prometheus, start, end, happened)
    for panel in board:
        _draw(figure, panel, rows, look)
    figure.savefig(file, dpi=_DPI, metadata={"Software": None})


class _Look:
    """What was, from the beginning of the run to its end."""

    def __init__(
        self, prometheus: Prometheus, start: float, end: float, happened: Sequence[Happened]
    ) -> None:
        self.length = end - start
        self.marks = [(h.began - start, h.phase.name) for h in happened]
        self._prometheus, self._start, self._end = prometheus, start, end

    def series(self, panel: Panel) -> list[Series]:
        """All of a panel's, with the names that their legend gives them."""
        found = []
        for target in panel.targets:
            answer = self._prometheus.query_range(
                target.expression, self._start, self._end, (self._end - self._start) / _POINTS
            )
            for one in answer:
                times = [float(when) - self._start for when, _ in one["values"]]
                values = [float(value) for _, value in one["values"]]
                self._break(times, values)
                found.append((_named(target.legend, one["metric"]), times, values))
        return found

    def _break(self, times: list[float], values: list[float]) -> None:
        """Have no line where there is nothing."""
        step = self.length / _POINTS
        for i in range(len(times) - 1, 0, -1):
            if times[i] - times[i - 1] > 1.5 * step:
                times.insert(i, times[i - 1] + step)
                values.insert(i, math.nan)


def _named(legend: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"{{(\w+)}}", lambda m: labels.get(m[1], ""), legend).strip()


def _draw(figure: Any, panel: Panel, rows: int, look: _Look) -> None:
    x, y, w, h = (panel.place[name] for name in "xywh")
    gap_x, gap_y = 0.0035, 0.12 / rows
    left, width = x / _COLUMNS + gap_x, w / _COLUMNS - 2 * gap_x
    bottom, height = 1 - (y + h) / rows + gap_y, h / rows - 2 * gap_y
    if panel.type == "row":
        figure.text(left, bottom + height / 2, panel.title, fontsize=10, va="center", weight="bold")
        return
    card = figure.add_axes((left, bottom, width, height), facecolor=_CARD)
    card.set(xticks=[], yticks=[])
    card.spines[:].set_visible(False)
    top = bottom + height - 0.3 / rows
    figure.text(left + 0.004, top, panel.title, fontsize=8, va="top")
    found = look.series(panel)
    if panel.type == "stat":
        inner = (left, bottom, width, height * 0.42)
        _draw_stat(figure, panel, found, look, inner, (left + width / 2, bottom + height * 0.58))
        return
    if len(found) > _LEGEND:  # room for those that have something to show
        found = [one for one in found if any(one[2])]
    shown = 0.45 * -(-min(len(found), _LEGEND) // 2)  # of the grid's rows, for the legend
    inner = (
        left + 0.032,
        bottom + (0.85 + shown) / rows,
        width - (0.055 if "axisPlacement" in str(panel.options) else 0.04),
        height - (2.0 + shown) / rows,
    )
    _draw_series(figure.add_axes(inner, facecolor=_CARD), panel, found, look)


def _draw_stat(
    figure: Any,
    panel: Panel,
    found: Sequence[Series],
    look: _Look,
    inner: tuple[float, float, float, float],
    middle: tuple[float, float],
) -> None:
    """The highest of the run, which Grafana shows of the last moment; and its course."""
    if not found:
        return
    _, times, values = found[0]
    highest = max(value for value in values if not math.isnan(value))
    colour = _NAMED[_threshold(panel, highest)]
    axes = figure.add_axes(inner, facecolor="none")
    axes.fill_between(times, values, color=colour, alpha=0.35, linewidth=0)
    axes.plot(times, values, color=colour, linewidth=1)
    axes.set(xlim=(0, look.length), ylim=(0, (highest or 1) * 1.05))
    axes.axis("off")
    shown = f"max {_formatter(panel.unit)(highest)}"
    figure.text(*middle, shown, fontsize=15, ha="center", va="center", color=colour)


def _threshold(panel: Panel, value: float) -> str:
    steps = panel.options["defaults"]["thresholds"]["steps"]
    passed = [step["color"] for step in steps if step["value"] is None or value >= step["value"]]
    return str(passed[-1])


def _draw_series(axes: Any, panel: Panel, found: Sequence[Series], look: _Look) -> None:
    defaults = panel.options["defaults"]
    custom = defaults["custom"]
    base: list[float] = []
    for number, (name, times, values) in enumerate(found):
        own = _overrides(panel, name)
        colour = own.get("color") or _PALETTE[number % len(_PALETTE)]
        target = axes.twinx() if own.get("custom.axisPlacement") == "right" else axes
        style = own.get("custom.drawStyle", custom["drawStyle"])
        stacks = own.get("custom.stacking", custom["stacking"])
        label = name if len(name) < 48 else f"{name[:46]}..."  # noqa: PLR2004
        if target is not axes:
            _bare(target)
            axes.plot([], [], color=colour, label=f"{label} (right axis)")
        if stacks["mode"] == "normal" and stacks["group"] == "A":
            base = _stack(target, times, values, base, look, colour, label)
        elif style == "bars":
            target.fill_between(
                times, values, color=colour, alpha=0.6, step="mid", linewidth=0, label=label
            )
        else:
            dashes = (0, (4, 3)) if "custom.lineStyle" in own else "solid"
            target.plot(times, values, color=colour, linewidth=1.2, linestyle=dashes, label=label)
    _decorate(axes, panel, look)


def _stack(
    axes: Any,
    times: list[float],
    values: list[float],
    base: list[float],
    look: _Look,
    colour: str,
    label: str,
) -> list[float]:
    """Put a series on top of those before it, on one grid of times for all."""
    step = look.length / _POINTS
    grid = [0.0] * (_POINTS + 1)
    for when, value in zip(times, values, strict=True):
        grid[round(when / step)] = 0.0 if math.isnan(value) else value
    below = base or [0.0] * len(grid)
    above = [a + b for a, b in zip(below, grid, strict=True)]
    axes.fill_between(
        [i * step for i in range(len(grid))], below, above,
        color=colour, alpha=0.6, linewidth=0, step="mid", label=label,
    )  # fmt: skip
    return above


def _overrides(panel: Panel, name: str) -> dict[str, Any]:
    own: dict[str, Any] = {}
    for override in panel.options.get("overrides", ()):
        matcher = override["matcher"]
        exact = matcher["id"] == "byName"
        if matcher["options"] == name if exact else re.fullmatch(matcher["options"], name):
            own |= {p["id"]: p["value"] for p in override["properties"]}
    if "color" in own:
        own["color"] = _NAMED[own["color"]["fixedColor"]]
    return own


def _decorate(axes: Any, panel: Panel, look: _Look) -> None:
    defaults = panel.options["defaults"]
    form = _formatter(panel.unit)
    _bare(axes)
    axes.set_xlim(0, look.length)
    axes.set_ylim(0, defaults.get("max", max(axes.get_ylim()[1], 1e-9)))
    axes.yaxis.set_major_formatter(lambda value, _: form(value))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f} s")
    axes.grid(axis="y", color="#2c3235", linewidth=0.5)
    for when, name in look.marks:
        axes.axvline(when, color="#565c63", linewidth=0.6, linestyle=":")
        if panel.place["w"] >= _COLUMNS / 2:
            axes.annotate(
                name, (when, 1), xycoords=("data", "axes fraction"), fontsize=6, color=_FAINT,
                xytext=(0, 2), textcoords="offset points", va="bottom",
            )  # fmt: skip
    if defaults["custom"]["thresholdsStyle"]["mode"] != "off":
        for step in defaults["thresholds"]["steps"]:
            if step["value"] is not None:
                axes.axhline(step["value"], color=_NAMED[step["color"]], linewidth=0.8, ls="--")
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            handles[:_LEGEND], labels[:_LEGEND], frameon=False, fontsize=6.5, ncols=2,
            loc="upper left", bbox_to_anchor=(-0.02, -0.08), borderpad=0, labelcolor=_INK,
            handlelength=1.2, columnspacing=1.2, labelspacing=0.35,
        )  # fmt: skip


def _bare(axes: Any) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=6.5)


def _formatter(unit: str) -> Callable[[float], str]:
    return {"percentunit": _percent, "s": _seconds, "reqps": _rate}.get(unit, _short)


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _seconds(value: float) -> str:
    return f"{1000 * value:.3g} ms" if 0 < value < 1 else f"{value:.3g} s"


def _rate(value: float) -> str:
    return f"{value:.3g}/s"


def _short(value: float) -> str:
    return f"{value:.3g}"
