"""The tutorial's program: a table, a transaction, a limit."""

import asyncio

from sqlalchemy import text

from poolkit import StatementTimeout, create_async_engine


async def main() -> None:
    """Write and read a row, then run into the statement timeout."""
    engine = create_async_engine()

    async with engine.begin() as connection:
        await connection.execute(text("CREATE TEMPORARY TABLE notes (body text)"))
        await connection.execute(text("INSERT INTO notes VALUES ('first')"))
        print(await connection.scalar(text("SELECT body FROM notes")))

    async with engine.connect() as connection:
        try:
            await connection.execute(text("SELECT pg_sleep(30)"))
        except StatementTimeout as error:
            print(str(error).partition(".")[0])

    print(engine.pool.status())
    await engine.dispose()


asyncio.run(main())
