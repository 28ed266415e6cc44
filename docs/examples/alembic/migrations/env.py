"""Alembic's env.py on poolkit: limits of its own, and one migrator at a time."""

import asyncio

from alembic import context
from alembic.util import CommandError
from models import Base  # the application's
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncConnection

from poolkit import DatabaseSettings, get_engine

LOCK = 7_041_776  # any number; the migrator of this database holds it
PATIENCE = 600  # seconds to wait for another migrator


async def online() -> None:
    settings = DatabaseSettings(
        application_name="migrations",
        statement_timeout=0,  # a migration takes as long as it takes
        lock_timeout=5,  # but all others stand in line behind one that waits for a table
        idle_in_transaction_timeout=0,
    )
    async with get_engine(settings).connect() as connection:
        await take_turn(connection)
        await connection.run_sync(migrate)


async def take_turn(connection: AsyncConnection) -> None:
    driver = (await connection.get_raw_connection()).driver_connection
    if driver.get_server_pid() != await connection.scalar(text("SELECT pg_backend_pid()")):
        raise CommandError("there is a pooler in between: set DATABASE_URL to the direct address")
    async with asyncio.timeout(PATIENCE):
        # Not pg_advisory_lock: CREATE INDEX CONCURRENTLY would wait for whoever waits in it.
        while not await connection.scalar(text(f"SELECT pg_try_advisory_lock({LOCK})")):
            await connection.rollback()
            await asyncio.sleep(1)
    await connection.commit()  # Alembic does not commit what it did not begin


def migrate(connection: Connection) -> None:
    context.configure(
        connection=connection, target_metadata=Base.metadata, transaction_per_migration=True
    )
    with context.begin_transaction():
        context.run_migrations()


def offline() -> None:
    context.configure(dialect_name="postgresql", literal_binds=True, transaction_per_migration=True)
    with context.begin_transaction():
        context.execute("SET lock_timeout = '5s'")
        context.run_migrations()


if context.is_offline_mode():
    offline()
elif given := context.config.attributes.get("connection"):
    migrate(given)
else:
    asyncio.run(online())
