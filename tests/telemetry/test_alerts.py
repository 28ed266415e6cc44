"""The alert rules: whole, right by promtool, and true on a real Prometheus under real faults."""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from observatory import board, phases, prometheus, rules
from observatory.stage import INTERVAL, staged

from poolkit.cli.dashboard import Dashboard, text

FACTOR = 60.0
"""By how much the rules are faster in the run with faults: a second stands for a minute."""

RUNBOOKS = Path(__file__).parents[2] / "docs" / "runbooks"
HERE = Path(__file__).parent
CRITICAL = {
    "PoolkitUtilisationHigh",
    "PoolkitPoolTimeouts",
    "PoolkitWaitersStanding",
    "PoolkitConnectFailures",
    "PoolkitStatementTimeouts",
    "PoolkitServerConnectionsHigh",
    "PoolkitLongHolder",
}


def installed(name: str) -> str:
    found = prometheus.binary(name)
    if found is None:
        if os.environ.get("CI"):
            pytest.fail(f"{name} is not installed, and CI must have it")
        pytest.skip(f"{name} is not installed")
    return found


def promtool(*arguments: str, cwd: Path) -> None:
    done = subprocess.run(
        [installed("promtool"), *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def alerts() -> dict[str, dict]:
    (group,) = yaml.safe_load(text(Dashboard.ALERTS))["groups"]
    return {rule["alert"]: rule for rule in group["rules"]}


# -- As they are written -------------------------------------------------------------------


def test_what_wakes_somebody() -> None:
    """Seven alerts are critical, the others warnings."""
    by_severity = {name: rule["labels"]["severity"] for name, rule in alerts().items()}

    assert {name for name, severity in by_severity.items() if severity == "critical"} == CRITICAL
    assert set(by_severity.values()) == {"critical", "warning"}


@pytest.mark.parametrize("name", alerts())
def test_an_alert_says_what_it_is(name: str) -> None:
    """It names the pool or the server, its value or kind, and links to its page, which names it."""
    annotations = alerts()[name]["annotations"]
    page = RUNBOOKS.parent / annotations["runbook_url"]

    assert re.search(r"pool_name|server_address", annotations["summary"])
    assert annotations["description"].endswith(".")
    assert name in page.read_text(encoding="utf-8")


def test_every_page_is_an_alerts() -> None:
    """No page is left over, and the index has them all."""
    pages = {page.name for page in RUNBOOKS.glob("*.md")} - {"index.md"}
    linked = {Path(rule["annotations"]["runbook_url"]).name for rule in alerts().values()}
    index = (RUNBOOKS / "index.md").read_text(encoding="utf-8")

    assert pages == linked
    assert len(linked) == len(alerts())
    assert all(f"[{name}]" in index for name in alerts())


@pytest.mark.parametrize("name", alerts())
def test_workers_are_added_up(name: str) -> None:
    """Several workers of an instance are one, unless it is about the server."""
    expression = alerts()[name]["expr"]

    assert "without (worker" in expression or "by (job, server_address" in expression


@pytest.mark.parametrize("name", [n for n, rule in alerts().items() if "offset" in rule["expr"]])
def test_growth_has_one_form(name: str) -> None:
    """Each counter's growth is written so that the first event of a series counts."""
    inner = " ".join(re.findall(r"\) \((.*)\) >", alerts()[name]["expr"], re.DOTALL)[0].split())
    counter = re.escape(inner.split(" - ")[0])
    window = r"\[1h\] offset \d+m ?"

    assert re.fullmatch(
        rf"{counter} - last_over_time\( ?{counter}{window}\) >= 0 or {counter}", inner
    )


def test_promtool_accepts_them(tmp_path: Path) -> None:
    """`promtool check rules` finds nothing."""
    (tmp_path / "alerts.yml").write_text(text(Dashboard.ALERTS))

    promtool("check", "rules", "alerts.yml", cwd=tmp_path)


def test_each_fires_when_it_should_and_not_otherwise(tmp_path: Path) -> None:
    """`promtool test rules`: made-up series, among them bursts, deployments and restarts."""
    (tmp_path / "alerts.yml").write_text(text(Dashboard.ALERTS))
    shutil.copy(HERE / "alerts_test.yml", tmp_path)

    promtool("test", "rules", "alerts_test.yml", cwd=tmp_path)


def test_each_is_tested() -> None:
    """No alert is missing from the made-up series."""
    tests = (HERE / "alerts_test.yml").read_text()

    assert [n for n in alerts() if n not in tests and "PoolkitConnections" not in n] == []


def test_promtool_accepts_the_dashboards_queries(tmp_path: Path) -> None:
    """Each query of a panel is PromQL."""
    queries = [t.expression for panel in board.panels(15) for t in panel.targets]
    recorded = [{"record": f"panel:{i}", "expr": query} for i, query in enumerate(queries)]
    recorded_rules = {"groups": [{"name": "dashboard", "rules": recorded}]}
    (tmp_path / "queries.yml").write_text(yaml.safe_dump(recorded_rules))

    assert len(queries) > 30
    promtool("check", "rules", "queries.yml", cwd=tmp_path)


def test_scaling_changes_durations_alone() -> None:
    """Ranges, offsets, `for:` and the one threshold in seconds; nothing else."""
    source = """
groups: [{name: g, rules: [{alert: A, for: 5m, expr: 'a{x="5m"} - b[1h] offset 10m > 300'},
  {alert: B, expr: 'max without (worker) (c_longest_use_seconds) > 300'}]}]
"""
    (group,) = yaml.safe_load(rules.scaled(source, 60))["groups"]
    one, other = group["rules"]

    assert one == {
        "alert": "A", "for": "5000ms", "expr": 'a{x="5m"} - b[60000ms] offset 10000ms > 300',
    }  # fmt: skip
    assert other["expr"] == "max without (worker) (c_longest_use_seconds) > 5"


# -- On a real Prometheus ------------------------------------------------------------------


@pytest.mark.timeout(400)
def test_a_service_under_faults() -> None:
    """Each alert fires in its phase, none besides, none when calm; every panel has data."""
    installed("prometheus")
    began = time.time()
    with staged(FACTOR) as stage:
        for phase in phases.PHASES:
            happened = phases.run(stage, phase)
            assert (happened.missing, happened.unexpected) == (set(), set()), phase.name
            for annotations in happened.annotations.values():
                assert not re.search("<no value>|<error", str(annotations)), annotations
        empty = [
            (panel.title, target.legend)
            for panel in board.panels(INTERVAL / FACTOR)
            for target in panel.targets
            if not stage.prometheus.query_range(target.expression, began, time.time(), 0.5)
        ]
        problems = stage.prometheus.problems()

    assert empty == []
    assert problems == []
    assert set(alerts()) == set().union(*(phase.fires for phase in phases.PHASES))
