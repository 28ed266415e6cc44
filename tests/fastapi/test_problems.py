"""Database faults as HTTP answers, and what stays as it is without poolkit."""

import asyncio
import json
import logging
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated

import asyncpg
import httpx
import pytest
from fastapi import Depends, FastAPI, WebSocket
from fastapi.responses import PlainTextResponse, StreamingResponse
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from starlette.applications import Starlette
from starlette.routing import Route

from poolkit import (
    Fault,
    FaultKind,
    LockTimeout,
    Outcome,
    PoolTimeout,
    StatementTimeout,
)
from poolkit.fastapi import install, problems
from poolkit.testing import FaultProxy

SECRETS = (
    "postgres",
    "127.0.0.1",
    "pg_sleep",
    "SELECT",
    "INSERT",
    "57014",
    "used",
    "limit",
    "pool",
)


@asynccontextmanager
async def client(app: Starlette, *, raises: bool = True) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=raises)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as opened:
        yield opened


def failing(error: BaseException | Callable[[], object]) -> FastAPI:
    """An application whose ``/`` raises that."""
    app = FastAPI()
    install(app, health=False)

    @app.api_route("/", methods=["GET", "POST"])
    async def root() -> None:
        if isinstance(error, BaseException):
            raise error
        await error()

    return app


def assert_says_nothing(answer: httpx.Response) -> None:
    for secret in SECRETS:
        assert secret not in answer.text, answer.text


async def test_an_exhausted_pool_is_503_with_retry_after(make_engine, server):
    """RFC 9457's members, whole seconds to wait, and nothing of the pool."""
    engine = make_engine(settings={"url": server.url, "pool_size": 1}, max_overflow=0)
    engine.pool._timeout = 0.05

    async def use() -> None:
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))

    async with client(failing(use)) as http, engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
        answer = await http.post("/")
    assert answer.status_code == 503
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["cache-control"] == "no-store"
    assert 1 <= int(answer.headers["retry-after"]) <= 5
    assert answer.json() == {
        "type": "about:blank",
        "title": "Service Unavailable",
        "status": 503,
        "detail": "The service cannot do this at the moment. Try again later.",
    }
    assert_says_nothing(answer)


async def test_clients_turned_away_together_do_not_come_back_together(monkeypatch):
    """The seconds of ``Retry-After`` are spread."""
    monkeypatch.setattr(problems, "random", random.Random(1))
    async with client(failing(PoolTimeout("full"))) as http:
        told = {(await http.get("/")).headers["retry-after"] for _ in range(40)}
    assert told == {"1", "2", "3", "4", "5"}


async def test_a_statement_timeout_is_504_and_is_logged_once(make_engine, server, caplog):
    """Nobody else tells of it; the line has no statement in it."""
    engine = make_engine(settings={"url": server.url, "statement_timeout": 0.1})

    async def sleep() -> None:
        async with engine.connect() as connection:
            await connection.execute(text("SELECT pg_sleep(5), 'hush'"))

    async with client(failing(sleep)) as http:
        answer = await http.post("/")
    assert (answer.status_code, answer.json()["title"]) == (504, "Gateway Timeout")
    assert "retry-after" not in answer.headers
    assert_says_nothing(answer)
    lines = [
        r for r in caplog.records if r.name.startswith("poolkit") and r.levelno > logging.DEBUG
    ]
    assert [line.getMessage() for line in lines] == [
        "POST / answered with 504: statement_timeout, SQLSTATE 57014, outcome rolled_back"
    ]


async def test_a_lock_timeout_is_504(make_engine, server):
    """As a statement's."""
    engine = make_engine(settings={"url": server.url, "lock_timeout": 0.1})
    lock = text("SELECT pg_advisory_xact_lock(4711)")

    async def wait() -> None:
        async with engine.connect() as connection:
            await connection.execute(lock)

    async with client(failing(wait)) as http, engine.connect() as connection:
        await connection.execute(lock)
        assert (await http.get("/")).status_code == 504


async def test_no_database_is_503_and_is_not_logged_here(make_engine, server, caplog):
    """The engine's own line tells it."""
    with FaultProxy(server) as proxy:
        engine = make_engine(settings={"url": proxy.url, "connection_timeout": 0.3})
        proxy.refuse()

        async def use() -> None:
            async with engine.connect():
                pass

        async with client(failing(use)) as http:
            answer = await http.get("/")
    assert answer.status_code == 503
    assert "retry-after" in answer.headers
    assert_says_nothing(answer)
    assert [r.name for r in caplog.records if r.name.startswith("poolkit")] == ["poolkit.connect"]


