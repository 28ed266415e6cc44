"""Whole transactions are done again after faults that pass, and never where that could do harm."""

import asyncio
import contextlib
import functools
import inspect
import itertools
import logging

import asyncpg
import pytest
import tenacity
from sqlalchemy import event, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, InvalidRequestError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.ext.asyncio import create_async_engine as sqlalchemys_own
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from poolkit import (
    ConfigurationError,
    DeadlineExceeded,
    PoolTimeout,
    TransactionAborted,
    TransactionRetried,
    attempts,
    observe,
    pool_stats,
    run_in_transaction,
)
from poolkit.driver import DriverConnection
from poolkit.errors import find_sqlstate
from poolkit.faults import FaultKind, Outcome, classify
from poolkit.testing import FaultProxy, postgres

WITHIN = 30.0
"""Seconds for what would otherwise last for ever."""


@pytest.fixture(scope="module")
def server():
    """A server that finds deadlocks at once."""
    with postgres(server_settings={"deadlock_timeout": "10ms"}) as running:
        yield running


def own_url(url: str) -> str:
    return url.replace("postgresql://", "postgresql+asyncpg://")


@pytest.fixture(params=["poolkit", "asyncpg", "psycopg"])
async def any_engine(request, server, make_engine):
    """poolkit's engine, and SQLAlchemy's own on both drivers."""
    if request.param == "poolkit":
        yield make_engine(server.url)
        return
    pytest.importorskip(request.param)
    engine = sqlalchemys_own(server.url.replace("postgresql://", f"postgresql+{request.param}://"))
    yield engine
    await engine.dispose()


@pytest.fixture
async def counters(server):
    """Two rows that begin at 0; gives a function that reads them, and one that does SQL."""
    connection = await asyncpg.connect(server.url)
    await connection.execute(
        "DROP TABLE IF EXISTS counters; CREATE TABLE counters (id int PRIMARY KEY, n int NOT NULL);"
        "INSERT INTO counters VALUES (1, 0), (2, 0)"
    )
    yield Counters(connection)
    await connection.close()


class Counters:
    def __init__(self, connection: asyncpg.Connection) -> None:
        self.connection = connection
        self.do = connection.execute

    async def is_unlocked(self) -> None:
        """No transaction has been left open that touched the first row."""
        await self.do("UPDATE counters SET n = n WHERE id = 1", timeout=WITHIN)

    async def read(self) -> list[int]:
        rows = await self.connection.fetch("SELECT n FROM counters ORDER BY id")
        return [row["n"] for row in rows]


@pytest.fixture
def pauses(monkeypatch):
    """The pauses that would have been made."""
    made: list[float] = []

    async def at_once(seconds: float) -> None:
        made.append(seconds)

    monkeypatch.setattr(attempts, "_pause", at_once)
    return made


async def add(connection: AsyncSession | AsyncEngine, row: int = 1) -> None:
    await connection.execute(text("UPDATE counters SET n = n + 1 WHERE id = :row"), {"row": row})


def failing(times: int, error_of, then=add):
    """A work that fails so many times, and notes each of its beginnings."""
    begun: list[int] = []

    async def work(connection):
        begun.append(len(begun) + 1)
        await then(connection)
        if len(begun) <= times:
            await error_of(connection)
        return len(begun)

    work.begun = begun
    return work


async def serialization_failure(connection) -> None:
    await connection.execute(
        text("DO $$ BEGIN RAISE EXCEPTION 'made up' USING ERRCODE = '40001'; END $$")
    )


async def lock_timeout(connection) -> None:
    await connection.execute(
        text("DO $$ BEGIN RAISE EXCEPTION 'made up' USING ERRCODE = '55P03'; END $$")
    )


def checked_out(engine: AsyncEngine) -> int:
    return engine.pool.checkedout()


