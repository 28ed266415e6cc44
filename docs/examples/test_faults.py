"""What a service does when the network or the server fails, tested."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from poolkit import ConnectError, create_async_engine
from poolkit.testing import FaultProxy

INSERT = text("INSERT INTO orders DEFAULT VALUES")
COUNT = text("SELECT count(*) FROM orders")
TRANSACTION = 3  # round trips

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def engine(poolkit_faults: FaultProxy) -> AsyncIterator[AsyncEngine]:
    """The service's engine, by way of the proxy, on a database with an empty table."""
    engine = create_async_engine(poolkit_faults.url, connect_args={"timeout": 2})
    async with engine.begin() as connection:
        await connection.execute(text("DROP TABLE IF EXISTS orders"))
        await connection.execute(text("CREATE TABLE orders (id int GENERATED ALWAYS AS IDENTITY)"))
    yield engine
    await engine.dispose()


@pytest.mark.parametrize(("moment", "stored"), [("before", 0), ("after", 1)])
async def test_a_lost_commit_is_an_error(
    engine: AsyncEngine, poolkit_faults: FaultProxy, moment: str, stored: int
) -> None:
    """COMMIT does not arrive, or its reply is lost: the service cannot tell which."""
    lost = poolkit_faults.cut(**{moment: "COMMIT"})

    with pytest.raises(DBAPIError):
        async with engine.begin() as connection:
            await connection.execute(INSERT)

    await lost
    async with engine.connect() as connection:
        assert await connection.scalar(COUNT) == stored


async def test_a_checkout_costs_no_round_trip(
    engine: AsyncEngine, poolkit_faults: FaultProxy
) -> None:
    """What is left is BEGIN, the query, and ROLLBACK."""
    async with engine.connect() as connection:
        await connection.scalar(COUNT)

    poolkit_faults.forget()
    async with engine.connect() as connection:
        await connection.scalar(COUNT)
    assert poolkit_faults.round_trips == TRANSACTION


async def test_a_server_that_does_not_answer_is_an_error_in_time(
    engine: AsyncEngine, poolkit_faults: FaultProxy
) -> None:
    """No connect hangs."""
    await engine.dispose()
    poolkit_faults.silence()

    with pytest.raises(ConnectError):
        async with engine.connect():
            pass
