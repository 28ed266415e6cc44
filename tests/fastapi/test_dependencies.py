"""A handler's work is committed before its answer, or not at all, and its connection given back."""

import asyncio
import contextlib
import importlib.util
import json
import threading
import warnings
from typing import Annotated

import httpx
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, Request, Response, WebSocket
from fastapi.responses import StreamingResponse
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, InvalidRequestError, ResourceClosedError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.websockets import WebSocketDisconnect

from poolkit import TransactionAborted, get_engine, pool_stats
from poolkit.fastapi import (
    AutocommitSessionDep,
    ConnectionDep,
    SessionDep,
    clients,
    get_autocommit_session,
    get_connection,
    get_session,
    lifespan,
)
from poolkit.testing import FaultProxy

with warnings.catch_warnings():  # Starlette would rather have it on another HTTP client
    warnings.simplefilter("ignore")
    from fastapi.testclient import TestClient

WITHIN = 30.0
"""Seconds for what would otherwise last for ever."""

PARENT = text("INSERT INTO parents VALUES (:id)")
ORPHAN = text("INSERT INTO children VALUES (-1)")
ONE = text("SELECT 1")

pytestmark = pytest.mark.usefixtures("environment")

both = pytest.mark.parametrize("kind", [SessionDep, ConnectionDep], ids=["session", "connection"])
each = pytest.mark.parametrize(
    "kind",
    [SessionDep, ConnectionDep, AutocommitSessionDep],
    ids=["session", "connection", "autocommit"],
)


@contextlib.asynccontextmanager
async def asking(app, **kwargs):
    """A client of an application that is not behind a network."""
    transport = httpx.ASGITransport(app, **kwargs)
    async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
        yield client


async def status(app, path="/") -> int:
    async with asking(app, raise_app_exceptions=False) as client:
        return (await client.get(path)).status_code


async def parents(witness) -> list[int]:
    return [row[0] for row in await witness.fetch("SELECT id FROM parents ORDER BY id")]


def used() -> int:
    return pool_stats(get_engine()).used


# -- Commit ------------------------------------------------------------------------------------


@each
async def test_committed_and_given_back_before_the_response_begins(kind, witness):
    """At the response's first message the row is there for others, and the pool has it all."""
    app, seen = FastAPI(), []

    @app.get("/")
    async def write(work: kind) -> int:
        await work.execute(PARENT, {"id": 1})
        return 1

    async def watched(scope, receive, send):
        async def watch(message):
            seen.append((message["type"], await parents(witness), used()))
            await send(message)

        await app(scope, receive, watch)

    assert await status(watched) == 200
    assert seen[0] == ("http.response.start", [1], 0)


@both
async def test_a_failed_commit_is_a_500(kind, witness):
    """A constraint that is checked at COMMIT: no 200, and no row."""
    app = FastAPI()

    @app.get("/")
    async def write(work: kind) -> int:
        await work.execute(PARENT, {"id": 1})
        await work.execute(ORPHAN)
        return 1

    assert await status(app) == 500
    assert (await parents(witness), used()) == ([], 0)


@both
async def test_a_commit_that_was_a_rollback_is_a_500(kind, witness):
    """The handler swallowed an error, and the server answers COMMIT with ROLLBACK."""
    app = FastAPI()

    @app.get("/")
    async def write(work: kind) -> int:
        await work.execute(PARENT, {"id": 1})
        with contextlib.suppress(DBAPIError):
            await work.execute(text("SELECT 1/0"))
        return 1

    assert await status(app) == 500
    async with asking(app) as client:
        with pytest.raises(TransactionAborted):
            await client.get("/")
    assert (await parents(witness), used()) == ([], 0)


@both
async def test_a_handler_may_commit_and_roll_back_itself(kind, witness):
    """What it committed stays, what it rolled back is gone, what follows is committed."""
    app = FastAPI()

    @app.get("/")
    async def write(work: kind) -> int:
        await work.execute(PARENT, {"id": 1})
        await work.commit()
        await work.execute(PARENT, {"id": 2})
        await work.rollback()
        await work.execute(PARENT, {"id": 3})
        return 1

    assert await status(app) == 200
    assert (await parents(witness), used()) == ([1, 3], 0)