class TestWithoutFaults:
    """The work's result, once it is committed."""

    async def test_an_engine_gives_a_connection(self, any_engine, counters) -> None:
        """Committed before the result is there."""

        async def work(connection):
            await add(connection)
            return "done"

        assert await run_in_transaction(any_engine, work) == "done"
        assert await counters.read() == [1, 0]
        assert checked_out(any_engine) == 0

    async def test_a_session_maker_gives_a_session(self, any_engine, counters) -> None:
        """What is held back is flushed, and committed."""

        class Base(DeclarativeBase):
            pass

        class Counter(Base):
            __tablename__ = "counters"
            id: Mapped[int] = mapped_column(primary_key=True)
            n: Mapped[int]

        async def work(session):
            session.add(Counter(id=3, n=7))
            (await session.scalars(select(Counter).where(Counter.id == 1))).one().n = 5

        await run_in_transaction(async_sessionmaker(any_engine), work)
        assert await counters.read() == [5, 0, 7]
        assert checked_out(any_engine) == 0

    async def test_a_work_that_does_nothing(self, any_engine) -> None:
        """No statement, and no error."""

        async def work(_):
            return 1

        assert await run_in_transaction(any_engine, work) == 1
        assert await run_in_transaction(async_sessionmaker(any_engine), work) == 1

    @pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
    @pytest.mark.parametrize("of", [lambda engine: engine, async_sessionmaker])
    async def test_the_isolation_level(self, any_engine, level, of) -> None:
        """It holds for this transaction, and not for the next user of the connection."""

        async def work(connection):
            return await connection.scalar(text("SHOW transaction_isolation"))

        source = of(any_engine)
        assert await run_in_transaction(source, work, isolation_level=level) == level.lower()
        assert await run_in_transaction(source, work) == "read committed"

    async def test_it_costs_no_round_trip(self, server, make_engine) -> None:
        """BEGIN, the statement and COMMIT."""
        async with FaultProxy(server) as proxy:
            engine = make_engine(f"{proxy.url}?sslmode=disable")

            async def work(connection):
                return await connection.scalar(text("SELECT 1"))

            await run_in_transaction(engine, work)
            await run_in_transaction(engine, work)
            proxy.forget()
            await run_in_transaction(engine, work)
            assert proxy.round_trips == 3
            await engine.dispose()

    async def test_nothing_is_left_of_it(self, engine) -> None:
        """No listener on what lives on, such as the connection that a session is bound to."""
        async with engine.connect() as connection:
            maker = async_sessionmaker(connection, join_transaction_mode="create_savepoint")
            await connection.begin()

            async def work(session):
                await session.execute(text("SELECT 1"))
                raise LookupError

            with pytest.raises(LookupError):
                await run_in_transaction(maker, work)
            await connection.commit()


class TestManyWorkers:
    """Each unit of work is applied exactly once."""

    WORKERS = 8
    UNITS = 1000

    async def count_up(self, source, work, **options) -> None:
        units = iter(range(self.UNITS))

        async def worker(number: int) -> None:
            rows = (1, 2) if number % 2 else (2, 1)
            for _ in units:
                await run_in_transaction(
                    source, functools.partial(work, rows=rows), attempts=100, **options
                )

        async with asyncio.timeout(2 * WITHIN):
            await asyncio.gather(*(worker(number) for number in range(self.WORKERS)))

    async def test_deadlocks(self, engine, counters) -> None:
        """Two rows, locked in opposite order."""
        kinds: list[FaultKind] = []
        observe(engine, lambda e: kinds.append(e.kind) if type(e) is TransactionRetried else None)

        async def work(connection, rows):
            for row in rows:
                await add(connection, row)

        await self.count_up(engine, work)

        assert await counters.read() == [self.UNITS, self.UNITS]
        assert set(kinds) == {FaultKind.DEADLOCK}
        assert pool_stats(engine).retries == len(kinds)
        assert checked_out(engine) == 0

    async def test_serialization_failures(self, engine, counters) -> None:
        """Read, then write what rests on it; in sessions."""

        async def work(session, rows):
            read = text("SELECT n FROM counters WHERE id = :row")
            write = text("UPDATE counters SET n = :n WHERE id = :row")
            for row in sorted(rows):
                n = await session.scalar(read, {"row": row})
                await session.execute(write, {"row": row, "n": n + 1})

        await self.count_up(async_sessionmaker(engine), work, isolation_level="SERIALIZABLE")

        assert await counters.read() == [self.UNITS, self.UNITS]
        assert pool_stats(engine).retries > 0
        assert checked_out(engine) == 0


