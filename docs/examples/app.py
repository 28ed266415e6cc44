"""Application code: sessions and an engine from DATABASE_*."""

from sqlalchemy import text

from poolkit import get_engine, pool_stats, session


async def database() -> str:
    async with session() as db:  # committed at the end, rolled back after an exception
        return str(await db.scalar(text("SELECT current_database()")))


async def version() -> str:
    async with get_engine().connect() as connection:  # the running event loop's own engine
        return str(await connection.scalar(text("SHOW server_version")))


def idle() -> int:
    return pool_stats(get_engine()).idle


# The rest only shows that it works.
async def main() -> None:
    """Ask twice, on one connection; it is closed with the event loop."""
    print(await database(), await version(), idle())


if __name__ == "__main__":
    import asyncio

    asyncio.run(main())
