"""The status page: who may see it, what it says, and how it looks to a browser."""

import asyncio
import json
import logging
import os
import re
import shutil
import weakref
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Annotated

import httpx
import pytest
import uvicorn
from fastapi import Depends, FastAPI, Header, HTTPException
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from poolkit.events import CheckoutTimedOut, ConnectionOpened, LongHolder
from poolkit.fastapi import Guard, install, status
from poolkit.fastapi.status import watch
from poolkit.fastapi.status.watch import Faults, Watch
from poolkit.testing import FaultProxy

NASTY = "<script>alert('x')</script>&\"<img src=x onerror=alert(1)>"
CHROMIUM = shutil.which("chromium")


def serving(engine: AsyncEngine, **options: object) -> FastAPI:
    app = FastAPI()
    install(app, engine=engine, **{"status_page": True, **options})
    return app


async def get(
    app: FastAPI, path: str = "/poolkit", client: str = "127.0.0.1", **options: object
) -> httpx.Response:
    transport = httpx.ASGITransport(app, client=(client, 4711))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        return await http.get(path, **options)


# -- Who may see it ------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/poolkit", "/poolkit/data"])
@pytest.mark.parametrize(
    ("client", "headers", "expected"),
    [
        ("127.0.0.1", {}, 200),
        ("127.8.9.1", {"host": "127.0.0.1:8000"}, 200),
        ("::1", {"host": "[::1]:8000"}, 200),
        ("192.0.2.7", {}, 404),
        ("10.0.0.1", {"host": "localhost"}, 404),
        ("testclient", {}, 404),
        ("127.0.0.1", {"x-forwarded-for": "192.0.2.7"}, 404),
        ("127.0.0.1", {"forwarded": "for=127.0.0.1"}, 404),
        ("127.0.0.1", {"host": "evil.example"}, 404),
        ("127.0.0.1", {"host": "localhost.evil.example"}, 404),
    ],
)
async def test_by_default_only_the_same_machine_sees_it(engine, path, client, headers, expected):
    """Not through a proxy, not by a name that was made to point here; others see no such page."""
    app = serving(engine)
    answer = await get(app, path, client, headers=headers)
    assert answer.status_code == expected
    if expected == 404:
        assert answer.json() == (await get(app, "/nothing", client, headers=headers)).json()


@pytest.mark.parametrize("path", ["/poolkit", "/poolkit/data"])
async def test_a_dependency_decides_if_one_is_given(engine, path):
    """From anywhere; the page and what it reads are behind the same."""

    def require_admin(authorization: Annotated[str, Header()] = "") -> None:
        if authorization != "Bearer admin":
            raise HTTPException(403)

    app = serving(engine, status_guard=Depends(require_admin))
    assert (await get(app, path)).status_code == 403
    allowed = {"authorization": "Bearer admin"}
    assert (await get(app, path, "192.0.2.7", headers=allowed)).status_code == 200
    app.dependency_overrides[require_admin] = lambda: None
    assert (await get(app, path)).status_code == 200
    assert app.openapi()["paths"] == {}


async def test_it_may_be_public(engine):
    """If one says so."""
    app = serving(engine, status_guard=Guard.PUBLIC, status_page="/ops/pool")
    assert (await get(app, "/ops/pool", "192.0.2.7")).status_code == 200
    assert (await get(app, "/ops/pool/data", "192.0.2.7")).status_code == 200
    assert (await get(app, "/poolkit")).status_code == 404


# -- What it needs -------------------------------------------------------------------------


async def test_the_page_needs_nothing_from_elsewhere(engine):
    """No address in it but SVG's name, and a policy that would forbid any."""
    answer = await get(serving(engine))
    assert re.findall(r"\w+://[^\"' ]+", answer.text) == ["http://www.w3.org/2000/svg"]
    assert re.findall(r"(?:src|href|action)=\"([^\"]*)", answer.text) == ["data:,"]
    assert "innerHTML" not in answer.text
    assert " style=" not in answer.text
    policy = dict(
        part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy["script-src"])
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy["style-src"])
    assert (policy["connect-src"], policy["frame-ancestors"]) == ("'self'", "'none'")
    assert answer.headers["cache-control"] == "no-store"


# -- What it says --------------------------------------------------------------------------


