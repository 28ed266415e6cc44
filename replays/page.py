"""A page for each replay, with a picture of every request, drawn from the run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from replays.model import SERVED, STILL_WAITING, Request, Timeline

_COLOURS = {SERVED: "#0b6e4f", STILL_WAITING: "#222222"}
_FAILED = "#d1495b"
_LEAST = 0.02
"""Seconds that a line is long at least, so that it can be seen."""

_LIMIT = 120
"""Requests of each result in a picture; of more, every so many-th is drawn."""

_INTRODUCTION = """\
Each page replays one outage against poolkit as it comes and against the recipe that is found
everywhere (pre-ping, both statement caches off, a name function), on a real PostgreSQL behind a
proxy that fails on purpose."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """What one replay gave.

    Attributes:
        name: Of its page and its picture.
        title: Of the page.
        story: What happened, and what poolkit does.
        timelines: One for each contestant.
    """

    name: str
    title: str
    story: str
    timelines: Sequence[Timeline]


def write(replayed: Sequence[Replayed], directory: Path, *, where: str) -> None:
    """Write a page and a picture for each, and the index of these and of what is there already."""
    directory.mkdir(parents=True, exist_ok=True)
    results = directory / "results.json"
    known = json.loads(results.read_text()) if results.exists() else {}
    for replay in replayed:
        draw(replay, directory / f"{replay.name}.svg")
        (directory / f"{replay.name}.md").write_text(_page(replay, where))
        rows = [_cells(timeline) for timeline in replay.timelines]
        known[replay.name] = {"title": replay.title, "rows": rows}
    results.write_text(json.dumps(known, indent=1) + "\n")
    (directory / "index.md").write_text(_index(known, where))


def _page(replay: Replayed, where: str) -> str:
    lines = [f"# {replay.title}", "", replay.story.strip(), ""]
    lines += [f"![The requests of the run: {replay.title}]({replay.name}.svg)", ""]
    lines += _table(replay.timelines)
    for timeline in replay.timelines:
        if timeline.findings:
            lines += ["", f"{timeline.contestant}:", ""]
            lines += [f"- {what}: {found}" for what, found in timeline.findings.items()]
    return "\n".join([*lines, "", where, ""])


def _index(results: Mapping[str, Any], where: str) -> str:
    lines = ["# Outages, replayed", "", _INTRODUCTION, ""]
    lines += [
        "| replay | contestant | requests | how they ended | longest |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, result in results.items():
        for row in result["rows"]:
            lines.append("| " + " | ".join([f"[{result['title']}]({name}.md)", *row]) + " |")
    return "\n".join([*lines, "", where, ""])


def _table(timelines: Sequence[Timeline]) -> list[str]:
    lines = ["| contestant | requests | how they ended | longest |", "| --- | --- | --- | --- |"]
    return lines + ["| " + " | ".join(_cells(timeline)) + " |" for timeline in timelines]


def _cells(timeline: Timeline) -> tuple[str, str, str, str]:
    ended = ", ".join(f"{many} {shown(how)}" for how, many in timeline.results.most_common())
    return timeline.contestant, str(len(timeline.requests)), ended, f"{timeline.worst():.2f} s"


def shown(result: str) -> str:
    """A result in words."""
    return result.replace("_", " ")


def draw(replay: Replayed, file: Path) -> None:
    """A line for each request, from its beginning to its end, in the colour of its result."""
    import matplotlib as mpl  # noqa: PLC0415 (not needed for the tests)
    from matplotlib.figure import Figure  # noqa: PLC0415

    # Text as text and no dates: small files that differ only where the runs do.
    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "poolkit", "font.size": 9}
    figure = Figure(figsize=(9, 2.6 * len(replay.timelines)), layout="constrained")
    rows = figure.subplots(len(replay.timelines), 1, squeeze=False, sharex=True)
    for axes, timeline in zip(rows[:, 0], replay.timelines, strict=True):
        _draw_requests(axes, timeline)
        axes.set_title(timeline.contestant, loc="left")
        axes.set_yticks([])
        axes.set_ylabel("requests")
        axes.spines[["top", "right", "left"]].set_visible(False)
    rows[-1, 0].set_xlabel("seconds")
    figure.savefig(file, metadata={"Date": None})


def _draw_requests(axes: Any, timeline: Timeline) -> None:
    drawn = list(enumerate(_some_of_each(timeline)))
    for result in timeline.results:
        alike = [(row, request) for row, request in drawn if request.result == result]
        axes.hlines(
            [row for row, _ in alike],
            [request.began for _, request in alike],
            [max(request.ended, request.began + _LEAST) for _, request in alike],
            color=_COLOURS.get(result, _FAILED),
            linewidth=1.2,
            label=shown(result),
        )
    for when, what in _few(timeline.marks):
        axes.axvline(when, color="#888888", linewidth=0.8, linestyle="--")
        axes.annotate(
            what, (when, 1), xycoords=("data", "axes fraction"), fontsize=7, rotation=90,
            ha="right", va="top", color="#666666",
        )  # fmt: skip
    if drawn:
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def _some_of_each(timeline: Timeline) -> list[Request]:
    """In the order in which they began."""
    chosen: list[Request] = []
    for result in timeline.results:
        alike = [request for request in timeline.requests if request.result == result]
        chosen += alike[:: max(1, len(alike) // _LIMIT)]
    return sorted(chosen, key=lambda request: request.began)


def _few(marks: Sequence[tuple[float, str]]) -> Sequence[tuple[float, str]]:
    return marks if len(marks) <= 24 else marks[:: len(marks) // 24]  # noqa: PLR2004


def as_lines(replayed: Sequence[Replayed]) -> list[Mapping[str, str]]:
    """For the terminal."""
    header = ("contestant", "requests", "ended", "longest")
    return [
        {"replay": replay.title} | dict(zip(header, _cells(timeline), strict=True))
        for replay in replayed
        for timeline in replay.timelines
    ]
