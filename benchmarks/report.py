"""One table for the terminal, and pages with pictures."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.model import Chart, Row, Section

_PACKAGES = ("sqlalchemy", "asyncpg", "psycopg", "psycopg-pool")
_HEADER = ("what", "poolkit", "others", "target", "verdict")
_COLOURS = ("#0b6e4f", "#d1495b", "#edae49", "#8d5b4c", "#30638e", "#7b8794", "#b8c0c8", "#444444")


def verdict(row: Row) -> str:
    """In a word."""
    return {True: "met", False: "MISSED", None: "-"}[row.met]


def show(sections: Mapping[str, Section]) -> None:
    """Print the one table; with rich, if it is installed."""
    lines = [_cells(row) for section in sections.values() for row in section.rows]
    if find_spec("rich"):
        _show_rich(lines)
        return
    print("\t".join(_HEADER))
    for line in lines:
        print("\t".join(line))


def _cells(row: Row) -> tuple[str, ...]:
    return (row.what, row.poolkit, row.others, row.target, verdict(row))


def _show_rich(lines: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console  # noqa: PLC0415 (may not be installed)
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(*_HEADER, show_lines=True, title="poolkit's benchmarks")
    colours = {"met": "green", "MISSED": "bold red", "-": "dim"}
    for *cells, word in lines:
        table.add_row(*(Text(c.replace("; ", "\n")) for c in cells), Text(word, colours[word]))
    console = Console()
    Console(width=max(console.width, 150)).print(table)


def write(sections: Mapping[str, Section], directory: Path, *, postgres: str, took: float) -> None:
    """Write the page, its pictures and the figures as JSON."""
    directory.mkdir(parents=True, exist_ok=True)
    pictures = {name: _draw(name, section.charts, directory) for name, section in sections.items()}
    page = [
        "# Benchmarks",
        "",
        _where(postgres, took),
        "",
        *_markdown_table(
            _HEADER, [_cells(row) for section in sections.values() for row in section.rows]
        ),
    ]
    for name, section in sections.items():
        page += ["", f"## {section.title}", "", section.method, ""]
        page += [f"![{chart.title}]({file})" for chart, file in pictures[name]]
        page += [""] * bool(pictures[name])
        page += _markdown_table(section.header, section.figures)
    (directory / "index.md").write_text("\n".join(page) + "\n")
    figures = {name: _plain(section) for name, section in sections.items()}
    (directory / "results.json").write_text(json.dumps(figures, indent=1) + "\n")


def _plain(section: Section) -> dict[str, Any]:
    return {
        "rows": [asdict(row) for row in section.rows],
        "header": list(section.header),
        "figures": [list(line) for line in section.figures],
    }


def _where(postgres: str, took: float) -> str:
    versions = []
    for package in _PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    return (
        f"Written by `make bench` in {took:.0f} s: Python {platform.python_version()},"
        f" {', '.join(versions)}, PostgreSQL {postgres}, {os.cpu_count()} cores, everything on"
        " 127.0.0.1. All that is compared was measured in turns in one run; brackets hold the"
        " quartiles. Counts are exact, times are this machine's."
    )


def _markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|").replace("; ", "<br>") for c in cells) + " |"

    return [line(header), "|" + " --- |" * len(header), *map(line, lines)]


def _draw(name: str, charts: Sequence[Chart], directory: Path) -> list[tuple[Chart, str]]:
    if not find_spec("matplotlib"):
        return []
    files = []
    for number, chart in enumerate(charts, 1):
        file = f"{name}-{number}.svg" if len(charts) > 1 else f"{name}.svg"
        _draw_bars(chart, directory / file)
        files.append((chart, file))
    return files


def _draw_bars(chart: Chart, file: Path) -> None:
    import matplotlib as mpl  # noqa: PLC0415 (may not be installed)
    from matplotlib.figure import Figure  # noqa: PLC0415

    # Text as text and no dates: small files that differ only where the figures do.
    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "poolkit", "font.size": 9}
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(chart.series)
    for index, (name, spreads) in enumerate(chart.series.items()):
        for group, spread in enumerate(spreads):
            if spread is None:
                continue
            axes.bar(
                group - 0.4 + (index + 0.5) * height,
                spread.median,
                height,
                yerr=[[spread.median - spread.low], [spread.high - spread.median]],
                error_kw={"linewidth": 0.8, "ecolor": "#222222"},
                color=_COLOURS[index % len(_COLOURS)],
                label=name if group == 0 else None,
            )
    labels = [group.replace(", ", "\n") for group in chart.groups]
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylabel(chart.unit)
    axes.set_title(chart.title, loc="left")
    if chart.logarithmic:
        axes.set_yscale("log")
    if chart.line is not None:
        axes.axhline(chart.line, color="#222222", linewidth=0.8, linestyle="--")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, metadata={"Date": None})