class TestFaultsThatPass:
    """The whole work is done again."""

    async def test_on_any_engine(self, any_engine, counters, pauses) -> None:
        """A serialization failure; what the first attempt did is rolled back."""
        work = failing(2, serialization_failure)

        assert await run_in_transaction(any_engine, work) == 3
        assert await counters.read() == [1, 0]
        assert checked_out(any_engine) == 0

    async def test_each_attempt_has_a_fresh_session(self, engine, counters, pauses) -> None:
        """Nothing is carried over."""
        sessions = []

        async def work(session):
            sessions.append(session)
            await add(session)
            if len(sessions) == 1:
                await serialization_failure(session)

        await run_in_transaction(async_sessionmaker(engine), work)
        assert len({id(session) for session in sessions}) == 2
        assert await counters.read() == [1, 0]

    async def test_a_failure_at_commit_itself(self, engine, counters, pauses) -> None:
        """The server answered COMMIT with an error: it is rolled back."""
        await counters.do(
            "CREATE OR REPLACE FUNCTION fail_once() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " IF nextval('tries') = 1 THEN"
            " RAISE EXCEPTION 'made up' USING ERRCODE = '40001'; END IF; RETURN NULL; END $$;"
            "DROP SEQUENCE IF EXISTS tries; CREATE SEQUENCE tries;"
            "CREATE CONSTRAINT TRIGGER late AFTER UPDATE ON counters"
            " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION fail_once()"
        )
        work = failing(0, serialization_failure)

        assert await run_in_transaction(engine, work) == 2
        assert await counters.read() == [1, 0]

    async def test_a_connection_lost_before_commit(self, server, make_engine, counters, pauses):
        """The network fails in mid-work."""
        async with FaultProxy(server) as proxy:
            engine = make_engine(f"{proxy.url}?sslmode=disable")
            cut = proxy.cut(before="UPDATE")
            work = failing(0, serialization_failure)

            assert await run_in_transaction(engine, work) == 2
            assert cut.happened
            assert await counters.read() == [1, 0]
            assert checked_out(engine) == 0
            await engine.dispose()

    async def test_a_reset_on_sqlalchemys_own_engine(self, server, counters, pauses) -> None:
        """There an error of the socket's comes through as it is; it is the database's all the same."""
        async with FaultProxy(server) as proxy:
            engine = sqlalchemys_own(own_url(proxy.url), connect_args={"ssl": False})
            proxy.cut(before="UPDATE", reset=True)
            assert await run_in_transaction(engine, failing(0, serialization_failure)) == 2
            assert await counters.read() == [1, 0]
            await engine.dispose()

    @pytest.mark.parametrize("of", [lambda engine: engine, async_sessionmaker])
    async def test_a_backend_killed_before_commit(self, engine, counters, pauses, of) -> None:
        """The driver knows it before COMMIT is sent."""
        begun: list[int] = []

        async def work(connection):
            begun.append(await connection.scalar(text("SELECT pg_backend_pid()")))
            await add(connection)
            if len(begun) == 1:
                owner = (
                    connection if of is not async_sessionmaker else await connection.connection()
                )
                driver = (await owner.get_raw_connection()).driver_connection
                await counters.do("SELECT pg_terminate_backend($1)", begun[0])
                async with asyncio.timeout(WITHIN):
                    while not driver.is_closed():
                        await asyncio.sleep(0.01)

        await run_in_transaction(of(engine), work)
        assert len(begun) == 2
        assert await counters.read() == [1, 0]
        assert checked_out(engine) == 0

    async def test_a_stale_plan(self, engine, counters, pauses) -> None:
        """A migration changes a type under a prepared statement."""
        query = text("SELECT n FROM counters WHERE id = 1")
        begun: list[int] = []

        async def work(connection):
            begun.append(1)
            return await connection.scalar(query)

        await run_in_transaction(engine, work)
        await counters.do("ALTER TABLE counters ALTER n TYPE bigint")
        begun.clear()

        assert await run_in_transaction(engine, work) == 0
        assert len(begun) == 2

    @pytest.mark.parametrize("of", [lambda engine: engine, async_sessionmaker])
    async def test_a_full_pool(self, server, make_engine, counters, pauses, of) -> None:
        """A connection becomes free within the deadline."""
        engine = make_engine(server.url, pool_size=1, max_overflow=0, pool_timeout=0.05)
        holder = await engine.connect()
        freed: list[asyncio.Task[None]] = []
        loop = asyncio.get_running_loop()
        observe(
            engine,
            lambda e: (
                freed.append(loop.create_task(holder.close()))
                if type(e) is TransactionRetried and not freed
                else None
            ),
        )
        work = failing(0, serialization_failure)

        assert await run_in_transaction(of(engine), work, attempts=50) == 1
        assert await counters.read() == [1, 0]
        await asyncio.gather(*freed)
        assert checked_out(engine) == 0

    async def test_a_server_that_comes_back(self, server, make_engine, counters, pauses) -> None:
        """A connect that fails is tried again inside the deadline."""
        async with FaultProxy(server) as proxy:
            engine = make_engine(f"{proxy.url}?sslmode=disable&connect_timeout=0.2")
            proxy.refuse()
            kinds: list[FaultKind] = []

            def heal(happened) -> None:
                if type(happened) is TransactionRetried:
                    kinds.append(happened.kind)
                    proxy.accept()

            observe(engine, heal)
            await run_in_transaction(engine, add, attempts=100)
            assert await counters.read() == [1, 0]
            assert kinds
            await engine.dispose()

    async def test_lock_timeouts_if_asked_for(self, engine, counters, pauses) -> None:
        """Otherwise they are raised."""
        with pytest.raises(DBAPIError) as caught:
            await run_in_transaction(engine, failing(1, lock_timeout))
        assert find_sqlstate(caught.value) == "55P03"

        work = failing(1, lock_timeout)
        assert await run_in_transaction(engine, work, retry_lock_timeouts=True) == 2
        assert await counters.read() == [1, 0]


