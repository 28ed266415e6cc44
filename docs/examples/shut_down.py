"""A service's beginning and end: connections before traffic, none after it."""

import asyncio

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from poolkit import PoolDraining, create_async_engine, drain, warm_up


async def request(engine: AsyncEngine) -> str:
    async with engine.connect() as connection:
        await connection.execute(text("SELECT pg_sleep(0.3)"))
        return "finished"


async def main() -> None:
    """Start, serve, and stop in the middle of a request."""
    engine = create_async_engine(pool_size=5)
    ready = await warm_up(engine)
    print("opened", ready.opened, "failures", len(ready.failures))

    under_way = asyncio.create_task(request(engine))
    await asyncio.sleep(0.1)

    report = await drain(engine, timeout=5)
    print("the request under way:", await under_way)
    print("closed", report.closed, "terminated", report.terminated)
    try:
        await request(engine)
    except PoolDraining as error:
        print(error)


asyncio.run(main())
