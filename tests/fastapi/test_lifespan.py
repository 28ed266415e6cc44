"""An application's engine: there before the first request, drained after the last."""

import asyncio
import contextlib
import logging
import warnings

import httpx
import pytest
from fastapi import FastAPI, Request
from sqlalchemy import text
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse

from poolkit import (
    ConfigurationError,
    DatabaseSettings,
    PoolDraining,
    get_engine,
    pool_stats,
)
from poolkit.fastapi import SessionDep, get_session, lifespan
from poolkit.fastapi.lifespan import DRAIN_TIMEOUT

with warnings.catch_warnings():  # Starlette would rather have it on another HTTP client
    warnings.simplefilter("ignore")
    from fastapi.testclient import TestClient

pytestmark = pytest.mark.usefixtures("environment")

NAME = text("SELECT current_setting('application_name')")


def named(server, name: str) -> DatabaseSettings:
    return DatabaseSettings(url=server.url, application_name=name)


def app_that_asks(**kwargs) -> FastAPI:
    app = FastAPI(**kwargs)

    @app.get("/")
    async def name(session: SessionDep) -> str:
        return await session.scalar(NAME)

    return app


async def ask(app, path="/") -> str:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
        return (await client.get(path, follow_redirects=True)).json()


async def test_its_engine_is_the_loops_and_warm():
    """One connection is there before the first request, which opens no other."""
    app = app_that_asks()

    async with lifespan()(app):
        assert pool_stats(get_engine()).idle == 1
        await ask(app)
        assert pool_stats(get_engine()).opened == 1


async def test_a_rotating_password_reaches_its_sessions(server):
    """A callable is asked at every connect, on another loop too."""
    asked = []

    def token():
        asked.append(1)
        return server.password

    app = app_that_asks()
    async with lifespan(password=token)(app):
        warm = len(asked)
        await ask(app)
        await asyncio.to_thread(asyncio.run, ask(app))
    assert 0 < warm < len(asked)


@pytest.mark.parametrize(("warm_up", "opened"), [(0, 0), (False, 0), (3, 3), (None, 10)])
async def test_how_many_are_opened_is_ones_choice(warm_up, opened):
    """None is the pool's size, 0 none."""
    async with lifespan(warm_up=warm_up)(FastAPI()):
        assert pool_stats(get_engine()).opened == opened


async def test_ones_own_lifespan_runs_inside():
    """It finds the engine, can use it to its end, and its state passes through."""
    seen = []

    @contextlib.asynccontextmanager
    async def inner(app):
        seen.append(("begun", pool_stats(get_engine()).idle))
        yield {"greeting": "hello"}
        async with get_engine().connect() as connection:
            await connection.execute(NAME)
        seen.append(("ended", pool_stats(get_engine()).draining))

    async with lifespan(inner)(FastAPI()) as state:
        assert state == {"greeting": "hello"}

    assert seen == [("begun", 1), ("ended", False)]
    assert pool_stats(get_engine()).draining


def test_its_state_reaches_the_requests():
    """As without poolkit, FastAPI's or Starlette's."""

    @contextlib.asynccontextmanager
    async def inner(app):
        yield {"greeting": "hello"}

    app = FastAPI(lifespan=lifespan(inner))

    @app.get("/")
    async def greet(request: Request) -> str:
        return request.state.greeting

    with TestClient(app) as client:
        assert client.get("/").json() == "hello"


