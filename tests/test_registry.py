"""One engine for each event loop and settings, closed with its loop."""

import asyncio
import gc
import os
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import uvloop
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker

from poolkit import (
    ConfigurationError,
    DatabaseSettings,
    TransactionAborted,
    create_async_engine,
    dispose_engines,
    drain,
    get_engine,
    get_sessionmaker,
    pool_stats,
    session,
    warm_up,
)
from poolkit.testing import postgres

NAME = "poolkit-registry"
SLOTS = 30
ONE = text("SELECT 1")


@pytest.fixture(scope="module")
def small():
    """A server with few slots."""
    with postgres(server_settings={"max_connections": SLOTS}) as running:
        yield running


@pytest.fixture
def settings(small, request):
    """Of an application name of each test's own, to be counted by."""
    return DatabaseSettings(url=small.url, application_name=request.node.name[:63])


def sessions_of(settings: DatabaseSettings) -> int:
    """Sessions that the server has of these settings' name, once those that end have ended."""

    async def count() -> int:
        name = {"application_name": "counter"}
        engine = create_async_engine(settings.database_url().sqlalchemy(), server_settings=name)
        query = text("SELECT count(*) FROM pg_stat_activity WHERE application_name = :name")
        async with engine.connect() as connection:
            found = await connection.scalar(query, {"name": settings.application_name})
        await engine.dispose()
        return found

    end = time.monotonic() + 5
    while (found := asyncio.run(count())) and time.monotonic() < end:
        time.sleep(0.02)
    return found


async def one(settings: DatabaseSettings | None = None) -> AsyncEngine:
    engine = get_engine(settings)
    async with engine.connect() as connection:
        assert await connection.scalar(ONE) == 1
    return engine


# -- One per loop and settings -----------------------------------------------------------------


async def test_a_loop_has_one_engine_for_the_same_settings(settings):
    """The same object each time, a plain AsyncEngine, for equal settings too."""
    engine = get_engine(settings)

    assert type(engine) is AsyncEngine
    assert get_engine(settings) is engine
    assert get_engine(settings.model_copy()) is engine


async def test_full_settings_count(settings):
    """Settings that differ only in a timeout are two engines."""
    other = settings.model_copy(update={"statement_timeout": 3.0})

    assert get_engine(other) is not get_engine(settings)


async def test_it_is_made_once_under_concurrency(settings):
    """Tasks that ask at the same time get the same."""

    async def ask():
        await asyncio.sleep(0)
        return get_engine(settings)

    found = await asyncio.gather(*(ask() for _ in range(50)))

    assert len({id(engine) for engine in found}) == 1


def test_threads_have_an_engine_each(settings):
    """Loops that run side by side do not share."""
    with ThreadPoolExecutor(4) as threads:
        barrier = threading.Barrier(4)

        async def work():
            barrier.wait(30)
            return await one(settings)

        engines = list(threads.map(lambda _: asyncio.run(work()), range(4)))

    assert len({id(engine) for engine in engines}) == 4
    assert sessions_of(settings) == 0


async def test_the_environment_is_read_at_every_call(small, monkeypatch, tmp_path):
    """A changed DATABASE_* is another engine, also one in .env; the old one is back with it."""
    monkeypatch.setenv("DATABASE_URL", small.url)
    first = get_engine()
    monkeypatch.setenv("DATABASE_POOL_SIZE", "3")
    second = get_engine()
    monkeypatch.delenv("DATABASE_POOL_SIZE")
    assert get_engine() is first
    (tmp_path / ".env").write_text("DATABASE_POOL_SIZE=4\n")
    third = get_engine()

    assert [engine.pool.size() for engine in (first, second, third)] == [10, 3, 4]
    assert get_engine() is third


async def test_a_file_that_a_variable_names_is_read_at_every_call(small, monkeypatch, tmp_path):
    """As a mounted secret that is replaced."""
    monkeypatch.setenv("DATABASE_URL", small.url)
    file = tmp_path / "size"
    monkeypatch.setenv("DATABASE_POOL_SIZE_FILE", str(file))
    file.write_text("3")
    first = get_engine()
    file.write_text("4")

    assert (first.pool.size(), get_engine().pool.size()) == (3, 4)


