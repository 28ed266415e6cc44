"""`poolkit dashboard`: what it prints is whole, fits its readers, and speaks of real metrics."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import Result

from poolkit.cli.dashboard import Dashboard, text
from poolkit.settings import DatabaseSettings

pytest.importorskip("opentelemetry")
from poolkit.telemetry.attributes import POOL_NAME
from poolkit.telemetry.catalogue import METRICS, Kind, Metric

Run = Callable[..., Result]

COLUMNS = 24
RUNBOOKS = Path(__file__).parents[2] / "docs" / "runbooks"
EVERY_METRIC = {"job", "instance", "worker", "db_system_name", "db_namespace"} | {
    "server_address", "server_port", POOL_NAME.replace(".", "_"),
}  # fmt: skip
NOT_CHARTED = {
    "db.client.connection.idle.min",  # a setting that does not change
    "poolkit.pool.utilisation",  # of one worker; the charts have that of the instance
}


def dashboard() -> dict[str, Any]:
    return json.loads(text(Dashboard.GRAFANA))


def panels() -> list[dict[str, Any]]:
    return dashboard()["panels"]


def expressions() -> Iterator[tuple[str, str]]:
    """Where each stands, and what it is."""
    for panel in panels():
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for group in yaml.safe_load(text(Dashboard.ALERTS))["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


def series() -> dict[str, Metric]:
    """Every name that is in Prometheus, and its metric."""
    found = {}
    for metric in METRICS.values():
        parts = ("_bucket", "_count", "_sum") if metric.kind is Kind.HISTOGRAM else ("",)
        found |= {metric.prometheus + part: metric for part in parts}
    return found


# -- The command ---------------------------------------------------------------------------


@pytest.mark.parametrize("which", Dashboard)
def test_prints_the_file_as_it_is(run: Run, which: Dashboard) -> None:
    """On a pipe: the bytes of the shipped file, and nothing on stderr."""
    result = run("dashboard", which)

    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == text(which)
    assert result.stdout.isascii()


def test_a_name_that_there_is_not(run: Run) -> None:
    """Exit code 2, with the names that there are, and nothing on stdout."""
    result = run("dashboard", "kibana")

    assert (result.exit_code, result.stdout) == (2, "")
    assert all(name in result.stderr for name in Dashboard)


def test_help_names_what_there_is(run: Run) -> None:
    """--help names all three."""
    result = run("dashboard", "--help")

    assert result.exit_code == 0
    assert all(name in result.stdout for name in Dashboard)


@pytest.mark.parametrize("which", [Dashboard.GRAFANA, Dashboard.ALERTS])
def test_runbooks_elsewhere(run: Run, which: Dashboard) -> None:
    """--runbooks makes every link absolute, and changes nothing else."""
    there = run("dashboard", which, "--runbooks", "https://wiki.example.com/db/").stdout

    assert there.replace("https://wiki.example.com/db/", "runbooks/") == text(which)
    assert not re.search(r"[ (]runbooks/", there)


def test_an_address_that_would_break_the_file(run: Run) -> None:
    """Quotes and spaces in --runbooks are refused."""
    assert run("dashboard", "alerts", "--runbooks", 'x"y z').exit_code == 2


def test_needs_no_telemetry_package() -> None:
    """The files are printed where OpenTelemetry is not installed."""
    code = (
        "import sys; sys.modules['opentelemetry'] = None; sys.argv[1:] = ['dashboard', 'alerts'];"
        "import poolkit.cli; poolkit.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout) == (0, text(Dashboard.ALERTS)), done.stderr


# -- Grafana -------------------------------------------------------------------------------


def test_panels_have_their_places() -> None:
    """They fit on the grid, no two overlap, and no id is there twice."""
    places = [(panel["title"], panel["gridPos"]) for panel in panels()]

    assert all(p["x"] >= 0 and p["x"] + p["w"] <= COLUMNS for _, p in places)
    for (one, a), (other, b) in combinations(places, 2):
        apart_x = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        apart_y = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert apart_x or apart_y, (one, other)
    ids = [panel["id"] for panel in panels()]
    assert len(ids) == len(set(ids))


def test_can_be_imported_and_provisioned() -> None:
    """The data source is asked for at import, or chosen by the variable of the same name."""
    whole = dashboard()
    (wanted,) = whole["__inputs"]
    variables = {variable["name"]: variable for variable in whole["templating"]["list"]}

    assert whole["schemaVersion"] >= 36
    assert whole["id"] is None
    assert wanted["type"] == variables[wanted["name"]]["type"] == "datasource"
    sources = [p["datasource"]["uid"] for p in panels() if p["type"] != "row"]
    sources += [t["datasource"]["uid"] for p in panels() for t in p.get("targets", ())]
    assert set(sources) == {"${DS_PROMETHEUS}"}
    assert {"job", "instance", "pool"} <= variables.keys()
    assert all(variables[name]["multi"] for name in ("job", "instance", "pool"))


@pytest.mark.parametrize(
    "panel", [p for p in panels() if p["type"] != "row"], ids=lambda p: p["title"]
)
def test_a_panel_says_what_it_shows(panel: dict[str, Any]) -> None:
    """A unit, a description whose links lead to runbooks, and a query that heeds the variables."""
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["description"].endswith(".")
    for page in re.findall(r"\]\(runbooks/([^)]+)\)", panel["description"]):
        assert (RUNBOOKS / page).is_file()
    references = [target["refId"] for target in panel["targets"]]
    assert len(references) == len(set(references)) > 0
    for target in panel["targets"]:
        selectors = re.findall(r"\{([^{}]*)\}", target["expr"])
        chosen = 'job=~"$job", instance=~"$instance", db_client_connection_pool_name=~"$pool"'
        assert selectors
        assert all(selector.startswith(chosen) for selector in selectors), target["expr"]


def test_every_metric_is_charted() -> None:
    """What the catalogue has is in a panel, or there is a reason why not."""
    shown = text(Dashboard.GRAFANA)
    left_out = {name for name, metric in METRICS.items() if metric.prometheus not in shown}

    assert left_out <= NOT_CHARTED


# -- Names ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("where", "expression"), [*expressions()])
def test_names_are_those_of_the_catalogue(where: str, expression: str) -> None:
    """Every metric of a query exists, and has the labels that it is chosen by."""
    labels = {a.replace(".", "_") for metric in METRICS.values() for a in metric.attributes}
    known = series()
    bare = re.sub(r'"[^"]*"', "", expression)
    named = set(re.findall(r"\b(?:db|poolkit)_\w+", bare)) - EVERY_METRIC - labels

    assert named
    assert named <= known.keys(), where
    for name, selector in re.findall(r"(\w+)\{([^}]*)\}", expression):
        own = {attribute.replace(".", "_") for attribute in known[name].attributes}
        assert set(re.findall(r"(\w+)[=!]", selector)) <= EVERY_METRIC | own, where


# -- Logfire -------------------------------------------------------------------------------


def queries() -> list[str]:
    return [query for query in text(Dashboard.LOGFIRE).split(";") if "SELECT" in query]


def metrics_of(query: str) -> set[str]:
    return set(re.findall(r"'((?:db\.client|poolkit)\.[\w.]+)'", query))


@pytest.mark.parametrize("query", queries(), ids=range(len(queries())))
def test_logfires_names_are_those_of_the_catalogue(query: str) -> None:
    """Every quoted name is a metric, or an attribute that the query's metrics have."""
    if "FROM records" in query:
        return
    named = metrics_of(query)
    attributes = set(re.findall(r"attributes->>'([\w.]+)'", query))
    metrics = named - attributes

    assert metrics
    assert metrics <= METRICS.keys()
    own = {a for name in metrics for a in METRICS[name].attributes}
    assert attributes <= own | {POOL_NAME}


def test_logfire_has_a_panel_for_every_metric() -> None:
    """What Grafana shows, Logfire shows."""
    left_out = METRICS.keys() - {name for query in queries() for name in metrics_of(query)}

    assert left_out <= NOT_CHARTED | {"poolkit.pool.overloaded", "db.client.connection.idle.max"}


def test_settings_that_are_named_exist() -> None:
    """What the files tell to set can be set."""
    known = {DatabaseSettings.variable(name) for name in DatabaseSettings.model_fields}
    for which in Dashboard:
        assert set(re.findall(r"\bDATABASE_[A-Z_]+[A-Z]\b", text(which))) <= known