async def test_starlette_has_it_too():
    """The dependency is a generator like any other."""

    async def name(request):
        async with contextlib.asynccontextmanager(get_session)(request) as session:
            return PlainTextResponse(await session.scalar(NAME))

    app = Starlette()
    app.add_route("/", name)
    async with lifespan()(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
            assert (await client.get("/")).status_code == 200


# -- The start ---------------------------------------------------------------------------------


async def test_a_database_that_is_down_does_not_keep_it_from_starting(caplog):
    """One warning of it, without the password."""
    settings = DatabaseSettings(
        url="postgresql://user:secret@127.0.0.1:1/db", connection_timeout=0.2
    )

    with caplog.at_level(logging.INFO):
        async with lifespan(settings=settings)(FastAPI()):
            pass

    ours = [record for record in caplog.records if record.name == "poolkit.fastapi"]
    assert [record.levelname for record in ours] == ["WARNING"]
    assert "starts without a database" in ours[0].getMessage()
    assert "secret" not in caplog.text


async def test_bad_settings_do(monkeypatch):
    """They will not become better by waiting."""
    monkeypatch.setenv("DATABASE_POOL_SIZE", "many")

    with pytest.raises(ConfigurationError, match="POOL_SIZE"):
        async with lifespan()(FastAPI()):
            pytest.fail("it started")


async def test_an_inner_one_that_fails_leaves_nothing(server, witness):
    """The engine is drained where the start went wrong."""

    @contextlib.asynccontextmanager
    async def inner(app):
        raise KeyError("bug")
        yield

    settings = named(server, "failing-start")
    with pytest.raises(KeyError):
        async with lifespan(inner, settings=settings)(FastAPI()):
            pytest.fail("it started")

    assert await sessions(witness, "failing-start") == 0


# -- The end -----------------------------------------------------------------------------------


async def sessions(witness, name: str) -> int:
    return await witness.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1", name
    )


async def test_afterwards_nothing_is_left_and_nothing_given_out(server, witness):
    """No session at the server, and a late request is refused."""
    app = app_that_asks()
    async with lifespan(settings=named(server, "drained"))(app):
        assert await ask(app) == "drained"
        assert await sessions(witness, "drained") == 1

    assert await sessions(witness, "drained") == 0
    with pytest.raises(PoolDraining):
        await ask(app)


async def test_it_can_start_again_on_the_same_loop():
    """As in tests whose loop is the session's."""
    app = app_that_asks(title="again")

    for _ in range(2):
        async with lifespan()(app):
            await ask(app)
            assert pool_stats(get_engine()).idle == 1


async def test_what_is_not_given_back_is_terminated_and_logged(caplog):
    """In time, and with a count."""
    engine = get_engine()
    async with lifespan(drain_timeout=0.05)(FastAPI()):
        connection = await engine.connect()

    with contextlib.suppress(Exception):
        await connection.close()
    lines = [r.getMessage() for r in caplog.records if r.name == "poolkit.fastapi"]
    assert lines == [
        "the application ended with 1 connections in use for more than 0.05 s: terminated"
    ]


def test_the_default_leaves_room_in_what_the_platforms_give():
    """gunicorn and Kubernetes kill after 30 s."""
    assert DRAIN_TIMEOUT <= 15


# -- Several applications ------------------------------------------------------------------------


async def test_two_applications_have_their_own(server):
    """Two databases in one process."""
    first, second = app_that_asks(), app_that_asks()

    async with (
        lifespan(settings=named(server, "first"))(first),
        lifespan(settings=lambda: named(server, "second"))(second),
    ):
        assert [await ask(first), await ask(second)] == ["first", "second"]


async def test_a_mounted_application_has_its_parents_or_its_own(server):
    """However deep it is mounted; Starlette starts no lifespan but the outermost."""
    parent, child, grandchild, other = (app_that_asks() for _ in range(4))
    child.mount("/grandchild", grandchild)
    parent.mount("/child", child)
    parent.mount("/other", other)

    async with (
        lifespan(settings=named(server, "parent"))(parent),
        lifespan(settings=named(server, "other"))(other),
    ):
        found = [await ask(parent, path) for path in ("/", "/child/", "/child/grandchild/")]
        assert found == ["parent"] * 3
        assert await ask(parent, "/other/") == "other"


async def test_a_shared_engine_is_drained_by_the_last():
    """Two applications with the same settings have one engine."""
    stays = app_that_asks()

    async with lifespan()(stays):
        async with lifespan()(FastAPI()):
            pass
        assert not pool_stats(get_engine()).draining
        await ask(stays)
    assert pool_stats(get_engine()).draining


async def test_without_a_lifespan_it_is_the_loops():
    """As most tests use an application."""
    app = app_that_asks()

    await ask(app)

    assert pool_stats(get_engine()).opened == 1


def test_another_loop_has_its_own_engine_with_the_same_settings(server):
    """A lifespan on one loop, a request on another, then and later."""
    app = app_that_asks(lifespan=lifespan(settings=named(server, "settings")))

    with TestClient(app) as client:
        assert client.get("/").json() == "settings"
        assert asyncio.run(ask(app)) == "settings"
    assert asyncio.run(ask(app)) == "settings"