async def data(app: FastAPI, **params: object) -> dict:
    return (await get(app, "/poolkit/data", params=params)).json()


async def test_the_pools_state_holders_and_settings(make_engine, server):
    """As it is at that moment; the password is not among it."""
    engine = make_engine(
        settings={"url": server.url, "pool_size": 2, "leak_threshold": 60, "pool_name": NASTY},
        max_overflow=0,
    )
    app = serving(engine)
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
        asyncio.current_task().set_name("mine")
        [record] = engine.pool.held()
        record.taken_at -= 61
        found = await data(app)
    assert found["pool"] == NASTY
    assert found["pid"] == os.getpid()
    state = {name: found["state"][name] for name in ("used", "idle", "waiting", "limit")}
    assert state == {"used": 1, "idle": 0, "waiting": 0, "limit": 2}
    [holder] = found["holders"]
    assert (holder["task"], round(holder["held"])) == ("mine", 61)
    assert "test_the_pools_state_holders_and_settings" in holder["stack"]
    assert found["settings"]["pool size"] == "2"
    assert engine.url.password not in json.dumps(found).replace("postgres", "", 3)


async def test_holders_are_nameless_unless_they_are_watched_for(engine):
    """The pool does not note who takes a connection, then."""
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
        [record] = engine.pool.held()
        record.taken_at -= 61
        found = await data(serving(engine))
    assert [(each["task"], each["stack"]) for each in found["holders"]] == [(None, None)]
    assert found["holdersAreNamed"] is False


async def test_samples_go_on_from_where_the_page_is(engine):
    """All to a page that has none, or that had them from another process."""
    app = serving(engine)
    first = await data(app)
    assert len(first["samples"]) == 1
    number = first["samples"][-1][0]
    assert (await data(app, after=number, pid=os.getpid()))["samples"] == []
    assert len((await data(app, after=number, pid=1))["samples"]) == 1
    for nonsense in ("", "x", "-5", "9" * 99):
        assert len((await data(app, after=nonsense, pid=os.getpid()))["samples"]) == 1


async def test_the_timer_holds_neither_the_engine_nor_the_watch(make_engine, server):
    """It samples as long as both are there."""
    engine = make_engine(settings={"url": server.url})
    watching = Watch(engine)
    watching.begin()
    watching.begin()
    timer = watching._timer
    assert len(watching.samples(-1)) == 1
    watching.tick()
    assert len(watching.samples(-1)) == 2
    assert len(watching.samples(watching.samples(-1)[0][0])) == 1
    reference = weakref.ref(watching)
    ring = watching._samples
    del watching
    assert reference() is None
    timer._run()
    assert len(ring) == 2


async def test_faults_are_counted_and_told_once_each(make_engine, server, monkeypatch):
    """The like in a row are one line; after a while without, another begins."""
    now = 1000.0
    monkeypatch.setattr(watch.time, "time", lambda: now)
    engine = make_engine(settings={"url": server.url})
    faults = Faults(engine)
    for waited in (1.0, 2.0, 3.0):
        faults(CheckoutTimedOut(waited, TimeoutError()))
    faults(ConnectionOpened("x:1", 0.1, 1, "none"))  # told to nobody: it is no fault
    faults(LongHolder(7.0, NASTY, "stack"))
    now += watch.APART + 1
    faults(CheckoutTimedOut(4.0, TimeoutError()))
    told = [(fault["event"], fault["count"]) for fault in faults.newest()]
    assert told == [("checkout timed out", 1), ("long holder", 1), ("checkout timed out", 3)]
    assert NASTY in faults.newest()[1]["text"]
    for number in range(watch.FAULTS * 2):
        faults.add(number, logging.ERROR, "made_up", "text")
    assert len(faults.newest()) == watch.FAULTS


async def test_a_statement_timeout_is_among_the_faults(make_engine, server):
    """Which no event of the pool tells of; the statement is not named."""
    engine = make_engine(settings={"url": server.url, "statement_timeout": 0.05})
    app = serving(engine)

    @app.get("/slow/{number}")
    async def slow(number: int) -> None:
        async with engine.connect() as connection:
            await connection.execute(text("SELECT pg_sleep(5)"))

    await data(app)
    for number in range(2):
        assert (await get(app, f"/slow/{number}")).status_code == 504
    [fault] = (await data(app))["faults"]
    assert (fault["event"], fault["count"]) == ("statement timeout", 2)
    assert fault["text"].startswith("GET /slow/{number} answered with 504")


