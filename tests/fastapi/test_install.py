"""``install``: where it may be called, which engine it finds, and what it refuses."""

import httpx
import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import text
from starlette.applications import Starlette

from poolkit import ConfigurationError, DatabaseSettings, LockTimeout, get_engine, pool_stats
from poolkit.fastapi import Guard, SessionDep, install, lifespan
from poolkit.testing import FaultProxy


async def get(app: Starlette, path: str) -> httpx.Response:
    transport = httpx.ASGITransport(app, client=("127.0.0.1", 5000))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        return await client.get(path)


def test_twice_is_refused():
    """Each application once."""
    app = FastAPI()
    install(app)
    with pytest.raises(ConfigurationError, match="before"):
        install(app)
    install(FastAPI())


async def test_an_application_that_serves_is_refused():
    """Starlette would take no notice of the handlers."""
    app = FastAPI()
    await get(app, "/")
    with pytest.raises(ConfigurationError, match="before the application serves"):
        install(app)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"ready_within": 0}, "ready_within=0"),
        ({"health": "health"}, "health='health'"),
        ({"health": "/health/"}, "health='/health/'"),
        ({"status_page": "pool"}, "status_page='pool'"),
        ({"status_page": "/{pool}"}, "status_page='/{pool}'"),
    ],
)
def test_what_cannot_be_honoured_is_refused(options, named):
    """By its name, and nothing is installed then."""
    app = FastAPI()
    routes = len(app.router.routes)
    with pytest.raises(ConfigurationError, match="=") as caught:
        install(app, **options)
    assert named in str(caught.value)
    assert len(app.router.routes) == routes


def test_a_dependency_needs_fastapi():
    """Plain Starlette has none."""
    with pytest.raises(ConfigurationError, match="FastAPI"):
        install(Starlette(), status_page=True, status_guard=Depends(dict))
    install(Starlette(), status_page=True, status_guard=Guard.PUBLIC)


async def test_what_is_not_asked_for_is_not_there():
    """No page unless wanted, no health if unwanted."""
    app = FastAPI()
    install(app, health=False)
    for path in ("/health/live", "/health/ready", "/poolkit", "/poolkit/data"):
        assert (await get(app, path)).status_code == 404


async def test_the_engine_is_the_loops_without_a_lifespan(server, monkeypatch):
    """``get_engine()`` of the loop that serves the request."""
    monkeypatch.setenv("DATABASE_URL", server.url)
    app = FastAPI()
    install(app)
    assert (await get(app, "/health/ready")).json() == {"status": "ready"}
    assert pool_stats(get_engine()).idle == 0


async def test_without_settings_nothing_breaks():
    """Not ready, the page says why, and an error's answer is what it was."""
    app = FastAPI()
    install(app, status_page=True)

    @app.get("/")
    async def root() -> None:
        raise LockTimeout("x", {}, ValueError("y"))

    async with app.router.lifespan_context(app):
        answer = await get(app, "/health/ready")
        assert answer.status_code == 503
        assert answer.json() == {"status": "unavailable", "reason": "configuration"}
        answer = await get(app, "/poolkit/data")
        assert answer.status_code == 501
        assert "DATABASE_URL" in answer.json()["error"]
        assert (await get(app, "/")).status_code == 504


async def test_the_engine_is_the_lifespans(server, monkeypatch):
    """Found whether it began before or after, with its settings."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://nobody@127.0.0.1:1/nowhere")
    app = FastAPI(lifespan=lifespan(settings=DatabaseSettings(url=server.url, pool_name="mine")))
    install(app, status_page=True)
    async with app.router.lifespan_context(app):
        assert (await get(app, "/health/ready")).json() == {"status": "ready"}
        data = (await get(app, "/poolkit/data")).json()
    assert data["pool"] == "mine"
    assert [fault for fault in data["faults"] if fault["event"] == "connect failed"] == []
    assert (await get(app, "/health/ready")).json() == {"status": "draining"}


async def test_on_plain_starlette(engine):
    """Health and the page."""
    app = Starlette()
    install(app, engine=engine, status_page=True)
    assert (await get(app, "/health/ready")).status_code == 200
    assert (await get(app, "/poolkit")).status_code == 200


async def test_a_lost_commit_of_session_dep_is_told_as_such(server):
    """The dependency ends before the response is sent, so that there is one to give."""
    with FaultProxy(server) as proxy:
        settings = DatabaseSettings(url=f"{proxy.url}?sslmode=disable")
        app = FastAPI(lifespan=lifespan(settings=settings))
        install(app)

        @app.post("/")
        async def write(session: SessionDep) -> str:
            await session.execute(text("CREATE TEMPORARY TABLE IF NOT EXISTS lost (n int)"))
            return "done"

        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://localhost") as client,
        ):
            assert (await client.post("/")).status_code == 200
            proxy.cut(before="COMMIT")
            answer = await client.post("/")
    assert (answer.status_code, answer.json()["outcome"]) == (503, "unknown")
    assert "retry-after" not in answer.headers
