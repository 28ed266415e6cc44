"""The fault proxy: each fault as a client sees it, on a real server."""

import asyncio
import contextlib
import gc
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest

from poolkit.testing import At, FaultProxy, FaultProxyError, PostgresServer, postgres
from poolkit.testing._dialogue import Dialogue
from poolkit.testing._upstream import upstream

LOST = (OSError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError)
STARTUP = b"\0\0\0\x17\0\x03\0\0user\0postgres\0\0"
SOON = 0.2  # a real wait: that nothing happens can only be seen by waiting


@pytest.fixture
def proxy(server: PostgresServer) -> Iterator[FaultProxy]:
    with FaultProxy(server) as running:
        yield running


Connect = Any


@pytest.fixture
async def connect(proxy: FaultProxy) -> AsyncIterator[Connect]:
    """Connections through the proxy, without TLS being asked for."""
    made: list[asyncpg.Connection] = []

    async def connect(**options: Any) -> asyncpg.Connection:
        made.append(await asyncpg.connect(proxy.url, **{"ssl": False, **options}))
        return made[-1]

    yield connect
    for connection in made:
        connection.terminate()


@pytest.fixture
async def table(server: PostgresServer) -> AsyncIterator[asyncpg.Connection]:
    """A direct connection to the server, with an empty table ``t``."""
    direct = await asyncpg.connect(server.url)
    await direct.execute("DROP TABLE IF EXISTS t; CREATE TABLE t (x int)")
    yield direct
    await direct.close()


async def rows(direct: asyncpg.Connection) -> int:
    return await direct.fetchval("SELECT count(*) FROM t")


async def insert(connection: asyncpg.Connection) -> None:
    async with connection.transaction():
        await connection.execute("INSERT INTO t VALUES ($1)", 1)


async def is_unanswered(waiting: asyncio.Future[Any]) -> bool:
    await asyncio.wait([waiting], timeout=SOON)
    return not waiting.done()


@contextlib.contextmanager
def raw(proxy: FaultProxy) -> Iterator[socket.socket]:
    """A client that has been let in by the server as far as the request for its password."""
    with socket.create_connection((proxy.host, proxy.port), timeout=10) as sock:
        sock.sendall(STARTUP)
        assert sock.recv(1) == b"R"
        yield sock


# Without a fault.


async def test_the_url_is_the_servers_with_another_address(proxy, server):
    """User, password, database and options stay."""
    ours, theirs = (
        urlsplit(proxy.through(f"{server.url}?sslmode=disable&host=x")),
        urlsplit(server.url),
    )

    assert (ours.hostname, ours.port) == (proxy.host, proxy.port) == ("127.0.0.1", proxy.port)
    assert (ours.username, ours.password) == (theirs.username, theirs.password)
    assert (ours.path, ours.query) == ("/postgres", "sslmode=disable")


@pytest.mark.parametrize("kind", ["server", "url", "socket_url", "address", "socket"])
async def test_a_server_may_be_named_in_any_way(server, kind):
    """By postgres(), by URL over TCP or a Unix socket, by address, by the socket's path."""
    named = {
        "server": server,
        "url": server.url,
        "socket_url": server.socket_url,
        "address": (server.host, server.port),
        "socket": server.socket_dir / f".s.PGSQL.{server.port}",
    }[kind]
    async with FaultProxy(named) as proxy:
        url = proxy.through(server.url)
        connection = await asyncpg.connect(url)
        assert await connection.fetchval("SELECT 1") == 1
        await connection.close()
        if "url" in kind or kind == "server":
            assert proxy.url == url


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("postgres://u:p@h/d", ("h", 5432, None)),
        ("postgresql+asyncpg://h:1/d", ("h", 1, None)),
        ("postgresql://[::1]:7/", ("::1", 7, None)),
        ("postgresql:///d?host=h&port=6", ("h", 6, None)),
        ("postgresql://h/d?hostaddr=10.0.0.1", ("10.0.0.1", 5432, None)),
        ("postgresql://u@/d?host=/run/pg&port=6", ("", 0, "/run/pg/.s.PGSQL.6")),
        ("postgresql://%2Frun/d", ("", 0, "/run/.s.PGSQL.5432")),
    ],
)
def test_urls_lead_to_the_server(url, address):
    """libpq's ways to write an address are understood."""
    found = upstream(url)

    assert (found.host, found.port, found.socket) == address


