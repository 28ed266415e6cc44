"""Bad addresses and black holes, with real sockets and servers."""

import asyncio
import socket
import ssl
import stat
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import text

from poolkit import ConnectionOpened, ConnectTimeout
from poolkit.addresses import SILENT
from poolkit.connect import Connector
from poolkit.scouts import SCOUTING
from poolkit.testing import PostgresServer, postgres

SLACK = 3.0
"""Seconds that a busy machine may take; the faults would last for longer than any bound."""

BACK = 1.0
"""Seconds within which a server that is back is found: half of it, and what a busy machine takes."""

LIMIT = {"timeout": 20, "user": "u", "database": "d", "ssl": False}


def open_sockets() -> int:
    return sum(
        stat.S_ISSOCK(entry.stat().st_mode)
        for entry in Path("/proc/self/fd").iterdir()
        if entry.exists()
    )


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
async def _nothing_is_left() -> AsyncIterator[None]:
    """No socket and no task outlives a test."""
    sockets, tasks = open_sockets(), asyncio.all_tasks()
    yield
    await eventually(lambda: asyncio.all_tasks() <= tasks | {asyncio.current_task()})
    await eventually(lambda: open_sockets() <= sockets)


async def run_there(server: PostgresServer, *statements: str) -> object:
    """Run statements on a connection of their own; the last one's value."""
    connection = await asyncpg.connect(server.url)
    try:
        for statement in statements:
            value = await connection.fetchval(statement)
        return value
    finally:
        await connection.close()


async def no_session(server: PostgresServer) -> None:
    """Wait until the server has no client session but the one that counts them."""
    count = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
    )
    async with asyncio.timeout(5):
        while await run_there(server, count):
            await asyncio.sleep(0.02)


@pytest.fixture
def resolve(monkeypatch) -> Callable[..., None]:
    """Give a name these addresses."""
    names: dict[str, tuple[str, ...]] = {}
    real = asyncio.BaseEventLoop.getaddrinfo

    async def getaddrinfo(self, host, port, **options):
        if host not in names:
            return await real(self, host, port, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in names[host]]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    return lambda name, *addresses: names.update({name: addresses})


@contextmanager
def full_backlog(host: str, port: int = 0) -> Iterator[socket.socket]:
    """A listener whose queue is full: the system swallows every SYN that comes now."""
    clients = []
    with socket.create_server((host, port), backlog=0) as listener:
        for _ in range(4):
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
            clients.append(client)
        try:
            yield listener
        finally:
            for client in clients:
                client.close()


