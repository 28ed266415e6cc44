"""``python -m observatory``: all phases, slower than the test, the picture and its page."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from observatory.phases import PHASES, Happened, run
from observatory.picture import draw
from observatory.prometheus import binary
from observatory.stage import INTERVAL, staged

OUTPUT = Path(__file__).parent.parent / "docs" / "telemetry"


def main() -> int:
    """Run it; 1 if an alert did not fire where it should, or fired where it should not."""
    arguments = _arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    with staged(arguments.factor) as stage:
        happened = []
        for phase in PHASES:
            happened.append(run(stage, phase))
            print(_line(happened[-1]), flush=True)
        draw(stage.prometheus, happened, arguments.factor, arguments.output / "dashboard.png")
        problems = stage.prometheus.problems()
    page = _page(happened, arguments.factor)
    (arguments.output / "index.md").write_text(page, encoding="utf-8")
    wrong = any(one.missing or one.unexpected for one in happened)
    for problem in problems:
        print(problem)
    return int(wrong or bool(problems))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m observatory", description=__doc__)
    parser.add_argument(
        "--factor", type=float, default=30.0, help="by how much the rules' durations are shortened"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where to write")
    return parser.parse_args()


def _line(one: Happened) -> str:
    fired = ", ".join(_new(one)) or "nothing"
    wrong = "".join(
        f"; {word}: {', '.join(sorted(names))}"
        for word, names in (("MISSING", one.missing), ("UNEXPECTED", one.unexpected))
        if names
    )
    return f"{one.phase.name:<22}{one.ended - one.began:6.1f} s  {fired}{wrong}"


def _new(one: Happened) -> list[str]:
    """Alerts that began to fire in it."""
    return [name for name in one.fired if name not in one.before]


def _page(happened: Sequence[Happened], factor: float) -> str:
    rows = []
    for one in happened:
        fired = [
            f"[{name}](../runbooks/{_runbook(one, name)}) after {one.fired[name]:.1f} s"
            for name in _new(one)
        ]
        told = "<br>".join(fired) or "none"
        rows.append(
            f"| {one.phase.name} | {one.phase.story} | {one.ended - one.began:.0f} s | {told} |"
        )
    return "\n".join([
        "# The dashboard, on a run with faults",
        "",
        "A service with poolkit on a throwaway PostgreSQL, scraped by a real Prometheus with the",
        "shipped alert rules, whose durations (`for:`, ranges, offsets) were made shorter by a",
        f"factor of {factor:g}, as was the time between scrapes ({INTERVAL:g} s): a second here",
        f"stands for {factor:g} there.",
        "",
        "| phase | what happens | lasted | alerts that began to fire |",
        "| --- | --- | --- | --- |",
        *rows,
        "",
        "![The dashboard's panels over that run](dashboard.png)",
        "",
        "Grafana has not drawn this picture. It is made from the dashboard's JSON: its panels, at",
        "their places, with the answers of that Prometheus to their own queries. Panels of one",
        "number show the highest of the run, where Grafana shows the last.",
        "",
        _where(),
        "",
    ])  # fmt: skip


def _runbook(one: Happened, name: str) -> str:
    return one.annotations[name]["runbook_url"].removeprefix("runbooks/")


def _where() -> str:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("sqlalchemy", "asyncpg")]
    told = subprocess.run(
        [binary() or "prometheus", "--version"], capture_output=True, text=True, check=True
    )
    prometheus = (told.stdout or told.stderr).split()[2].partition("+")[0]
    return (
        f"Written by `make observatory` on {time.strftime('%Y-%m-%d')}: Python"
        f" {platform.python_version()}, {', '.join(versions)}, Prometheus {prometheus},"
        " everything on 127.0.0.1. A test does the same, faster, and holds it to this."
    )


if __name__ == "__main__":
    raise SystemExit(main())