class TestUnknown:
    """Nobody can tell whether COMMIT took effect."""

    @pytest.fixture
    async def proxied(self, server, make_engine):
        async with FaultProxy(server) as proxy:
            engine = make_engine(f"{proxy.url}?sslmode=disable", settings=None)
            yield proxy, engine
            await engine.dispose()

    @pytest.mark.parametrize("cut", ["before", "after"])
    @pytest.mark.parametrize("of", [lambda engine: engine, async_sessionmaker])
    async def test_it_is_not_repeated(self, proxied, counters, pauses, cut, of) -> None:
        """The caller is told; the row was counted up, or not."""
        proxy, engine = proxied
        proxy.cut(**{cut: "COMMIT"})
        work = failing(0, serialization_failure)

        with pytest.raises(DBAPIError) as caught:
            await run_in_transaction(of(engine), work)

        assert classify(caught.value).outcome is Outcome.UNKNOWN
        assert "may have been committed" in caught.value.__notes__[0]
        assert work.begun == [1]
        assert await counters.read() == ([1, 0] if cut == "after" else [0, 0])
        assert checked_out(engine) == 0

    async def test_it_is_repeated_where_that_does_no_harm(self, proxied, counters, pauses) -> None:
        """``idempotent=True``: the work is done twice."""
        proxy, engine = proxied
        proxy.cut(after="COMMIT")
        work = failing(0, serialization_failure)

        assert await run_in_transaction(engine, work, idempotent=True) == 2
        assert await counters.read() == [2, 0]
        assert checked_out(engine) == 0

    async def test_on_sqlalchemys_own_engine(self, server, counters, pauses) -> None:
        """The same there."""
        async with FaultProxy(server) as proxy:
            engine = sqlalchemys_own(own_url(proxy.url), connect_args={"ssl": False})
            proxy.cut(after="COMMIT")
            work = failing(0, serialization_failure)
            with pytest.raises(Exception) as caught:  # raw on SQLAlchemy 2.0
                await run_in_transaction(engine, work)
            assert classify(caught.value).outcome is Outcome.UNKNOWN
            assert work.begun == [1]
            await engine.dispose()

    async def test_what_fails_after_commit_is_not_repeated(self, engine, counters, pauses) -> None:
        """A listener's error, even one that is retryable, comes too late."""
        begun: list[int] = []

        class Session(AsyncSession):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                event.listen(self.sync_session, "after_commit", self.fail)

            def fail(self, _):
                raise begun_error

        async def get_error(connection):
            await serialization_failure(connection)

        with pytest.raises(DBAPIError) as caught:
            await run_in_transaction(engine, get_error, attempts=1)
        begun_error = caught.value

        async def work(session):
            begun.append(1)
            await add(session)

        with pytest.raises(DBAPIError) as caught:
            await run_in_transaction(async_sessionmaker(engine, class_=Session), work)
        assert caught.value is begun_error
        assert begun == [1]
        assert await counters.read() == [1, 0]
        assert checked_out(engine) == 0

    async def test_one_of_two_engines_has_committed(self, server, make_engine, counters, pauses):
        """A second COMMIT that fails leaves the first done: not repeated."""
        first, second = make_engine(server.url), make_engine(server.url)

        class Base(DeclarativeBase):
            pass

        class Counter(Base):
            __tablename__ = "counters"
            id: Mapped[int] = mapped_column(primary_key=True)
            n: Mapped[int]

        commits = itertools.count(1)
        begun: list[int] = []

        def fail_second(connection) -> None:
            if next(commits) == 2:
                connection.exec_driver_sql(
                    "DO $$ BEGIN RAISE EXCEPTION 'made up' USING ERRCODE = '40001'; END $$"
                )

        for engine in (first, second):
            event.listen(engine.sync_engine, "commit", fail_second)
        binds = {Counter: first}

        async def work(session):
            begun.append(1)
            await session.scalars(select(Counter))
            await session.connection(bind_arguments={"bind": second.sync_engine})

        with pytest.raises(DBAPIError):
            await run_in_transaction(async_sessionmaker(binds=binds), work)
        assert begun == [1]
        assert (checked_out(first), checked_out(second)) == (0, 0)


