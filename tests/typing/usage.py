"""The public interface in use; the type checker reads it, nobody runs it."""

from collections.abc import Awaitable, Callable
from typing import assert_type

from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import NullPool

from poolkit import (
    ConnectError,
    ConnectTimeout,
    DatabaseSettings,
    Event,
    StatementTimeout,
    create_async_engine,
    engine_options,
)
from poolkit.testing import PostgresServer, postgres

assert_type(create_async_engine(), AsyncEngine)
create_async_engine(
    "postgresql://h/d", pool_size=3, poolclass=NullPool, connect_args={"timeout": 3}
)
create_async_engine(settings=DatabaseSettings(), server_settings={"jit": "off"})

events: list[Event] = []
create_async_engine(observers=[events.append, print])


async def token() -> str:
    return "t"


password: Callable[[], Awaitable[str]] = token
create_async_engine(password=password)
create_async_engine(password=lambda: "t")

url, kwargs = engine_options(DatabaseSettings(pool_size=3, statement_timeout=2.5))
assert_type(url, URL)


async def run() -> None:
    """Errors carry typed attributes; servers are typed objects."""
    async with postgres(tls=True) as server:
        assert_type(server, PostgresServer)
        engine = create_async_engine(server.url)
        try:
            async with engine.connect() as connection:
                await connection.execute(
                    text("SELECT 1"), execution_options={"statement_timeout": 1.5}
                )
        except StatementTimeout as error:
            assert_type(error.sqlstate, str | None)
            assert_type(error.connection_invalidated, bool)
        except ConnectTimeout as error:
            assert_type(error.elapsed, float)
        except ConnectError as error:
            assert_type((error.address, error.attempts), tuple[str, int])