class Gate:
    """A way to a server: connections that come while it is shut are swallowed for good."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.shut = False
        self.hold = 0.0
        self.startups = 0
        self.writers: list[asyncio.StreamWriter] = []

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        if self.shut:
            return
        there_reader, there = await asyncio.open_connection("127.0.0.1", self.target)
        self.writers.append(there)
        first = await reader.read(65536)
        if len(first) == 8:  # the question for TLS
            there.write(first)
            writer.write(await there_reader.read(1))
            first = await reader.read(65536)
        if first:
            self.startups += 1
            await asyncio.sleep(self.hold)
        there.write(first)
        await asyncio.gather(copy(reader, there), copy(there_reader, writer))


async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await source.read(65536):
            target.write(data)
    target.close()


@asynccontextmanager
async def gate(target: int, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[Gate]:
    made = Gate(target)
    listening = await asyncio.start_server(made.handle, host, port)
    made.listening = listening
    made.port = listening.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        listening.close()
        for writer in made.writers:
            writer.transport.abort()


def login(server: PostgresServer, **others):
    return (
        LIMIT
        | {
            "user": server.user,
            "password": server.password,
            "database": server.database,
            "host": server.host,
            "port": server.port,
        }
        | others
    )


async def timed(connector: Connector, arguments: dict) -> float:
    started = time.perf_counter()
    connection = await connector(**arguments)
    seconds = time.perf_counter() - started
    await connection.close()
    return seconds


class TestABadAddress:
    """One of several addresses swallows packets: connects succeed, and it delays nobody twice."""

    @pytest.mark.parametrize("accepts", [True, False])
    async def test_of_one_name(self, server, resolve, accepts) -> None:
        """It swallows SYNs, or accepts and never answers."""
        resolve("db.test", "127.0.0.2", "127.0.0.1", "127.0.0.3")
        connector = Connector()
        arguments = login(server, host="db.test")
        with (
            socket.create_server(("127.0.0.2", server.port))
            if accepts
            else full_backlog("127.0.0.2", server.port)
        ):
            first = await asyncio.gather(*(timed(connector, arguments) for _ in range(5)))
            later = [await timed(connector, arguments) for _ in range(5)]
        assert max(first) < SILENT + SLACK
        assert sorted(later)[2] < SILENT
        await no_session(server)

    async def test_of_several_hosts(self, server) -> None:
        """The same in the URL."""
        connector = Connector()
        with full_backlog("127.0.0.2") as hole:
            ports = [hole.getsockname()[1], server.port]
            arguments = login(server, host=["127.0.0.2", "127.0.0.1"], port=ports)
            first = await timed(connector, arguments)
            later = [await timed(connector, arguments) for _ in range(5)]
        assert SILENT <= first < SILENT + SLACK
        assert sorted(later)[2] < SILENT

    async def test_all_are_bad(self) -> None:
        """ConnectTimeout at the bound, as ever."""
        with full_backlog("127.0.0.2") as one, full_backlog("127.0.0.3") as two:
            ports = [one.getsockname()[1], two.getsockname()[1]]
            hosts = {"host": ["127.0.0.2", "127.0.0.3"], "port": ports, "timeout": 1}
            with pytest.raises(ConnectTimeout):
                await Connector()(**LIMIT | hosts)

    async def test_the_name_is_what_tls_and_the_password_file_go_by(
        self, tls_server, resolve, tmp_path: Path, make_engine
    ) -> None:
        """verify-full checks the name, and the server is told it, wherever it resolves to."""
        resolve("localhost", "127.0.0.3", "127.0.0.2")
        entry = f"localhost:*:*:{tls_server.user}:{tls_server.password}"
        (tmp_path / "passfile").write_text(entry)
        (tmp_path / "passfile").chmod(0o600)
        url = (
            f"postgresql://{tls_server.user}@localhost:{tls_server.port}/postgres"
            f"?sslmode=verify-full&sslrootcert={tls_server.ca_file}&passfile={tmp_path}/passfile"
        )
        async with gate(tls_server.port, "127.0.0.2", tls_server.port):
            engine = make_engine(url)
            async with engine.connect() as connection:
                raw = (await connection.get_raw_connection()).driver_connection
                assert raw.ssl_object.server_hostname == "localhost"
                assert (await connection.execute(text("SELECT 1"))).scalar() == 1
            await engine.dispose()

    def test_the_name_on_uvloop(self, tls_server) -> None:
        """The same on uvloop, whose TLS is its own."""
        uvloop = pytest.importorskip("uvloop")

        async def main() -> str:
            context = ssl.create_default_context(cafile=tls_server.ca_file)
            connection = await Connector()(**login(tls_server, host="localhost", ssl=context))
            try:
                return connection.ssl_object.server_hostname
            finally:
                await connection.close()

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            assert runner.run(main()) == "localhost"

    async def test_the_users_own_context(self, tls_server, resolve, make_engine) -> None:
        """An SSLContext of the caller's gets the name too."""
        resolve("localhost", "127.0.0.2")
        context = ssl.create_default_context(cafile=tls_server.ca_file)
        url = tls_server.url.replace("127.0.0.1", "localhost")
        async with gate(tls_server.port, "127.0.0.2", tls_server.port):
            engine = make_engine(url, connect_args={"ssl": context})
            async with engine.connect() as connection:
                assert (await connection.execute(text("SELECT 1"))).scalar() == 1
            await engine.dispose()