async def test_bad_settings_are_an_error(monkeypatch):
    """As of create_async_engine, at every call."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://h/d")
    monkeypatch.setenv("DATABASE_POOL_SIZE", "0")

    for make in (get_engine, get_sessionmaker):
        with pytest.raises(ConfigurationError, match="DATABASE_POOL_SIZE"):
            make()
    with pytest.raises(ConfigurationError, match="DATABASE_POOL_SIZE"):
        await session().__aenter__()


async def test_a_password_callable_tells_engines_apart(small, settings):
    """It is asked at every connect, and is the engine's own."""
    asked = []

    def password():
        asked.append(1)
        return small.password

    async with session(settings, password=password) as opened:
        await opened.execute(ONE)

    assert asked
    assert get_engine(settings, password=password) is get_engine(settings, password=password)
    assert get_engine(settings, password=password) is not get_engine(settings)


# -- The end of a loop -------------------------------------------------------------------------


@pytest.mark.parametrize("factory", [None, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_sixty_runs_leave_no_session(settings, factory):
    """Each asyncio.run has an engine, and the server 30 slots."""

    async def work():
        engine = await one(settings)
        async with engine.connect() as first, engine.connect() as second:
            await first.execute(ONE)
            await second.execute(ONE)

    for _ in range(60):
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(work())

    assert sessions_of(settings) == 0


def test_runs_with_the_environment_and_sessions_leave_none(settings, small, monkeypatch):
    """The shortest way: session() in each asyncio.run."""
    monkeypatch.setenv("DATABASE_URL", small.url)
    monkeypatch.setenv("DATABASE_APPLICATION_NAME", settings.application_name)

    async def work():
        async with session() as opened:
            return await opened.scalar(ONE)

    assert [asyncio.run(work()) for _ in range(60)] == [1] * 60
    assert sessions_of(settings) == 0


@pytest.mark.filterwarnings("ignore:The garbage collector is trying to clean up")
def test_a_connection_left_out_is_closed_too(settings):
    """A task that was cancelled with the loop, and a connection that nobody gave back."""
    kept = []

    async def work():
        engine = get_engine(settings)
        kept.append(await engine.connect().__aenter__())
        await kept[0].execute(ONE)

    asyncio.run(work())

    assert sessions_of(settings) == 0
    kept.clear()
    gc.collect()


# What a loop has open when it is closed, asyncio and uvloop report.
UNCLOSED = pytest.mark.filterwarnings("ignore::ResourceWarning")


@UNCLOSED
@pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_bare_close_of_the_loop_drops_the_sockets(settings, factory):
    """Without shutdown_asyncgens, and with nobody calling anything afterwards."""
    loop = factory()
    loop.run_until_complete(one(settings))
    loop.close()

    assert sessions_of(settings) == 0
    del loop
    gc.collect()


@pytest.mark.parametrize("factory", [None, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_dead_loop_and_its_engine_are_not_kept_alive(settings, factory):
    """Neither by the registry nor by each other."""
    seen = []

    async def work():
        engine = await one(settings)
        seen.extend([weakref.ref(asyncio.get_running_loop()), weakref.ref(engine)])
        get_sessionmaker(settings)

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(work())
    del runner
    gc.collect()

    assert [reference() for reference in seen] == [None, None]


@UNCLOSED
def test_a_loop_that_is_only_closed_is_not_kept_alive(settings):
    loop = asyncio.new_event_loop()
    engine = weakref.ref(loop.run_until_complete(one(settings)))
    loop.close()
    reference = weakref.ref(loop)
    del loop
    gc.collect()

    assert (reference(), engine()) == (None, None)


def test_a_generator_of_the_programs_own_may_use_the_engine_at_the_end(settings):
    """Asynchronous generators that are closed with the loop give their connections back first."""
    ended = []

    async def rows():
        async with get_engine(settings).connect() as connection:
            try:
                yield await connection.scalar(ONE)
            finally:
                await asyncio.sleep(0.01)
                ended.append(await connection.scalar(ONE))

    async def work(generator):
        assert await anext(generator) == 1

    asyncio.run(work(rows_that_are_kept := rows()))

    assert ended == [1]
    del rows_that_are_kept
    assert sessions_of(settings) == 0


def test_a_drained_engine_ends_with_its_loop(settings):
    """As after a lifespan that has drained it."""

    async def work():
        await drain(await one(settings))

    asyncio.run(work())
    assert sessions_of(settings) == 0


def test_a_virtual_clock_does_not_end_it(settings):
    """One that goes on to the next timer where nothing else is to be done."""

    async def work():
        engine = await one(settings)
        loop = asyncio.get_running_loop()
        later = loop.time() + 11 * 365 * 86_400
        loop.time = lambda: later
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        del loop.time
        return get_engine(settings) is engine, pool_stats(engine).idle

    assert asyncio.run(work()) == (True, 1)


# -- Without a loop ----------------------------------------------------------------------------


def test_an_engine_of_no_loop_serves_one_run_after_the_other(settings):
    """`engine = get_engine()` in a module."""
    engine = get_engine(settings)
    assert type(engine) is AsyncEngine
    assert get_engine(settings) is engine

    async def work():
        async with engine.connect() as connection:
            await connection.execute(ONE)
        assert get_engine(settings) is engine
        return pool_stats(engine).idle

    assert [asyncio.run(work()) for _ in range(3)] == [1, 1, 1]
    assert sessions_of(settings) == 0


def test_an_engine_of_no_loop_is_the_one_of_the_first_loop(settings):
    """There are not two pools: one of the module's and one of the loop's."""
    engine = get_engine(settings)

    async def work():
        await one(settings)
        async with engine.connect() as connection:
            await connection.execute(ONE)
        return pool_stats(engine).opened

    assert asyncio.run(work()) == 1


def test_an_engine_of_no_loop_serves_loops_side_by_side(settings):
    """Each by a pool of its own, on its own thread."""
    engine = get_engine(settings)
    maker = get_sessionmaker(settings)
    barrier = threading.Barrier(3)

    async def work():
        async with engine.connect() as connection:
            await connection.execute(ONE)
            barrier.wait(30)
            stats = pool_stats(engine)
            async with maker() as opened:
                await opened.execute(ONE)
            barrier.wait(30)
        return stats.used, (await warm_up(engine, 2)).failures

    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda _: asyncio.run(work()), range(3)))

    assert found == [(1, ())] * 3
    assert sessions_of(settings) == 0


def test_listeners_of_a_module_are_heard(settings):
    """`@event.listens_for(engine.sync_engine, ...)` before there is a loop."""
    engine = get_engine(settings)
    heard = []
    event.listen(engine.sync_engine, "connect", lambda *_: heard.append("connect"))
    event.listen(engine.sync_engine, "before_cursor_execute", lambda *_: heard.append("execute"))

    asyncio.run(one(settings))
    asyncio.run(one(settings))

    assert heard == ["connect", "execute"] * 2


def test_a_session_maker_of_no_loop(settings):
    """`Session = get_sessionmaker()` in a module."""
    maker = get_sessionmaker(settings)
    assert type(maker) is async_sessionmaker

    async def work():
        async with maker() as opened:
            return await opened.scalar(ONE)

    assert [asyncio.run(work()) for _ in range(3)] == [1, 1, 1]
    assert sessions_of(settings) == 0


@UNCLOSED
def test_an_engine_of_no_loop_moves_on_from_a_loop_that_was_just_closed(settings):
    engine = get_engine(settings)

    async def work():
        async with engine.connect() as connection:
            await connection.execute(ONE)

    for _ in range(3):
        loop = asyncio.new_event_loop()
        loop.run_until_complete(work())
        loop.close()

    assert sessions_of(settings) == 0
    del loop
    gc.collect()


def test_a_forked_child_has_engines_of_its_own(settings):
    """Of a parent that used its own; the parent's go on."""
    engine = get_engine(settings)

    async def work():
        async with engine.connect() as connection:
            await connection.execute(ONE)
            return await connection.scalar(text("SELECT pg_backend_pid()"))

    def in_child(pid):
        try:
            os._exit(0 if asyncio.run(work()) != pid else 3)
        finally:
            os._exit(4)

    async def parent():
        pid = await work()
        child = os.fork()
        if child == 0:
            threading.Thread(target=in_child, args=[pid]).start()
            threading.Event().wait()
        _, status = await asyncio.to_thread(os.waitpid, child, 0)
        return os.waitstatus_to_exitcode(status), await work() == pid

    assert asyncio.run(parent()) == (0, True)
    assert sessions_of(settings) == 0


# -- dispose_engines ---------------------------------------------------------------------------


async def test_dispose_engines_closes_all_of_this_loop(settings):
    """They can be used again."""
    other = settings.model_copy(update={"pool_size": 3})
    engines = [await one(settings), await one(other)]

    await dispose_engines()

    assert [pool_stats(engine).idle for engine in engines] == [0, 0]
    assert await asyncio.to_thread(sessions_of, settings) == 0
    assert await one(settings) is engines[0]


@UNCLOSED
def test_dispose_engines_reaches_other_loops(settings):
    """From a loop that has used none, as a test's teardown."""
    loop = asyncio.new_event_loop()
    loop.run_until_complete(one(settings))

    asyncio.run(dispose_engines())

    loop.run_until_complete(asyncio.sleep(0))
    assert sessions_of(settings) == 0
    loop.close()


# -- session() ---------------------------------------------------------------------------------


@pytest.fixture
async def orders(settings):
    """A table, emptied for each test."""
    async with get_engine(settings).begin() as connection:
        await connection.execute(text("DROP TABLE IF EXISTS orders"))
        await connection.execute(text("CREATE TABLE orders (id int PRIMARY KEY)"))
    return text("INSERT INTO orders VALUES (:id)")


async def count(settings):
    async with get_engine(settings).connect() as connection:
        return await connection.scalar(text("SELECT count(*) FROM orders"))


async def test_a_session_is_committed_at_the_end(settings, orders):
    """And checks out at its first use only; the block may commit in between."""
    checkouts = pool_stats(get_engine(settings)).checkouts
    async with session(settings) as opened:
        assert pool_stats(get_engine(settings)).checkouts == checkouts
        await opened.execute(orders, {"id": 1})
        await opened.commit()
        await opened.execute(orders, {"id": 2})

    assert await count(settings) == 2


@pytest.mark.parametrize("error", [ValueError("no"), asyncio.CancelledError()])
async def test_a_session_is_rolled_back_after_an_exception(settings, orders, error):
    async def fail():
        async with session(settings) as opened:
            await opened.execute(orders, {"id": 1})
            raise error

    with pytest.raises(type(error)):
        await fail()

    assert await count(settings) == 0
    assert pool_stats(get_engine(settings)).used == 0


async def test_a_session_does_not_report_a_rollback_as_a_commit(settings, orders):
    """A statement failed, the block went on."""

    async def go_on():
        async with session(settings) as opened:
            await opened.execute(orders, {"id": 1})
            with pytest.raises(DBAPIError):
                await opened.execute(orders, {"id": 1})

    with pytest.raises(TransactionAborted):
        await go_on()

    assert await count(settings) == 0


async def test_a_savepoint_makes_a_failure_harmless(settings, orders):
    """What was rolled back to a savepoint does not count."""
    async with session(settings) as opened:
        await opened.execute(orders, {"id": 1})
        with pytest.raises(DBAPIError):
            async with opened.begin_nested():
                await opened.execute(orders, {"id": 1})

    assert await count(settings) == 1
