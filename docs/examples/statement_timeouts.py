"""Statement timeouts: the default, and other limits for a statement or a transaction."""

import asyncio

from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker

from poolkit import StatementTimeout, create_async_engine


async def main() -> None:
    """Run into a limit, then raise it."""
    engine = create_async_engine()
    async with engine.connect() as connection:
        print("default:", await connection.scalar(text("SHOW statement_timeout")))

        # One statement.
        try:
            await connection.execute(
                text("SELECT pg_sleep(5)"), execution_options={"statement_timeout": 0.2}
            )
        except StatementTimeout as error:
            print("ended by the server:", error.sqlstate == "57014")
            print("connection discarded:", error.connection_invalidated)
        await connection.rollback()

    # Everything on this connection.
    async with engine.connect() as connection:
        await connection.execution_options(statement_timeout=60)
        print("report:", await connection.scalar(text("SHOW statement_timeout")))

    # One transaction of a session.
    async with async_sessionmaker(engine)() as session:
        await session.connection(execution_options={"statement_timeout": 30})
        print("session:", await session.scalar(text("SHOW statement_timeout")))

    # All that goes through this view of the engine; the pool is shared.
    reports = engine.execution_options(statement_timeout=300)
    async with reports.connect() as connection:
        print("reports:", await connection.scalar(text("SHOW statement_timeout")))
    await engine.dispose()


asyncio.run(main())
