"""See an engine in Logfire: LOGFIRE_ENABLED=true is all it takes."""

import asyncio

import logfire
from sqlalchemy import text

from poolkit import PoolTimeout, create_async_engine

# Left out, poolkit does it at the first connect; this is for what the program wants its own way.
logfire.configure(send_to_logfire="if-token-present", service_name="shop")


async def main() -> None:
    """Have a statement and a pool timeout within one request."""
    engine = create_async_engine(pool_size=1, max_overflow=0, pool_timeout=0.2)
    with logfire.span("GET /orders"):
        async with engine.connect() as connection:
            await connection.execute(text("SELECT datname FROM pg_database WHERE oid = 1"))
            try:
                await engine.connect()
            except PoolTimeout:
                print("503")
    await engine.dispose()


asyncio.run(main())
