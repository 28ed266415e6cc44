"""The engine on real servers: it is SQLAlchemy's, and its statement timeouts are kept to."""

import asyncio
import pickle
import time

import pytest
from sqlalchemy import Integer, bindparam, event, insert, text
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import NullPool

from poolkit import (
    ConfigurationError,
    DatabaseSettings,
    StatementTimeout,
    create_async_engine,
    timeouts,
)

SLEEP = text("SELECT pg_sleep(60)")
LIMIT = text("SHOW statement_timeout")
SLACK = 5.0


async def scalar(connection, statement, **options):
    return (await connection.execute(statement, execution_options=options)).scalar()


class TestFactory:
    """create_async_engine and its arguments."""

    async def test_from_the_environment(self, monkeypatch, server) -> None:
        """With DATABASE_URL set, no argument is needed."""
        for name, value in server.environ.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("DATABASE_POOL_SIZE", "3")
        engine = create_async_engine()
        assert type(engine) is AsyncEngine
        assert engine.pool.size() == 3
        async with engine.connect() as connection:
            assert await scalar(connection, text("SHOW application_name")) == "tests"
        await engine.dispose()

    async def test_a_url_with_the_other_variables(self, monkeypatch, make_engine, server) -> None:
        """The URL is the caller's, the rest the environment's."""
        monkeypatch.setenv("DATABASE_URL", "postgresql://nobody@nowhere/x")
        monkeypatch.setenv("DATABASE_STATEMENT_TIMEOUT", "4")
        async with make_engine(server.url).connect() as connection:
            assert await scalar(connection, LIMIT) == "4s"

    async def test_settings_leave_the_environment_unread(self, monkeypatch, make_engine, server):
        """With settings, variables count for nothing."""
        settings = DatabaseSettings(url=server.url)
        monkeypatch.setenv("DATABASE_POOL_SIZE", "nonsense")
        engine = make_engine(settings=settings)
        async with engine.connect() as connection:
            assert await scalar(connection, LIMIT) == "10s"

    def test_url_and_settings(self, server) -> None:
        """Both is one too many."""
        with pytest.raises(ConfigurationError, match="either url or settings"):
            create_async_engine(server.url, settings=DatabaseSettings(url=server.url))

    def test_errors_are_sqlalchemys_and_list_all(self, monkeypatch) -> None:
        """ArgumentError and ValueError at once, each problem on its line."""
        monkeypatch.setenv("DATABASE_POOL_SIZE", "x")
        monkeypatch.setenv("DATABASE_STATEMENT_TIMEOUT", "-1")
        with pytest.raises(ArgumentError) as caught:
            create_async_engine()
        assert isinstance(caught.value, ValueError)
        assert len(str(caught.value).splitlines()) == 3

    def test_an_env_file_that_is_no_text(self, tmp_path) -> None:
        """A broken .env is a configuration error."""
        (tmp_path / ".env").write_bytes(b"DATABASE_URL=\xff\xfe")
        with pytest.raises(ConfigurationError, match=r"\.env"):
            create_async_engine()

    async def test_server_settings(self, make_engine, server) -> None:
        """jit and the like reach the session, from either place."""
        engine = make_engine(
            server.url,
            server_settings={"jit": "off"},
            connect_args={"server_settings": {"work_mem": "8MB"}},
        )
        async with engine.connect() as connection:
            assert await scalar(connection, text("SHOW jit")) == "off"
            assert await scalar(connection, text("SHOW work_mem")) == "8MB"

    async def test_url_options_reach_the_session(self, make_engine, server) -> None:
        """options=-c name=value, as psql takes it."""
        url = f"{server.url}?options=-c%20search_path=app,public%20-c%20statement_timeout=7s"
        async with make_engine(url).connect() as connection:
            assert await scalar(connection, text("SHOW search_path")) == "app,public"
            assert await scalar(connection, LIMIT) == "7s"

    async def test_null_pool(self, make_engine, server) -> None:
        """Without a pool each checkout connects, bounded and typed as ever."""
        engine = make_engine(server.url, poolclass=NullPool)
        async with engine.connect() as connection:
            assert await scalar(connection, text("SELECT 1")) == 1

    async def test_do_connect_listeners_are_heard(self, make_engine, server) -> None:
        """SQLAlchemy's own way to rotate a password works, whenever it is registered."""
        engine = make_engine(server.url.replace(server.password, "stale"))

        @event.listens_for(engine.sync_engine, "do_connect")
        def give_token(dialect, record, cargs, cparams) -> None:
            cparams["password"] = server.password

        async with engine.connect() as connection:
            assert await scalar(connection, text("SELECT 1")) == 1

    async def test_the_password_is_shown_nowhere(self, make_engine, server) -> None:
        """Not by the engine, its URL, its pool or its errors."""
        engine = make_engine(server.url)
        shown = [repr(engine), repr(engine.url), str(engine.url), repr(engine.pool)]
        with pytest.raises(DBAPIError) as caught:
            async with engine.connect() as connection:
                await connection.execute(text("SELECT * FROM nowhere"))
        assert not [text_ for text_ in [*shown, str(caught.value)] if server.password in text_]


