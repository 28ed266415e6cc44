"""The private names of asyncpg and SQLAlchemy that are leant on: a change makes these fail."""

import asyncio
import contextlib
import inspect
import socket

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_dbapi

from poolkit import ConfigurationError
from poolkit.driver import DriverConnection, assignment, is_ours, milliseconds
from poolkit.testing import FaultProxy


async def driver_of(connection) -> DriverConnection:
    raw = await connection.get_raw_connection()
    return raw.driver_connection


def test_the_driver_hands_over_the_transport() -> None:
    """``asyncpg.Connection(protocol, transport, ...)``."""
    assert list(inspect.signature(asyncpg.Connection.__init__).parameters)[1:3] == [
        "protocol",
        "transport",
    ]


async def test_the_drivers_own_timeout_can_be_changed(engine) -> None:
    """``_config.command_timeout`` is what an operation waits for."""
    async with engine.connect() as connection:
        driver = await driver_of(connection)
        driver.wait_at_most(0.2)
        with pytest.raises(TimeoutError):
            await driver.execute("SELECT pg_sleep(30)")
        await connection.invalidate()


async def test_begin_goes_through_execute(engine, monkeypatch) -> None:
    """``Transaction.start`` calls ``Connection.execute`` with a text that begins with BEGIN."""
    seen: list[str] = []
    original = DriverConnection.execute

    async def spy(self, query, *args, timeout=None):
        seen.append(query)
        return await original(self, query, *args, timeout=timeout)

    monkeypatch.setattr(DriverConnection, "execute", spy)
    async with engine.connect() as connection:
        seen.clear()
        await connection.execute(text("SELECT 1"))
        await connection.commit()
    assert [query.split()[0].rstrip(";") for query in seen] == ["BEGIN", "COMMIT"]


def test_the_dbapi_takes_what_we_pass() -> None:
    """``connect`` pops ``async_creator_fn`` and ``prepared_statement_cache_size``."""
    source = inspect.getsource(AsyncAdapt_asyncpg_dbapi.connect)
    for name in ("async_creator_fn", "prepared_statement_cache_size"):
        assert f'"{name}"' in source


async def test_keepalive_is_set_on_the_socket(engine) -> None:
    """A peer that vanishes is noticed in seconds, idle or not."""
    async with engine.connect() as connection:
        driver = await driver_of(connection)
        sock = driver._transport.get_extra_info("socket")
        read = {
            option: sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, option))
            for option in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
        }
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert read == {
        "TCP_KEEPIDLE": 5,
        "TCP_KEEPINTVL": 2,
        "TCP_KEEPCNT": 3,
        "TCP_USER_TIMEOUT": 10_000,
    }


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0, "0"), (0.0001, "1"), (0.25, "250"), (10, "10000")]
)
def test_milliseconds(seconds: float, expected: str) -> None:
    """What is not off does not round to off."""
    assert milliseconds(seconds) == expected


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("work_mem", "8MB", "work_mem = '8MB'"),
        ("search_path", '"$user", public', "search_path = '$user', 'public'"),
        ("search_path", "", "search_path = ''"),
        ("app.note", "it's", "app.note = 'it''s'"),
        ("app.note", "a\\b", "app.note = E'a\\\\b'"),
    ],
)
def test_quoting(name: str, value: str, expected: str) -> None:
    """Values are quoted, lists item by item."""
    assert assignment(name, value) == expected


def test_no_setting_smuggles_in_sql() -> None:
    """A name is a name."""
    with pytest.raises(ConfigurationError):
        assignment("a = 1; DROP TABLE x; --", "1")


async def test_a_close_is_bounded_while_a_cancel_request_hangs(server, make_engine) -> None:
    """asyncpg 0.31 waits for the request first, for as long as it takes."""
    async with FaultProxy(server) as proxy:
        engine = make_engine(settings={"url": proxy.url})
        connection = await engine.connect()
        driver = await driver_of(connection)
        running = asyncio.ensure_future(connection.execute(text("SELECT pg_sleep(20)")))
        await proxy.seen("SELECT pg_sleep")
        proxy.silence()
        proxy.freeze()
        running.cancel()
        async with asyncio.timeout(10):
            await asyncio.wait({running})
            with contextlib.suppress(TimeoutError):
                await driver.close(timeout=0.2)
            assert driver.is_closed()
            await connection.close()
        proxy.reset()


async def test_a_connection_of_somebody_elses_is_not_ours(server, engine) -> None:
    """asyncpg says of each of its connections that it is an instance of any class of its own."""
    theirs = await asyncpg.connect(server.url)
    assert isinstance(theirs, DriverConnection)
    assert not is_ours(theirs)
    await theirs.close()
    async with engine.connect() as connection:
        assert is_ours(await driver_of(connection))
