"""The benchmarks run, and those of their figures that are exact hold."""

import asyncio
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import asyncpg
import pytest

ROOT = Path(__file__).parent.parent
CONTESTANTS = {
    "poolkit": 3,
    "SQLAlchemy": 3,
    "SQLAlchemy, pre-ping": 6,
    "production recipe": 9,
    "asyncpg.Pool": 3,
    "poolkit, AUTOCOMMIT": 1,
    "poolkit, after the idle window": 4,
}


@pytest.fixture
def benchmarks(monkeypatch):
    """The package, which is not installed."""
    monkeypatch.syspath_prepend(ROOT)


def test_round_trips(tmp_path):
    """Exact counts, the table, and the page."""
    command = [sys.executable, "-m", "benchmarks", "--quick", "--only", "roundtrips"]
    done = subprocess.run(
        [*command, "--output", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    (result,) = json.loads((tmp_path / "results.json").read_text()).values()
    counts = {name: int(count) for name, count in result["figures"]}
    assert counts == counts | CONTESTANTS
    assert all(row["met"] for row in result["rows"])
    assert "met" in done.stdout
    assert "# Benchmarks" in (tmp_path / "index.md").read_text()


def test_web(tmp_path):
    """Each contestant answers over HTTP, and ends when it is told."""
    command = [sys.executable, "-m", "benchmarks", "--quick", "--only", "web"]
    subprocess.run(
        [*command, "--output", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    (result,) = json.loads((tmp_path / "results.json").read_text()).values()
    contestants = ["SessionDep", "AutocommitSessionDep", "get_db", "get_db, no pre-ping"]
    assert [line[1] for line in result["figures"]] == contestants * 2
    assert len(result["rows"]) == 8


async def test_proxy_adds_latency_and_goes_silent(benchmarks, server):
    """At least the round-trip time it was told, and nothing once it is frozen."""
    through = import_module("benchmarks.engines").through
    proxy = import_module("benchmarks.proxy").proxy
    clock = asyncio.get_running_loop().time
    with proxy(server.port) as between:
        connection = await asyncpg.connect(through(server.url, between.port))
        before = between.round_trips()
        between.set_rtt(0.05)
        began = clock()
        await connection.execute("SELECT 1")
        assert clock() - began >= 0.05
        assert between.round_trips() - before == 1
        assert between.connects() == 1
        between.freeze()
        with pytest.raises(TimeoutError):
            await connection.execute("SELECT 1", timeout=0.2)
        connection.terminate()


def test_a_verdict_comes_from_the_run(benchmarks):
    """The statistics that verdicts are made of."""
    model = import_module("benchmarks.model")
    assert model.Spread(2, 1.5, 2.5) == model.Spread.of([1, 2, 3])
    assert model.Spread(7, 7, 7) == model.Spread.of([7])
    assert model.ratios([2, 3, 4], [1, 1, 1]).median == 3
    assert model.percentile([3, 1, 2, 4], 50) == 2
    assert model.rotated(["a", "b", "c"], 4) == ["b", "c", "a"]
