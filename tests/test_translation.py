"""What fails under way, provoked for real: one typed error for each, and what became of the work."""

import asyncio
import copy
import pickle
import time
from collections.abc import AsyncIterator, Callable

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import (
    DBAPIError,
    IntegrityError,
    InterfaceError,
    InternalError,
    NotSupportedError,
    OperationalError,
)
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.ext.asyncio import create_async_engine as sqlalchemys_own
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from poolkit import (
    ConnectionLost,
    DeadlockDetected,
    FaultKind,
    IdleInTransactionTimeout,
    Interrupted,
    LockTimeout,
    Outcome,
    ReadOnlyServer,
    SerializationFailure,
    StalePlan,
    StatementTimeout,
    TransactionTimeout,
    classify,
)
from poolkit.testing import At, FaultProxy, PostgresServer, postgres

TELLS_WHY = tuple(map(int, asyncpg.__version__.split(".")[:2])) >= (0, 32)
"""Before, the driver forgets what the server said when it ended a session in mid-statement."""

BOUNDS_CLOSE = TELLS_WHY
"""Before, SQLAlchemy's own engine waits without an end for a peer that is frozen."""

SLACK = 5.0
"""Seconds that a busy machine may take for what takes none."""


def stock(url: str, **kwargs) -> AsyncEngine:
    """SQLAlchemy's own engine."""
    connect_args = {"ssl": False} | kwargs.pop("connect_args", {})
    url = url.replace("postgresql://", "postgresql+asyncpg://")
    return sqlalchemys_own(url, connect_args=connect_args, **kwargs)


@pytest.fixture
async def make_stock() -> AsyncIterator[Callable[..., AsyncEngine]]:
    made: list[AsyncEngine] = []

    def make(url: str, **kwargs) -> AsyncEngine:
        made.append(stock(url, **kwargs))
        return made[-1]

    yield make
    for engine in made:
        await engine.dispose()


@pytest.fixture(params=["ours", "stock"])
def make_either(request, make_engine, make_stock):
    """An engine of poolkit's, and one of SQLAlchemy's own."""
    return make_engine if request.param == "ours" else make_stock


@pytest.fixture
async def table(server: PostgresServer, make_stock) -> str:
    """A table with two rows."""
    engine = make_stock(server.url)
    async with engine.begin() as connection:
        await connection.execute(text("DROP TABLE IF EXISTS account"))
        await connection.execute(text("CREATE TABLE account (id int PRIMARY KEY, balance int)"))
        await connection.execute(text("INSERT INTO account VALUES (1, 10), (2, 20)"))
    return "account"


async def caught(work) -> BaseException:
    """What the work raises."""
    try:
        await asyncio.wait_for(work, 4 * SLACK) if asyncio.iscoroutine(work) else await work
    except BaseException as error:  # noqa: BLE001
        return error
    raise AssertionError("nothing was raised")


async def caught_while_frozen(
    engine: AsyncEngine, proxy: FaultProxy, task: asyncio.Task[None]
) -> BaseException:
    """What the task raises; the peer stays frozen unless the engine would never give up."""
    if not BOUNDS_CLOSE and not is_ours(engine):
        await asyncio.wait({task}, timeout=1)
        proxy.thaw()
    return await caught(task)


def pid(connection: AsyncConnection) -> int:
    return connection.sync_connection.connection.driver_connection.get_server_pid()


async def run(connection, query: str, **parameters):
    return await connection.execute(text(query), parameters)


def is_ours(engine: AsyncEngine) -> bool:
    return type(engine.pool).__name__ == "HandoffPool"


def assert_unused(engine: AsyncEngine) -> None:
    assert engine.pool.checkedout() == 0 or not is_ours(engine)


