"""The recipe for scripts: ends of every kind, each with a clear word and nothing left behind."""

import asyncio
import importlib.util
import itertools
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import asyncpg
import pytest

typer = pytest.importorskip("typer")

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "write_scripts.py"
SESSIONS = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'count-up'"
ACTIVE = f"{SESSIONS} AND state = 'active' AND query LIKE 'INSERT%'"
numbers = itertools.count()


@pytest.fixture
def url(server, monkeypatch) -> str:
    url = server.create_database(f"scripts_{next(numbers)}")
    monkeypatch.setenv("DATABASE_URL", url)
    return url


def ask(url: str, query: str):
    """What a superuser sees, from outside."""

    async def fetch():
        connection = await asyncpg.connect(url)
        try:
            return await connection.fetchval(query)
        finally:
            await connection.close()

    return asyncio.run(fetch())


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(EXAMPLE), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def load():
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("write_scripts", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_counts_and_ends(url):
    """Exit code 0, the result on stdout, no word on stderr, no session left."""
    done = run("--rows", "3")

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split()[-1] == "3"
    assert ask(url, SESSIONS) == 0


async def test_the_limits_are_its_own(url, monkeypatch):
    """A statement takes longer than the service's limit; the name is the script's."""
    monkeypatch.setenv("DATABASE_STATEMENT_TIMEOUT", "0.1")
    monkeypatch.setenv("DATABASE_APPLICATION_NAME", "service")
    recipe = load()
    slow = recipe.text("INSERT INTO counted SELECT :n FROM pg_sleep(0.3)")
    own = recipe.text
    monkeypatch.setattr(recipe, "text", lambda sql: slow if "VALUES" in sql else own(sql))

    counting = asyncio.create_task(recipe.count_up(1))
    connection = await asyncpg.connect(url)
    async with asyncio.timeout(20):
        while await connection.fetchval(ACTIVE) != 1:
            await asyncio.sleep(0.01)

    assert await counting == 1
    await connection.close()


def test_many_runs_in_one_process(url):
    """Sixty times asyncio.run: the server never has more than one session of it, and none after."""
    recipe = load()

    for _ in range(60):
        assert asyncio.run(recipe.count_up(1)) == 1
        assert ask(url, SESSIONS) <= 1

    assert ask(url, SESSIONS) == 0


def test_ctrl_c_ends_the_statement_at_the_server_too(url, server, tmp_path):
    """SIGINT in mid-query: exit code 130, no traceback, the backend is gone, nothing committed."""
    script = tmp_path / "slow.py"
    script.write_text(
        EXAMPLE.read_text()
        .replace(
            "INSERT INTO counted VALUES (:n)", "INSERT INTO counted SELECT :n FROM pg_sleep(60)"
        )
        .replace("TEMPORARY TABLE", "TABLE")
        .replace(" ON COMMIT DROP", "")
    )
    process = subprocess.Popen(
        [sys.executable, "-W", "error", str(script)], stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(url, ACTIVE, 1)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=20)
        took = time.monotonic() - began
    finally:
        process.kill()
        process.wait()

    assert process.returncode == 130
    assert "Traceback" not in told
    assert took < 10
    wait_for(url, SESSIONS, 0)
    assert ask(url, "SELECT to_regclass('counted')") is None


def wait_for(url: str, query: str, expected: int) -> None:
    deadline = time.monotonic() + 20
    while ask(url, query) != expected:
        assert time.monotonic() < deadline, query
        time.sleep(0.05)


def test_where_the_database_is_away_it_says_so(monkeypatch):
    """Exit code 1 and a line that names the address, no traceback, no password."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        monkeypatch.setenv("DATABASE_URL", f"postgresql://u:secret@127.0.0.1:{port}/d")
        monkeypatch.setenv("DATABASE_CONNECTION_TIMEOUT", "0.5")
        done = run()

    assert (done.returncode, done.stdout) == (1, "")
    assert f"cannot connect to 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stderr


@pytest.mark.parametrize(
    "wrong", [{}, {"DATABASE_URL": "postgresql://h/d", "DATABASE_POOL_TIMEOUT": "x"}]
)
def test_settings_that_will_not_do_are_named(wrong, monkeypatch):
    """Exit code 1, and the variable that is missing or wrong."""
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)

    done = run()

    assert (done.returncode, done.stdout) == (1, "")
    assert (list(wrong) or ["DATABASE_URL"])[-1] in done.stderr
    assert "Traceback" not in done.stderr