@pytest.mark.parametrize(
    "url", ["mysql://h/d", "postgresql://a,b/d", "postgresql://h:x/d", "postgresql://u:s3cret@[x/d"]
)
def test_urls_that_name_no_one_server_are_refused(url):
    """A clear error, which does not show the password."""
    with pytest.raises(ValueError) as caught:
        FaultProxy(url)

    assert "s3cret" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("tls", [False, True])
async def test_large_messages_and_copy_pass_unharmed(tls, server, tls_server):
    """Values, rows and COPY of megabytes, both ways, readable or encrypted."""
    async with FaultProxy(tls_server if tls else server) as proxy:
        connection = await asyncpg.connect(proxy.url, ssl="require" if tls else False)
        value = os.urandom(5_000_000)
        assert await connection.fetchval("SELECT $1::bytea", value) == value
        await connection.execute("CREATE TEMP TABLE big (i int, t text)")
        records = [(i, "x" * 1000) for i in range(3000)]
        await connection.copy_records_to_table("big", records=records)
        assert await connection.fetch("SELECT * FROM big ORDER BY i") == records
        copied: list[bytes] = []
        await connection.copy_from_table("big", output=_into(copied))
        assert sum(map(len, copied)) > 3_000_000
        assert await connection.fetchval("SELECT count(*) FROM big") == 3000
        await connection.close()


def _into(chunks: list[bytes]) -> Any:
    async def write(data: bytes) -> None:
        chunks.append(data)

    return write


async def test_a_request_to_cancel_reaches_the_server(proxy, connect):
    """The driver's cancellation, on a connection of its own, works and is counted."""
    connection = await connect()
    with pytest.raises(TimeoutError):
        await connection.execute("SELECT pg_sleep(60)", timeout=SOON)

    assert await connection.fetchval("SELECT 1") == 1
    assert proxy.stats.cancel_requests == 1


def test_it_serves_sync_code_and_other_threads(server):
    """No event loop is needed, and any thread may drive it."""
    with FaultProxy(server) as proxy:
        with raw(proxy):
            seen = proxy.seen(At("AuthenticationSASL")).wait()
        thread = threading.Thread(target=proxy.refuse)
        thread.start()
        thread.join()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((proxy.host, proxy.port))

    assert (seen.connection, seen.sender) == (1, "server")


async def test_two_proxies_are_two_hosts(server):
    """Several addresses can listen on one port."""
    with (
        FaultProxy(server, host="127.0.0.2") as one,
        FaultProxy(server, host="127.0.0.3", port=one.port) as two,
    ):
        for proxy in (one, two):
            connection = await asyncpg.connect(proxy.url)
            await connection.close()
        assert (one.stats.accepted, two.stats.accepted) == (1, 1)


# Reading along.


@pytest.mark.parametrize(
    ("refuse", "ssl", "trips"), [(False, False, 3), (False, "prefer", 4), (True, "prefer", 4)]
)
async def test_the_round_trips_of_a_connect(server, refuse, ssl, trips):
    """SCRAM takes three, and asking for TLS one more."""
    async with FaultProxy(server, refuse_encryption=refuse) as proxy:
        connection = await asyncpg.connect(proxy.url, ssl=ssl)
        assert proxy.round_trips == proxy.stats.round_trips == trips
        await connection.close()


async def test_the_round_trips_of_statements(proxy, connect, table):
    """Prepare and execute are one each, and so are BEGIN and COMMIT."""
    connection = await connect()
    counts = []
    for _ in range(2):
        for work in (connection.fetchval("SELECT $1::int", 1), insert(connection)):
            proxy.forget()
            await work
            counts.append(proxy.round_trips)

    assert counts == [2, 4, 1, 3]
    assert proxy.connections[0].round_trips == 3


