"""`ConnectionDep`'s connection starts by itself, whatever is called first."""

import asyncio
import inspect

import pytest
from sqlalchemy import text
from sqlalchemy.exc import InvalidRequestError, ResourceClosedError
from sqlalchemy.ext.asyncio import AsyncConnection

from poolkit import pool_stats
from poolkit.fastapi.lazy import LazyConnection

ONE = text("SELECT 1")

START = {
    "exec_driver_sql": lambda c: c.exec_driver_sql("SELECT 1"),
    "execute": lambda c: c.execute(ONE),
    "execution_options": lambda c: c.execution_options(logging_token="x"),
    "get_isolation_level": lambda c: c.get_isolation_level(),
    "get_raw_connection": lambda c: c.get_raw_connection(),
    "invalidate": lambda c: c.invalidate(),
    "run_sync": lambda c: c.run_sync(lambda sync: sync.execute(ONE)),
    "scalar": lambda c: c.scalar(ONE),
    "scalars": lambda c: c.scalars(ONE),
    "start": lambda c: c.start(),
    "begin": lambda c: c.begin(),
    "begin_nested": lambda c: c.begin_nested(),
    "stream": lambda c: c.stream(ONE),
    "stream_scalars": lambda c: c.stream_scalars(ONE),
}
DO_NOTHING = {
    "aclose": lambda c: c.aclose(),
    "close": lambda c: c.close(),
    "commit": lambda c: c.commit(),
    "rollback": lambda c: c.rollback(),
}
AT_ONCE = {
    "closed": False,
    "get_nested_transaction": None,
    "get_transaction": None,
    "in_nested_transaction": False,
    "in_transaction": False,
    "invalidated": False,
    "sync_connection": None,
}
WITHOUT_CONNECTION = {"dialect", "engine", "sync_engine"}
NOT_THERE = {"connection", "default_isolation_level", "info"}
"""SQLAlchemy refuses the first always; the others are the started connection's."""


@pytest.fixture
async def connection(engine):
    lazy = LazyConnection(engine)
    yield lazy
    await lazy.end()


def test_every_public_name_is_accounted_for():
    """One that SQLAlchemy adds is to be added here, and perhaps to `LazyConnection`."""
    public = {name for name, _ in inspect.getmembers_static(AsyncConnection) if name[0] != "_"}

    assert public == {*START, *DO_NOTHING, *AT_ONCE, *WITHOUT_CONNECTION, *NOT_THERE}


@pytest.mark.parametrize("name", START)
async def test_it_starts_at_the_first_use(name, connection, engine):
    """By awaiting it; and at a second use it has started."""
    assert pool_stats(engine).checkouts == 0

    await START[name](connection)

    assert pool_stats(engine).checkouts == 1
    if name != "invalidate":
        await connection.get_isolation_level()
        assert pool_stats(engine).checkouts == 1


@pytest.mark.parametrize("name", ["begin", "begin_nested", "stream", "stream_scalars"])
async def test_it_starts_as_a_context_manager(name, connection, engine):
    """`async with connection.begin():` and its like."""
    async with START[name](connection):
        assert pool_stats(engine).used == 1


async def test_a_block_of_its_own_ends_it(connection, engine):
    """`async with connection:` works as ever."""
    async with connection as same:
        assert same is connection
        assert await connection.scalar(ONE) == 1
    assert pool_stats(engine).used == 0
    assert connection.closed


@pytest.mark.parametrize("name", DO_NOTHING)
async def test_there_is_nothing_to_end(name, connection, engine):
    """No connection is taken for it."""
    await DO_NOTHING[name](connection)

    assert pool_stats(engine).checkouts == 0


@pytest.mark.parametrize("name", AT_ONCE)
async def test_what_can_be_said_without_a_connection(name, connection, engine):
    """No error, and the honest answer."""
    found = getattr(connection, name)

    assert (found() if callable(found) else found) == AT_ONCE[name]
    assert connection.dialect is engine.dialect


async def test_its_transactions_are_seen(connection):
    """As those of any connection."""
    async with connection.begin() as transaction:
        assert connection.get_transaction() is transaction
        async with connection.begin_nested() as nested:
            assert connection.in_nested_transaction()
            assert connection.get_nested_transaction() is nested
    assert not connection.in_transaction()


@pytest.mark.parametrize("was_used", [True, False])
@pytest.mark.parametrize("name", START)
async def test_after_its_end_nothing_starts(name, was_used, connection, engine):
    """A clear error and no checkout."""
    if was_used:
        await connection.execute(ONE)
    await connection.end()

    with pytest.raises(ResourceClosedError, match="ended with its handler"):
        await START[name](connection)
    assert connection.closed
    assert pool_stats(engine).checkouts == was_used
    assert pool_stats(engine).used == 0


async def test_two_tasks_do_not_take_two_connections(connection, engine):
    """The second is refused, as it would be in the middle of a statement."""
    results = await asyncio.gather(
        connection.execute(ONE), connection.execute(ONE), return_exceptions=True
    )

    assert sum(isinstance(result, InvalidRequestError) for result in results) == 1
    await connection.end()
    assert (pool_stats(engine).checkouts, pool_stats(engine).used) == (1, 0)