class TestErrorsOfTheProgram:
    """They come out as they are, and the work is rolled back."""

    @pytest.mark.parametrize("of", [lambda engine: engine, async_sessionmaker])
    @pytest.mark.parametrize(
        "error",
        [
            ValueError("mine"),
            ConnectionResetError("of an HTTP client"),
            TimeoutError("of an HTTP client"),
            tenacity.TryAgain(),
        ],
        ids=lambda error: type(error).__name__,
    )
    async def test_the_very_same_object(self, any_engine, counters, of, error) -> None:
        """Also where its type is that of a fault, or a signal to the library beneath."""
        begun: list[int] = []

        async def work(connection):
            begun.append(1)
            await add(connection)
            raise error

        with pytest.raises(type(error)) as caught:
            await run_in_transaction(of(any_engine), work)

        assert caught.value is error
        assert not hasattr(error, "__notes__")
        assert (error.__cause__, error.__context__) == (None, None)
        assert begun == [1]
        assert await counters.read() == [0, 0]
        assert checked_out(any_engine) == 0

    async def test_when_the_connection_is_lost_too(self, server, make_engine, counters) -> None:
        """A rollback that fails does not hide it."""
        async with FaultProxy(server) as proxy:
            engine = make_engine(f"{proxy.url}?sslmode=disable")
            error = ValueError("mine")

            async def work(connection):
                await add(connection)
                proxy.cut(before="ROLLBACK")
                raise error

            with pytest.raises(ValueError) as caught:
                await run_in_transaction(engine, work)
            assert caught.value is error
            assert checked_out(engine) == 0
            await engine.dispose()

    async def test_an_error_made_from_a_fault(self, engine, counters) -> None:
        """Whoever translates a fault has dealt with it."""

        async def translate(connection):
            try:
                await serialization_failure(connection)
            except DBAPIError as error:
                raise LookupError from error

        work = failing(9, translate)
        with pytest.raises(LookupError):
            await run_in_transaction(engine, work)
        assert work.begun == [1]

    async def test_a_violated_constraint(self, engine, counters) -> None:
        """It would be violated again."""
        begun: list[int] = []

        async def work(connection):
            begun.append(1)
            await connection.execute(text("INSERT INTO counters VALUES (1, 0)"))

        with pytest.raises(IntegrityError):
            await run_in_transaction(engine, work)
        assert begun == [1]
        assert checked_out(engine) == 0

    @pytest.mark.parametrize("of", [lambda engine: engine, async_sessionmaker])
    async def test_a_swallowed_error(self, any_engine, counters, of) -> None:
        """The server rolls back at COMMIT, and that is not reported as committed."""

        async def work(connection):
            await add(connection)
            try:
                await connection.execute(text("INSERT INTO counters VALUES (1, 0)"))
            except IntegrityError:
                return "done"

        with pytest.raises(TransactionAborted, match="nothing was committed") as caught:
            await run_in_transaction(of(any_engine), work)

        fault = classify(caught.value)
        assert (fault.sqlstate, fault.retryable) == ("25P02", False)
        assert fault.outcome is Outcome.ROLLED_BACK
        assert await counters.read() == [0, 0]
        assert checked_out(any_engine) == 0
        assert await run_in_transaction(any_engine, failing(0, None)) == 1

    async def test_an_error_swallowed_in_a_savepoint(self, any_engine, counters) -> None:
        """That is what savepoints are for."""

        async def work(connection):
            await add(connection)
            try:
                async with connection.begin_nested():
                    await connection.execute(text("INSERT INTO counters VALUES (1, 0)"))
            except IntegrityError:
                pass

        await run_in_transaction(any_engine, work)
        await run_in_transaction(async_sessionmaker(any_engine), work)
        assert await counters.read() == [2, 0]

    async def test_a_swallowed_loss(self, engine, counters) -> None:
        """A connection that was lost is not reported as committed either."""

        async def work(connection):
            await add(connection)
            try:
                await connection.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
            except DBAPIError:
                return

        with pytest.raises(PendingRollbackError):
            await run_in_transaction(engine, work)
        assert await counters.read() == [0, 0]
        assert checked_out(engine) == 0

    async def test_others_commit_as_before(self, engine, counters) -> None:
        """The check concerns this transaction only, also if it never reached COMMIT."""

        async def nothing(_):
            return None

        async def refused(_):
            raise ValueError

        await run_in_transaction(engine, nothing)
        with pytest.raises(ValueError):
            await run_in_transaction(engine, refused)
        async with engine.connect() as connection:
            with pytest.raises(IntegrityError):
                await connection.execute(text("INSERT INTO counters VALUES (1, 0)"))
            await connection.commit()


class TestAWorkThatEndsItsTransaction:
    """It may roll back; COMMIT is not its business."""

    @staticmethod
    async def commit(connection) -> None:
        await connection.commit()

    @staticmethod
    async def commit_of_a_block(connection) -> None:
        await connection.rollback()
        async with connection.begin():
            await add(connection)

    @staticmethod
    async def swallowed(connection) -> None:
        try:
            await connection.commit()
        except InvalidRequestError:
            return

    @pytest.mark.parametrize("of", [lambda engine: engine, async_sessionmaker])
    @pytest.mark.parametrize("how", ["commit", "commit_of_a_block", "swallowed"])
    async def test_its_commit_is_refused(self, any_engine, counters, how, of) -> None:
        """Before anything is sent."""

        async def work(connection):
            await add(connection)
            await getattr(self, how)(connection)

        with pytest.raises(InvalidRequestError, match="commits when the work is done"):
            await run_in_transaction(of(any_engine), work)
        await counters.is_unlocked()
        assert await counters.read() == [0, 0]
        assert checked_out(any_engine) == 0

    async def test_a_sessions_connection_commits(self, engine, counters) -> None:
        """The way round is closed too."""

        async def work(session):
            await add(session)
            await (await session.connection()).commit()

        with pytest.raises(InvalidRequestError, match="commits when the work is done"):
            await run_in_transaction(async_sessionmaker(engine), work)
        assert await counters.read() == [0, 0]

    @pytest.mark.parametrize("of", [lambda engine: engine, async_sessionmaker])
    async def test_it_may_roll_back(self, any_engine, counters, of) -> None:
        """What comes after that is committed."""

        async def work(connection):
            await add(connection, 1)
            await connection.rollback()
            await add(connection, 2)

        await run_in_transaction(of(any_engine), work)
        assert await counters.read() == [0, 1]
        assert checked_out(any_engine) == 0

    @pytest.mark.parametrize("of", [lambda engine: engine, async_sessionmaker])
    async def test_a_fault_after_its_rollback(self, engine, counters, pauses, of) -> None:
        """Run again like any other."""

        async def roll_back_and_fail(connection):
            await connection.rollback()
            await add(connection, 2)
            await serialization_failure(connection)

        work = failing(1, roll_back_and_fail)
        assert await run_in_transaction(of(engine), work) == 2
        assert await counters.read() == [1, 0]
        assert checked_out(engine) == 0

    async def test_an_isolation_level_that_a_rollback_would_lose(self, engine, counters) -> None:
        """A connection keeps it; a session would not, and says so."""

        async def work(connection):
            await connection.rollback()
            return await connection.scalar(text("SHOW transaction_isolation"))

        level = {"isolation_level": "SERIALIZABLE"}
        assert await run_in_transaction(engine, work, **level) == "serializable"
        with pytest.raises(ConfigurationError, match="isolation_level"):
            await run_in_transaction(async_sessionmaker(engine), work, **level)
        assert checked_out(engine) == 0

    async def test_a_commit_by_sql(self, engine, counters, pauses) -> None:
        """What was committed that way is not done again."""

        async def and_fail(connection):
            await connection.execute(text("COMMIT"))
            await serialization_failure(connection)

        work = failing(1, and_fail)
        with pytest.raises(DBAPIError):
            await run_in_transaction(engine, work)
        assert work.begun == [1]
        assert await counters.read() == [1, 0]
        assert checked_out(engine) == 0


