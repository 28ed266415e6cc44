"""docs/how-to/run-under-uvicorn-and-gunicorn.md: real servers with two workers, under load."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
BOUND = 30.0
CALLERS = 8
LISTENING = re.compile(r"unclosed <socket.socket [^>]*laddr=\('127.0.0.1', \d+\)>")
"""What uvicorn's parent process leaves; a connection would have a raddr too."""
UNIQUE = "CREATE TABLE orders (id serial, amount int PRIMARY KEY)"

MORE_ROUTES = """
import os
from sqlalchemy import text
from poolkit import get_engine
from poolkit.fastapi import SessionDep
from serve_app import app

engine = get_engine()  # of no loop yet: where gunicorn preloads, before the forks


@app.post("/slowly/{amount}")
async def add_slowly(amount: int, session: SessionDep) -> int:
    await session.execute(text(f"INSERT INTO orders (amount) VALUES ({amount})"))
    await session.execute(text("SELECT pg_sleep(0.02)"))
    return os.getpid()


@app.post("/endlessly/{amount}")
async def add_endlessly(amount: int, session: SessionDep) -> None:
    await session.execute(text(f"INSERT INTO orders (amount) VALUES ({amount})"))
    await session.execute(text("SELECT pg_sleep(9)"))


@app.get("/who")
async def who() -> list[int]:
    async with engine.connect() as connection:
        backend = await connection.scalar(text("SELECT pg_backend_pid()"))
    return [os.getpid(), backend]
"""


NO_PRELOAD = """
from gunicorn_conf import *
preload_app = False
"""


@dataclass
class Served:
    """What became of the requests."""

    done: dict[int, int] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    other: list[str] = field(default_factory=list)