class TestWhatTheServerRefuses:
    """The server's ERRORs: the connection goes on, and the work is rolled back."""

    def check(self, engine, error, cls, kind: FaultKind, state: str, *, retryable=True) -> None:
        fault = classify(error)
        assert (fault.kind, fault.sqlstate) == (kind, state)
        assert (fault.retryable, fault.outcome) == (retryable, Outcome.ROLLED_BACK)
        assert not fault.connection_lost
        if is_ours(engine):
            assert type(error) is cls
            assert (error.sqlstate, error.outcome) == (state, Outcome.ROLLED_BACK)
            assert not error.connection_invalidated
        assert isinstance(error, DBAPIError)
        assert_unused(engine)

    @pytest.mark.parametrize("wait", ["NOWAIT", ""])
    async def test_lock_timeout(self, make_either, server, table, wait) -> None:
        """NOWAIT, and lock_timeout."""
        engine = make_either(server.url)

        async def work() -> None:
            async with engine.begin() as one, engine.begin() as two:
                await run(one, "SELECT * FROM account FOR UPDATE")
                await run(two, "SET LOCAL lock_timeout = 50")
                await run(two, f"SELECT * FROM account WHERE id = :id FOR UPDATE {wait}", id=1)

        error = await caught(work())
        self.check(engine, error, LockTimeout, FaultKind.LOCK_TIMEOUT, "55P03")
        assert isinstance(error, OperationalError) or not is_ours(engine)
        assert classify(error).http_status == 504
        assert "FOR UPDATE" in error.statement
        assert error.params in ((1,), {"id": 1})

    async def test_deadlock(self, make_either, server, table) -> None:
        """Two transactions that wait for each other: one goes on."""
        engine = make_either(server.url)
        update = "UPDATE account SET balance = 0 WHERE id = :id"

        async def work(first: int, second: int, met: asyncio.Barrier) -> None:
            async with engine.begin() as connection:
                await run(connection, update, id=first)
                await met.wait()
                await run(connection, update, id=second)

        met = asyncio.Barrier(2)
        results = await asyncio.gather(work(1, 2, met), work(2, 1, met), return_exceptions=True)
        (error,) = [result for result in results if result is not None]
        self.check(engine, error, DeadlockDetected, FaultKind.DEADLOCK, "40P01")

    @pytest.mark.parametrize("at_commit", [False, True])
    async def test_serialization_failure(self, make_either, server, table, at_commit) -> None:
        """Write skew among serializable transactions, told at a statement or at COMMIT."""
        engine = make_either(server.url, isolation_level="SERIALIZABLE")
        total = "SELECT sum(balance) FROM account"

        async def work() -> None:
            async with engine.connect() as one, engine.connect() as two:
                await run(one, total)
                await run(two, total)
                await run(one, "INSERT INTO account VALUES (3, 1)")
                if not at_commit:
                    await one.commit()
                await run(two, "INSERT INTO account VALUES (4, 1)")
                if at_commit:
                    await one.commit()
                await two.commit()

        error = await caught(work())
        self.check(engine, error, SerializationFailure, FaultKind.SERIALIZATION_FAILURE, "40001")

    async def test_statement_timeout(self, make_either, server) -> None:
        """It is not retryable: it would take as long again."""
        engine = make_either(server.url)

        async def work() -> None:
            async with engine.begin() as connection:
                await run(connection, "SET LOCAL statement_timeout = 50")
                await run(connection, "SELECT pg_sleep(60)")

        error = await caught(work())
        kind = FaultKind.STATEMENT_TIMEOUT
        self.check(engine, error, StatementTimeout, kind, "57014", retryable=False)

    async def test_an_integrity_error_at_commit(self, make_either, server) -> None:
        """A deferred constraint: SQLAlchemy's own IntegrityError, and nothing was committed."""
        engine = make_either(server.url)

        async def work() -> None:
            async with engine.begin() as connection:
                unique = "UNIQUE DEFERRABLE INITIALLY DEFERRED"
                await run(connection, f"CREATE TEMP TABLE t (id int {unique})")
                await run(connection, "INSERT INTO t VALUES (1), (1)")

        error = await caught(work())
        assert type(error) is IntegrityError
        fault = classify(error)
        assert (fault.kind, fault.sqlstate, fault.http_status) == (
            FaultKind.INTEGRITY,
            "23505",
            409,
        )
        assert fault.outcome is Outcome.ROLLED_BACK
        assert_unused(engine)

    async def test_a_flush_in_commit(self, make_either, server, table) -> None:
        """session.commit() that fails in its flush has sent no COMMIT."""

        class Base(DeclarativeBase):
            pass

        class Account(Base):
            __tablename__ = "account"
            id: Mapped[int] = mapped_column(primary_key=True)

        engine = make_either(server.url)

        async def work() -> None:
            async with AsyncSession(engine) as session:
                await run(session, "SET LOCAL lock_timeout = 50")
                session.add(Account(id=3))
                await session.commit()

        async with make_either(server.url).begin() as other:
            await run(other, "LOCK TABLE account")
            error = await caught(work())
        self.check(engine, error, LockTimeout, FaultKind.LOCK_TIMEOUT, "55P03")

    async def test_a_stale_plan(self, make_either, server, table) -> None:
        """After a migration: NotSupportedError as ever, and the next transaction is well."""
        engine = make_either(server.url, pool_size=2)
        query = "SELECT * FROM account"

        other = make_either(server.url)
        async with engine.connect() as one:
            await run(one, query)
            await one.commit()
            async with other.begin() as migration:
                await run(migration, "ALTER TABLE account ALTER balance TYPE numeric")
            error = await caught(run(one, query))
            await one.rollback()
            assert len((await run(one, query)).all()) == 2
        assert isinstance(error, NotSupportedError)
        self.check(engine, error, StalePlan, FaultKind.STALE_PLAN, "0A000")

    async def test_while_streaming(self, make_either, server, table) -> None:
        """An error in mid-stream is typed, and knows its statement."""
        engine = make_either(server.url)
        query = text(
            "SELECT pg_sleep(CASE WHEN n > 500 THEN 60 ELSE 0 END) FROM generate_series(1, 900) n"
            " WHERE n <> :n"
        )

        async def work() -> None:
            async with engine.connect() as connection:
                await run(connection, "SET LOCAL statement_timeout = 100")
                async for _ in await connection.stream(query, {"n": 7}):
                    pass

        error = await caught(work())
        assert classify(error).kind is FaultKind.STATEMENT_TIMEOUT
        if is_ours(engine):
            assert type(error) is StatementTimeout
            assert "generate_series" in error.statement
            assert error.params in ((7,), {"n": 7})
        assert_unused(engine)


