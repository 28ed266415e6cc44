"""Tests of a service, on a throwaway PostgreSQL."""

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import NullPool

from poolkit import create_async_engine
from poolkit.testing import postgres


@pytest.fixture(scope="session")
def database_url() -> Iterator[str]:
    with postgres() as server:
        yield server.url


@pytest_asyncio.fixture
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    # NullPool, since each test may run on an event loop of its own.
    engine = create_async_engine(database_url, poolclass=NullPool)
    yield engine
    await engine.dispose()


@pytest.mark.asyncio
async def test_orders_start_empty(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TEMPORARY TABLE orders (id int)"))
        assert await connection.scalar(text("SELECT count(*) FROM orders")) == 0