class TestAttemptsAndTime:
    """How long it goes on."""

    async def test_the_last_fault_is_raised(self, engine, counters, pauses) -> None:
        """With a note on what was tried."""
        work = failing(99, serialization_failure)
        with pytest.raises(DBAPIError) as caught:
            await run_in_transaction(engine, work, attempts=3)
        assert work.begun == [1, 2, 3]
        assert len(pauses) == 2
        assert find_sqlstate(caught.value) == "40001"
        assert caught.value.__notes__[0].startswith("run_in_transaction gave up after 3 attempts")
        assert checked_out(engine) == 0

    async def test_pauses_have_full_jitter(self, engine, counters, pauses, monkeypatch) -> None:
        """Anything from 0 to a bound that doubles up to 2 s."""
        bounds: list[tuple[float, float]] = []

        def uniform(low: float, high: float) -> float:
            bounds.append((low, high))
            return high

        await run_in_transaction(engine, add)  # its connect has a jitter of its own
        monkeypatch.setattr("random.uniform", uniform)
        with pytest.raises(DBAPIError):
            await run_in_transaction(
                engine, failing(99, serialization_failure), attempts=9, deadline=None
            )
        assert pauses == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
        assert bounds[: len(pauses)] == [(0, pause) for pause in pauses]

    async def test_no_pause_goes_past_the_deadline(self, engine, counters, pauses, monkeypatch):
        """It gives up at once."""
        monkeypatch.setattr(attempts, "FIRST_PAUSE", 2000.0)
        monkeypatch.setattr(attempts, "LONGEST_PAUSE", 2000.0)
        monkeypatch.setattr("random.uniform", lambda _, high: high)
        work = failing(99, serialization_failure)
        with pytest.raises(DBAPIError) as caught:
            await run_in_transaction(engine, work, deadline=1000)
        assert work.begun == [1]
        assert pauses == []
        assert "1 attempt in" in caught.value.__notes__[0]

    @pytest.mark.parametrize("of", [lambda engine: engine, async_sessionmaker])
    async def test_the_deadline_ends_the_work(self, any_engine, counters, of) -> None:
        """Rolled back, and said so."""

        async def work(connection):
            await add(connection)
            await connection.execute(text("SELECT pg_sleep(60)"))

        with pytest.raises(DeadlineExceeded, match=r"0\.3 s ended attempt 1 \(working\)") as caught:
            async with asyncio.timeout(WITHIN):
                await run_in_transaction(of(any_engine), work, deadline=0.3)

        assert isinstance(caught.value, TimeoutError)
        fault = classify(caught.value)
        assert (fault.kind, fault.outcome) == (FaultKind.DEADLINE_EXCEEDED, Outcome.ROLLED_BACK)
        assert not fault.retryable
        await counters.is_unlocked()
        assert await counters.read() == [0, 0]
        assert checked_out(any_engine) == 0

    async def test_the_deadline_ends_the_flush(self, engine, counters) -> None:
        """What a session has held back is sent before COMMIT, not as a part of it."""

        class Base(DeclarativeBase):
            pass

        class Counter(Base):
            __tablename__ = "counters"
            id: Mapped[int] = mapped_column(primary_key=True)
            n: Mapped[int]

        async def work(session):
            (await session.scalars(select(Counter).where(Counter.id == 1))).one().n = 5

        async with counters.connection.transaction():
            await counters.do("UPDATE counters SET n = n WHERE id = 1")
            with pytest.raises(DeadlineExceeded):
                await run_in_transaction(async_sessionmaker(engine), work, deadline=0.3)
        assert await counters.read() == [0, 0]

    async def test_the_deadline_ends_the_wait_for_a_connection(self, server, make_engine) -> None:
        """Which would be longer."""
        engine = make_engine(server.url, pool_size=1, max_overflow=0, pool_timeout=60)
        async with engine.connect():
            with pytest.raises(DeadlineExceeded, match="waiting for a connection"):
                await run_in_transaction(engine, add, deadline=0.1)
        assert checked_out(engine) == 0

    async def test_a_full_pool_to_the_end(self, server, make_engine, pauses) -> None:
        """PoolTimeout, with the pool's state."""
        engine = make_engine(server.url, pool_size=1, max_overflow=0, pool_timeout=0.01)
        async with engine.connect():
            with pytest.raises(PoolTimeout) as caught:
                await run_in_transaction(engine, add)
        assert "5 attempts" in caught.value.__notes__[0]

    async def test_a_work_that_swallows_its_end(self, engine, counters) -> None:
        """Too late is too late."""

        async def work(connection):
            await add(connection)
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                return

        with pytest.raises(DeadlineExceeded):
            await run_in_transaction(engine, work, deadline=0.1)
        assert await counters.read() == [0, 0]
        assert checked_out(engine) == 0

    async def test_commit_is_let_finish(self, server, make_engine, counters, monkeypatch) -> None:
        """A deadline that strikes during COMMIT leaves no doubt: what it says is true."""
        async with FaultProxy(server) as proxy:
            engine = make_engine(f"{proxy.url}?sslmode=disable")
            held = proxy.hold(before="COMMIT")
            running = asyncio.create_task(run_in_transaction(engine, add, deadline=0.2))
            await held
            await asyncio.sleep(0.4)  # the deadline is a real clock's
            assert not running.done()
            held.release()
            await running
            assert await counters.read() == [1, 0]
            await engine.dispose()