async def test_the_record_tells_what_was_said(proxy, connect):
    """Types, SQL, tags and SQLSTATEs, in order, with the statement that an answer is for."""
    connection = await connect()
    statement = await connection.prepare("SELECT $1::int")
    proxy.forget()
    await statement.fetch(7)
    with pytest.raises(asyncpg.UndefinedTableError):
        await connection.execute("SELECT * FROM nowhere")

    told = [(m.sender, m.type, m.text) for m in proxy.messages]
    assert told == [
        ("client", "Bind", "SELECT $1::int"),
        ("client", "Execute", "SELECT $1::int"),
        ("client", "Sync", None),
        ("server", "BindComplete", None),
        ("server", "DataRow", None),
        ("server", "CommandComplete", "SELECT 1"),
        ("server", "ReadyForQuery", "I"),
        ("client", "Query", "SELECT * FROM nowhere"),
        ("server", "ErrorResponse", "42P01"),
        ("server", "ReadyForQuery", "I"),
    ]
    assert [
        m.statement for m in proxy.messages if m.type in {"CommandComplete", "ErrorResponse"}
    ] == [
        "SELECT $1::int",
        "SELECT * FROM nowhere",
    ]
    assert proxy.statements == ["SELECT $1::int", "SELECT * FROM nowhere"]
    assert [m.time for m in proxy.messages] == sorted(m.time for m in proxy.messages)


async def test_the_record_holds_no_secret(proxy, connect, server):
    """No password, no SASL data, no parameter, no row."""
    connection = await connect()
    await connection.fetchval("SELECT $1::text", "pa55word")
    await connection.fetchval("SELECT 'pa55' || 'word'")
    seen = repr(proxy.messages) + repr(proxy.stats) + repr(proxy)

    types = [m.type for m in proxy.messages]
    assert types[:4] == [
        "StartupMessage",
        "AuthenticationSASL",
        "SASLInitialResponse",
        "AuthenticationSASLContinue",
    ]
    for secret in ("pa55word", server.password, "SCRAM", "n,,", ",r="):
        assert secret not in seen


def test_messages_may_come_in_any_pieces():
    """Byte by byte, the same messages are told, and the same bytes relayed."""
    client = b"".join((
        b"\0\0\0\x08\x04\xd2\x16\x2f",
        b"\0\0\0\x10\0\x03\0\0user\0u\0\0",
        b"p\0\0\0\x08abcd",
        b"P\0\0\0\x11n\0SELECT 1\0\0\0",
        b"B\0\0\0\x0ep\0n\0\0\0\0\0\0\0",
        b"E\0\0\0\x0ap\0\0\0\0\0",
        b"S\0\0\0\x04",
        b"d\0\0\0\x06xx" * 3,
        b"Q\0\0\0\x0bCOMMIT\0",
    ))  # fmt: skip

    def told(size: int) -> tuple[bytes, list[tuple[str, str | None]], list[str]]:
        dialogue = Dialogue(1, refuse_encryption=False)
        units = [
            unit
            for at in range(0, len(client), size)
            for unit in dialogue.units("client", client[at : at + size])
        ]
        return (
            b"".join(unit.data for unit in units) + dialogue.rest("client"),
            [(u.begins.type, u.begins.text) for u in units if u.begins],
            [u.ends.type for u in units if u.ends],
        )

    whole = told(len(client))
    assert whole[0] == client
    assert [name for name, _ in whole[1]] == [
        "SSLRequest", "StartupMessage", "PasswordMessage", "Parse", "Bind", "Execute", "Sync",
        "CopyData", "Query",
    ]  # fmt: skip
    assert ("Execute", "SELECT 1") in whole[1]
    for size in (1, 2, 3, 7):
        assert told(size)[:2] == whole[:2]


def test_answers_are_told_apart_in_a_pipeline():
    """What the server skips after an error is answered by nothing, nor is a Sync during COPY."""

    def message(kind: bytes, body: bytes = b"") -> bytes:
        return kind + (len(body) + 4).to_bytes(4, "big") + body

    def execution(sql: bytes) -> bytes:
        parse, bind = message(b"P", b"\0" + sql + b"\0\0\0"), message(b"B", b"\0\0" + b"\0" * 6)
        return parse + bind + message(b"E", b"\0\0\0\0\0")

    dialogue = Dialogue(1, refuse_encryption=False)
    sync, query = message(b"S"), message(b"Q", b"third\0")
    sent = STARTUP + execution(b"first") + execution(b"skipped") + sync + query
    sent += execution(b"fourth") + sync + sync + execution(b"fifth") + execution(b"sixth") + sync
    list(dialogue.units("client", sent))
    idle, done = message(b"Z", b"I"), message(b"C", b"DONE\0")
    answers = message(b"E", b"C22012\0\0") + idle + done + done + idle
    answers += done + idle + done + done + idle
    told = [unit.begins for unit in dialogue.units("server", answers)]

    assert [(m.text, m.statement) for m in told if m.type != "ReadyForQuery"] == [
        ("22012", "first"),
        ("DONE", "third"),
        ("DONE", "third"),
        ("DONE", "fourth"),
        ("DONE", "fifth"),
        ("DONE", "sixth"),
    ]