async def test_objects_stay_readable_in_the_response(witness):
    """The response is made of them after the commit."""
    app = FastAPI()

    @app.get("/")
    async def read(session: SessionDep) -> bool:
        return session.sync_session.expire_on_commit

    async with asking(app) as client:
        assert (await client.get("/")).json() is False


# -- Rollback ----------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("error", "expected"), [(HTTPException(409), 409), (KeyError("bug"), 500)], ids=["http", "bug"]
)
async def test_an_exception_rolls_back(kind, error, expected, witness):
    """Whether it is an answer or a bug; the answer stays what it is."""
    app = FastAPI()

    @app.get("/")
    async def write(work: kind) -> int:
        await work.execute(PARENT, {"id": 1})
        raise error

    assert await status(app) == expected
    assert (await parents(witness), used()) == ([], 0)


@each
async def test_a_cancellation_rolls_back(kind, witness):
    """In the middle of a statement: nothing is written, no connection is missing."""
    app = FastAPI()

    @app.get("/")
    async def write(work: kind) -> int:
        if kind is not AutocommitSessionDep:
            await work.execute(PARENT, {"id": 1})
        await work.execute(text("SELECT pg_sleep(20) AS cancelled"))
        return 1

    sleeping = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(20)%'"
    async with asyncio.timeout(WITHIN):
        request = asyncio.create_task(status(app))
        while not await witness.fetchval(sleeping):
            await asyncio.sleep(0.01)
        request.cancel()
        await asyncio.wait({request})

    assert request.cancelled()
    assert (await parents(witness), used()) == ([], 0)


# -- What is not used, and what is used too late -------------------------------------------------


@each
async def test_a_handler_that_does_not_use_it_takes_no_connection(kind):
    """Checked out at the first use, and there was none."""
    app = FastAPI()

    @app.get("/")
    async def idle(work: kind) -> int:
        return 1

    assert await status(app) == 200
    assert pool_stats(get_engine()).checkouts == 0


@each
async def test_given_back_before_streaming_and_background_tasks(kind):
    """The pool is whole while the body is sent, and while the tasks run."""
    app, seen = FastAPI(), []

    async def body():
        seen.append(used())
        yield b"piece"

    @app.get("/")
    async def stream(work: kind, later: BackgroundTasks):
        await work.execute(ONE)
        seen.append(used())
        later.add_task(lambda: seen.append(used()))
        return StreamingResponse(body(), background=later)

    assert await status(app) == 200
    assert seen == [1, 0, 0]


@each
@pytest.mark.parametrize("was_used", [True, False])
async def test_use_after_the_end_is_an_error_that_says_what_to_do(kind, was_used):
    """Never a new checkout that nobody gives back."""
    app, errors = FastAPI(), []

    async def later(work):
        try:
            await work.execute(ONE)
        except ResourceClosedError as error:
            errors.append(str(error))

    @app.get("/")
    async def handler(work: kind, tasks: BackgroundTasks) -> int:
        if was_used:
            await work.execute(ONE)
        tasks.add_task(later, work)
        return 1

    assert await status(app) == 200
    assert len(errors) == 1
    assert "ended with its handler" in errors[0]
    assert "poolkit.session()" in errors[0]
    assert "scope='request'" in errors[0]
    assert pool_stats(get_engine()).checkouts == was_used


HELD_ON = {
    "session": Annotated[AsyncSession, Depends(get_session, scope="request")],
    "connection": Annotated[AsyncConnection, Depends(get_connection, scope="request")],
    "autocommit": Annotated[AsyncSession, Depends(get_autocommit_session, scope="request")],
}


@pytest.mark.parametrize("kind", HELD_ON.values(), ids=HELD_ON)
async def test_one_that_is_held_on_to_is_committed_after_the_body(kind, witness, serve):
    """Under uvicorn too, where a client that has its answer counts as disconnected."""
    app = FastAPI(lifespan=lifespan())

    @app.get("/")
    async def stream(work: kind):
        async def body():
            await work.execute(PARENT, {"id": 1})
            yield b"done"

        return StreamingResponse(body())

    served = serve(app)
    async with httpx.AsyncClient() as client:
        assert (await client.get(served.url)).text == "done"
    async with asyncio.timeout(WITHIN):
        while await parents(witness) != [1]:
            await asyncio.sleep(0.01)