class TestCancellation:
    """Never repeated, and nothing is left."""

    @pytest.mark.parametrize("of", [lambda engine: engine, async_sessionmaker])
    async def test_in_mid_work(self, any_engine, counters, of) -> None:
        """Rolled back."""
        begun: list[int] = []
        there = asyncio.Event()

        async def work(connection):
            begun.append(1)
            await add(connection)
            there.set()
            await connection.execute(text("SELECT pg_sleep(60)"))

        running = asyncio.create_task(run_in_transaction(of(any_engine), work))
        await there.wait()
        await asyncio.sleep(0.05)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert begun == [1]
        await counters.is_unlocked()
        assert await counters.read() == [0, 0]
        assert checked_out(any_engine) == 0

    async def test_in_a_pause(self, engine, counters, monkeypatch) -> None:
        """No further attempt."""
        pausing = asyncio.Event()

        async def for_ever(_: float) -> None:
            pausing.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(attempts, "_pause", for_ever)
        work = failing(99, serialization_failure)
        running = asyncio.create_task(run_in_transaction(engine, work))
        await pausing.wait()
        assert checked_out(engine) == 0  # nothing is held meanwhile
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert work.begun == [1]

    async def test_during_commit(self, server, make_engine, counters) -> None:
        """Unknown, and not repeated even if idempotent."""
        async with FaultProxy(server) as proxy:
            engine = make_engine(f"{proxy.url}?sslmode=disable")
            held = proxy.hold(after="COMMIT")
            running = asyncio.create_task(run_in_transaction(engine, add, idempotent=True))
            await held
            running.cancel()
            await asyncio.sleep(0)  # it has arrived before the answer can
            held.release()
            with pytest.raises(asyncio.CancelledError) as caught:
                await running
            assert classify(caught.value).outcome is Outcome.UNKNOWN
            assert await counters.read() == [1, 0]
            assert checked_out(engine) == 0
            await engine.dispose()


class TestWhatIsTold:
    """An event, a counter and a log line for each retry."""

    async def test_of_poolkits_pool(self, engine, counters, pauses, caplog) -> None:
        """To the observers of the engine, session makers included."""
        told: list[object] = []
        observe(engine, told.append)
        caplog.set_level(logging.INFO, "poolkit.transactions")

        await run_in_transaction(async_sessionmaker(engine), failing(1, serialization_failure))

        (retried,) = [e for e in told if isinstance(e, TransactionRetried)]
        assert (retried.attempt, retried.kind) == (1, FaultKind.SERIALIZATION_FAILURE)
        assert retried.pause == pauses[0]
        assert find_sqlstate(retried.error) == "40001"
        assert pool_stats(engine).retries == 1
        (record,) = caplog.records
        assert (record.name, record.levelname) == ("poolkit.transactions", "INFO")
        assert (record.poolkit_attempt, record.poolkit_kind) == (1, "serialization_failure")
        assert (record.poolkit_pause, record.poolkit_sqlstate) == (pauses[0], "40001")

    async def test_without_observers_no_event_is_made(self, engine, pauses, monkeypatch) -> None:
        """The counter counts all the same."""
        monkeypatch.delattr(TransactionRetried, "__init__")
        await run_in_transaction(engine, failing(1, serialization_failure, then=_nothing))
        assert pool_stats(engine).retries == 1