async def test_another_pool_is_told_in_words(server):
    """There is nothing to show of it."""
    url = server.url.replace("postgresql://", "postgresql+asyncpg://")
    app = serving(create_async_engine(url, poolclass=NullPool))
    answer = await get(app, "/poolkit/data")
    assert answer.status_code == 501
    assert "NullPool" in answer.json()["error"]


async def test_it_is_watched_from_the_applications_start(engine):
    """What happened before the first look is there then."""
    app = serving(engine)
    async with app.router.lifespan_context(app):
        engine.pool.observers.notify(CheckoutTimedOut(1.0, TimeoutError()))
        found = await data(app)
    assert [fault["event"] for fault in found["faults"]] == ["checkout timed out"]


# -- In a browser --------------------------------------------------------------------------


@asynccontextmanager
async def real_server(app: FastAPI) -> AsyncIterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await serving


async def seen(url: str, profile: object) -> tuple[str, list[str]]:
    """The page after its script has run for a while, and what the console says."""
    process = await asyncio.create_subprocess_exec(
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--enable-logging=stderr",
        "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
        f"--user-data-dir={profile}",
        "--virtual-time-budget=4000",
        "--dump-dom",
        url,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(60):
            out, err = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    console = [line for line in err.decode(errors="replace").splitlines() if "CONSOLE" in line]
    return out.decode(), console


def shown(dom: str, name: str) -> str:
    """An element's text."""
    found = re.search(rf'id="{name}"[^>]*>(.*?)</(?:b|h1|p|span|footer)>', dom, re.DOTALL)
    return re.sub(r"<[^>]*>", "", found[1])


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not here")
async def test_a_browser_shows_the_numbers_and_asks_nobody_else(make_engine, server, tmp_path):
    """Exhausted, with a holder and a pool of nasty names, which stay text."""
    with FaultProxy(server) as proxy:
        settings = {"url": f"{proxy.url}?sslmode=disable", "pool_size": 2, "leak_threshold": 60}
        engine = make_engine(settings=settings | {"pool_name": NASTY}, max_overflow=0)
        app = serving(engine)
        asked: list[str] = []

        @app.middleware("http")
        async def note(request, call_next):
            asked.append(request.url.path)
            return await call_next(request)

        asyncio.current_task().set_name(NASTY)
        async with real_server(app) as base, AsyncExitStack() as stack:
            for _ in range(2):
                connection = await stack.enter_async_context(engine.connect())
                await connection.execute(text("SELECT 1"))
            for record in engine.pool.held():
                record.taken_at -= 75
            engine.pool.observers.notify(LongHolder(75.0, NASTY, "stack"))
            waiter = asyncio.create_task(use(engine))
            dom, console = await seen(f"{base}/poolkit", tmp_path)
        await waiter
    assert console == []
    assert set(asked) == {"/poolkit", "/poolkit/data"}
    assert asked.count("/poolkit/data") >= 2, "it goes on looking"
    numbers = {name: shown(dom, name) for name in ("used", "idle", "waiting", "utilisation")}
    assert numbers == {"used": "2 / 2", "idle": "0", "waiting": "1", "utilisation": "100 %"}
    assert shown(dom, "status") == "exhausted"
    assert "1 min 1" in dom or "1 min 2" in dom
    assert f"This is process {os.getpid()}." in shown(dom, "process")
    assert re.search(r'<path class="line" stroke="currentColor" d="M[\d.]+,', dom)
    assert "<img" not in dom
    assert dom.count("<script>") == 1
    assert "&lt;script&gt;alert('x')&lt;/script&gt;" in shown(dom, "pool")


async def use(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not here")
async def test_a_browser_says_when_there_is_no_answer(engine, tmp_path, monkeypatch):
    """The page came, and then nothing but errors."""
    app = serving(engine)
    monkeypatch.setattr(status.StatusPage, "watch", fail)
    async with real_server(app) as base:
        dom, _ = await seen(f"{base}/poolkit", tmp_path)
    assert 'class="stale"' in dom
    assert "answers with 500" in shown(dom, "gone")


def fail(*_: object) -> None:
    logging.getLogger("uvicorn.error").disabled = True
    raise RuntimeError("no")
