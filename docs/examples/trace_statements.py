"""The spans of statements, and of a long wait for a connection."""

import asyncio

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from poolkit import create_async_engine, warm_up
from poolkit.telemetry import instrument


async def main() -> None:
    """Do a few things, then show their spans."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))

    engine = create_async_engine(pool_size=1, max_overflow=0)
    await warm_up(engine)
    end = instrument(engine, tracer_provider=provider, slow_checkout=0.05)
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TEMP TABLE orders (id int, owner text)"))
        await connection.execute(
            text("INSERT INTO orders VALUES (:id, :owner)"),
            [{"id": 1, "owner": "ann"}, {"id": 2, "owner": "bob"}],
        )
        await connection.execute(text("SELECT * FROM orders WHERE owner = 'ann'"))
    async with engine.connect() as connection:
        try:
            await connection.execute(text("SELECT * FROM nowhere"))
        except DBAPIError:
            await connection.rollback()

    async def wait() -> None:
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 2"))

    async with engine.connect() as connection:
        waiting = asyncio.create_task(wait())
        await connection.execute(text("SELECT pg_sleep(0.1)"))
    await waiting

    end()
    for span in exporter.get_finished_spans():
        said = span.attributes or {}
        print(span.name, *([said["error.type"]] if "error.type" in said else []))
        if "db.query.text" in said:
            print("   ", said["db.query.text"])
    await engine.dispose()


asyncio.run(main())