@pytest.fixture
def terminate(make_stock, server):
    """Ends a session from outside."""
    engine = make_stock(server.url)

    async def end(target: int) -> None:
        async with engine.connect() as connection:
            await run(connection, "SELECT pg_terminate_backend(:pid)", pid=target)

    return end


async def until_closed(connection: AsyncConnection) -> None:
    driver = connection.sync_connection.connection.driver_connection
    async with asyncio.timeout(SLACK):
        while not driver.is_closed():
            await asyncio.sleep(0.01)


class TestLostConnections:
    """The session is ended, or the network breaks."""

    def check(self, engine, error, outcome: Outcome, cls=ConnectionLost) -> None:
        fault = classify(error)
        assert fault.kind in (FaultKind.CONNECTION_LOST, FaultKind.TRANSACTION_TIMEOUT), error
        assert fault.connection_lost
        assert fault.outcome is outcome
        retryable = outcome is not Outcome.UNKNOWN and fault.kind is FaultKind.CONNECTION_LOST
        assert fault.retryable is retryable
        if is_ours(engine):
            assert type(error) is cls
            assert isinstance(error, OperationalError)
            assert isinstance(error, InterfaceError)
            assert isinstance(error, InternalError)
            assert isinstance(error, ConnectionError)
            assert error.connection_invalidated
            assert error.outcome is outcome
        assert_unused(engine)

    @pytest.mark.parametrize(
        ("query", "isolation", "outcome"),
        [
            ("SELECT pg_terminate_backend(pg_backend_pid())", None, Outcome.ROLLED_BACK),
            ("SELECT pg_terminate_backend(pg_backend_pid())", "AUTOCOMMIT", Outcome.UNKNOWN),
        ],
    )
    async def test_in_a_statement(self, make_either, server, query, isolation, outcome) -> None:
        """57P01."""
        engine = make_either(server.url)

        async def work() -> None:
            async with engine.connect() as connection:
                if isolation:
                    await connection.execution_options(isolation_level=isolation)
                await run(connection, query)

        error = await caught(work())
        self.check(engine, error, outcome)
        assert classify(error).sqlstate == ("57P01" if TELLS_WHY else "08003")

    @pytest.mark.parametrize("step", ["statement", "commit"])
    @pytest.mark.parametrize("known", [True, False])
    async def test_between_statements(self, make_either, server, terminate, step, known) -> None:
        """Found at the next statement, or at COMMIT; what the driver would not send, was not."""
        engine = make_either(server.url)

        async def work() -> None:
            async with engine.connect() as connection:
                await run(connection, "SELECT 1")
                if known:
                    await terminate(pid(connection))
                    await until_closed(connection)
                else:
                    await terminate(pid(connection))
                if step == "statement":
                    await run(connection, "SELECT 2")
                await connection.commit()

        error = await caught(work())
        if step == "commit" and not known:
            assert classify(error).outcome in (Outcome.UNKNOWN, Outcome.ROLLED_BACK)
            assert classify(error).connection_lost
        else:
            self.check(engine, error, Outcome.ROLLED_BACK)

    async def test_idle_in_transaction(self, make_either, server) -> None:
        """25P03; what was sent after it was not read."""
        engine = make_either(server.url)

        async def work() -> None:
            async with engine.connect() as connection:
                await run(connection, "SET LOCAL idle_in_transaction_session_timeout = 50")
                await until_closed(connection)
                await connection.commit()

        self.check(engine, await caught(work()), Outcome.ROLLED_BACK)

    async def test_idle_in_transaction_told_in_reply(self, make_either, server) -> None:
        """The server's 25P03 in answer to a statement: IdleInTransactionTimeout."""
        engine = make_either(server.url)

        async def work() -> None:
            async with engine.connect() as connection:
                await run(connection, "SET LOCAL idle_in_transaction_session_timeout = 50")
                time.sleep(0.3)  # noqa: ASYNC251 (the loop is busy, and hears of it too late)
                await run(connection, "SELECT 1")

        cls = IdleInTransactionTimeout if TELLS_WHY else ConnectionLost
        self.check(engine, await caught(work()), Outcome.ROLLED_BACK, cls)

    async def test_transaction_timeout(self, make_either) -> None:
        """25P04, from PostgreSQL 17 on."""
        with postgres(version=17) as server:
            engine = make_either(server.url)

            async def work() -> None:
                async with engine.connect() as connection:
                    await run(connection, "SET LOCAL transaction_timeout = 100")
                    await run(connection, "SELECT pg_sleep(60)")

            error = await caught(work())
            cls = TransactionTimeout if TELLS_WHY else ConnectionLost
            self.check(engine, error, Outcome.ROLLED_BACK, cls)
            assert classify(error).sqlstate == ("25P04" if TELLS_WHY else "08003")
            await engine.dispose()

    async def test_while_streaming(self, make_either, server, terminate) -> None:
        """In mid-stream."""
        engine = make_either(server.url)

        async def work() -> None:
            async with engine.connect() as connection:
                query = text("SELECT n FROM generate_series(1, 100000) n")
                first = True
                async for _ in await connection.stream(query):
                    if first:
                        await terminate(pid(connection))
                        await until_closed(connection)
                    first = False

        error = await caught(work())
        self.check(engine, error, Outcome.ROLLED_BACK)
        if is_ours(engine):  # not what the ROLLBACK after it met
            assert "generate_series" in error.statement

    async def test_a_driver_that_has_lost_track(self, make_engine, server, monkeypatch) -> None:
        """It does not know where the protocol stands: discarded, though its socket is open."""
        engine = make_engine(server.url)

        async def lost_track(*_: object, **__: object) -> None:
            raise asyncpg.InternalClientError("cannot switch to another state")

        async def work() -> None:
            async with engine.connect() as connection:
                await run(connection, "SELECT 1")
                monkeypatch.setattr(asyncpg.Connection, "prepare", lost_track)
                await run(connection, "SELECT 2")

        self.check(engine, await caught(work()), Outcome.ROLLED_BACK)
        assert engine.pool.checkedin() == 0

    async def test_in_a_session(self, make_either, server, terminate) -> None:
        """AsyncSession, at its COMMIT."""
        engine = make_either(server.url)

        async def work() -> None:
            async with AsyncSession(engine) as session:
                connection = await session.connection()
                await run(session, "SELECT 1")
                await terminate(pid(connection))
                await until_closed(connection)
                await session.commit()

        self.check(engine, await caught(work()), Outcome.ROLLED_BACK)

    async def test_at_rollback(self, make_either, server, terminate) -> None:
        """It is rolled back all the same."""
        engine = make_either(server.url)

        async def work() -> None:
            async with engine.connect() as connection:
                await run(connection, "SELECT 1")
                await terminate(pid(connection))
                await until_closed(connection)
                await connection.rollback()

        self.check(engine, await caught(work()), Outcome.ROLLED_BACK)

    async def test_idle_siblings_are_checked(self, make_engine, server, terminate) -> None:
        """After a lost connection the others answer before they are handed out."""
        engine = make_engine(server.url, pool_size=2)
        async with engine.connect() as one, engine.connect() as two:
            await run(one, "SELECT 1")
            await run(two, "SELECT 1")
        assert engine.pool.checkedin() == 2

        async def work() -> None:
            async with engine.connect() as connection:
                await run(connection, "SELECT pg_terminate_backend(pg_backend_pid())")

        await caught(work())
        killed = asyncio.get_running_loop().time()
        async with asyncio.timeout(SLACK):
            while not engine.pool.checkedin():  # it is being checked
                await asyncio.sleep(0.01)
        (sibling,) = engine.pool.idle()
        async with engine.connect() as connection:
            await run(connection, "SELECT 1")
        assert sibling.answered_at > killed

    async def test_it_can_be_kept(self, make_engine, server) -> None:
        """Pickled and copied it is the same; parameters that are hidden stay hidden."""
        engine = make_engine(server.url, hide_parameters=True)

        async def work() -> None:
            async with engine.connect() as connection:
                query = "SELECT pg_terminate_backend(pg_backend_pid()), CAST(:p AS text)"
                await run(connection, query, p="s3cret")

        error = await caught(work())
        for kept in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
            assert type(kept) is ConnectionLost
            assert str(kept) == str(error)
            assert (kept.outcome, kept.sqlstate) == (Outcome.ROLLED_BACK, error.sqlstate)
            assert (kept.statement, kept.params) == (error.statement, error.params)
            assert (kept.hide_parameters, kept.connection_invalidated) == (True, True)
            assert classify(kept) == classify(error)
        assert "s3cret" not in str(error)


