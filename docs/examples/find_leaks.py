"""Find what holds connections: a log line and an event, with the place in the code."""

import asyncio
import logging
import sys

from sqlalchemy.ext.asyncio import AsyncEngine

from poolkit import Event, LongHolder, LongHolderReturned, create_async_engine, observe

logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(name)s %(message)s")


def watch(event: Event) -> None:
    match event:
        case LongHolder(task=task):
            print("event: still held by", task)
        case LongHolderReturned(task=task):
            print("event: returned by", task)


async def report_of_the_month(engine: AsyncEngine) -> None:
    async with engine.connect():
        await asyncio.sleep(0.5)  # a call to another service, with the connection in hand


async def main() -> None:
    """Hold a connection for longer than the threshold."""
    engine = create_async_engine(leak_threshold=0.2)  # or DATABASE_LEAK_THRESHOLD
    observe(engine, watch)
    await asyncio.create_task(report_of_the_month(engine), name="report")
    await engine.dispose()


asyncio.run(main())