async def test_the_main_versions(make_engine, any_server) -> None:
    """On each major version: connect, limits in force, statement timeout, connection kept."""
    engine = make_engine(settings={"url": any_server.url, "lock_timeout": 2})
    async with engine.connect() as connection:
        assert await scalar(connection, text("SHOW lock_timeout")) == "2s"
        assert await scalar(connection, LIMIT) == "10s"
        pid = await scalar(connection, text("SELECT pg_backend_pid()"))
    async with engine.connect() as connection:
        with pytest.raises(StatementTimeout):
            await connection.execute(SLEEP, execution_options={"statement_timeout": 0.1})
    async with engine.connect() as connection:
        assert await scalar(connection, text("SELECT pg_backend_pid()")) == pid


class TestStatementTimeout:
    """One error, whichever end noticed."""

    async def test_the_server_first(self, make_engine, server) -> None:
        """57014: typed, in time, and the connection goes back to the pool."""
        engine = make_engine(settings={"url": server.url, "statement_timeout": 0.2})
        async with engine.connect() as connection:
            pid = await scalar(connection, text("SELECT pg_backend_pid()"))
            await connection.rollback()
            started = time.perf_counter()
            with pytest.raises(StatementTimeout) as caught:
                await connection.execute(text("SELECT pg_sleep(:s)"), {"s": 60})
            assert time.perf_counter() - started < SLACK
            await connection.rollback()
            assert await scalar(connection, text("SELECT pg_backend_pid()")) == pid
        error = caught.value
        assert isinstance(error, OperationalError)
        assert isinstance(error, TimeoutError)
        assert (error.sqlstate, error.connection_invalidated) == ("57014", False)
        assert (error.statement, error.params) == ("SELECT pg_sleep($1)", (60,))
        assert "0.2 s" in str(error)

    async def test_the_client_as_the_backstop(self, make_engine, server) -> None:
        """A server that is not heard: the same error, and the connection is discarded."""
        engine = make_engine(server.url, connect_args={"command_timeout": 0.2})
        async with engine.connect() as connection:
            pid = await scalar(connection, text("SELECT pg_backend_pid()"))
            with pytest.raises(StatementTimeout) as caught:
                await connection.execute(SLEEP)
        assert caught.value.connection_invalidated
        assert caught.value.sqlstate is None
        async with engine.connect() as connection:
            assert await scalar(connection, text("SELECT pg_backend_pid()")) != pid

    async def test_canceled_by_an_operator(self, engine, server) -> None:
        """pg_cancel_backend has the same SQLSTATE; the message has the server's own words."""
        async with engine.connect() as connection, engine.connect() as operator:
            pid = await scalar(connection, text("SELECT pg_backend_pid()"))
            running = asyncio.ensure_future(connection.execute(SLEEP))
            cancel = text("SELECT pg_cancel_backend(:pid)")
            while not running.done():
                await operator.execute(cancel, {"pid": pid})
                await asyncio.sleep(0.02)
            with pytest.raises(StatementTimeout, match="user request"):
                await running

    async def test_off(self, make_engine, server) -> None:
        """0 is off at the server, and the client waits."""
        engine = make_engine(settings={"url": server.url, "statement_timeout": 0})
        async with engine.connect() as connection:
            assert await scalar(connection, LIMIT) == "0"

    async def test_other_errors_are_as_ever(self, engine) -> None:
        """Only timeouts are translated."""
        async with engine.connect() as connection:
            with pytest.raises(DBAPIError) as caught:
                await connection.execute(text("SELECT 1/0"))
        assert not isinstance(caught.value, StatementTimeout)

    async def test_it_pickles(self, engine) -> None:
        """Errors travel between processes."""
        async with engine.connect() as connection:
            with pytest.raises(StatementTimeout) as caught:
                await connection.execute(SLEEP, execution_options={"statement_timeout": 0.1})
        copy = pickle.loads(pickle.dumps(StatementTimeout("SELECT 1", {}, TimeoutError())))
        assert isinstance(copy, StatementTimeout)
        assert caught.value.hide_parameters is False