class TestReadOnly:
    """25006."""

    @pytest.mark.parametrize("by", ["option", "statement"])
    async def test_asked_for(self, make_engine, server, table, by) -> None:
        """A transaction that was asked to be read-only keeps its connection."""
        engine = make_engine(server.url)

        async def work() -> None:
            async with engine.connect() as connection:
                if by == "option":
                    await connection.execution_options(postgresql_readonly=True)
                else:
                    await run(connection, "SET TRANSACTION READ ONLY")
                await run(connection, "DELETE FROM account")

        error = await caught(work())
        fault = classify(error)
        assert type(error) is ReadOnlyServer
        assert (fault.kind, fault.retryable, fault.connection_lost) == (
            FaultKind.READ_ONLY,
            False,
            False,
        )
        assert fault.http_status == 500
        assert engine.pool.checkedin() == 1

    @pytest.mark.parametrize(
        "asked",
        [
            {"server_settings": {"default_transaction_read_only": "on"}},
            {"connect_args": {"target_session_attrs": "read-only"}},
        ],
    )
    async def test_asked_for_by_the_engine(self, make_engine, asked) -> None:
        """An engine for reading keeps its connections."""
        with postgres(server_settings={"default_transaction_read_only": "on"}) as standby:
            engine = make_engine(standby.url, **asked)

            async def work() -> None:
                async with engine.begin() as connection:
                    await run(connection, "CREATE TABLE t ()")

            assert not classify(await caught(work())).connection_lost
            assert engine.pool.checkedin() == 1

    async def test_after_a_failover(self, make_engine) -> None:
        """All connections to a server that has become read-only are left."""
        with postgres() as server:
            engine = make_engine(server.url, pool_size=3)
            async with engine.connect() as one, engine.connect() as two:
                await run(one, "SELECT 1")
                await run(two, "SELECT 1")
            async with engine.connect() as connection:
                await connection.execution_options(isolation_level="AUTOCOMMIT")
                await run(connection, "ALTER SYSTEM SET default_transaction_read_only = on")
                await run(connection, "SELECT pg_reload_conf()")
                async with asyncio.timeout(SLACK):
                    while True:
                        shown = await run(connection, "SHOW default_transaction_read_only")
                        if shown.scalar() == "on":
                            break
                        await asyncio.sleep(0.02)

            async def work() -> None:
                async with engine.connect() as bystander:
                    before.append(pid(bystander))
                    async with engine.begin() as connection:
                        before.append(pid(connection))
                        await run(connection, "CREATE TABLE t ()")

            before: list[int] = []
            error = await caught(work())
            fault = classify(error)
            assert type(error) is ReadOnlyServer
            assert (fault.retryable, fault.connection_lost) == (True, True)
            assert (fault.outcome, fault.http_status) == (Outcome.ROLLED_BACK, 503)
            assert (engine.pool.checkedin(), engine.pool.checkedout()) == (0, 0)
            async with engine.connect() as one, engine.connect() as two:
                assert not {pid(one), pid(two)} & set(before)
            await engine.dispose()


