"""Whole transactions of the ORM: a flush that fails has rolled back before anybody is asked."""

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from poolkit import SerializationFailure, run_in_transaction


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "orm_account"

    id: Mapped[int] = mapped_column(primary_key=True)
    balance: Mapped[int]


@pytest.fixture
async def sessions(engine):
    """A session maker, and one account with nothing on it."""
    async with engine.begin() as connection:
        await connection.execute(text("DROP FUNCTION IF EXISTS refuse CASCADE"))
        await connection.run_sync(Base.metadata.drop_all)
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(text("INSERT INTO orm_account VALUES (1, 0)"))
    return async_sessionmaker(engine, expire_on_commit=False)


class Work:
    """Reads and adds 1, while somebody else adds 10 before its first attempt is done."""

    def __init__(self, sessions) -> None:
        self.sessions = sessions
        self.attempts = 0

    async def __call__(self, session) -> None:
        self.attempts += 1
        account = await session.get(Account, 1)
        if self.attempts == 1:
            async with self.sessions.begin() as other:
                await other.execute(text("UPDATE orm_account SET balance = balance + 10"))
        account.balance += 1
        await self.write(session)

    async def write(self, session) -> None:
        """Left to the end."""


class Flushing(Work):
    async def write(self, session) -> None:
        await session.flush()


@pytest.mark.parametrize("kind", [Work, Flushing])
async def test_a_flush_that_fails_is_done_again(sessions, kind) -> None:
    """A serialization failure in a flush, at the end or before, is repeated as a whole."""
    work = kind(sessions)

    await run_in_transaction(sessions, work, isolation_level="REPEATABLE READ")

    assert work.attempts == 2
    async with sessions() as session:
        assert (await session.get(Account, 1)).balance == 11


async def test_a_flush_after_a_commit_as_text_is_not_done_again(sessions) -> None:
    """Part of the work is committed, which the flush's own rollback must not hide."""
    async with sessions.begin() as session:
        await session.execute(
            text(
                "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
                " $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '40001'; END $$"
            )
        )
        await session.execute(
            text("CREATE TRIGGER t BEFORE UPDATE ON orm_account EXECUTE FUNCTION refuse()")
        )
    attempts = []

    async def work(session) -> None:
        attempts.append(account := await session.get(Account, 1))
        await session.execute(text("COMMIT"))
        account.balance = 5
        await session.flush()

    with pytest.raises(SerializationFailure):
        await run_in_transaction(sessions, work)

    assert len(attempts) == 1
