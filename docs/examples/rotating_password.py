"""A password that rotates: a callable, asked at every physical connect."""

import asyncio
import os

from sqlalchemy import make_url, text

from poolkit import create_async_engine

TOKEN = make_url(os.environ["DATABASE_URL"]).password


async def token() -> str:
    """Stand in for a call to the service that issues tokens."""
    print("asked for a token")
    return str(TOKEN)


async def main() -> None:
    """Use two connections, then one of them again."""
    engine = create_async_engine(password=token)
    async with engine.connect() as first, engine.connect() as second:
        await first.execute(text("SELECT 1"))
        await second.execute(text("SELECT 1"))
    async with engine.connect() as again:
        await again.execute(text("SELECT 1"))
    await engine.dispose()


asyncio.run(main())