async def insert(engine: AsyncEngine, style: str) -> None:
    """Insert a row and commit."""
    statement = "INSERT INTO account VALUES (99, 0)"
    if style == "session":
        async with AsyncSession(engine) as session:
            await run(session, statement)
            await session.commit()
    elif style == "autocommit":
        async with engine.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            await run(connection, statement)
    else:
        async with engine.begin() as connection:
            await run(connection, statement)


MOMENTS = [
    ("BEGIN", "begin", Outcome.ROLLED_BACK),
    ("INSERT", "begin", Outcome.ROLLED_BACK),
    ("COMMIT", "begin", Outcome.UNKNOWN),
    ("COMMIT", "session", Outcome.UNKNOWN),
    ("INSERT", "session", Outcome.ROLLED_BACK),
    ("INSERT", "autocommit", Outcome.UNKNOWN),
]


@pytest.fixture
async def proxied(make_either, server, table):
    """An engine with a warm connection through a proxy, and the proxy."""
    async with FaultProxy(server) as proxy:
        engine = make_either(proxy.url, pool_size=1, max_overflow=0)
        async with engine.connect() as connection:
            await run(connection, "SELECT 1")
        yield engine, proxy
        proxy.heal()
        await engine.dispose()


@pytest.fixture
async def rows(make_stock, server):
    """How many of the rows that were inserted are there."""
    engine = make_stock(server.url)

    async def count() -> int:
        async with engine.connect() as connection:
            return (await run(connection, "SELECT count(*) FROM account WHERE id = 99")).scalar()

    return count


