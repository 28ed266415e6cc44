"""What the route leans on in asyncpg, and that a connection made by it is like any other."""

import asyncio
import ssl

import asyncpg
import looptime
import pytest
import trustme

from poolkit import AuthenticationFailed, create_async_engine
from poolkit.route import Route, RoutedConnection, TimeLimit


@pytest.fixture
async def routed(server):
    """A connection to a name that means nothing, by way of the server's address; and its answers."""
    loop, answers = asyncio.get_running_loop(), []
    route = Route(loop, (server.host, server.port), lambda: answers.append(1))
    connection = await asyncpg.connect(
        host="name.invalid",
        port=server.port,
        user=server.user,
        password=server.password,
        database=server.database,
        ssl=False,
        loop=route,
        connection_class=RoutedConnection,
    )
    yield connection, answers
    await connection.close()


async def test_the_address_is_ours(routed) -> None:
    """The name is not resolved, and the first answer is told once."""
    connection, answers = routed
    assert await connection.fetchval("SELECT 1") == 1
    assert answers == [1]


async def test_it_runs_on_the_loop_itself(routed) -> None:
    """asyncpg and asyncio compare loops by identity."""
    connection, _ = routed
    assert connection._loop is asyncio.get_running_loop()


async def test_timeouts_and_large_answers(routed) -> None:
    """Flow control and timers pass through."""
    connection, _ = routed
    assert len(await connection.fetchval("SELECT repeat('x', 5000000)", timeout=20)) == 5_000_000
    assert await connection.fetchval("SELECT length($1)", "x" * 5_000_000, timeout=20) == 5_000_000


async def test_unix_sockets(server) -> None:
    """The path is asyncpg's own, and the answer is told."""
    answers = []
    connection = await asyncpg.connect(
        host=str(server.socket_dir),
        port=server.port,
        user=server.user,
        password=server.password,
        database=server.database,
        loop=Route(asyncio.get_running_loop(), None, lambda: answers.append(1)),
        connection_class=RoutedConnection,
    )
    assert (await connection.fetchval("SELECT 1"), answers) == (1, [1])
    await connection.close()


async def test_the_drivers_limits_share_one_timer(routed, monkeypatch) -> None:
    """asyncpg asks the loop that it was given for each of them."""
    connection, _ = routed
    loop, timers = asyncio.get_running_loop(), []
    call_at = loop.call_at
    monkeypatch.setattr(
        loop, "call_at", lambda *args, **kw: timers.append(1) or call_at(*args, **kw)
    )
    connection._config = connection._config._replace(command_timeout=20)
    for _ in range(50):
        await connection.execute("SELECT 1")
    assert len(timers) <= 2
    with pytest.raises(TimeoutError):
        await connection.fetchval("SELECT pg_sleep(1)", timeout=0.05)
    connection.terminate()  # asyncpg would take the cancel request to the name


def on_virtual_time(main) -> None:
    def make_loop():
        return looptime.patch_event_loop(asyncio.new_event_loop(), noop_cycles=0)

    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(main())


def test_a_limit_ends_when_it_is_due() -> None:
    """Whatever ones before it were; one that was cancelled does not."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        limit, ended = TimeLimit(loop), []
        for number, (seconds, works) in enumerate([(5, 1), (5, 2), (1, 0.5), (9, 4)]):
            handle = limit.set(seconds, lambda which: ended.append((which, loop.time())), (number,))
            await asyncio.sleep(works)
            handle.cancel()
        began = loop.time()
        limit.set(2, lambda which: ended.append((which, loop.time() - began)), ("late",))
        await asyncio.sleep(30)
        assert ended == [("late", pytest.approx(2))]

    on_virtual_time(main)


def test_a_second_limit_at_once_is_kept_too() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        limit, ended = TimeLimit(loop), []
        limit.set(2, ended.append, ("first",))
        limit.set(1, ended.append, ("second",))
        await asyncio.sleep(1.5)
        assert ended == ["second"]
        await asyncio.sleep(1)
        assert ended == ["second", "first"]

    on_virtual_time(main)


async def test_a_failed_connect_leaves_no_socket(monkeypatch) -> None:
    """Under TLS neither: no goodbye is waited for, from a peer that has nothing to say any more."""
    authority, context = trustme.CA(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    done = asyncio.Event()

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(8)  # SSLRequest
        writer.write(b"S")
        await writer.start_tls(context)
        await reader.readexactly(8)
        fields = b"SFATAL\0VFATAL\0C28P01\0Mno\0\0"
        writer.write(b"E" + (len(fields) + 4).to_bytes(4, "big") + fields)
        await done.wait()
        writer.close()

    loop, made = asyncio.get_running_loop(), []
    connect = loop.create_connection

    async def seen(*args, **kwargs):
        transport, protocol = await connect(*args, **kwargs)
        made.append(transport)
        return transport, protocol

    monkeypatch.setattr(loop, "create_connection", seen)
    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        engine = create_async_engine(f"postgresql://u:p@127.0.0.1:{port}/d?sslmode=require")
        with pytest.raises(AuthenticationFailed):
            await engine.connect()
        await asyncio.sleep(0)
        assert [each.get_extra_info("socket").fileno() for each in made] == [-1]
        done.set()
        await engine.dispose()