class TestOwnLimit:
    """execution_options(statement_timeout=...), of a statement, a connection, an engine."""

    async def test_of_one_statement(self, engine) -> None:
        """It holds for that statement and not for the next, shorter or longer."""
        async with engine.connect() as connection:
            found = [
                await scalar(connection, LIMIT),
                await scalar(connection, LIMIT, statement_timeout=3),
                await scalar(connection, LIMIT),
                await scalar(connection, LIMIT, statement_timeout=30),
                await scalar(connection, LIMIT, statement_timeout=0),
                await scalar(connection, LIMIT, statement_timeout=None),
                await scalar(connection, LIMIT),
            ]
        assert found == ["10s", "3s", "10s", "30s", "0", "0", "10s"]

    async def test_of_the_first_statement(self, engine) -> None:
        """It travels with BEGIN, and the COMMIT does not run under it."""
        async with engine.connect() as connection:
            assert await scalar(connection, LIMIT, statement_timeout=0.25) == "250ms"
            raw = (await connection.get_raw_connection()).driver_connection
            assert await raw.fetchval("SHOW statement_timeout") == "10s"
            await connection.commit()

    async def test_of_a_connection(self, engine) -> None:
        """It holds for each of its transactions and for nobody after."""
        async with engine.connect() as connection:
            await connection.execution_options(statement_timeout=3)
            for _ in range(2):
                assert await scalar(connection, LIMIT) == "3s"
                assert await scalar(connection, LIMIT, statement_timeout=5) == "5s"
                assert await scalar(connection, LIMIT) == "3s"
                await connection.commit()
        async with engine.connect() as connection:
            assert await scalar(connection, LIMIT) == "10s"

    async def test_of_an_engine(self, engine) -> None:
        """A view of the engine has its own limit on the same pool."""
        slow = engine.execution_options(statement_timeout=60)
        async with slow.connect() as connection:
            assert await scalar(connection, LIMIT) == "1min"
        async with engine.connect() as connection:
            assert await scalar(connection, LIMIT) == "10s"

    async def test_longer_than_the_clients_patience(self, make_engine, server) -> None:
        """The client's backstop moves with the limit."""
        engine = make_engine(settings={"url": server.url, "statement_timeout": 0.1})
        async with engine.connect() as connection:
            await connection.execute(
                text("SELECT pg_sleep(1.5)"), execution_options={"statement_timeout": 30}
            )

    async def test_after_a_rolled_back_savepoint(self, engine) -> None:
        """ROLLBACK TO takes the server's setting back; the next statement sets it again."""
        async with engine.connect() as connection:
            await connection.execution_options(statement_timeout=3)
            await connection.execute(text("SELECT 1"))
            savepoint = await connection.begin_nested()
            await connection.execution_options(statement_timeout=20)
            assert await scalar(connection, LIMIT) == "20s"
            await savepoint.rollback()
            assert await scalar(connection, LIMIT) == "20s"

    async def test_a_savepoint_saves_the_transaction(self, engine) -> None:
        """After a statement with a limit of its own failed, ROLLBACK TO goes through alone."""
        async with engine.connect() as connection:
            for query, expected in ((SLEEP, StatementTimeout), (text("SELECT 1/0"), DBAPIError)):
                savepoint = await connection.begin_nested()
                with pytest.raises(expected):
                    await connection.execute(query, execution_options={"statement_timeout": 0.1})
                await savepoint.rollback()
                assert await scalar(connection, LIMIT) == "10s"

    async def test_after_a_timeout(self, engine) -> None:
        """A statement that ran into its own limit leaves none behind."""
        async with engine.connect() as connection:
            with pytest.raises(StatementTimeout, match=r"0\.1 s"):
                await connection.execute(SLEEP, execution_options={"statement_timeout": 0.1})
            await connection.rollback()
            assert await scalar(connection, LIMIT) == "10s"

    async def test_in_autocommit(self, engine) -> None:
        """Without a transaction it is set and taken back around the statement."""
        async with engine.connect() as plain:
            connection = await plain.execution_options(isolation_level="AUTOCOMMIT")
            assert await scalar(connection, LIMIT, statement_timeout=3) == "3s"
            assert await scalar(connection, LIMIT) == "10s"
            with pytest.raises(StatementTimeout):
                await connection.execute(SLEEP, execution_options={"statement_timeout": 0.1})
            assert await scalar(connection, LIMIT) == "10s"

    async def test_cancelled_in_autocommit(self, engine) -> None:
        """A cancelled statement is left at once: no attempt to take its limit back."""
        async with engine.connect() as plain:
            connection = await plain.execution_options(isolation_level="AUTOCOMMIT")
            with pytest.raises(TimeoutError) as caught:
                async with asyncio.timeout(0.2):
                    await connection.execute(SLEEP, execution_options={"statement_timeout": 8})
            assert not isinstance(caught.value, StatementTimeout)
            assert connection.invalidated
        assert engine.pool.checkedout() == 0

    async def test_while_streaming(self, engine) -> None:
        """A server-side cursor fetches under its statement's limit."""
        query = text("SELECT current_setting('statement_timeout') FROM generate_series(1, 1000)")
        async with engine.connect() as connection:
            async with connection.stream(query, execution_options={"statement_timeout": 3}) as rows:
                seen = {row[0] async for row in rows}
            assert seen == {"3s"}
            assert await scalar(connection, LIMIT) == "10s"

    @pytest.mark.parametrize("value", [-1, "3", True, float("inf"), float("nan")])
    async def test_nonsense(self, engine, value) -> None:
        """What is no duration is refused by name."""
        async with engine.connect() as connection:
            with pytest.raises(ConfigurationError, match="statement_timeout"):
                await connection.execute(LIMIT, execution_options={"statement_timeout": value})

    async def test_costs_no_round_trip_of_its_own(self, engine, monkeypatch) -> None:
        """For a whole transaction the limit rides on BEGIN."""

        def extra(*_: object, **__: object) -> None:
            raise AssertionError

        monkeypatch.setattr(timeouts, "_set_limit", extra)
        async with engine.connect() as connection:
            await connection.execution_options(statement_timeout=3)
            assert await scalar(connection, LIMIT) == "3s"
            await connection.commit()


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "engine_test_item"
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    note: Mapped[str]


