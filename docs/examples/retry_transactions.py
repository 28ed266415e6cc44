"""Run a transaction again as a whole: as a function, and as a decorator."""

import asyncio
from functools import partial

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_sessionmaker

from poolkit import create_async_engine, pool_stats, run_in_transaction

engine = create_async_engine()
sessions = async_sessionmaker(engine, expire_on_commit=False)

READ = text("SELECT balance FROM accounts WHERE name = :name")
WRITE = text("UPDATE accounts SET balance = :balance WHERE name = :name")


async def withdraw(connection: AsyncConnection, name: str, amount: int) -> int:
    balance = await connection.scalar(READ, {"name": name})
    if balance < amount:
        raise ValueError("not enough money")
    await connection.execute(WRITE, {"name": name, "balance": balance - amount})
    return balance - amount


@run_in_transaction(sessions, isolation_level="SERIALIZABLE", attempts=20)
async def deposit(session: AsyncSession, name: str, amount: int) -> None:
    balance = await session.scalar(READ, {"name": name})
    await session.execute(WRITE, {"name": name, "balance": balance + amount})


async def main() -> None:
    """Let transactions get in each other's way."""
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE accounts (name text, balance int)"))
        await connection.execute(text("INSERT INTO accounts VALUES ('ann', 0)"))

    await asyncio.gather(*(deposit("ann", 10) for _ in range(5)))
    print("done again:", pool_stats(engine).retries > 0)

    left = await run_in_transaction(engine, partial(withdraw, name="ann", amount=20))
    print("left:", left)
    try:
        await run_in_transaction(engine, partial(withdraw, name="ann", amount=100))
    except ValueError as error:
        print("the work's own error:", error)

    async with engine.begin() as connection:
        await connection.execute(text("DROP TABLE accounts"))
    await engine.dispose()


asyncio.run(main())
