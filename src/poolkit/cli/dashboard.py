"""``poolkit dashboard``: what is shipped for Grafana, Prometheus and Logfire."""

from __future__ import annotations

import re
from enum import StrEnum
from importlib.resources import files

_ADDRESS = re.compile(r"[^\s\"'()<>\\]+")
_RUNBOOK = re.compile(r"(?<=[ (])runbooks/(?=[\w-]+\.md)")


class Dashboard(StrEnum):
    """What there is to print."""

    GRAFANA = "grafana"
    ALERTS = "alerts"
    LOGFIRE = "logfire"


_FILES = {
    Dashboard.GRAFANA: "grafana.json",
    Dashboard.ALERTS: "alerts.yml",
    Dashboard.LOGFIRE: "logfire.sql",
}


def is_address(address: str) -> bool:
    """Whether it fits into JSON, YAML and a link as it stands."""
    return _ADDRESS.fullmatch(address) is not None


def text(which: Dashboard, runbooks: str | None = None) -> str:
    """The file, its links to the runbooks beginning with an address of the operator's."""
    # From the root, because the package around it needs OpenTelemetry.
    file = files("poolkit").joinpath("telemetry", "dashboards", _FILES[which])
    content = file.read_text(encoding="utf-8")
    if runbooks is None:
        return content
    return _RUNBOOK.sub(lambda _: f"{runbooks.rstrip('/')}/", content)