class TestOrm:
    """Sessions on the engine."""

    @pytest.fixture
    async def sessions(self, make_engine, server):
        engine = make_engine(server.url)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.drop_all)
            await connection.run_sync(Base.metadata.create_all)
        yield async_sessionmaker(engine, expire_on_commit=False)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.drop_all)

    async def test_units_of_work(self, sessions) -> None:
        """Insert many, commit, read back; execution options per statement and per session."""
        async with sessions() as session:
            session.add_all([Item(id=n, note=str(n)) for n in range(50)])
            await session.commit()
        async with sessions() as session:
            assert await session.scalar(text("SELECT count(*) FROM engine_test_item")) == 50
            limit = await session.scalar(LIMIT, execution_options={"statement_timeout": 4})
            assert limit == "4s"
            assert isinstance(session, AsyncSession)

    async def test_executemany_under_a_limit(self, sessions) -> None:
        """An executemany has the limit of its statement."""
        statement = insert(Item.__table__).values(
            id=bindparam("id"), note=text("current_setting('statement_timeout')")
        )
        async with sessions() as session:
            await session.execute(
                statement,
                [{"id": n} for n in range(3)],
                execution_options={"statement_timeout": 6},
            )
            notes = await session.scalars(text("SELECT note FROM engine_test_item"))
            assert set(notes) == {"6s"}


async def test_many_tasks_under_timeouts_leave_nothing_behind(make_engine, server) -> None:
    """Statements that time out under load: the pool is whole afterwards."""
    engine = make_engine(
        settings={"url": server.url, "statement_timeout": 0.1, "application_name": "crowd"}
    )

    async def work(number: int) -> bool:
        async with engine.connect() as connection:
            try:
                await connection.execute(SLEEP if number % 2 else text("SELECT 1"))
            except StatementTimeout:
                return True
            return False

    timed_out = await asyncio.gather(*(work(number) for number in range(40)))
    assert sum(timed_out) == 20
    assert engine.pool.checkedout() == 0
    await engine.dispose()
