"""The health endpoints: what a probe is told, and that it is no burden."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import httpx
import pytest
from fastapi import Depends, FastAPI, HTTPException
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool
from starlette.applications import Starlette
from starlette.routing import Mount

from poolkit import drain, pool_stats
from poolkit.fastapi import health, install
from poolkit.testing import FaultProxy, postgres


@asynccontextmanager
async def probing(app: Starlette) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://probe") as client:
        yield client


def serving(engine: AsyncEngine, **options: object) -> FastAPI:
    app = FastAPI()
    install(app, engine=engine, **options)
    return app


async def ready(engine: AsyncEngine, **options: object) -> tuple[int, dict[str, object]]:
    async with probing(serving(engine, **options)) as client:
        answer = await client.get("/health/ready")
    assert answer.headers["cache-control"] == "no-store"
    return answer.status_code, answer.json()


async def sessions(engine: AsyncEngine) -> int:
    """The server's, of this database and this application."""
    async with engine.connect() as connection:
        found = await connection.scalar(
            text(
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE application_name = current_setting('application_name')"
            )
        )
    return int(found or 0)


async def test_live_needs_no_database(make_engine):
    """The loop turns: that is all."""
    engine = make_engine("postgresql://nobody@127.0.0.1:1/nowhere")
    async with probing(serving(engine)) as client:
        answer = await client.get("/health/live")
    assert (answer.status_code, answer.json()) == (200, {"status": "live"})
    assert answer.headers["cache-control"] == "no-store"
    assert pool_stats(engine).open_failed == 0


async def test_ready_on_an_engine_never_used_and_on_one_that_is_warm(engine):
    """Nothing is left of the question but one answer."""
    assert await ready(engine) == (200, {"status": "ready"})
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
    assert await ready(engine) == (200, {"status": "ready"})
    stats = pool_stats(engine)
    assert (stats.used, stats.idle, stats.checkouts) == (0, 1, 1)


async def test_ready_after_dispose(engine):
    """Another pool, the same engine."""
    assert await ready(engine) == (200, {"status": "ready"})
    await engine.dispose()
    assert await ready(engine) == (200, {"status": "ready"})


async def test_head_is_answered(engine):
    """As load balancers ask."""
    async with probing(serving(engine)) as client:
        for path in ("/health/live", "/health/ready"):
            assert (await client.head(path)).status_code == 200


async def test_an_exhausted_pool_is_ready_and_nobody_waits(make_engine, server):
    """The probe stands in no line, takes no slot, and the caller in line keeps its place."""
    engine = make_engine(settings={"url": server.url, "pool_size": 2}, max_overflow=0)
    async with AsyncExitStack() as stack:
        for _ in range(2):
            connection = await stack.enter_async_context(engine.connect())
            await connection.execute(text("SELECT 1"))
        waiting = asyncio.create_task(sessions(engine))
        await asyncio.sleep(0)
        began = time.monotonic()
        found = await ready(engine)
        assert time.monotonic() - began < 1.5
        assert found == (200, {"status": "ready", "saturated": True})
        assert (pool_stats(engine).waiting, pool_stats(engine).used) == (1, 2)
    await waiting


_FIVE = {"max_connections": 5, "superuser_reserved_connections": 0, "max_wal_senders": 0}


async def test_a_server_that_is_full_is_ready_as_long_as_we_have_connections(make_engine):
    """It answers, and refuses one more; without any it is of no use."""
    with postgres(server_settings=_FIVE) as small:
        engine = make_engine(settings={"url": small.url, "pool_size": 5}, max_overflow=0)
        other = make_engine(settings={"url": small.url, "connection_timeout": 5})
        async with AsyncExitStack() as stack:
            for _ in range(5):
                connection = await stack.enter_async_context(engine.connect())
                await connection.execute(text("SELECT 1"))
            assert await ready(engine) == (200, {"status": "ready", "saturated": True})
            status, body = await ready(other)
            assert (status, body["reason"]) == (503, "too_many_connections")