@pytest.mark.parametrize(
    "noise", [b"\x16\x03\x01\x02", b"GET / HTTP/1.1\r\n", b"\0\0\0\0\0\0\0\0\0"]
)
def test_what_is_not_the_protocol_passes(noise):
    """TLS from the first byte, or anything else, is relayed and not read."""
    dialogue = Dialogue(1, refuse_encryption=False)

    assert [unit.data for unit in dialogue.units("client", noise)] == [noise]
    assert dialogue.encrypted


# Encryption.


async def test_tls_passes_and_its_messages_cannot_be_asked_for(tls_server):
    """Byte faults work; a fault at a message is a clear error, before or after."""
    async with FaultProxy(tls_server) as proxy:
        connection = await asyncpg.connect(proxy.url, ssl="require")
        for ask in (lambda: proxy.cut(before="COMMIT"), lambda: proxy.seen("COMMIT")):
            with pytest.raises(FaultProxyError, match="encrypted"):
                ask()
        assert proxy.round_trips >= 4
        trap = proxy.cut(after_bytes=1)
        with pytest.raises(LOST):
            await connection.fetchval("SELECT 1")
        assert await trap is None


async def test_a_trap_that_tls_hides_is_an_error(tls_server):
    """Waiting for it says so, and so does the end of the block."""
    proxy = FaultProxy(tls_server).__enter__()
    trap = proxy.cut(before="COMMIT")
    connection = await asyncpg.connect(proxy.url, ssl="require")
    with pytest.raises(FaultProxyError, match="encrypted"):
        await trap
    connection.terminate()
    with pytest.raises(FaultProxyError, match="encrypted"):
        proxy.__exit__(None, None, None)


async def test_encryption_can_be_refused(tls_server):
    """`prefer` goes on without TLS and can be read; `require` fails."""
    async with FaultProxy(tls_server, refuse_encryption=True) as proxy:
        connection = await asyncpg.connect(proxy.url, ssl="prefer")
        await connection.execute("SELECT 1")
        assert proxy.statements == ["SELECT 1"]
        await connection.close()
        with pytest.raises(ConnectionError):
            await asyncpg.connect(proxy.url, ssl="require")


# The network.


async def test_latency_is_a_round_trip(proxy, connect):
    """Each round trip costs it once; many bytes at once cost no more than few."""
    connection = await connect()
    proxy.latency = 0.1
    started = time.perf_counter()
    for _ in range(5):
        await connection.execute("SELECT 1")
    trips = time.perf_counter() - started
    started = time.perf_counter()
    await connection.execute("SELECT repeat('x', 1000) FROM generate_series(1, 5000)")
    much = time.perf_counter() - started

    assert 0.5 <= trips < 0.95
    assert 0.1 <= much < 1.0


async def test_bandwidth_limits_the_bytes_per_second(proxy, connect):
    """A hundred kilobytes at 200 kB/s take half a second, and arrive whole."""
    connection = await connect()
    proxy.connections[0].bandwidth = 200_000
    started = time.perf_counter()
    value = await connection.fetchval("SELECT repeat('x', 100000)")

    assert len(value) == 100_000
    assert 0.5 <= time.perf_counter() - started < 3
    assert (proxy.bandwidth, proxy.connections[0].bandwidth) == (None, 200_000)


@pytest.mark.parametrize(("name", "value"), [("latency", -1), ("bandwidth", 0)])
def test_impossible_networks_are_refused(proxy, name, value):
    """A value that means nothing is an error."""
    with pytest.raises(ValueError, match=name):
        setattr(proxy, name, value)


# New connections.


async def test_silence_answers_no_new_connection(proxy, connect):
    """Those that are there go on; those that met it are not answered later either."""
    before = await connect()
    proxy.silence()
    silenced = asyncio.ensure_future(connect(timeout=10))

    assert await is_unanswered(silenced)
    assert await before.fetchval("SELECT 1") == 1
    proxy.heal()
    assert await (await connect()).fetchval("SELECT 1") == 1
    assert await is_unanswered(silenced)
    silenced.cancel()
    await proxy.until(lambda stats: stats.open == 2)