async def test_raw_asyncpg_is_answered_too():
    """Without SQLAlchemy: refused, and too many connections."""

    async def refused() -> None:
        await asyncpg.connect("postgresql://u:p@127.0.0.1:1/d")

    async with client(failing(refused)) as http:
        assert (await http.get("/")).status_code == 503
    async with client(failing(asyncpg.TooManyConnectionsError("no more"))) as http:
        assert (await http.get("/")).status_code == 503


def session_dependency(url_engine) -> object:
    """As people write it; commits before the response is sent."""
    sessions = async_sessionmaker(url_engine)

    async def session() -> AsyncIterator[AsyncSession]:
        async with sessions.begin() as opened:
            yield opened

    return Annotated[AsyncSession, Depends(session, scope="function")]


def writing(engine) -> FastAPI:
    app = FastAPI()
    install(app, engine=engine)
    session_dep = session_dependency(engine)

    @app.post("/write")
    async def write(session: session_dep) -> str:
        await session.execute(text("INSERT INTO written VALUES (1)"))
        return "done"

    @app.get("/read")
    async def read(session: session_dep) -> int:
        return await session.scalar(text("SELECT 1"))

    return app


@pytest.fixture
async def written(engine):
    """A table whose rows are checked at COMMIT."""
    async with engine.begin() as connection:
        await connection.execute(text("DROP TABLE IF EXISTS written"))
        await connection.execute(
            text("CREATE TABLE written (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
        )
    return "written"


async def test_a_lost_commit_is_503_without_retry_after(make_engine, server, written):
    """It may have taken effect: told as such, and no client is sent back blindly."""
    with FaultProxy(server) as proxy:
        engine = make_engine(settings={"url": f"{proxy.url}?sslmode=disable"})
        async with client(writing(engine)) as http:
            assert (await http.get("/read")).status_code == 200
            proxy.cut(after="COMMIT")
            answer = await http.post("/write")
    assert answer.status_code == 503, answer.text
    assert "retry-after" not in answer.headers
    assert answer.json()["outcome"] == "unknown"
    assert "Look before trying again" in answer.json()["detail"]
    assert_says_nothing(answer)


async def test_a_refused_commit_stays_a_500(engine, written):
    """A deferred constraint: an error of the application's, and never a 200."""
    async with client(writing(engine), raises=False) as http:
        assert (await http.post("/write")).status_code == 200
        assert (await http.post("/write")).status_code == 500
    with pytest.raises(IntegrityError):
        async with client(writing(engine)) as http:
            await http.post("/write")


def lost(outcome: Outcome) -> Fault:
    return Fault(FaultKind.CONNECTION_LOST, None, False, True, outcome, 503)


@pytest.mark.parametrize(
    ("outcome", "method", "is_told"),
    [
        (Outcome.UNKNOWN, "POST", True),
        (Outcome.UNKNOWN, "PUT", True),
        (Outcome.UNKNOWN, "GET", False),
        (Outcome.ROLLED_BACK, "POST", False),
        (Outcome.NOT_SENT, "POST", False),
    ],
)
def test_an_unknown_outcome_is_told_unless_the_method_is_safe(outcome, method, is_told):
    """To repeat a GET does no harm by definition."""
    answer = problems.problem(lost(outcome), method)
    body = json.loads(answer.body)
    assert ("outcome" in body, "retry-after" in answer.headers) == (is_told, not is_told)


async def test_other_clients_errors_are_not_ours():
    """A file that is missing, a timeout of the application's, another server that refuses."""

    async def slow() -> None:
        async with asyncio.timeout(0.01):
            await asyncio.sleep(5)

    async def refused() -> None:
        await asyncio.open_connection("127.0.0.1", 1)

    for error in (FileNotFoundError("x"), slow, refused, TimeoutError()):
        async with client(failing(error), raises=False) as http:
            assert (await http.get("/")).status_code == 500, error
        with pytest.raises(OSError):
            async with client(failing(error)) as http:
                await http.get("/")


async def test_a_deadline_of_the_applications_around_a_statement_is_504(engine):
    """The database was what took so long."""

    async def sleep() -> None:
        async with asyncio.timeout(0.2), engine.connect() as connection:
            await connection.execute(text("SELECT pg_sleep(5)"))

    async with client(failing(sleep)) as http:
        assert (await http.get("/")).status_code == 504


async def test_what_is_no_capacity_fault_goes_on_unchanged():
    """The very exception reaches the server."""
    error = ValueError("mine")
    wrong = IntegrityError("INSERT", {}, ValueError("dup"))
    for each in (error, wrong):
        with pytest.raises(type(each)) as caught:
            async with client(failing(each)) as http:
                await http.get("/")
        assert caught.value is each


async def answered(app: Starlette) -> str:
    async with client(app) as http:
        return (await http.get("/")).text


@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize("kind", [LockTimeout, DBAPIError, SQLAlchemyError])
@pytest.mark.parametrize("before", [True, False])
async def test_the_applications_own_handlers_win(kind, before, is_async):
    """More specific ones and those for the same class, added before or after."""
    app = FastAPI()

    async def handle(_, error):
        return PlainTextResponse("mine")

    def handle_in_a_thread(_, error):
        return PlainTextResponse("mine")

    handler = handle if is_async else handle_in_a_thread
    if before:
        app.add_exception_handler(kind, handler)
    install(app)
    if not before:
        app.add_exception_handler(kind, handler)

    @app.get("/")
    async def root() -> None:
        raise LockTimeout("x", {}, ValueError("y"))

    assert await answered(app) == "mine"


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_more_general_handler_gets_what_is_not_ours(is_async):
    """As if poolkit's were not there; ``Exception``'s included."""
    app = failing(IntegrityError("INSERT", {}, ValueError("dup")))

    async def handle(_, error):
        return PlainTextResponse(type(error).__name__, 418)

    def handle_in_a_thread(_, error):
        return PlainTextResponse(type(error).__name__, 418)

    app.add_exception_handler(Exception, handle if is_async else handle_in_a_thread)
    async with client(app, raises=False) as http:
        assert (await http.get("/")).text == "IntegrityError"

    class Both(SQLAlchemyError, LookupError):
        pass

    app = failing(Both("x"))
    app.add_exception_handler(LookupError, handle if is_async else handle_in_a_thread)
    assert await answered(app) == "Both"


async def test_what_needs_somebody_to_change_something_is_a_500(make_engine, server):
    """A database that does not exist: waiting does not help."""
    engine = make_engine(settings={"url": server.url.replace("/postgres", "/nowhere")})

    async def use() -> None:
        async with engine.connect():
            pass

    async with client(failing(use), raises=False) as http:
        assert (await http.get("/")).status_code == 500


async def test_after_the_response_has_begun_nothing_is_made_worse():
    """The server gets an error and ends the connection, and the next request works."""
    app = FastAPI()
    install(app)

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def pieces() -> AsyncIterator[str]:
            yield "a"
            raise PoolTimeout("full")

        return StreamingResponse(pieces())

    @app.get("/next")
    async def following() -> str:
        return "ok"

    async with client(app) as http:
        with pytest.raises((PoolTimeout, RuntimeError)) as caught:
            await http.get("/stream")
        assert isinstance(caught.value, PoolTimeout) or isinstance(
            caught.value.__cause__, PoolTimeout
        )
        assert (await http.get("/next")).status_code == 200


async def test_a_websocket_gets_no_http_answer():
    """It ends as without poolkit."""
    app = FastAPI()
    install(app)

    @app.websocket("/ws")
    async def ws(socket: WebSocket) -> None:
        await socket.accept()
        raise PoolTimeout("full")

    sent: list[str] = []
    scope = {"type": "websocket", "path": "/ws", "headers": [], "query_string": b""}

    async def receive() -> dict[str, str]:
        return {"type": "websocket.connect"}

    async def send(message: dict[str, str]) -> None:
        sent.append(message["type"])

    with pytest.raises(PoolTimeout):
        await app(scope, receive, send)
    assert sent == ["websocket.accept"]


async def test_on_plain_starlette():
    """The same."""

    async def root(_) -> None:
        raise StatementTimeout("SELECT", {}, TimeoutError())

    app = Starlette(routes=[Route("/", root)])
    install(app)
    async with client(app) as http:
        assert (await http.get("/")).status_code == 504
