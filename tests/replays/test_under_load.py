"""What happens to a busy service, replayed: poolkit does what its page says."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from replays import cancel_storm, conflicts, ledger, lost_commit, restart, soak
from replays.engines import POOLKIT, RECIPE
from replays.ledger import AGREED, Ledger
from replays.model import SERVED, STILL_WAITING

from poolkit import FaultKind, Outcome
from poolkit.testing import postgres

ROOT = Path(__file__).parent.parent.parent
LOADED = 1.0
"""Seconds that a loaded machine may add."""


async def test_restart_under_load():
    """Whoever comes when the server is back is served, at once, and the rows are as reported."""
    async with postgres() as own:
        timeline = await restart.run(own, POOLKIT, apart=0.5)
    found = timeline.findings
    assert len(timeline.served) > restart.RESTARTS * restart.WORKERS
    assert found[restart.LATE_FAILURES] == "0"
    assert found[restart.DISAGREE] == AGREED
    assert (found[restart.SLOTS], found[restart.SESSIONS]) == ("0", "0")
    assert float(found[restart.FIRST_SUCCESS].partition(" ")[0]) <= 0.5 + LOADED
    assert STILL_WAITING not in timeline.results


async def test_the_lost_reply_to_commit(server):
    """Each is reported as unknown, none is done again, and the rows are as reported."""
    timeline = await lost_commit.run(server, POOLKIT, frozen=2)
    found = timeline.findings
    lost = int(found[lost_commit.LOST])
    assert lost_commit.TRANSACTIONS / 3 < lost < lost_commit.TRANSACTIONS
    assert found[lost_commit.UNKNOWN] == str(lost)
    assert found[lost_commit.AGAIN] == "0"
    assert 0 < int(found[lost_commit.THERE]) < lost
    assert found[lost_commit.DISAGREE] == AGREED
    assert timeline.results[SERVED] == lost_commit.TRANSACTIONS - lost


async def test_a_replay_tells_who_writes_twice(server):
    """The loop that repeats after every error does: the replay would notice."""
    timeline = await lost_commit.run(server, RECIPE, transactions=40, frozen=0)
    assert "there twice" in timeline.findings[lost_commit.DISAGREE]


async def test_cancel_storm(server):
    """No slot is missing, no session is left, and the rows are as reported."""
    timeline = await cancel_storm.run(server, POOLKIT, requests=1500)
    found = timeline.findings
    assert found[cancel_storm.SLOTS] == "0"
    assert found[cancel_storm.LIMIT_PASSED] == "0"
    assert found[cancel_storm.LEFT] == "0"
    assert found[cancel_storm.DISAGREE] == AGREED
    ended = float(found[cancel_storm.ABANDONED].removesuffix(" s"))
    assert ended < cancel_storm.STATEMENT_TIMEOUT + LOADED
    assert STILL_WAITING not in timeline.results
    assert timeline.results[SERVED] > 100
    assert timeline.results[cancel_storm.CANCELLED] > 100


async def test_conflicts(server):
    """Each unit is done exactly once, though many have to be done again."""
    timeline = await conflicts.run(server, POOLKIT, units=400)
    found = timeline.findings
    assert timeline.results == {SERVED: 400}
    assert found[conflicts.DONE] == "400 of 400"
    assert found[conflicts.DISAGREE] == AGREED
    assert (found[conflicts.SUM], found[conflicts.COUNTED]) == ("0", "0")
    assert FaultKind.SERIALIZATION_FAILURE in found[conflicts.AGAIN]
    assert FaultKind.DEADLOCK in found[conflicts.AGAIN]


async def test_conflicts_are_there(server):
    """Without retries units fail, and PostgreSQL did nothing of them: the replay is hard."""
    timeline = await conflicts.run(server, RECIPE, units=200)
    assert timeline.results[FaultKind.SERIALIZATION_FAILURE] > 0
    assert timeline.results[FaultKind.DEADLOCK] > 0
    assert timeline.findings[conflicts.DISAGREE] == AGREED


async def test_a_short_soak():
    """What holds for half an hour holds for a quarter of a minute."""
    said = []
    async with postgres() as own:
        timeline = await soak.run(own, seconds=15, every=7.5, seed=3, say=said.append)
    assert timeline.findings[soak.BROKEN] == "nothing"
    assert said
    assert timeline.served


def test_the_soak_ends_by_ctrl_c():
    """It checks all once more, says how it went, and leaves nothing running."""
    command = [sys.executable, "-m", "replays.soak", "--minutes", "5", "--seed", "3"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert "--seed 3" in process.stdout.readline()
        assert "began" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert f"{soak.BROKEN}: nothing" in said


async def test_the_soak_tells_what_breaks(monkeypatch):
    """A row that is there against what was reported ends it with a word on it."""
    monkeypatch.setattr(Ledger, "committed", lambda self, row: self.failed(row, ValueError()))
    async with postgres() as own:
        timeline = await soak.run(own, seconds=1, every=1, say=lambda _: None)
    assert "reported as not committed and there" in timeline.findings[soak.BROKEN]


@pytest.mark.parametrize(
    ("told", "rows", "found"),
    [
        ("committed", {1: 1}, AGREED),
        ("committed", {}, "1 reported committed and not there"),
        ("committed", {1: 2}, "1 there twice"),
        (Outcome.ROLLED_BACK, {}, AGREED),
        (Outcome.ROLLED_BACK, {1: 1}, "1 reported as not committed and there"),
        (Outcome.NOT_SENT, {1: 1}, "1 reported as not committed and there"),
        (Outcome.UNKNOWN, {}, AGREED),
        (Outcome.UNKNOWN, {1: 1}, AGREED),
        (Outcome.UNKNOWN, {1: 1, 2: 1}, "1 there and never written"),
    ],
)
def test_the_ledger(monkeypatch, told, rows, found):
    """It notices each way in which rows and reports may differ."""
    book = Ledger()
    row = book.new_row()
    if told == ledger.COMMITTED:
        book.committed(row)
    else:
        monkeypatch.setattr(ledger, "classify", lambda _: type("", (), {"outcome": told}))
        book.failed(row, ValueError())
    assert book.disagreements(rows) == found
