"""Each way a connect can fail, provoked for real, and the way out of those that pass."""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import asyncpg
import pytest
import trustme
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.ext.asyncio import create_async_engine as sqlalchemys_own

from poolkit import (
    AuthenticationFailed,
    CertificateNotTrusted,
    ConfigurationError,
    ConnectError,
    ConnectionOpened,
    ConnectRefused,
    ConnectTimeout,
    DatabaseNotFound,
    DatabaseSettings,
    HostNotFound,
    ServerNotReady,
    ServerUnreachable,
    TLSRefused,
    TooManyConnections,
    create_async_engine,
    engine_options,
    pool_stats,
)
from poolkit.testing import PostgresServer, postgres

SLACK = 5.0
"""Seconds beyond a bound that a busy machine may take; the faults would last for minutes."""

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], object]


@asynccontextmanager
async def listener(handler: Handler, host: str = "127.0.0.1") -> AsyncIterator[int]:
    """A TCP server that does what ``handler`` does; gives its port."""
    writers: list[asyncio.StreamWriter] = []

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        result = handler(reader, writer)
        if asyncio.iscoroutine(result):
            await result

    server = await asyncio.start_server(accepted, host, 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in writers:
            writer.close()


def silent(_: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
    """Accept, and never answer."""


def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


def forward_to(port: int) -> Handler:
    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", port)

        async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            while data := await source.read(65536):
                target.write(data)
            target.close()

        try:
            await asyncio.gather(
                copy(reader, upstream_writer),
                copy(upstream_reader, writer),
                return_exceptions=True,
            )
        finally:
            upstream_writer.close()

    return handler


def unused_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture
def attempt(make_engine):
    """Connect once and run SELECT 1; returns (error or None, seconds)."""

    async def run(url: str, **kwargs):
        engine = make_engine(url, **kwargs)
        started = time.perf_counter()
        try:
            async with engine.connect() as connection:
                assert (await connection.execute(text("SELECT 1"))).scalar() == 1
        except Exception as error:  # noqa: BLE001
            return error, time.perf_counter() - started
        return None, time.perf_counter() - started

    return run


async def test_a_silent_server(attempt) -> None:
    """It accepts and never answers: ConnectTimeout at the bound."""
    async with listener(silent) as port:
        error, seconds = await attempt(
            f"postgresql://u:s3cret@127.0.0.1:{port}/d?connect_timeout=1"
        )

    assert type(error) is ConnectTimeout
    assert isinstance(error, OperationalError)
    assert isinstance(error, TimeoutError)
    assert 1 <= seconds < 1 + SLACK
    assert f"127.0.0.1:{port}" in str(error)
    assert "s3cret" not in str(error)


async def test_nothing_listens(attempt) -> None:
    """Refused until the bound: ConnectRefused with the number of attempts."""
    port = unused_port()
    error, seconds = await attempt(f"postgresql://u@127.0.0.1:{port}/d?connect_timeout=1")

    assert type(error) is ConnectRefused
    assert isinstance(error, ConnectionRefusedError)
    assert error.attempts > 1
    assert seconds < 1 + SLACK


async def test_a_name_without_an_address(attempt) -> None:
    """HostNotFound, which is what the resolver raises."""
    error, seconds = await attempt("postgresql://u@no-such-host.invalid/d?connect_timeout=0.5")

    assert type(error) is HostNotFound
    assert isinstance(error, socket.gaierror)
    assert seconds < 0.5 + SLACK


async def test_a_server_that_hangs_up(attempt) -> None:
    """Reset in mid-handshake is tried again, then ServerUnreachable."""
    async with listener(hang_up) as port:
        error, _ = await attempt(f"postgresql://u@127.0.0.1:{port}/d?connect_timeout=0.5")

    assert type(error) is ServerUnreachable
    assert isinstance(error, ConnectionError)
    assert error.attempts > 1


async def test_a_socket_that_is_not_there(attempt, tmp_path) -> None:
    """A Unix socket may appear when the server has started: retried like a refusal."""
    error, _ = await attempt(f"postgresql:///d?host={tmp_path}&user=u&connect_timeout=0.3")

    assert type(error) is ServerUnreachable
    assert error.attempts > 1


async def test_a_wrong_password(attempt, server: PostgresServer) -> None:
    """Not retried; the password is in no message."""
    url = server.url.replace(server.password, "wr0ng")
    error, seconds = await attempt(url)

    assert type(error) is AuthenticationFailed
    assert error.sqlstate == "28P01"
    assert isinstance(error.orig, asyncpg.InvalidPasswordError)
    assert seconds < SLACK
    assert "wr0ng" not in str(error)


async def test_an_unknown_database(attempt, server: PostgresServer) -> None:
    """Not retried."""
    error, seconds = await attempt(server.url.removesuffix("/postgres") + "/nope")

    assert (type(error), error.sqlstate) == (DatabaseNotFound, "3D000")
    assert seconds < SLACK


async def test_a_setting_the_server_does_not_know(attempt, server: PostgresServer) -> None:
    """The server's own words, at once."""
    error, _ = await attempt(server.url, server_settings={"no_such_setting": "1"})

    assert (type(error), error.sqlstate) == (ConnectError, "42704")
    assert "no_such_setting" in str(error)


@pytest.fixture(scope="module")
def full():
    """A server with very few slots."""
    settings = {"max_connections": 4, "superuser_reserved_connections": 0, "max_wal_senders": 0}
    with postgres(server_settings=settings) as running:
        yield running


class TestFullServer:
    """max_connections is reached."""

    @staticmethod
    async def fill(server: PostgresServer) -> list[asyncpg.Connection]:
        held: list[asyncpg.Connection] = []
        refusals = 0
        while refusals < 5:  # a session that is just ending may hold a slot for a moment
            try:
                held.append(await asyncpg.connect(server.url))
            except asyncpg.TooManyConnectionsError:
                refusals += 1
                await asyncio.sleep(0.02)
        return held

    async def test_it_stays_full(self, attempt, full) -> None:
        """TooManyConnections after retries inside the bound."""
        held = await self.fill(full)
        try:
            error, seconds = await attempt(full.url + "?connect_timeout=1")
        finally:
            for connection in held:
                await connection.close()
        assert (type(error), error.sqlstate) == (TooManyConnections, "53300")
        assert error.attempts > 1
        assert seconds < 1 + SLACK

    async def test_room_comes(self, attempt, full) -> None:
        """A slot that is freed in time is taken."""
        held = await self.fill(full)
        connecting = asyncio.ensure_future(attempt(full.url))
        await asyncio.sleep(0.2)  # let it be refused a few times
        for connection in held:
            await connection.close()
        assert (await connecting)[0] is None


async def test_a_server_that_starts_late(make_engine) -> None:
    """A server that comes up 3 s late is waited for, within the default bound."""
    with postgres() as server:
        await asyncio.to_thread(server.stop)
        timer = threading.Timer(3, server.start)
        timer.start()
        events: list[object] = []
        engine = make_engine(server.url, observers=[events.append])
        try:
            async with engine.connect() as connection:
                assert (await connection.execute(text("SELECT 1"))).scalar() == 1
        finally:
            await asyncio.to_thread(timer.join)
        (opened,) = [event for event in events if isinstance(event, ConnectionOpened)]
        assert opened.attempts > 1


class TestTLS:
    """TLS demanded, offered, refused and not trusted."""

    async def in_use(self, make_engine, url: str) -> bool:
        engine = make_engine(url)
        async with engine.connect() as connection:
            query = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
            return (await connection.execute(text(query))).scalar()

    @pytest.mark.parametrize(
        ("mode", "at_tls_server", "at_plain_server"),
        [("disable", False, False), ("allow", False, False), ("prefer", True, False)],
    )
    async def test_modes_that_ask_for_nothing(
        self, make_engine, server, tls_server, mode, at_tls_server, at_plain_server
    ) -> None:
        """`disable`, `allow` and `prefer` connect anywhere, with TLS as libpq would choose."""
        assert await self.in_use(make_engine, f"{tls_server.url}?sslmode={mode}") is at_tls_server
        assert await self.in_use(make_engine, f"{server.url}?sslmode={mode}") is at_plain_server

    @pytest.mark.parametrize("mode", ["require", "verify-ca", "verify-full"])
    async def test_modes_that_demand_it(self, make_engine, tls_server, mode) -> None:
        """With the authority's certificate all three connect."""
        url = f"{tls_server.url}?sslmode={mode}&sslrootcert={tls_server.ca_file}"
        assert await self.in_use(make_engine, url)

    async def test_require_without_a_root_encrypts_only(self, make_engine, tls_server) -> None:
        """As with libpq, `require` alone trusts whoever answers."""
        assert await self.in_use(make_engine, f"{tls_server.url}?sslmode=require")

    async def test_direct_negotiation(self, attempt, tls_server) -> None:
        """sslnegotiation=direct reaches the driver; servers before 17 do not know it."""
        url = f"{tls_server.url}?sslmode=require&sslnegotiation=direct&connect_timeout=1"
        error, _ = await attempt(url)
        assert (error is None) is (tls_server.version >= 17)

    async def test_demanded_and_not_offered(self, attempt, server) -> None:
        """TLSRefused at once, with the remedy."""
        error, seconds = await attempt(f"{server.url}?sslmode=require")
        assert type(error) is TLSRefused
        assert "sslmode" in str(error)
        assert seconds < SLACK

    @pytest.mark.parametrize(
        "query",
        ["sslmode=verify-full", "sslmode=require&channel_binding=require", "sslrootcert=system"],
    )
    async def test_not_trusted(self, attempt, tls_server, query) -> None:
        """The system does not know the authority; channel_binding=require is not dropped."""
        error, seconds = await attempt(f"{tls_server.url}?{query}")
        assert type(error) is CertificateNotTrusted
        assert "sslrootcert" in str(error)
        assert seconds < SLACK

    async def test_another_authority(self, attempt, tls_server, tmp_path) -> None:
        """A certificate of another authority is refused, also by `require` with a root."""
        trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
        for mode in ("require", "verify-ca"):
            url = f"{tls_server.url}?sslmode={mode}&sslrootcert={tmp_path}/other.pem"
            error, _ = await attempt(url)
            assert type(error) is CertificateNotTrusted

    async def test_another_host(self, attempt, tls_server) -> None:
        """verify-full checks the name, verify-ca does not."""
        async with listener(forward_to(tls_server.port), "127.0.0.2") as port:
            there = tls_server.url.replace(f"127.0.0.1:{tls_server.port}", f"127.0.0.2:{port}")
            url = f"{there}?sslrootcert={tls_server.ca_file}&sslmode="
            full, _ = await attempt(f"{url}verify-full")
            authority, _ = await attempt(f"{url}verify-ca")
        assert type(full) is CertificateNotTrusted
        assert authority is None

    async def test_hang_up_while_tls_is_asked_for(self, attempt) -> None:
        """A proxy that closes is not taken for a server without TLS: it is tried again."""
        async with listener(hang_up) as port:
            error, _ = await attempt(
                f"postgresql://u@127.0.0.1:{port}/d?sslmode=require&connect_timeout=0.5"
            )
        assert type(error) is ServerUnreachable
        assert error.attempts > 1


class TestSeveralHosts:
    """Addresses share the time, and the right one is found."""

    async def test_a_silent_one_first(self, attempt, server) -> None:
        """A silent first host leaves the second its share."""
        async with listener(silent) as port:
            url = server.url.replace("@", f"@127.0.0.1:{port},") + "?connect_timeout=2"
            error, seconds = await attempt(url)
        assert error is None
        assert seconds < 2 + SLACK

    async def test_sqlalchemys_spelling(self, attempt, server) -> None:
        """?host=a:1&host=b:2, the first of them down."""
        login = server.url.split("@")[0].replace("postgresql", "postgresql+asyncpg")
        hosts = f"host=127.0.0.1:{unused_port()}&host=127.0.0.1:{server.port}"
        error, _ = await attempt(f"{login}@/postgres?{hosts}")
        assert error is None

    async def test_read_write(self, make_engine, server) -> None:
        """target_session_attrs=read-write passes over a read-only server."""
        with postgres(server_settings={"default_transaction_read_only": "on"}) as standby:
            login = standby.url.split("@")[0]
            hosts = f"127.0.0.1:{standby.port},127.0.0.1:{server.port}"
            url = f"{login}@{hosts}/postgres?target_session_attrs=read-write"
            engine = make_engine(url, password=server.password)
            async with engine.connect() as connection:
                port = (await connection.execute(text("SHOW port"))).scalar()
            assert int(port) == server.port

    async def test_no_host_is_writable(self, attempt) -> None:
        """Nobody fits: ServerNotReady at the bound, for a failover may be under way."""
        with postgres(server_settings={"default_transaction_read_only": "on"}) as standby:
            url = f"{standby.url}?target_session_attrs=read-write&connect_timeout=0.5"
            error, _ = await attempt(url)
        assert type(error) is ServerNotReady


async def test_unix_socket(attempt, server) -> None:
    """Both spellings of a socket connect."""
    assert (await attempt(server.socket_url))[0] is None
    directory = str(server.socket_dir).replace("/", "%2F")
    url = f"postgresql://{server.user}:{server.password}@{directory}:{server.port}/postgres"
    assert (await attempt(url))[0] is None


async def test_a_caller_that_gives_up_while_connecting(make_engine, server) -> None:
    """It gets its CancelledError at once; the connect goes on, and the next caller has it."""
    reached = asyncio.Event()
    go = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reached.set()
        await go.wait()
        await forward_to(server.port)(reader, writer)

    async with listener(handler) as port:
        url = server.url.replace(f":{server.port}/", f":{port}/") + "?sslmode=disable"
        engine = make_engine(url, pool_size=1, max_overflow=0)
        connecting = asyncio.ensure_future(engine.connect().start())
        await reached.wait()
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
        assert pool_stats(engine).opening == 1
        go.set()
        async with engine.connect() as connection:
            assert (await connection.execute(text("SELECT 1"))).scalar() == 1
        assert pool_stats(engine).opened == 1
        await engine.dispose()


async def test_dispose_ends_connects_that_nobody_waits_for(make_engine) -> None:
    """A half-made connection does not outlive its engine."""
    closed = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        while await reader.read(1024):
            pass
        closed.set()

    async with listener(handler) as port:
        engine = make_engine(f"postgresql://u@127.0.0.1:{port}/d?sslmode=disable")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await engine.connect()
        await engine.dispose()
        await asyncio.wait_for(closed.wait(), SLACK)


class TestPassword:
    """A password that rotates."""

    async def test_asked_at_every_connect(self, make_engine, server) -> None:
        """Each physical connect asks anew."""
        asked = []

        async def ask() -> str:
            asked.append(1)
            return server.password

        url = server.url.replace(f":{server.password}", "") + "?sslmode=disable"
        engine = make_engine(url, password=ask)
        async with engine.connect(), engine.connect():
            pass
        async with engine.connect():
            pass
        assert len(asked) == 2

    async def test_a_stale_token(self, make_engine, server) -> None:
        """What the callable gives is what is sent."""
        engine = make_engine(server.url, password=lambda: "stale")
        with pytest.raises(AuthenticationFailed):
            await engine.connect()


async def test_a_plain_sqlalchemy_engine_gets_the_same_errors(server) -> None:
    """The options beneath the factory carry the connect with them."""
    url, kwargs = engine_options(DatabaseSettings(url=server.url), password="wrong")
    engine = sqlalchemys_own(url, **kwargs)
    with pytest.raises(AuthenticationFailed):
        await engine.connect()
    await engine.dispose()


def test_bad_input_fails_when_the_engine_is_made() -> None:
    """Not at the first connect."""
    for url in ("postgresql://h/d?foo=1", "postgresql+psycopg://h/d", "postgresql://h:x/d", "h/d"):
        with pytest.raises(ConfigurationError, match="DATABASE_URL"):
            create_async_engine(url)
    with pytest.raises(ConfigurationError, match="DATABASE_URL is not set"):
        create_async_engine()


def test_every_connect_error_is_sqlalchemys() -> None:
    """Whoever catches DBAPIError catches them all."""
    for cls in (ConnectRefused, ConnectTimeout, HostNotFound, TLSRefused, AuthenticationFailed):
        assert issubclass(cls, OperationalError)
        assert issubclass(cls, DBAPIError)
