"""What the plugin's sessions promise, in a test of ours that uses them."""

import asyncio
import gc

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession

from poolkit import CheckedOut, TransactionAborted
from poolkit.sessions import commit
from poolkit.testing import _joined

ADD = text("INSERT INTO notes (text) VALUES ('a')")
COUNT = text("SELECT count(*) FROM notes")


@pytest.fixture(scope="session")
def poolkit_schema():
    async def lay(database):
        import asyncpg  # noqa: PLC0415

        connection = await asyncpg.connect(database.url)
        await connection.execute("CREATE TABLE notes (id serial PRIMARY KEY, text text NOT NULL)")
        await connection.close()

    return lay


async def test_one_connection_serves_all(poolkit_session, poolkit_sessionmaker, poolkit_events):
    """Sessions see each other's uncommitted work, on one checkout."""
    await poolkit_session.execute(ADD)
    async with poolkit_sessionmaker() as other:
        assert await other.scalar(COUNT) == 1

    assert len(poolkit_events.of(CheckedOut)) == 1


async def test_the_outer_transaction_cannot_be_committed(poolkit_session):
    """Not even by the connection beneath the session."""
    await poolkit_session.execute(ADD)
    connection = await poolkit_session.connection()

    with pytest.raises(InvalidRequestError, match="poolkit_database"):
        await connection.commit()


async def test_concurrent_sessions_take_turns(poolkit_sessionmaker):
    """Ten tasks, each in two statements: as if they had come one after the other."""

    async def add() -> int:
        async with poolkit_sessionmaker.begin() as session:
            before = await session.scalar(COUNT)
            await session.execute(ADD)
            return before

    assert sorted(await asyncio.gather(*(add() for _ in range(10)))) == list(range(10))


async def test_a_task_does_not_wait_for_itself(poolkit_sessionmaker):
    """A session within a session is a savepoint within a savepoint."""
    async with poolkit_sessionmaker.begin() as outer:
        await outer.execute(ADD)
        async with poolkit_sessionmaker.begin() as inner:
            await inner.execute(ADD)
        assert await outer.scalar(COUNT) == 2


async def test_waiting_for_a_turn_has_an_end(poolkit_sessionmaker, poolkit_session, monkeypatch):
    """A session that another task holds open is a clear error, and everything goes on after it."""
    monkeypatch.setattr(_joined, "_PATIENCE", 0.05)
    held = poolkit_sessionmaker()

    async def wait() -> None:
        async with poolkit_sessionmaker() as session:
            await session.execute(ADD)

    await held.execute(ADD)
    with pytest.raises(InvalidRequestError, match="take turns"):
        await asyncio.create_task(wait())
    await held.commit()
    await asyncio.create_task(wait())
    assert await poolkit_session.scalar(COUNT) == 1


async def test_a_task_that_ended_keeps_nobody_waiting(poolkit_sessionmaker):
    """Its session was forgotten."""
    forgotten = []

    async def forget() -> None:
        forgotten.append(poolkit_sessionmaker())
        await forgotten[0].execute(ADD)

    await asyncio.create_task(forget())
    async with asyncio.timeout(5), poolkit_sessionmaker() as session:
        assert await session.scalar(COUNT) == 1


async def test_a_request_that_fails_is_undone(poolkit_get_session, poolkit_session):
    """The dependency commits at the end, and rolls back after an exception."""
    succeeding, failing = poolkit_get_session(), poolkit_get_session()
    await (await anext(succeeding)).execute(ADD)
    await anext(succeeding, None)
    await (await anext(failing)).execute(ADD)
    with pytest.raises(ValueError, match="the handler"):
        await failing.athrow(ValueError("the handler's"))

    assert await poolkit_session.scalar(COUNT) == 1


async def test_a_swallowed_error_is_an_aborted_transaction_as_in_production(poolkit_sessionmaker):
    """``poolkit.sessions.commit`` says so; afterwards the test goes on."""
    async with poolkit_sessionmaker() as session:
        with pytest.raises(DBAPIError):
            await (await session.connection()).execute(text("SELECT 1/0"))
        with pytest.raises(TransactionAborted):
            await commit(session)
        await session.rollback()
        assert await session.scalar(COUNT) == 0


async def test_whoever_asks_for_the_bind_opens_nothing(poolkit_session, poolkit_events):
    """As libraries do, for the dialect."""
    assert poolkit_session.get_bind().dialect.name == "postgresql"
    assert poolkit_events == []


class OwnSession(AsyncSession):
    """A user's."""


class TestSessionClass:
    @pytest.fixture
    def poolkit_session_class(self):
        return OwnSession

    async def test_it_is_used(self, poolkit_session):
        """Sessions are of the class that a project overrides."""
        assert isinstance(poolkit_session, OwnSession)
        assert await poolkit_session.scalar(COUNT) == 0


class TestSQLModel:
    @pytest.fixture
    def poolkit_session_class(self):
        return pytest.importorskip("sqlmodel.ext.asyncio.session").AsyncSession

    async def test_it_has_exec(self, poolkit_session):
        """SQLModel's sync session is beneath it."""
        sqlmodel = pytest.importorskip("sqlmodel")
        assert (await poolkit_session.exec(sqlmodel.select(sqlmodel.text("1")))).one() == 1


async def test_nothing_of_all_this_is_left(poolkit_engine):
    """The last look, by another engine."""
    gc.collect()
    async with poolkit_engine.connect() as connection:
        assert await connection.scalar(COUNT) == 0
