"""The gauge of the server's connections: what it says, and what it must not take for it."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest
from sqlalchemy import text
from sqlalchemy.pool import NullPool

from poolkit import create_async_engine, drain, pool_stats, warm_up
from poolkit.events import CheckedOut, ConnectionOpened
from poolkit.pool import aside
from poolkit.telemetry import server as looks

INTERVAL = 0.05
GAUGE = "poolkit.server.connections"


@pytest.fixture
def watch(meter_provider):
    """Has an engine's server looked at."""
    return lambda engine, interval=INTERVAL: looks.install(
        engine.sync_engine, interval, meter_provider
    )


async def use(engine) -> None:
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))


async def until(condition, seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def test_connections_and_their_most(make_engine, server, watch, measured) -> None:
    """Of all clients, as the server counts them."""
    engine, other = make_engine(server.url), make_engine(server.url, pool_size=7)
    await warm_up(other, 7)
    watch(engine)
    assert GAUGE not in measured()
    await use(engine)
    await until(lambda: GAUGE in measured())
    async with other.connect() as connection:
        most = int(await connection.scalar(text("SHOW max_connections")))
        count = text("SELECT sum(numbackends) FROM pg_stat_database")
        expected = await connection.scalar(count)
    await until(lambda: measured()[GAUGE] == expected)
    assert measured()["poolkit.server.connections.max"] == most


async def test_an_ordinary_role_sees_all(make_engine, server, watch, measured) -> None:
    """Not only its own sessions."""
    owner = make_engine(server.url)
    async with owner.connect() as connection:
        await connection.execute(text("CREATE ROLE plain LOGIN PASSWORD 'plain'"))
        await connection.commit()
    await warm_up(owner, 5)
    engine = make_engine(f"postgresql://plain:plain@127.0.0.1:{server.port}/postgres")
    watch(engine)
    try:
        await use(engine)
        await until(lambda: measured().get(GAUGE, 0) >= 6)
    finally:
        await engine.dispose()
        async with owner.connect() as connection:
            await connection.execute(text("DROP ROLE plain"))
            await connection.commit()


async def test_an_idle_connection_is_asked(make_engine, server, watch, measured) -> None:
    """None is opened for it, no caller is counted, and it goes on ageing."""
    engine = make_engine(server.url)
    seen: list[object] = []
    await warm_up(engine, 2)
    coldest = engine.pool._idle[0]
    since = coldest.idle_since
    engine.pool.observers.add(seen.append, [CheckedOut, ConnectionOpened])
    await aside.ask(engine.pool, _nothing, 1.0)
    assert seen == []
    assert (engine.pool._idle[0], coldest.idle_since) == (coldest, since)
    assert pool_stats(engine).used == 0


async def test_an_exhausted_pool(make_engine, server, watch, measured) -> None:
    """A connection of its own is opened beside it and closed: no caller waits for it."""
    engine = make_engine(server.url, pool_size=1, max_overflow=0)
    watch(engine)
    async with engine.connect():
        await until(lambda: GAUGE in measured())
        stats = pool_stats(engine)
        assert (stats.used, stats.waiting, stats.waits) == (1, 0, 1)
    await drain(engine)
    await asyncio.sleep(0)
    other = make_engine(server.url)
    sessions = text("SELECT count(*) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
    own = text(f"{sessions.text} AND application_name = 'tests.py'")
    async with asyncio.timeout(10), other.connect() as connection:
        while await connection.scalar(own):
            await asyncio.sleep(0.02)
            await connection.rollback()


async def _nothing(_) -> None:
    pass


async def _fail(_) -> None:
    raise OSError("no answer")


async def _pause(_) -> None:
    await asyncio.sleep(0.01)


async def _hang(_) -> None:
    await asyncio.sleep(60)


@pytest.mark.parametrize(("question", "error"), [(_fail, OSError), (_hang, TimeoutError)])
async def test_a_question_without_an_answer(engine, question, error) -> None:
    """Bounded; the connection is not trusted any more, and no slot is missing."""
    await warm_up(engine, 1)
    with pytest.raises(error):
        await aside.ask(engine.pool, question, 0.05)
    stats = pool_stats(engine)
    assert (stats.used, stats.idle, stats.closed["lost"]) == (0, 0, 1)
    with pytest.raises(error):
        await aside.ask(engine.pool, question, 0.05)
    stats = pool_stats(engine)
    assert (stats.used, stats.idle, stats.closed["lost"]) == (0, 0, 1)
    await use(engine)


@pytest.mark.parametrize(("question", "closed"), [(_hang, 1), (_pause, 0)])
async def test_a_caller_that_comes_meanwhile(make_engine, server, question, closed) -> None:
    """It waits for the end of the question where the pool has no more, however that ends."""
    engine = make_engine(server.url, pool_size=1, max_overflow=0)
    await warm_up(engine)
    asked = asyncio.create_task(aside.ask(engine.pool, question, 0.1))
    await asyncio.sleep(0)
    await use(engine)
    await asyncio.wait([asked])
    assert (asked.exception() is not None) == bool(closed)
    stats = pool_stats(engine)
    assert (stats.waits, stats.closed["lost"], stats.idle) == (1, closed, 1)


async def test_a_look_that_is_cancelled(engine) -> None:
    """As when the loop ends."""
    await warm_up(engine, 1)
    task = asyncio.create_task(aside.ask(engine.pool, _hang, 60))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (pool_stats(engine).used, pool_stats(engine).idle) == (0, 0)


async def test_failures_are_logged_once_in_a_row(
    make_engine, server, watch, measured, caplog, monkeypatch
) -> None:
    """And what was seen before them is not reported for ever."""
    engine = make_engine(server.url)
    watch(engine)
    holder = await engine.connect()  # or there would be no connection left after a failure
    await until(lambda: GAUGE in measured())
    monkeypatch.setattr(looks, "_QUERY", "SELECT 1/0")
    await until(lambda: GAUGE not in measured())
    await asyncio.sleep(3 * INTERVAL)  # real: some more looks
    logged = [r for r in caplog.records if r.name == "poolkit.telemetry"]
    assert [r.getMessage() for r in logged] == ["the server's connections could not be counted"]
    monkeypatch.undo()
    await until(lambda: GAUGE in measured())
    await holder.close()


async def test_nothing_is_asked_of_an_engine_without_connections(
    make_engine, server, watch, monkeypatch
) -> None:
    """A database that sleeps when it is not used is let sleep; the next connection goes on."""
    engine = make_engine(server.url)
    watch(engine)
    asked = []

    async def ask(*_) -> None:
        asked.append(1)

    monkeypatch.setattr(aside, "ask", ask)
    await use(engine)
    await until(lambda: asked)
    await engine.dispose()
    await asyncio.sleep(2 * INTERVAL)  # real: longer than an interval
    asked.clear()
    await asyncio.sleep(3 * INTERVAL)
    assert asked == []
    await use(engine)
    await until(lambda: asked)


async def test_twice_is_once_and_off_is_off(make_engine, server, watch, measured) -> None:
    """The second end ends nothing."""
    engine = make_engine(server.url)
    others = list(engine.pool.observers)
    end = watch(engine)
    watched = list(engine.pool.observers)
    second = watch(engine)
    assert list(engine.pool.observers) == watched
    second()
    await use(engine)
    await until(lambda: GAUGE in measured())
    end()
    assert GAUGE not in measured()
    assert list(engine.pool.observers) == others


async def test_several_engines_of_one_name(make_engine, server, watch, measured) -> None:
    """One value, of whoever looked last: it is the server's, and is not added up."""
    engines = [make_engine(server.url) for _ in range(2)]
    for engine in engines:
        watch(engine)
        await use(engine)
    await until(lambda: measured().get(GAUGE) is not None)
    assert isinstance(measured()[GAUGE], int)


async def test_an_engine_is_not_kept(server, watch, measured) -> None:
    """Neither it nor its pool; what it saw goes with it."""
    engine = create_async_engine(server.url)
    watch(engine)
    await use(engine)
    await until(lambda: GAUGE in measured())
    await engine.dispose()
    await asyncio.sleep(0.1)  # real: a look that is under way ends
    references = [weakref.ref(engine.sync_engine), weakref.ref(engine.pool)]
    del engine
    gc.collect()
    assert [each() for each in references] == [None, None]
    assert GAUGE not in measured()


def test_a_loop_is_not_kept_open_and_the_next_goes_on(server, watch, measured) -> None:
    """One engine, a loop after the other."""
    engine = create_async_engine(server.url)
    watch(engine)

    async def main() -> None:
        await use(engine)
        await until(lambda: GAUGE in measured())
        await engine.dispose()

    for _ in range(2):
        asyncio.run(main())


async def test_another_pool(make_engine, server, watch, measured) -> None:
    """Nothing is looked at."""
    engine = make_engine(server.url, poolclass=NullPool)
    watch(engine)()
    await use(engine)
    assert measured() == {}
