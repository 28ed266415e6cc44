"""The interface of services and scripts in use, for the type checker; nothing here is run."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, assert_type

import asyncpg
from fastapi import FastAPI
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker

from poolkit import (
    DatabaseSettings,
    connect_kwargs,
    dispose_engines,
    get_engine,
    get_sessionmaker,
    run_in_transaction,
    session,
)
from poolkit.fastapi import (
    AutocommitSessionDep,
    ConnectionDep,
    SessionDep,
    get_session,
    install,
    lifespan,
)

settings = DatabaseSettings()
engine = get_engine()
Session = get_sessionmaker(settings)
assert_type(engine, AsyncEngine)
assert_type(Session, async_sessionmaker[AsyncSession])


async def token() -> str:
    """Rotates."""
    return "secret"


async def script() -> None:
    """Sessions and connections of the running event loop."""
    async with session() as opened:
        assert_type(opened, AsyncSession)
    async with session(settings, password=token) as opened:
        await opened.execute(text("SELECT 1"))
    assert_type(await run_in_transaction(get_engine, count), int)
    await asyncpg.connect(**connect_kwargs(settings, password=token))
    await dispose_engines()


async def count(connection: AsyncConnection) -> int:
    """A unit of work."""
    return int(await connection.scalar(text("SELECT 1")) or 0)


@asynccontextmanager
async def own(_app: FastAPI) -> AsyncIterator[dict[str, Any]]:
    """A lifespan with a state."""
    yield {"started": True}


app = FastAPI(lifespan=lifespan(own, settings=settings, warm_up=2, drain_timeout=5))
install(app)


@app.get("/")
async def handler(
    one: SessionDep, two: ConnectionDep, three: AutocommitSessionDep
) -> dict[str, str]:
    """Dependencies are SQLAlchemy's own types to a handler."""
    assert_type(one, AsyncSession)
    assert_type(two, AsyncConnection)
    assert_type(three, AsyncSession)
    return {}


def override(replacement: AsyncSession) -> None:
    """In a test."""
    app.dependency_overrides[get_session] = lambda: replacement