# -- AUTOCOMMIT --------------------------------------------------------------------------------


async def test_an_autocommit_read_is_one_round_trip(server, monkeypatch):
    """No BEGIN, no COMMIT; a session's read is three."""
    app = FastAPI()

    @app.get("/autocommit")
    async def autocommit(session: AutocommitSessionDep) -> int:
        return await session.scalar(ONE)

    @app.get("/transaction")
    async def transaction(session: SessionDep) -> int:
        return await session.scalar(ONE)

    with FaultProxy(server) as proxy:
        monkeypatch.setenv("DATABASE_URL", proxy.url)
        trips = []
        for path in ("/autocommit", "/transaction", "/autocommit"):
            assert await status(app, path) == 200  # statements are prepared once
            proxy.forget()
            assert await status(app, path) == 200
            trips.append(proxy.round_trips)
        await get_engine().dispose()

    assert trips == [1, 3, 1]


async def test_both_kinds_of_sessions_in_one_handler(witness):
    """The one is committed at once, the other rolled back, on two connections of one pool."""
    app = FastAPI()

    @app.get("/")
    async def write(transaction: SessionDep, autocommit: AutocommitSessionDep) -> int:
        await transaction.execute(PARENT, {"id": 1})
        await autocommit.execute(PARENT, {"id": 2})
        assert used() == 2
        raise HTTPException(409)

    assert await status(app) == 409
    assert await parents(witness) == [2]
    assert (used(), pool_stats(get_engine()).idle) == (0, 2)


async def test_the_isolation_level_is_the_default_afterwards():
    """A connection that was in AUTOCOMMIT comes back for transactions."""
    app = FastAPI()

    async def begun(connection) -> bool:
        await connection.execute(ONE)
        return (await connection.get_raw_connection()).driver_connection.is_in_transaction()

    @app.get("/")
    async def read(session: AutocommitSessionDep) -> bool:
        return await begun(await session.connection())

    async with asking(app) as client:
        assert (await client.get("/")).json() is False
    async with get_engine().connect() as connection:
        assert await begun(connection)
    assert pool_stats(get_engine()).opened == 1


class Base(DeclarativeBase):
    """Of the model."""


class Parent(Base):
    """A row of the table `parents`."""

    __tablename__ = "parents"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


async def test_what_is_pending_in_an_autocommit_session_is_sent(witness):
    """At the handler's end, as in any session: new, changed and deleted objects."""
    app = FastAPI()

    @app.get("/{step}")
    async def write(step: str, session: AutocommitSessionDep) -> int:
        if step == "new":
            session.add_all([Parent(id=1), Parent(id=2)])
        elif step == "changed":
            (await session.get(Parent, 1)).id = 3
        else:
            await session.delete(await session.get(Parent, 2))
        return 1

    found = []
    for step in ("new", "changed", "deleted"):
        assert await status(app, path=f"/{step}") == 200
        found.append(await parents(witness))
    assert found == [[1, 2], [2, 3], [3]]


async def test_what_is_pending_in_an_autocommit_session_may_fail(witness):
    """As an error, and the connection is given back."""
    app = FastAPI()
    await witness.execute("INSERT INTO parents VALUES (1)")

    @app.get("/")
    async def write(session: AutocommitSessionDep) -> int:
        session.add(Parent(id=1))
        return 1

    assert await status(app) == 500
    assert pool_stats(get_engine()).used == 0


# -- Clients that leave ------------------------------------------------------------------------


