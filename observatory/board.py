"""The shipped dashboard's panels and queries, with Grafana's variables filled in."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from poolkit.cli.dashboard import Dashboard, text

_SCRAPES_OF_A_RATE = 4
"""As Grafana has it for ``$__rate_interval``."""


@dataclass(frozen=True, slots=True)
class Target:
    """One query of a panel.

    Attributes:
        expression: In PromQL.
        legend: The name of its series, with labels in double braces.
    """

    expression: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel; of a row it is the title alone.

    Attributes:
        type: In Grafana's words.
        title: As shown.
        unit: Of its values, in Grafana's words.
        place: Its ``x``, ``y``, ``w`` and ``h`` on the grid of 24 columns.
        targets: Its queries.
        options: The rest, as in the JSON.
    """

    type: str
    title: str
    unit: str
    place: dict[str, int]
    targets: tuple[Target, ...]
    options: dict[str, Any]


def panels(interval: float) -> list[Panel]:
    """All of them.

    Args:
        interval: Seconds between scrapes.
    """
    return [_panel(panel, interval) for panel in json.loads(text(Dashboard.GRAFANA))["panels"]]


def _panel(panel: dict[str, Any], interval: float) -> Panel:
    return Panel(
        type=panel["type"],
        title=panel["title"],
        unit=panel.get("fieldConfig", {}).get("defaults", {}).get("unit", "short"),
        place=panel["gridPos"],
        targets=tuple(
            Target(filled_in(target["expr"], interval), target["legendFormat"])
            for target in panel.get("targets", ())
        ),
        options=panel.get("fieldConfig", {}),
    )


def filled_in(expression: str, interval: float) -> str:
    """All jobs, instances and pools; rates over as many scrapes as in Grafana."""
    every = f"{round(1000 * _SCRAPES_OF_A_RATE * interval)}ms"
    for name in ("$job", "$instance", "$pool"):
        expression = expression.replace(f'"{name}"', '".*"')
    return expression.replace("$__rate_interval", every)
