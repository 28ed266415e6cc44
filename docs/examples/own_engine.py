"""See, or change, what goes to SQLAlchemy's own create_async_engine."""

import asyncio

from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from poolkit import DatabaseSettings, engine_options


async def main() -> None:
    """Make the engine by hand."""
    options = engine_options(DatabaseSettings(pool_size=3), server_settings={"jit": "off"})
    print("pool_size", options.kwargs["pool_size"])
    engine = create_async_engine(options.url, **options.kwargs)
    async with engine.connect() as connection:
        print("jit", await connection.scalar(text("SHOW jit")))
    await engine.dispose()


asyncio.run(main())
