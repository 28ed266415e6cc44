"""The metrics on a port of their own, with DATABASE_TELEMETRY=metrics."""

import asyncio
from urllib.request import urlopen

from sqlalchemy import text

from poolkit import create_async_engine
from poolkit.telemetry.prometheus import start_metrics_server


async def main() -> None:
    """A worker process: no web framework, and an endpoint nevertheless."""
    stop = start_metrics_server()
    engine = create_async_engine()
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
        # As Prometheus does; that it blocks the event loop here does not matter.
        with urlopen("http://127.0.0.1:9464/metrics") as answer:  # noqa: ASYNC210
            print("db_client_connection_wait_time_seconds_count" in answer.read().decode())
    await engine.dispose()
    stop()


asyncio.run(main())