async def _nothing(_):
    return None


class TestArguments:
    """What will not do is said clearly, before anything is begun."""

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"attempts": 0}, "attempts=0"),
            ({"attempts": -1}, "attempts=-1"),
            ({"attempts": True}, "attempts=True"),
            ({"attempts": 1.5}, "attempts=1.5"),
            ({"deadline": -1}, "deadline=-1"),
            ({"deadline": 0}, "deadline=0"),
            ({"deadline": float("inf")}, "deadline=inf"),
            ({"deadline": float("nan")}, "deadline=nan"),
            ({"deadline": "1"}, "deadline='1'"),
            ({"isolation_level": "AUTOCOMMIT"}, "AUTOCOMMIT"),
            ({"isolation_level": "CHAOS"}, "SERIALIZABLE"),
        ],
    )
    def test_options(self, engine, options, named) -> None:
        """At the call, and where a function is decorated."""
        with pytest.raises(ConfigurationError, match=named):
            run_in_transaction(engine, add, **options)
        with pytest.raises(ConfigurationError, match=named):
            run_in_transaction(engine, **options)

    async def test_sources(self, engine) -> None:
        """Nothing that is used up by one attempt, and nothing that is not async."""
        async with AsyncSession(engine) as session, engine.connect() as connection:
            for wrong in (session, connection, engine.sync_engine, "postgresql://", None):
                with pytest.raises(ConfigurationError, match="give an AsyncEngine"):
                    run_in_transaction(wrong, add)
            for wrong in (lambda: session, _make_coroutine):
                with pytest.raises(ConfigurationError, match="give an AsyncEngine"):
                    run_in_transaction(wrong, add)

    async def test_works(self, engine) -> None:
        """Async callables."""

        def not_async(_) -> int:
            return 1

        with pytest.raises(ConfigurationError, match="coroutine"):
            run_in_transaction(engine, _nothing(None))
        with pytest.raises(ConfigurationError, match="no async callable"):
            run_in_transaction(engine, 7)
        with pytest.raises(ConfigurationError, match="not async: it returned int"):
            await run_in_transaction(engine, not_async)
        with pytest.raises(ConfigurationError, match="async function"):
            run_in_transaction(engine)(not_async)
        assert checked_out(engine) == 0

    @pytest.mark.parametrize("of", [lambda engine: engine, async_sessionmaker])
    @pytest.mark.parametrize("said", ["at the engine", "as an option"])
    async def test_autocommit_engines(self, server, make_engine, counters, of, said) -> None:
        """There is no transaction to repeat; with an isolation level there is."""
        if said == "at the engine":
            engine = make_engine(server.url, isolation_level="AUTOCOMMIT")
        else:
            engine = make_engine(server.url).execution_options(isolation_level="AUTOCOMMIT")
        with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
            await run_in_transaction(of(engine), add)
        assert await counters.read() == [0, 0]
        assert checked_out(engine) == 0
        await run_in_transaction(of(engine), add, isolation_level="READ COMMITTED")
        assert await counters.read() == [1, 0]


async def _make_coroutine():
    return None


class TestDecorator:
    """``@run_in_transaction(engine)``."""

    async def test_other_arguments_go_through(self, engine, counters, pauses) -> None:
        """The connection comes first."""
        begun: list[int] = []

        @run_in_transaction(engine, attempts=2)
        async def count(connection, row: int, *, fails: int = 0) -> str:
            """Count up."""
            begun.append(row)
            await add(connection, row)
            if len(begun) <= fails:
                await serialization_failure(connection)
            return "done"

        assert await count(2, fails=1) == "done"
        assert await counters.read() == [0, 1]
        assert (count.__name__, count.__doc__) == ("count", "Count up.")
        assert list(inspect.signature(count).parameters) == ["row", "fails"]
        assert inspect.iscoroutinefunction(count)

    @pytest.mark.parametrize("of", [lambda engine: engine, async_sessionmaker])
    async def test_the_engine_may_come_later(self, engine, counters, of) -> None:
        """A function that returns it is asked at each call."""
        made: list[object] = []

        @run_in_transaction(lambda: made[0])
        async def count(connection) -> None:
            await add(connection)

        made.append(of(engine))
        await count()
        assert await counters.read() == [1, 0]


async def test_commit_goes_through_execute(engine) -> None:
    """``Transaction.commit`` calls ``Connection.execute`` and the server's answer comes back."""
    aborted = pytest.raises(asyncpg.InFailedSQLTransactionError)
    async with engine.connect() as connection:
        driver: DriverConnection = (await connection.get_raw_connection()).driver_connection
        for statement, told in (("SELECT 1", contextlib.nullcontext()), ("SELECT 1/0", aborted)):
            transaction = driver.transaction()
            await transaction.start()
            driver.check_next_commit()
            with contextlib.suppress(asyncpg.DivisionByZeroError):
                await driver.execute(statement)
            with told:
                await transaction.commit()
