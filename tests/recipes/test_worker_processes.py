"""The workers of docs/how-to/run-workers.md: a real Celery, forks, threads, many short loops."""

import asyncio
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import text

from poolkit import get_engine, session
from poolkit.testing import PostgresServer, postgres

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
BOUND = 30.0
SLOTS = 30


@pytest.fixture(scope="module")
def small_server() -> Iterator[PostgresServer]:
    """A server that soon has no slot left."""
    with postgres(server_settings={"max_connections": SLOTS}) as running:
        yield running


@pytest.fixture
def admin(small_server, monkeypatch) -> Iterator[psycopg.Connection]:
    """A connection to a database with the table; the environment names the database."""
    url = small_server.create_database(f"work_{uuid4().hex}")
    monkeypatch.setenv("DATABASE_URL", url)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE TABLE orders (id serial, amount int)")
        yield connection


def sessions(admin: psycopg.Connection) -> int:
    asked = """
        SELECT count(*) FROM pg_stat_activity
        WHERE datname = current_database() AND pid != pg_backend_pid()
    """
    return admin.execute(asked).fetchone()[0]


def orders(admin: psycopg.Connection) -> list[int]:
    return [row[0] for row in admin.execute("SELECT amount FROM orders ORDER BY amount")]


def eventually(true: Callable[[], object]) -> None:
    end = time.monotonic() + BOUND
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


async def add(amount: int) -> None:
    async with session() as opened:
        await opened.execute(text("INSERT INTO orders (amount) VALUES (:a)"), {"a": amount})


# -- Loops, threads, forks ---------------------------------------------------------------------


def test_sixty_loops_in_a_row_leave_no_session(admin) -> None:
    """`asyncio.run` for each task, twice as many as the server has slots."""
    for amount in range(60):
        asyncio.run(add(amount))

    assert orders(admin) == [*range(60)]
    eventually(lambda: sessions(admin) == 0)


def test_threads_with_a_loop_for_each_task(admin) -> None:
    """Four threads at once; never more sessions than tasks that run."""
    most = 0

    def work(amount: int) -> None:
        nonlocal most
        asyncio.run(add(amount))

    with ThreadPoolExecutor(4) as threads:
        for _ in threads.map(work, range(60)):
            most = max(most, sessions(admin))

    assert orders(admin) == [*range(60)]
    assert most <= 4 + 4  # those that are just ending
    eventually(lambda: sessions(admin) == 0)


def test_threads_with_a_loop_of_their_own(admin) -> None:
    """One long-lived loop in each: one session in each."""
    done = threading.Barrier(5, timeout=BOUND)

    def work(first: int) -> None:
        with asyncio.Runner() as runner:
            for amount in range(first, 60, 4):
                runner.run(add(amount))
            done.wait()
            done.wait()

    with ThreadPoolExecutor(4) as threads:
        working = [threads.submit(work, first) for first in range(4)]
        done.wait()
        assert sessions(admin) == 4
        done.wait()
        for each in working:
            each.result()

    assert orders(admin) == [*range(60)]
    eventually(lambda: sessions(admin) == 0)


async def test_forks_of_a_parent_that_is_connected(admin) -> None:
    """Each child opens connections of its own; the parent's go on."""
    engine = get_engine()
    async with engine.connect() as connection:
        mine = await connection.scalar(text("SELECT pg_backend_pid()"))
        context = multiprocessing.get_context("fork")
        children = [
            context.Process(target=_work_in_a_fork, args=(range(first, 60, 3),))
            for first in range(3)
        ]
        for child in children:
            child.start()
        for child in children:
            await asyncio.to_thread(child.join, BOUND)

        assert [child.exitcode for child in children] == [0, 0, 0]
        assert await connection.scalar(text("SELECT pg_backend_pid()")) == mine
    assert orders(admin) == [*range(60)]


def _work_in_a_fork(amounts: range) -> None:
    asyncio._set_running_loop(None)  # the parent's: it was in a coroutine as it forked
    for amount in amounts:
        asyncio.run(add(amount))


# -- Celery ------------------------------------------------------------------------------------

MORE_TASKS = """
import asyncio, json, os
from pathlib import Path

from celery.signals import worker_ready
from celery_tasks import app, run
from poolkit import get_engine, session
from sqlalchemy import text

here = Path(__file__).parent
app.conf.update(
    broker_url="filesystem://localhost",
    result_backend=f"file://{here}/results",
    broker_transport_options={
        "data_folder_in": f"{here}/messages",
        "data_folder_out": f"{here}/messages",
        "control_folder": f"{here}/control",
        "polling_interval": 0.1,
    },
)


@worker_ready.connect
def ready(**_):
    (here / "ready").write_text("yes")


@app.task
def dawdle(amount, seconds):
    run(_dawdle(amount, seconds))


async def _dawdle(amount, seconds):
    async with session() as opened:
        await opened.execute(text(f"INSERT INTO orders (amount) VALUES ({amount})"))
        (here / "dawdling").write_text(str(os.getpid()))
        await opened.execute(text(f"SELECT pg_sleep({seconds})"))


async def use():
    async with get_engine().connect() as connection:
        await connection.execute(text("SELECT 1"))


if os.environ.get("USE_BEFORE_FORK"):
    engine = get_engine()
    asyncio.run(use())
"""