async def test_refuse_is_nobody_listening(proxy, connect):
    """Connections are refused, again and again, until it listens on the same port."""
    before, port = await connect(), proxy.port
    for _ in range(2):
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            await connect()
        assert await before.fetchval("SELECT 1") == 1
        proxy.accept()
        assert await (await connect()).fetchval("SELECT 1") == 1
    assert proxy.port == port


async def test_a_sleeping_server_wakes(proxy, connect):
    """New connections wait for it; old ones are dead for good."""
    before = await connect()
    proxy.sleep()
    waiting = [asyncio.ensure_future(connect()) for _ in range(3)]
    lost = asyncio.ensure_future(before.fetchval("SELECT 1"))
    await proxy.until(lambda stats: stats.connecting == 3)

    assert await is_unanswered(asyncio.gather(*waiting))
    proxy.wake()
    for connection in await asyncio.gather(*waiting):
        assert await connection.fetchval("SELECT 1") == 1
    proxy.heal()
    assert await is_unanswered(lost)
    lost.cancel()


async def test_a_sleeping_server_may_wake_by_itself(proxy, connect):
    """After the time given, also for what came in an earlier sleep."""
    started = time.perf_counter()
    proxy.sleep()
    waiting = asyncio.ensure_future(connect())
    await proxy.until(lambda stats: stats.connecting == 1)
    proxy.sleep(wake_after=0.3)

    assert await (await waiting).fetchval("SELECT 1") == 1
    assert time.perf_counter() - started >= 0.3


async def test_a_server_that_is_gone_is_a_reset(connect):
    """What cannot be connected to the server is reset; one that comes back is reached."""
    with postgres() as own, FaultProxy(own) as proxy:
        own.stop("immediate")
        with pytest.raises(LOST):
            await asyncpg.connect(proxy.url)
        await asyncio.to_thread(own.start)
        connection = await asyncpg.connect(proxy.url)
        await connection.close()


# Connections that are there.


async def test_frozen_connections_hear_nothing(proxy, connect, table):
    """No reply and no end; new ones work; thawed, they go on where they were."""
    connection = await connect()
    proxy.freeze()
    waiting = asyncio.ensure_future(connection.execute("INSERT INTO t VALUES (1)"))

    assert await is_unanswered(waiting)
    assert not connection.is_closed()
    assert await rows(table) == 0
    assert await (await connect()).fetchval("SELECT 1") == 1
    proxy.thaw()
    assert await waiting == "INSERT 0 1"


async def test_replies_alone_can_be_frozen(proxy, connect, table):
    """The server does what it is told, and the client does not hear of it."""
    connection = await connect()
    proxy.freeze(replies_only=True)
    waiting = asyncio.ensure_future(connection.execute("INSERT INTO t VALUES (1)"))
    await proxy.seen(At("CommandComplete", "INSERT"))

    assert await is_unanswered(waiting)
    assert await rows(table) == 1
    proxy.thaw()
    assert await waiting == "INSERT 0 1"


async def test_a_frozen_flood_is_not_kept_in_memory(proxy, connect):
    """The side that sends is made to wait, and nothing is lost."""
    connection = await connect()
    copied: list[bytes] = []
    frozen = proxy.freeze_at(before=At("CopyData"), replies_only=True)
    query = "SELECT repeat('x', 1000) FROM generate_series(1, 50000)"
    waiting = asyncio.ensure_future(connection.copy_from_query(query, output=_into(copied)))
    await frozen

    assert await is_unanswered(waiting)
    assert proxy.stats.server_bytes < 4_000_000
    proxy.thaw()
    await waiting
    assert sum(map(len, copied)) == 50_000 * 1001


async def test_a_client_may_leave_a_frozen_connection(proxy, connect, server, table):
    """The proxy sees it, the server does not: its backend stays."""
    connection = await connect()
    pid = connection.get_server_pid()
    proxy.freeze()
    connection.terminate()
    await proxy.until(lambda stats: stats.open == 0)

    backends = "SELECT count(*) FROM pg_stat_activity WHERE pid = $1"
    assert await table.fetchval(backends, pid) == 1
    proxy.heal()
    while await table.fetchval(backends, pid):
        await asyncio.sleep(0.01)


async def test_the_server_may_leave_a_frozen_connection_first(proxy, connect, table):
    """The client's end then meets a socket that is no more."""
    connection = await connect()
    proxy.freeze()
    pid = connection.get_server_pid()
    assert await table.fetchval("SELECT pg_terminate_backend($1, 5000)", pid)
    connection.terminate()
    await proxy.until(lambda stats: stats.open == 0)

    proxy.heal()


