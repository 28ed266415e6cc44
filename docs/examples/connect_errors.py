"""A connect that fails: a typed error that says what was tried."""

import asyncio
import os

from sqlalchemy import make_url

from poolkit import ConnectError, create_async_engine

URL = make_url(os.environ["DATABASE_URL"])


async def attempt(url: str) -> None:
    """Try to connect, and say what came of it."""
    engine = create_async_engine(url)
    try:
        async with engine.connect():
            print("connected")
    except ConnectError as error:
        kept_trying = error.attempts > 1
        print(f"{type(error).__name__}: sqlstate={error.sqlstate} retried={kept_trying}")
    await engine.dispose()


async def main() -> None:
    """Ask for a database that is not there, then for a server that is not there."""
    there = URL.set(database="no_such_database", query={"sslmode": "disable"})
    await attempt(there.render_as_string(hide_password=False))
    await attempt("postgresql://app@127.0.0.1:1/app?connect_timeout=1")


asyncio.run(main())
