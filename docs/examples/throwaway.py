"""A throwaway PostgreSQL: started, used, restarted, gone."""

import asyncio

from sqlalchemy import text

from poolkit import create_async_engine
from poolkit.testing import postgres


async def main() -> None:
    """Start a server and restart it under an engine."""
    async with postgres(server_settings={"work_mem": "8MB"}) as server:
        engine = create_async_engine(server.url)
        async with engine.connect() as connection:
            print("work_mem", await connection.scalar(text("SHOW work_mem")))

        await asyncio.to_thread(server.restart)
        async with engine.connect() as connection:
            print("after a restart", await connection.scalar(text("SELECT 1")))
        await engine.dispose()


asyncio.run(main())