class Waiting:
    """An application whose handlers write and then wait, until the test lets them go on."""

    def __init__(self, kind, *, middlewares=0):
        self.app = FastAPI(lifespan=lifespan())
        self.written, self.go_on = threading.Event(), threading.Event()
        self.outcomes: list[int] = []

        async def pass_on(request, call_next):
            return await call_next(request)

        for _ in range(middlewares):
            self.app.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)

        @self.app.exception_handler(HTTPException)
        async def note(request, error):
            self.outcomes.append(error.status_code)
            return Response(status_code=error.status_code)

        @self.app.get("/")
        async def read(work: kind) -> int:
            return await self.write(work)

        @self.app.post("/")
        async def send(work: kind, body: dict[str, str]) -> int:
            return await self.write(work)

    async def write(self, work):
        await work.execute(PARENT, {"id": 1})
        self.written.set()
        assert await asyncio.to_thread(self.go_on.wait, WITHIN)
        return 1


GET = b"GET / HTTP/1.1\r\nHost: app\r\n\r\n"
BODY = json.dumps({"key": "x" * 5000}).encode()
POST = (
    b"POST / HTTP/1.1\r\nHost: app\r\nContent-Type: application/json\r\n"
    + b"Content-Length: %d\r\n\r\n" % len(BODY)
    + BODY
)
requests = pytest.mark.parametrize("sent", [GET, POST], ids=["get", "post"])
depths = pytest.mark.parametrize("middlewares", [0, 1, 2])
protocols = pytest.mark.parametrize(
    "http", ["h11"] + ["httptools"] * (importlib.util.find_spec("httptools") is not None)
)


@both
@requests
@depths
@protocols
async def test_nothing_is_committed_for_a_client_that_has_left(
    kind, sent, middlewares, http, witness, serve
):
    """Nobody was told 200, so nothing is done; nothing that follows the handler happens either."""
    waiting = Waiting(kind, middlewares=middlewares)
    served = serve(waiting.app, http=http)
    async with asyncio.timeout(WITHIN):
        _, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(sent)
        assert await asyncio.to_thread(waiting.written.wait, WITHIN)
        writer.close()
        await writer.wait_closed()
        while served.server.server_state.connections:  # until the server has noticed
            await asyncio.sleep(0.01)
        waiting.go_on.set()
        while not waiting.outcomes and not await parents(witness):
            await asyncio.sleep(0.01)

    assert await parents(witness) == []
    assert waiting.outcomes == [clients.CLIENT_CLOSED_REQUEST]


@both
@requests
@depths
@protocols
async def test_a_client_that_waits_is_served(kind, sent, middlewares, http, witness, serve):
    """The check itself takes nobody for gone, whatever stands around the application."""
    waiting = Waiting(kind, middlewares=middlewares)
    waiting.go_on.set()
    served = serve(waiting.app, http=http)
    async with asyncio.timeout(WITHIN):
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(sent)
        assert b" 200 " in await reader.readline()
        writer.close()
        await writer.wait_closed()

    assert await parents(witness) == [1]


@pytest.mark.parametrize("content", [b"", b"x" * 300_000], ids=["empty", "long"])
@pytest.mark.parametrize("middlewares", [0, 1])
async def test_an_unread_body_is_left_to_who_reads_it_later(content, middlewares, witness, serve):
    """The check takes no piece of it away."""
    app = FastAPI(lifespan=lifespan())

    async def pass_on(request, call_next):
        return await call_next(request)

    for _ in range(middlewares):
        app.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)

    @app.post("/")
    async def echo(request: Request, session: SessionDep):
        await session.execute(PARENT, {"id": 1})

        class Echo(Response):
            async def __call__(self, scope, receive, send):
                await Response(await request.body())(scope, receive, send)

        return Echo()

    served = serve(app)
    async with asyncio.timeout(WITHIN), httpx.AsyncClient() as client:
        answer = await client.post(served.url, content=content)

    assert answer.content == content
    assert await parents(witness) == [1]


async def test_an_unread_body_is_not_waited_for(witness, serve):
    """A client that never sends what it announced keeps no connection from going back."""
    app = FastAPI(lifespan=lifespan())

    @app.post("/")
    async def write(session: SessionDep) -> int:
        await session.execute(PARENT, {"id": 1})
        return 1

    served = serve(app)
    async with asyncio.timeout(WITHIN):
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(b"POST / HTTP/1.1\r\nHost: app\r\nContent-Length: 10\r\n\r\n")
        assert b" 200 " in await reader.readline()
        writer.close()
        await writer.wait_closed()

    assert await parents(witness) == [1]


