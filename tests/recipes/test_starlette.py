"""The recipe for Starlette: committed before the answer, 503 where the database is away."""

import importlib.util
import itertools
import socket
from pathlib import Path

import httpx
import pytest
from sqlalchemy import text
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from poolkit import get_engine, pool_stats, session

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "use_starlette.py"
numbers = itertools.count()


@pytest.fixture
def recipe():
    """A fresh copy of the example."""
    spec = importlib.util.spec_from_file_location("use_starlette", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def database(server, monkeypatch) -> str:
    url = server.create_database(f"starlette_{next(numbers)}")
    monkeypatch.setenv("DATABASE_URL", url)
    return url


def client(app):
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://app")


async def test_it_serves_and_leaves_nothing(recipe, database):
    """Warm at the start; after the end the server has none of its sessions."""
    async with recipe.lifespan(recipe.app), client(recipe.app) as ask:
        assert pool_stats(get_engine()).idle == 1
        for _ in range(20):
            response = await ask.get("/database")
            assert response.json() == database.rpartition("/")[2]
        assert pool_stats(get_engine()).used == 0
        engine = get_engine()
    assert pool_stats(engine).idle == 0


async def test_the_next_lifespan_has_a_new_engine(recipe, database):
    """An application that starts again on the same loop, as tests do, serves again."""
    for _ in range(2):
        async with recipe.lifespan(recipe.app), client(recipe.app) as ask:
            assert (await ask.get("/database")).status_code == 200


async def test_where_the_database_is_away_it_says_503(recipe, monkeypatch):
    """No server listens: 503 with Retry-After, and nothing internal in it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv(
            "DATABASE_URL", f"postgresql://u:secret@127.0.0.1:{taken.getsockname()[1]}/d"
        )
        monkeypatch.setenv("DATABASE_CONNECTION_TIMEOUT", "0.5")
        async with client(recipe.app) as ask:
            response = await ask.get("/database")

    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert response.content == b""


async def test_a_commit_that_fails_is_no_success(recipe, database):
    """A constraint that fails at COMMIT is a 500, and the block's rows are not there."""

    async def twice(request: Request) -> Response:
        async with session() as opened:
            await opened.execute(text("INSERT INTO once VALUES (1), (1)"))
        return PlainTextResponse("done")

    recipe.app.router.routes.append(Route("/twice", twice))
    async with session() as opened:
        await opened.execute(text("CREATE TABLE once (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)"))

    async with client(recipe.app) as ask:
        assert (await ask.get("/twice")).status_code == 500

    async with session() as opened:
        assert await opened.scalar(text("SELECT count(*) FROM once")) == 0
    assert pool_stats(get_engine()).used == 0


async def test_a_stream_holds_no_connection_of_the_handler(recipe, database):
    """A pool of one: what streams opens its own session after the handler's has ended."""

    async def stream(request: Request) -> Response:
        async with session() as opened:
            await opened.execute(text("SELECT 1"))

        async def rows():
            async with session() as opened:
                for n in range(3):
                    yield f"{await opened.scalar(text('SELECT :n'), {'n': str(n)})}"

        return StreamingResponse(rows())

    recipe.app.router.routes.append(Route("/stream", stream))
    async with client(recipe.app) as ask:
        assert (await ask.get("/stream")).text == "012"
    assert pool_stats(get_engine()).used == 0
