"""Applications on a real server: by hand, and under uvicorn."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Iterator

import asyncpg
import pytest

from poolkit.testing import PostgresServer

pytest.importorskip("fastapi")

TABLES = """
    DROP TABLE IF EXISTS children, parents;
    CREATE TABLE parents (id int PRIMARY KEY);
    CREATE TABLE children (
        parent int REFERENCES parents DEFERRABLE INITIALLY DEFERRED
    )
"""


@pytest.fixture
def environment(server: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """`DATABASE_URL` is the server's."""
    monkeypatch.setenv("DATABASE_URL", server.url)


@pytest.fixture
async def witness(server: PostgresServer) -> AsyncIterator[asyncpg.Connection]:
    """Somebody else at the database, with empty tables `parents` and `children`."""
    connection = await asyncpg.connect(server.url)
    await connection.execute(TABLES)
    yield connection
    await connection.close()


class Served:
    """An application under uvicorn, in a thread with an event loop of its own."""

    def __init__(self, app, **config) -> None:
        import uvicorn  # noqa: PLC0415

        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = {"log_level": "critical", "lifespan": "on"} | config
        self.server = uvicorn.Server(uvicorn.Config(app, **config))
        self.loop: asyncio.AbstractEventLoop | None = None
        self.thread = threading.Thread(target=asyncio.run, args=[self._run()])
        self.started = threading.Event()

    async def _run(self) -> None:
        self.loop = asyncio.get_running_loop()
        serving = asyncio.create_task(self.server.serve([self.socket]))
        while not self.server.started and not serving.done():
            await asyncio.sleep(0.01)
        self.started.set()
        await serving

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        self.server.force_exit = True  # where a test left a connection open
        self.thread.join(20)
        self.socket.close()


@pytest.fixture
def serve(environment) -> Iterator:
    """Start an application under uvicorn; it is stopped afterwards."""
    with contextlib.ExitStack() as stack:

        def start(app, **config) -> Served:
            served = Served(app, **config)
            served.thread.start()
            stack.callback(served.stop)
            assert served.started.wait(30)
            return served

        yield start
