"""The public interface in use; the type checker reads it, nobody runs it."""

from collections.abc import Awaitable, Callable
from typing import assert_type

from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
)
from sqlalchemy.pool import NullPool

from poolkit import (
    CheckoutTimedOut,
    ConnectError,
    ConnectionLost,
    ConnectTimeout,
    DatabaseSettings,
    Event,
    Fault,
    FaultKind,
    Outcome,
    StatementTimeout,
    classify,
    create_async_engine,
    engine_options,
    observe,
    run_in_transaction,
)
from poolkit.telemetry import instrument
from poolkit.telemetry.prometheus import start_metrics_server
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


engine = create_async_engine()
timeouts: list[CheckoutTimedOut] = []
assert_type(observe(engine, timeouts.append, [CheckoutTimedOut]), Callable[[], None])
assert_type(observe(engine, events.append), Callable[[], None])
assert_type(instrument(engine, spans=False, server_interval=15), Callable[[], None])
assert_type(start_metrics_server(9464), Callable[[], None])
sessions = async_sessionmaker(engine)


class OwnSession(AsyncSession):
    """Of an application."""


def get_engine() -> AsyncEngine:
    """For an application that makes it later."""
    return engine


async def count(connection: AsyncConnection, table: str = "t") -> int:
    """A unit of work."""
    found: int = await connection.scalar(text(f"SELECT count(*) FROM {table}"))
    return found


async def name(session: OwnSession) -> str:
    """A unit of work on a session of one's own."""
    return str(await session.scalar(text("SELECT 'name'")))


@run_in_transaction(engine, attempts=3, isolation_level="SERIALIZABLE")
async def decorated(connection: AsyncConnection, a: int, *, b: str = "") -> float:
    """Called without the connection."""
    await connection.execute(text("SELECT 1"))
    return a + len(b)


@run_in_transaction(lambda: sessions, deadline=None)
async def with_session(session: AsyncSession) -> None:
    """The session maker may come later."""
    await session.execute(text("SELECT 1"))


async def run_transactions() -> None:
    """The work's type is kept; what does not fit is an error."""
    assert_type(await run_in_transaction(engine, count), int)
    assert_type(await run_in_transaction(get_engine, lambda c: count(c, "u")), int)
    assert_type(await run_in_transaction(async_sessionmaker(class_=OwnSession), name), str)
    assert_type(await decorated(1, b="x"), float)
    await with_session()
    await decorated("1")  # type: ignore[arg-type]
    await run_in_transaction(engine, count, tries=3)  # type: ignore[call-overload]
    await run_in_transaction(sessions, count)  # type: ignore[arg-type]


def explain(error: BaseException) -> str:
    """Any exception is read; what is found is typed."""
    fault = classify(error)
    assert_type(fault, Fault)
    assert_type((fault.kind, fault.outcome), tuple[FaultKind, Outcome])
    assert_type((fault.retryable, fault.http_status), tuple[bool, int])
    if isinstance(error, ConnectionLost):
        assert_type((error.outcome, error.sqlstate), tuple[Outcome, str | None])
    return fault.kind