class Service:
    """A server's process, and what can be asked of it."""

    def __init__(self, process: subprocess.Popen[str], port: int, output: Path) -> None:
        self.process = process
        self.address = f"http://127.0.0.1:{port}"
        self.output = output

    async def is_up(self) -> bool:
        assert self.process.poll() is None, self.output.read_text()
        try:
            return bool(await self.who())
        except httpx.TransportError:
            return False

    async def who(self) -> list[int]:
        async with httpx.AsyncClient() as client:
            return (await client.get(f"{self.address}/who")).json()

    @asynccontextmanager
    async def load(self, requests: int | None = None) -> AsyncIterator[Served]:
        """Callers one after the other, each request on a connection of its own."""
        served, numbers = Served(), iter(range(requests or 10**9))
        go_on = True

        async def call(client: httpx.AsyncClient) -> None:
            for number in numbers:
                if not go_on:
                    return
                try:
                    answer = await client.post(f"{self.address}/slowly/{number}")
                except httpx.TransportError as error:
                    served.refused[number] = type(error).__name__
                    await asyncio.sleep(0.01)
                    continue
                if answer.status_code == 200:
                    served.done[number] = answer.json()
                else:
                    served.other.append(f"{number}: {answer.status_code} {answer.text}")

        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(limits=limits, timeout=BOUND) as client:
            callers = [asyncio.create_task(call(client)) for _ in range(CALLERS)]
            try:
                yield served
                if requests is not None:
                    await asyncio.wait_for(asyncio.gather(*callers), BOUND)
            finally:
                go_on = False
                await asyncio.wait_for(asyncio.gather(*callers), BOUND)

    async def stop(self, which: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(which)
        return await asyncio.to_thread(self.process.wait, BOUND)

    def complaints(self) -> list[str]:
        words = ("Traceback", "ERROR", "CRITICAL", "Warning:", "never awaited", "SIGKILL")
        said = self.output.read_text().splitlines()
        ours = [line for line in said if not LISTENING.search(line)]
        return [line for line in ours if any(word in line for word in words)]


@pytest.fixture
async def admin(server, monkeypatch) -> AsyncIterator[asyncpg.Connection]:
    """A connection to a database with the table; the environment names the database."""
    url = server.create_database(f"web_{uuid4().hex}")
    monkeypatch.setenv("DATABASE_URL", url)
    monkeypatch.setenv("DATABASE_APPLICATION_NAME", "web")
    connection = await asyncpg.connect(url)
    await connection.execute(UNIQUE)
    yield connection
    await connection.close()


SESSIONS = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND application_name = 'web'
"""


async def sessions(admin: asyncpg.Connection) -> int:
    return await admin.fetchval(SESSIONS)


async def orders(admin: asyncpg.Connection) -> set[int]:
    return {row["amount"] for row in await admin.fetch("SELECT amount FROM orders")}


async def eventually(true: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(BOUND):
        while not await true():
            await asyncio.sleep(0.05)


async def are_gone(admin: asyncpg.Connection) -> None:
    await eventually(lambda: _none(admin))


async def _none(admin: asyncpg.Connection) -> bool:
    return await sessions(admin) == 0


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., Awaitable[Service]]]:
    """Starts a server of one of the kinds, and ends it with its workers."""
    started: list[subprocess.Popen[str]] = []

    async def start_one(kind: str, *options: str) -> Service:
        (tmp_path / "more_routes.py").write_text(MORE_ROUTES)
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = listening.getsockname()[1]
        (tmp_path / "no_preload.py").write_text(NO_PRELOAD)
        output = tmp_path / "output"
        started.append(_spawn([*_command(kind, port), *options], tmp_path, output))
        service = Service(started[-1], port, output)
        await eventually(service.is_up)
        return service

    yield start_one
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # the session that was started for it
            process.wait()


def _spawn(command: list[str], directory: Path, output: Path) -> subprocess.Popen[str]:
    with output.open("w") as written:
        return subprocess.Popen(
            [sys.executable, "-W", "error", "-m", *command],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(EXAMPLES), str(directory)])},
            cwd=directory,
            stdout=written,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _command(kind: str, port: int) -> list[str]:
    if kind == "uvicorn":
        pytest.importorskip("uvicorn")
        timeout = ["--timeout-graceful-shutdown", "15", "--no-access-log"]
        timeout += ["--timeout-worker-healthcheck", "60"]  # on a machine that is busy
        return ["uvicorn", "more_routes:app", "--workers", "2", "--port", str(port), *timeout]
    if kind == "uvicorn-reload":
        watched = ["--reload", "--reload-dir", ".", "--reload-delay", "0.1"]
        return ["uvicorn", "more_routes:app", "--port", str(port), *watched]
    pytest.importorskip("gunicorn")
    pytest.importorskip("uvicorn_worker")
    config = "no_preload.py" if kind == "gunicorn" else str(EXAMPLES / "gunicorn_conf.py")
    native = ["-k", "asgi"] if kind == "gunicorn-asgi" else []
    where = ["-b", f"127.0.0.1:{port}"]
    return ["gunicorn", "-c", config, "more_routes:app", "-w", "2", *where, *native]


KINDS = ["uvicorn", "gunicorn", "gunicorn-preload", "gunicorn-asgi"]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_stop_under_load(start, admin, kind) -> None:
    """Every 200 is a row, nothing is a 5xx, and no session is left."""
    service = await start(kind)
    async with service.load() as served:
        await eventually(lambda: asyncio.sleep(0, len(served.done) >= 200))
        assert 0 < await sessions(admin) <= 2 * 15
        began = time.monotonic()

        code = await service.stop()

        assert time.monotonic() - began < 20
    await are_gone(admin)
    assert code == 0 if kind != "uvicorn" else code in {0, -signal.SIGTERM}
    assert len(set(served.done.values())) == 2
    assert served.other == []
    found = await orders(admin)
    assert served.done.keys() <= found
    assert found <= served.done.keys() | served.refused.keys()
    assert service.complaints() == []


@pytest.mark.parametrize("kind", KINDS)
async def test_a_reload_under_load(start, admin, kind) -> None:
    """SIGHUP: other workers take over, what was begun is answered, the old ones leave nothing."""
    service = await start(kind)
    async with service.load() as served:
        await eventually(lambda: asyncio.sleep(0, len(set(served.done.values())) == 2))
        old = set(served.done.values())
        service.process.send_signal(signal.SIGHUP)

        async def others_answer() -> bool:
            return not old & set(list(served.done.values())[-50:])

        await eventually(others_answer)
    left = await sessions(admin)
    assert 0 < left <= 2 * 15
    assert served.other == []
    # uvicorn drops connections on which no request has come yet; nothing was done for those.
    assert len(served.refused) <= 2 * CALLERS
    assert await orders(admin) == served.done.keys()
    await service.stop()
    await are_gone(admin)
    assert service.complaints() == []


async def test_workers_that_are_replaced_after_some_requests(start, admin) -> None:
    """`max_requests`: several generations, all answered, and none leaves a session."""
    service = await start("gunicorn-preload", "--max-requests", "60", "--max-requests-jitter", "0")
    async with service.load(400) as served:
        pass

    assert len(set(served.done.values())) > 2
    assert served.other == []
    assert served.done.keys() | served.refused.keys() == {*range(400)}
    assert await sessions(admin) <= 2 * 15
    await service.stop()
    await are_gone(admin)
    assert served.done.keys() <= await orders(admin)
    assert service.complaints() == []


async def test_the_engine_of_the_module_is_that_of_the_worker(start, admin) -> None:
    """Made before the forks, used after them: each worker has backends of its own."""
    service = await start("gunicorn-preload")

    found = [await service.who() for _ in range(40)]

    workers = {worker: {b for w, b in found if w == worker} for worker, _ in found}
    assert len(workers) == 2
    first, second = workers.values()
    assert not first & second
    assert await sessions(admin) == len(first | second)


async def test_a_request_that_outlives_its_grace_is_rolled_back(start, admin) -> None:
    """uvicorn cancels it; the pool is drained, and the server has no session soon after."""
    service = await start("uvicorn", "--timeout-graceful-shutdown", "1")
    async with httpx.AsyncClient(timeout=BOUND) as client:
        asked = asyncio.create_task(client.post(f"{service.address}/endlessly/1"))
        await eventually(lambda: admin.fetchval(SESSIONS + "AND query LIKE '%pg_sleep%'"))
        began = time.monotonic()

        await service.stop()
        await are_gone(admin)

        assert time.monotonic() - began < 8
        [answer] = await asyncio.gather(asked, return_exceptions=True)
    assert isinstance(answer, httpx.TransportError) or answer.status_code >= 500
    assert await orders(admin) == set()


async def test_reload_leaves_no_session_behind(start, admin, tmp_path) -> None:
    """Another process for each change, and the sessions of the last one only."""
    service = await start("uvicorn-reload")
    before = {tuple(await service.who()) for _ in range(3)}
    (tmp_path / "more_routes.py").write_text(MORE_ROUTES + "# changed\n")

    async def another_answers() -> bool:
        try:
            return (await service.who())[0] not in {process for process, _ in before}
        except httpx.TransportError:
            return False

    await eventually(another_answers)
    old = [backend for _, backend in before]

    asked = "SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = ANY($1)"
    await eventually(lambda: admin.fetchval(asked, old))
    await service.stop()
    await are_gone(admin)
