"""A second database: the same settings under another prefix."""

import asyncio
import os

from sqlalchemy import text

from poolkit import DatabaseSettings, create_async_engine

# In a deployment these come from the environment.
os.environ["REPORTS_URL"] = os.environ["DATABASE_URL"]
os.environ["REPORTS_STATEMENT_TIMEOUT"] = "120"


async def main() -> None:
    """Ask both databases for their limit."""
    engine = create_async_engine()
    reports = create_async_engine(settings=DatabaseSettings(_env_prefix="REPORTS_"))
    for name, each in {"main": engine, "reports": reports}.items():
        async with each.connect() as connection:
            print(name, await connection.scalar(text("SHOW statement_timeout")))
        await each.dispose()


asyncio.run(main())