@pytest.mark.parametrize("how", ["close", "reset"])
def test_close_is_fin_and_reset_is_rst(proxy, how):
    """A client reads the end, or ConnectionResetError."""
    with raw(proxy) as sock:
        getattr(proxy, how)()
        with pytest.raises(ConnectionResetError) if how == "reset" else contextlib.nullcontext():
            drain(sock)
    proxy.until(lambda stats: stats.open == 0).wait()


def drain(sock: socket.socket) -> None:
    while sock.recv(4096):
        pass


async def test_the_server_learns_of_a_cut(proxy, connect, table):
    """Its backend goes."""
    pid = (await connect()).get_server_pid()
    proxy.close()
    while await table.fetchval("SELECT count(*) FROM pg_stat_activity WHERE pid = $1", pid):
        await asyncio.sleep(0.01)


async def test_one_connection_can_be_meant(proxy, connect):
    """Others do not suffer from its faults."""
    one, other = await connect(), await connect()
    first, second = proxy.connections
    first.latency = 0.05
    second.cut(before="SELECT 2")
    assert (first.number, second.number, proxy.latency, second.latency) == (1, 2, 0, 0)

    assert await one.fetchval("SELECT 2") == 2
    with pytest.raises(LOST):
        await other.fetchval("SELECT 2")
    await proxy.until(lambda stats: stats.open == 1)
    first.reset()
    with pytest.raises(LOST):
        await one.fetchval("SELECT 1")
    await proxy.until(lambda stats: stats.open == 0)
    assert first.statements
    with pytest.raises(FaultProxyError, match="over"):
        _ = first.latency


# At a moment.


async def test_the_reply_to_a_commit_is_lost(proxy, connect, table):
    """The row is there, and the client does not know."""
    connection = await connect()
    trap = proxy.cut(after="COMMIT")
    with pytest.raises(LOST):
        await insert(connection)

    assert (await trap).type == "CommandComplete"
    assert await rows(table) == 1
    await insert(await connect())
    assert await rows(table) == 2


async def test_a_commit_does_not_reach_the_server(proxy, connect, table):
    """There is no row."""
    connection = await connect()
    trap = proxy.cut(before="commit", reset=True)
    with pytest.raises(LOST):
        await insert(connection)

    assert (await trap).type == "Query"
    await table.execute("BEGIN; LOCK t; COMMIT")  # until the lost transaction has ended
    assert await rows(table) == 0


async def test_a_prepared_statement_is_a_statement(proxy, connect, table):
    """Its execution is the moment, not its preparation."""
    connection = await connect()
    prepared = await connection.prepare("INSERT INTO t VALUES ($1)")
    trap = proxy.cut(after="INSERT  into\nt")
    with pytest.raises(LOST):
        await prepared.fetch(1)

    assert (await trap).statement == "INSERT INTO t VALUES ($1)"
    assert await rows(table) == 1


async def test_a_trap_springs_once_or_every_time(proxy, connect):
    """Disarmed, it does not."""
    proxy.cut(before="SELECT 1")
    every = proxy.cut(before="SELECT 2", every=True)
    outcomes = []
    for number in (1, 1, 2, 2, 3):
        if number == 3:
            every.disarm()
            number = 2  # noqa: PLW2901
        connection = await connect()
        try:
            outcomes.append(await connection.fetchval(f"SELECT {number}"))
        except LOST:
            outcomes.append("lost")

    assert outcomes == ["lost", 1, "lost", "lost", 2]


async def test_a_freeze_every_time_lets_pass_what_was_thawed(proxy, connect):
    """The message at which it froze is not met again; the next one is."""
    connection = await connect()
    proxy.freeze_at(before="SELECT 1", every=True)
    for _ in range(2):
        waiting = asyncio.ensure_future(connection.execute("SELECT 1"))
        assert await is_unanswered(waiting)
        proxy.thaw()
        await waiting