class TestWhatBecameOfTheWork:
    """Each moment, each fault: what is said is never more than what is known."""

    def check(self, engine, error, kinds: set[FaultKind], outcome: Outcome) -> None:
        fault = classify(error)
        assert fault.kind in kinds
        assert fault.outcome is outcome
        passes = fault.kind is FaultKind.CONNECTION_LOST
        assert fault.retryable is (passes and outcome is not Outcome.UNKNOWN)
        assert_unused(engine)

    @pytest.mark.parametrize("side", ["before", "after"])
    @pytest.mark.parametrize(("marker", "style", "outcome"), MOMENTS)
    async def test_the_network_breaks(self, proxied, rows, side, marker, style, outcome) -> None:
        """The message or its reply is lost."""
        engine, proxy = proxied
        proxy.cut(**{side: marker})
        error = await caught(insert(engine, style))
        self.check(engine, error, {FaultKind.CONNECTION_LOST}, outcome)
        assert classify(error).connection_lost
        if outcome is Outcome.ROLLED_BACK:
            assert await rows() == 0
        if is_ours(engine):
            assert type(error) is ConnectionLost

    @pytest.mark.parametrize("deadline", [True, False])
    @pytest.mark.parametrize(("marker", "style", "outcome"), MOMENTS)
    async def test_cancelled(self, proxied, rows, deadline, marker, style, outcome) -> None:
        """The task is cancelled, or its asyncio.timeout runs out, while the server is silent."""
        engine, proxy = proxied
        frozen = proxy.freeze_at(before=marker)

        async def work() -> None:
            async with asyncio.timeout(None) as limit:
                limits.append(limit)
                await insert(engine, style)

        limits: list[asyncio.Timeout] = []
        task = asyncio.ensure_future(work())
        await frozen
        if deadline:
            limits[0].reschedule(0)
        else:
            task.cancel()
        error = await caught_while_frozen(engine, proxy, task)
        kind = FaultKind.DEADLINE_EXCEEDED if deadline else FaultKind.CANCELLED
        assert type(error) is (TimeoutError if deadline else asyncio.CancelledError)
        self.check(engine, error, {kind}, outcome)
        assert classify(error).http_status == (504 if deadline else 499)
        assert classify(error).connection_lost
        if is_ours(engine):
            marker_error = error.__cause__.__cause__ if deadline else error.__cause__
            assert type(marker_error) is Interrupted
            assert marker_error.outcome is outcome

    @pytest.mark.parametrize(("marker", "style", "outcome"), MOMENTS)
    async def test_the_client_gives_up(
        self, make_either, server, table, marker, style, outcome
    ) -> None:
        """Nobody answers within the client's own limit."""
        async with FaultProxy(server) as proxy:
            engine = make_either(proxy.url, connect_args={"command_timeout": 0.3})
            async with engine.connect() as connection:
                await run(connection, "SELECT 1")
            proxy.freeze_at(before=marker)
            task = asyncio.ensure_future(insert(engine, style))
            error = await caught_while_frozen(engine, proxy, task)
            self.check(engine, error, {FaultKind.STATEMENT_TIMEOUT}, outcome)
            assert classify(error).connection_lost
            if is_ours(engine):
                assert type(error) is StatementTimeout
                assert error.outcome is outcome
            await engine.dispose()

    @pytest.mark.parametrize("cancelled", [True, False])
    async def test_waiting_for_a_slot(self, make_either, server, cancelled) -> None:
        """Nothing was sent."""
        engine = make_either(server.url, pool_size=1, max_overflow=0, pool_timeout=0.2)

        async with engine.connect():
            task = asyncio.ensure_future(insert(engine, "begin"))
            await asyncio.sleep(0.05)
            if cancelled:
                task.cancel()
            error = await caught(task)
        kind = FaultKind.CANCELLED if cancelled else FaultKind.POOL_TIMEOUT
        fault = classify(error)
        assert (fault.kind, fault.outcome) == (kind, Outcome.NOT_SENT)
        assert fault.retryable is not cancelled
        assert not fault.connection_lost
        assert_unused(engine)

    @pytest.mark.parametrize("fault", ["cancelled", "deadline", "refused", "timeout", "reset"])
    async def test_connecting(self, make_either, server, fault) -> None:
        """Nothing was sent."""
        async with FaultProxy(server) as proxy:
            if fault == "refused":
                proxy.refuse()
            elif fault == "reset":
                proxy.cut(before=At("StartupMessage"), every=True, reset=True)
            else:
                proxy.silence()
            engine = make_either(proxy.url, connect_args={"timeout": 0.5, "ssl": False})
            work = insert(engine, "begin")
            limited = asyncio.wait_for(work, 0.1) if fault == "deadline" else work
            task = asyncio.ensure_future(limited)
            if fault == "cancelled":
                await proxy.until(lambda stats: stats.accepted > 0)
                task.cancel()
            error = await caught(task)
        found = classify(error)
        kinds = {
            "cancelled": FaultKind.CANCELLED,
            "deadline": FaultKind.DEADLINE_EXCEEDED,
            "refused": FaultKind.CONNECT_REFUSED,
            "timeout": FaultKind.CONNECT_TIMEOUT,
            "reset": FaultKind.SERVER_UNREACHABLE,
        }
        assert found.kind is kinds[fault]
        assert found.outcome is Outcome.NOT_SENT
        assert found.retryable is (fault not in ("cancelled", "deadline"))
        assert_unused(engine)