class TestABlackHoleInTime:
    """Attempts that were under way when the server came back may be lost for good."""

    async def first_after(self, connector, arguments, shut: float, reopen) -> float:
        """Seconds from the server's return to the first success of five waiting callers."""
        tasks = [asyncio.ensure_future(connector(**arguments)) for _ in range(5)]
        await asyncio.sleep(shut)
        back = time.perf_counter()
        reopen()
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            found = time.perf_counter() - back
            for task in tasks:
                await (await task).close()
        finally:
            for task in tasks:
                task.cancel()
        return found

    @pytest.mark.parametrize("shut", [0.1, 0.7, 1.55])
    async def test_swallowed(self, server, shut) -> None:
        """The way accepts and swallows, and is well again for those who come anew."""
        async with gate(server.port) as way:
            way.shut = True
            seconds = await self.first_after(
                Connector(), login(server, port=way.port), shut, lambda: setattr(way, "shut", False)
            )
        assert seconds < BACK + SILENT * (shut < SILENT)
        await no_session(server)

    async def test_swallowed_syns(self, server) -> None:
        """The system sends them again after 1, 3 and 7 s only; nobody waits for that."""
        ways = []
        with full_backlog("127.0.0.2") as listener:
            listener.setblocking(False)

            async def reopen() -> None:
                while True:
                    with suppress(BlockingIOError):
                        listener.accept()[0].close()
                        continue
                    break
                way = Gate(server.port)
                ways.append(way)
                ways.append(await asyncio.start_server(way.handle, sock=listener.dup()))

            seconds = await self.first_after(
                Connector(),
                login(server, host="127.0.0.2", port=listener.getsockname()[1]),
                1.3,
                lambda: ways.append(asyncio.ensure_future(reopen())),
            )
            ways[2].close()
            for writer in ways[1].writers:
                writer.transport.abort()
        assert seconds < BACK

    async def test_refused_and_back(self, server) -> None:
        """Nothing listened, and now something does."""
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
        connector = Connector()
        tasks = [asyncio.ensure_future(connector(**login(server, port=port))) for _ in range(5)]
        await asyncio.sleep(1)
        async with gate(server.port, port=port):
            back = time.perf_counter()
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            assert time.perf_counter() - back < BACK
            for task in tasks:
                await (await task).close()

    async def test_a_waking_server_that_has_answered(self, tls_server) -> None:
        """A proxy answered the question for TLS and holds the rest: one session is asked for."""
        context = ssl.create_default_context(cafile=tls_server.ca_file)
        async with gate(tls_server.port) as way:
            way.hold = 2.5
            arguments = login(tls_server, port=way.port, ssl=context)
            seconds = await timed(Connector(pooler="none"), arguments)
            assert 2.5 <= seconds < 2.5 + SLACK
            assert way.startups == 1
        await no_session(tls_server)

    async def test_a_waking_server_without_a_word(self, server) -> None:
        """It answers scouts and holds the rest: second attempts are few, and none is kept."""
        async with gate(server.port) as way:
            way.hold = 2.5
            seconds = await timed(Connector(pooler="none"), login(server, port=way.port))
            assert 2.5 <= seconds < 2.5 + SLACK
            assert way.startups <= 3
        await no_session(server)

    async def test_many_at_once_are_not_doubled(self, server) -> None:
        """A crowd is slow, and that is not silence: each is attempted about once."""
        events: list[ConnectionOpened] = []
        connector = Connector(pooler="none", observers=[events.append])
        made = await asyncio.gather(*(connector(**login(server)) for _ in range(60)))
        try:
            assert sum(event.attempts for event in events) <= 66
        finally:
            for connection in made:
                connection.terminate()
        await no_session(server)

    @pytest.mark.parametrize("after", [0.0, SILENT / 2, SILENT, SILENT + SCOUTING, 1.0])
    async def test_given_up_while_waiting(self, server, after) -> None:
        """A caller that is cancelled leaves nothing, whatever is under way."""
        async with gate(server.port) as way:
            way.shut = True
            task = asyncio.ensure_future(Connector()(**login(server, port=way.port)))
            await asyncio.sleep(after)
            way.shut = False
            await asyncio.sleep(0.01)
            task.cancel()
            with suppress(asyncio.CancelledError):
                (await task).terminate()
        await no_session(server)


class TestFailover:
    """target_session_attrs=read-write follows the primary."""

    READ_ONLY = "ALTER SYSTEM SET default_transaction_read_only = on"
    WRITABLE = "ALTER SYSTEM RESET default_transaction_read_only"

    @staticmethod
    async def turn(server: PostgresServer, statement: str, shown: str) -> None:
        await run_there(server, statement, "SELECT pg_reload_conf()")
        async with asyncio.timeout(5):
            while await run_there(server, "SHOW default_transaction_read_only") != shown:
                await asyncio.sleep(0.02)

    @pytest.mark.parametrize("old", ["black hole", "refuses", "read-only"])
    async def test_new_connects_find_the_new_primary(self, server, old) -> None:
        """Whatever has become of the old one, and a standby is never chosen."""
        with postgres() as second:
            await self.turn(second, self.READ_ONLY, "on")
            async with gate(server.port) as way:
                arguments = login(
                    server,
                    host=["127.0.0.1", "127.0.0.1"],
                    port=[way.port, second.port],
                    target_session_attrs="read-write",
                )
                connector = Connector()
                assert await port_found(connector, arguments) == server.port
                if old == "black hole":
                    way.shut = True
                elif old == "refuses":
                    way.listening.close()
                else:
                    await self.turn(server, self.READ_ONLY, "on")
                try:
                    waiting = asyncio.ensure_future(port_found(connector, arguments))
                    await asyncio.sleep(0.5)
                    assert not waiting.done()
                    started = time.perf_counter()
                    await self.turn(second, self.WRITABLE, "off")
                    assert await waiting == second.port
                    assert time.perf_counter() - started < SLACK
                    for _ in range(3):
                        assert await port_found(connector, arguments) == second.port
                finally:
                    await self.turn(server, self.WRITABLE, "off")


async def port_found(connector: Connector, arguments: dict) -> int:
    connection = await connector(**arguments)
    try:
        return int(await connection.fetchval("SHOW port"))
    finally:
        await connection.close()