async def test_a_message_can_be_the_moment(proxy, connect):
    """Before or after it is relayed: the client has it, or not."""
    connection = await connect()
    proxy.freeze_at(before=At("ReadyForQuery", "T"))
    begin = asyncio.ensure_future(connection.execute("BEGIN"))
    assert await is_unanswered(begin)
    proxy.heal()
    assert await begin == "BEGIN"

    proxy.freeze_at(after=At("ReadyForQuery"), replies_only=True)
    assert await connection.fetchval("SELECT 1") == 1
    waiting = asyncio.ensure_future(connection.fetchval("SELECT 1"))
    assert await is_unanswered(waiting)
    proxy.thaw()
    assert await waiting == 1


async def test_a_hold_lasts_until_it_is_released(proxy, connect, table):
    """Two transactions can be put in an order without a sleep."""
    one, two = await connect(), await connect()
    with proxy.hold(before="INSERT") as hold:
        held = asyncio.ensure_future(one.execute("INSERT INTO t VALUES (1)"))
        message = await hold
        assert (message.connection, message.type, hold.happened) == (1, "Query", True)
        assert await two.execute("INSERT INTO t VALUES (2)") == "INSERT 0 1"
        assert await rows(table) == 1
        assert not held.done()
    assert await held == "INSERT 0 1"


async def test_a_cut_may_come_after_so_many_bytes(proxy):
    """Exactly those are relayed, on each connection if wanted."""
    trap = proxy.cut(after_bytes=5, every=True)
    for _ in range(2):
        reader, writer = await asyncio.open_connection(proxy.host, proxy.port)
        writer.write(STARTUP)
        assert len(await reader.read()) == 5
        writer.close()
        await writer.wait_closed()
    assert trap.happened


def test_a_moment_must_be_one(proxy):
    """None, two, or a message that does not exist: an error at once."""
    for moments in ({}, {"before": "a", "after": "b"}):
        with pytest.raises(TypeError):
            proxy.hold(**moments)
    with pytest.raises(TypeError):
        proxy.cut(before="a", after_bytes=1)
    with pytest.raises(ValueError, match="Comit"):
        At("Comit")


async def test_waiting_has_an_end(proxy):
    """A signal that does not come is a TimeoutError that names it; it stays of use."""
    signal = proxy.seen("COMMIT")
    with pytest.raises(TimeoutError, match="COMMIT"):
        await signal.reached(0.01)
    with pytest.raises(TimeoutError, match="COMMIT"):
        signal.wait(0.01)
    assert not signal.happened


# Counting, and the end.


async def test_the_most_connects_at_once_are_counted(proxy, connect):
    """Accepted and not ready is connecting; ready is not."""
    proxy.latency = 0.05
    await asyncio.gather(*(connect() for _ in range(4)))
    proxy.heal()
    await connect()
    stats = proxy.stats

    assert (stats.accepted, stats.ready, stats.open, stats.connecting) == (5, 5, 5, 0)
    assert (stats.max_connecting, stats.max_open) == (4, 5)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_nothing_is_left_behind(server, table):
    """No thread, no socket, no task, no backend, whatever state the connections were in."""
    gc.collect()
    threads, files = threading.active_count(), open_files()
    async with FaultProxy(server) as proxy:
        made = [await asyncpg.connect(proxy.url, ssl=False) for _ in range(4)]
        proxy.latency = 60
        asleep = asyncio.ensure_future(made[0].execute("SELECT 1"))
        proxy.connections[1].freeze()
        proxy.latency = 0
        proxy.hold(before="SELECT 2")
        held = asyncio.ensure_future(made[2].execute("SELECT 2"))
        proxy.sleep(wake_after=60)
        _, writer = await asyncio.open_connection(proxy.host, proxy.port)
        await proxy.until(lambda stats: stats.open == 5)
        never = proxy.seen("COMMIT")
    with pytest.raises(FaultProxyError):
        await never
    with pytest.raises(FaultProxyError, match="not running"):
        proxy.freeze()
    for waiting in (asleep, held):
        with pytest.raises(LOST):
            await waiting
    for connection in made:
        connection.terminate()
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    await asyncio.sleep(0)

    assert threading.active_count() == threads
    assert open_files() == files
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_proxy_that_fails_by_itself_says_so(server, monkeypatch, caplog):
    """A fault that nobody asked for is raised at the end of the block."""
    monkeypatch.setattr("poolkit.testing._link.Link.received", lambda *_: 1 / 0)
    proxy = FaultProxy(server).__enter__()
    with pytest.raises(LOST):
        await asyncpg.connect(proxy.url)
    with pytest.raises(ZeroDivisionError):
        proxy.__exit__(None, None, None)
