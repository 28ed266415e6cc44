"""What an error means, for whoever has to answer for it."""

import asyncio

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from poolkit import Outcome, classify, create_async_engine

engine = create_async_engine()


def answer(error: Exception) -> str:
    """What a service says to its client; the details belong into the log."""
    fault = classify(error)
    if fault.outcome is Outcome.UNKNOWN:
        return f"{fault.http_status}: look before you try again"
    if fault.retryable:
        return f"{fault.http_status}: try again ({fault.kind}, {fault.outcome})"
    return f"{fault.http_status}: no use trying again ({fault.kind}, {fault.outcome})"


async def attempt(query: str, connection: AsyncConnection) -> None:
    """Run one statement, and say what came of it."""
    try:
        await connection.execute(text(query))
    except Exception as error:  # noqa: BLE001 (classify takes any)
        print(answer(error))
    if not connection.closed:
        await connection.rollback()


async def main() -> None:
    """Meet a lock, a bad statement, and the end of a session in two places."""
    kill_me = "SELECT pg_terminate_backend(pg_backend_pid())"
    async with engine.connect() as holder, engine.connect() as connection:
        await holder.execute(text("SELECT pg_advisory_lock(1)"))
        await connection.execute(text("SET lock_timeout = 50"))
        await connection.commit()
        await attempt("SELECT pg_advisory_lock(1)", connection)
        await attempt("SELECT nonsense", connection)
        await attempt(kill_me, connection)
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        await attempt(kill_me, connection)
    await engine.dispose()


asyncio.run(main())