async def test_the_check_waits_for_nothing_and_hides_no_cancellation():
    """A receive that never returns is cancelled soon; one's own cancellation goes through."""
    ended = []

    async def receive():
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("ended")

    assert await clients._glance(receive) is None
    assert ended == ["ended"]

    glancing = asyncio.create_task(clients._glance(receive))
    await asyncio.sleep(0)
    glancing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await glancing
    assert ended == ["ended"] * 2


def test_what_is_leant_on_is_there():
    """Starlette's mark of a body that was read; FastAPI's exit stack is in every other test."""
    request = Request({"type": "http", "headers": []})

    assert request._stream_consumed is False


async def test_fastapi_keeps_the_stack_of_what_ends_before_the_response():
    """By it the check knows that a response has not begun."""
    app, kinds = FastAPI(), []

    @app.get("/")
    async def handler(request: Request) -> int:
        kinds.append(type(request.scope[clients.FUNCTION_STACK]))
        return 1

    assert await status(app) == 200
    assert kinds == [contextlib.AsyncExitStack]


@protocols
def test_uvicorn_notes_whether_a_client_is_there(http, serve):
    """What is asked before anything that costs more."""
    app = FastAPI()

    @app.get("/")
    async def handler(request: Request) -> bool:
        return request.receive.__self__.disconnected

    assert httpx.get(serve(app, http=http).url).json() is False


# -- WebSockets, test clients, overrides ---------------------------------------------------------


def test_a_websocket_commits_at_its_end_and_rolls_back_when_the_peer_leaves(server):
    """As any handler; a `WebSocketDisconnect` that leaves it is an exception."""
    app = FastAPI(lifespan=lifespan())

    @app.get("/parents")
    async def listed(session: SessionDep) -> list[int]:
        return list(await session.scalars(text("SELECT id FROM parents ORDER BY id")))

    @app.get("/tables")
    async def tables(session: SessionDep) -> None:
        await session.execute(text("DROP TABLE IF EXISTS children, parents"))
        await session.execute(text("CREATE TABLE parents (id int PRIMARY KEY)"))

    @app.websocket("/{row}")
    async def socket(websocket: WebSocket, row: int, session: SessionDep):
        await websocket.accept()
        await session.execute(PARENT, {"id": row})
        await websocket.send_text("written")
        await websocket.receive_text()

    with TestClient(app) as client:
        client.get("/tables")
        with client.websocket_connect("/1") as stays:
            stays.receive_text()
            stays.send_text("done")
        with contextlib.suppress(WebSocketDisconnect), client.websocket_connect("/2") as leaves:
            leaves.receive_text()
        assert client.get("/parents").json() == [1]


@each
def test_in_the_test_client(kind):
    """Starlette's own, on a loop of its own."""
    app = FastAPI(lifespan=lifespan())

    @app.get("/")
    async def read(work: kind) -> int:
        return await work.scalar(ONE)

    with TestClient(app) as client:
        assert [client.get("/").json() for _ in range(3)] == [1, 1, 1]


async def test_an_override_is_one_line(make_engine, server):
    """Tests put a session of their own in its place."""
    app = FastAPI()

    @app.get("/")
    async def read(session: SessionDep) -> int:
        return await session.scalar(ONE)

    engine = make_engine(settings={"url": server.url})
    async with AsyncSession(engine) as session:
        app.dependency_overrides[get_session] = lambda: session
        assert await status(app) == 200
        assert session.in_transaction()


async def test_an_error_that_swallows_nothing_keeps_its_type():
    """A second commit after the end is SQLAlchemy's own error, and no checkout."""
    app, kept = FastAPI(), []

    @app.get("/")
    async def read(session: SessionDep) -> int:
        kept.append(session)
        return 1

    assert await status(app) == 200
    with pytest.raises(InvalidRequestError):
        await kept[0].commit()
    assert pool_stats(get_engine()).checkouts == 0
