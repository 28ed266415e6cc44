"""Watch a pool: its state in one snapshot, and its events as they happen."""

import asyncio

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from poolkit import (
    CheckedOut,
    CheckoutTimedOut,
    ConnectionClosed,
    Event,
    OverloadBegan,
    create_async_engine,
    observe,
    pool_stats,
    warm_up,
)

LONG = 0.01


def watch(event: Event) -> None:
    """Tell what should not happen often."""
    match event:
        case CheckedOut(wait=wait) if wait > LONG:
            print("a caller had to wait")
        case CheckoutTimedOut() | OverloadBegan():
            print("the pool is too small, or something holds its connections")
        case ConnectionClosed(reason=reason):
            print("closed:", reason)


async def query(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))


async def main() -> None:
    """Have a third caller wait for one of two connections."""
    engine = create_async_engine(pool_size=2, max_overflow=0)
    await warm_up(engine)
    end = observe(engine, watch)
    async with engine.connect(), engine.connect():
        third = asyncio.create_task(query(engine))
        await asyncio.sleep(0.1)
        now = pool_stats(engine)
        print(f"used {now.used} of {now.limit}, idle {now.idle}, waiting {now.waiting}")
    await third

    now = pool_stats(engine)
    print(f"used {now.used} of {now.limit}, idle {now.idle}, waiting {now.waiting}")
    print(f"{now.checkouts} checkouts, {now.opened} connections opened, {now.timeouts} timeouts")
    await engine.dispose()
    end()


asyncio.run(main())