@pytest.mark.parametrize(
    ("fault", "reason"), [("refuse", "connect_refused"), ("silence", "connect_timeout")]
)
async def test_no_database_is_unavailable_within_the_bound(make_engine, server, fault, reason):
    """A kind, nothing internal, and no later than was asked for."""
    with FaultProxy(server) as proxy:
        engine = make_engine(settings={"url": f"{proxy.url}?sslmode=disable"})
        getattr(proxy, fault)()
        began = time.monotonic()
        status, body = await ready(engine, ready_within=0.4)
        assert time.monotonic() - began < 3
        assert (status, body) == (503, {"status": "unavailable", "reason": reason})
        proxy.heal()
        await asyncio.sleep(health.FRESH)
        assert (await ready(engine))[0] == 200


async def test_idle_connections_that_are_dead_do_not_hide_a_live_server(make_engine, server):
    """After a restart or behind a firewall that forgot them: the next connect shows it."""
    with FaultProxy(server) as proxy:
        engine = make_engine(settings={"url": f"{proxy.url}?sslmode=disable"})
        async with AsyncExitStack() as stack:
            for _ in range(5):
                connection = await stack.enter_async_context(engine.connect())
                await connection.execute(text("SELECT 1"))
        for connection in proxy.connections:
            connection.reset()
        assert await ready(engine) == (200, {"status": "ready"})
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
        for connection in proxy.connections:
            connection.freeze()
        assert await ready(engine) == (200, {"status": "ready"})


async def test_a_storm_of_probes_is_one_question(make_engine, server):
    """However many come together."""
    with FaultProxy(server) as proxy:
        engine = make_engine(settings={"url": f"{proxy.url}?sslmode=disable"})
        async with probing(serving(engine)) as client:
            answers = await asyncio.gather(*(client.get("/health/ready") for _ in range(100)))
        assert {answer.status_code for answer in answers} == {200}
        assert proxy.stats.accepted == 1


async def test_a_probe_that_hangs_up_does_not_end_the_others_question(engine):
    """The question is nobody's own."""
    readiness = health.Readiness(1.0)
    first = asyncio.create_task(readiness.of(engine))
    second = asyncio.create_task(readiness.of(engine))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).status == "ready"


async def test_draining_is_told(engine):
    """During ``drain()`` and after it."""
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
        draining = asyncio.create_task(drain(engine))
        await asyncio.sleep(0)
        assert await ready(engine) == (503, {"status": "draining"})
    await draining
    assert await ready(engine) == (503, {"status": "draining"})


async def test_the_lifespans_end_is_draining(engine):
    """Told before the application's own lifespan does its last work; live goes on."""
    told: list[object] = []

    @asynccontextmanager
    async def own(app: FastAPI) -> AsyncIterator[dict[str, int]]:
        yield {"mine": 1}
        async with probing(app) as client:
            told.append((await client.get("/health/ready")).json())
            told.append((await client.get("/health/live")).json())

    app = FastAPI(lifespan=own)
    install(app, engine=engine)
    async with app.router.lifespan_context(app) as state, probing(app) as client:
        assert state == {"mine": 1}
        assert (await client.get("/health/ready")).json() == {"status": "ready"}
    assert told == [{"status": "draining"}, {"status": "live"}]


async def test_another_pool_is_asked_as_it_can_be(server):
    """Within the bound, by an ordinary checkout."""
    url = server.url.replace("postgresql://", "postgresql+asyncpg://")
    engine = create_async_engine(url, poolclass=NullPool)
    assert await ready(engine) == (200, {"status": "ready"})


async def test_nothing_of_the_applications_stands_before_them(engine):
    """Neither its dependencies nor a mount at the root; and its schema does not have them."""

    def deny() -> None:
        raise HTTPException(401)

    app = FastAPI(dependencies=[Depends(deny)])
    app.router.routes.append(Mount("/", Starlette()))
    install(app, engine=engine, health="/internal/probes")
    async with probing(app) as client:
        assert (await client.get("/internal/probes/live")).status_code == 200
        assert (await client.get("/internal/probes/ready")).status_code == 200
        assert (await client.get("/health/live")).status_code == 404
    assert app.openapi()["paths"] == {}