class Celery:
    """A worker with two processes, and the other end of its queue."""

    def __init__(self, directory: Path, *options: str, **environment: str) -> None:
        self.directory = directory
        for name in ("messages", "control", "results"):
            (directory / name).mkdir()
        (directory / "more_tasks.py").write_text(MORE_TASKS)
        path = os.pathsep.join([str(EXAMPLES), str(directory)])
        self.environ = os.environ | {"PYTHONPATH": path} | environment
        self.python = [sys.executable, "-W", "error", "-W", "ignore:You're running the worker"]
        command = ["-m", "celery", "-A", "more_tasks", "worker", "-c", "2"]
        quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat", "-l", "WARNING"]
        self.output = directory / "output"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [*self.python, *command, *quiet, *options],
                env=self.environ,
                cwd=directory,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def call(self, code: str) -> object:
        """The JSON value of an expression where `send` sends a task."""
        done = subprocess.run(
            [*self.python, "-c", f"import json, more_tasks\nprint(json.dumps({code}))"],
            env=self.environ,
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=BOUND,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(BOUND)

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # the session that was started for it
            self.process.wait()


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Celery]]:
    """Starts a worker, and ends it."""
    pytest.importorskip("celery")
    started: list[Celery] = []

    def start_one(*options: str, **environment: str) -> Celery:
        started.append(Celery(tmp_path, *options, **environment))
        wait_for(tmp_path / "ready")  # two that set the queue up at once are too many for kombu
        return started[-1]

    yield start_one
    for each in started:
        each.kill()


MANY = "[r.get(timeout=25) for r in [more_tasks.app.tasks['celery_tasks.add_order'].delay(n) for n in range(60)]]"


@pytest.mark.parametrize("environment", [{}, {"USE_BEFORE_FORK": "1"}], ids=["fresh", "used"])
def test_celerys_prefork_pool(admin, start, environment) -> None:
    """Sixty tasks: two sessions, none left, nothing warned about, a used parent or not."""
    worker = start("--pool", "prefork", **environment)

    ids = worker.call(MANY)

    assert sorted(ids) == [*range(1, 61)]
    assert 1 <= sessions(admin) <= 2
    assert worker.stop() == 0
    eventually(lambda: sessions(admin) == 0)
    assert orders(admin) == [*range(60)]
    assert not complaints(worker)


def wait_for(file: Path) -> str:
    eventually(lambda: file.exists() and file.read_text())
    return file.read_text()


def complaints(worker: Celery) -> list[str]:
    words = ("Traceback", "Error", "Warning:", "never awaited", "unclosed")
    said = worker.output.read_text().splitlines()
    return [line for line in said if any(word in line for word in words)]


LOOKING = "?options=-c%20client_connection_check_interval=500ms"


@pytest.mark.parametrize(("which", "options"), [("SIGTERM", ""), ("SIGKILL", LOOKING)])
def test_a_worker_process_is_ended_in_mid_task(admin, start, which, options) -> None:
    """Rolled back, its backend gone in mid-statement, the next task done by another process."""
    worker = start("--pool", "prefork", DATABASE_URL=os.environ["DATABASE_URL"] + options)
    worker.call("more_tasks.dawdle.delay(1, 9) and None")
    pid = int(wait_for(worker.directory / "dawdling"))

    began = time.monotonic()
    os.kill(pid, signal.Signals[which])
    eventually(lambda: sessions(admin) == 0)

    assert time.monotonic() - began < 5
    assert orders(admin) == []
    assert worker.call("more_tasks.app.tasks['celery_tasks.add_order'].delay(2).get(timeout=25)")
    assert orders(admin) == [2]  # not stopped: Celery would wait 10 s for the process that it lost


def test_a_warm_shutdown_lets_the_task_end(admin, start) -> None:
    """SIGTERM to the worker itself."""
    worker = start("--pool", "prefork")
    worker.call("more_tasks.dawdle.delay(1, 2) and None")
    wait_for(worker.directory / "dawdling")

    assert worker.stop() == 0

    assert orders(admin) == [1]
    eventually(lambda: sessions(admin) == 0)
    assert not complaints(worker)
