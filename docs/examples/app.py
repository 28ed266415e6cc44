"""Application code: an engine and a session maker from DATABASE_*."""

from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker

from poolkit import create_async_engine

engine = create_async_engine()  # reads DATABASE_URL and the other DATABASE_* variables
Session = async_sessionmaker(engine, expire_on_commit=False)


async def database() -> str:
    async with Session() as session:
        return str(await session.scalar(text("SELECT current_database()")))


# The rest only shows that it works.
async def main() -> None:
    """Run one query."""
    print(await database())
    await engine.dispose()


if __name__ == "__main__":
    import asyncio

    asyncio.run(main())
