"""The pool on a real PostgreSQL: nothing leaks, whatever happens to callers and connections."""

import asyncio
import gc
import os
import random
import warnings
from contextlib import suppress

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine as sqlalchemys_own

from poolkit import (
    ConnectionClosed,
    HandoffPool,
    LongHolder,
    LongHolderReturned,
    PoolDraining,
    PoolOverloaded,
    PoolTimeout,
    WrongEventLoop,
    create_async_engine,
    drain,
    observe,
    pool_stats,
    warm_up,
)
from poolkit.events import CloseReason

SELECT_1 = text("SELECT 1")
SLACK = 5.0


class Watcher:
    """A connection of its own that sees the engine's sessions at the server."""

    def __init__(self, engine, name: str) -> None:
        self.engine, self.name = engine, name

    async def sessions(self) -> int:
        query = text("SELECT count(*) FROM pg_stat_activity WHERE application_name = :name")
        async with self.engine.connect() as connection:
            return (await connection.execute(query, {"name": self.name})).scalar()

    async def until(self, expected: int) -> int:
        """The number of sessions, once it is as expected or a few seconds have passed."""
        for _ in range(int(SLACK / 0.02)):
            found = await self.sessions()
            if found == expected:
                break
            await asyncio.sleep(0.02)
        return found

    async def kill_all(self) -> None:
        query = text(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = :name"
        )
        async with self.engine.connect() as connection:
            await connection.execute(query, {"name": self.name})


@pytest.fixture
def named(request) -> str:
    """An application name of the test's own."""
    return f"t-{abs(hash(request.node.nodeid)) % 10**9}"


@pytest.fixture
def watcher(make_engine, server, named) -> Watcher:
    """Sees what the server sees."""
    return Watcher(make_engine(server.url), named)


@pytest.fixture
def make(make_engine, server, named):
    """An engine with settings given by name."""

    def engine_with(**settings):
        return make_engine(settings={"url": server.url, "application_name": named} | settings)

    return engine_with


class TestCancellation:
    """At every await, thousands of times: no slot and no session is left behind."""

    async def storm(self, engine, watcher: Watcher, rounds: int, seed: int) -> None:
        luck = random.Random(seed)

        async def request() -> None:
            async with engine.connect() as connection:
                await connection.execute(SELECT_1)
                if luck.random() < 0.5:
                    await connection.commit()

        async def give_up_at_random() -> None:
            task = asyncio.ensure_future(request())
            await asyncio.sleep(luck.random() * 0.004)
            task.cancel()
            if luck.random() < 0.3:
                await asyncio.sleep(0)
                task.cancel()  # twice
            with suppress(asyncio.CancelledError, DBAPIError):
                await task

        for _ in range(rounds):
            await asyncio.gather(*(give_up_at_random() for _ in range(30)))
        while pool_stats(engine).opening:
            await asyncio.sleep(0.01)
        stats = pool_stats(engine)
        assert (stats.used, stats.waiting) == (0, 0)
        assert await watcher.until(stats.idle) == stats.idle
        await asyncio.gather(*(request() for _ in range(30)))
        assert pool_stats(engine).used == 0

    async def test_random_cancels(self, make, watcher) -> None:
        """3,000 requests cancelled at random points, some of them twice."""
        engine = make(pool_size=4, max_overflow=2)
        await self.storm(engine, watcher, rounds=100, seed=1)

    def test_random_cancels_on_uvloop(self, server, named) -> None:
        """The same on uvloop."""
        uvloop = pytest.importorskip("uvloop")

        async def main() -> None:
            engine = create_async_engine(
                server.url,
                pool_size=4,
                max_overflow=2,
                connect_args={"server_settings": {"application_name": named}},
            )
            outside = create_async_engine(server.url)
            await self.storm(engine, Watcher(outside, named), rounds=40, seed=2)
            await engine.dispose()
            await outside.dispose()

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())

    async def test_each_await_in_turn(self, make, watcher) -> None:
        """One caller, cancelled after 0, 1, 2, ... turns of the loop until it gets through."""
        engine = make(pool_size=1, max_overflow=0)

        async def request() -> None:
            async with engine.begin() as connection:
                await connection.execute(SELECT_1)

        for turns in range(400):
            task = asyncio.ensure_future(request())
            for _ in range(turns):
                await asyncio.sleep(0)
            if task.done():
                break
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            await request()
            assert pool_stats(engine).used == 0
        assert task.done()
        assert await watcher.until(1) == 1

    async def test_a_statement_that_was_abandoned_ends(self, make, watcher) -> None:
        """After a cancel in mid-statement the server's session is gone soon."""
        engine = make(pool_size=1, max_overflow=0)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2), engine.connect() as connection:
                await connection.execute(text("SELECT pg_sleep(60)"))
        assert pool_stats(engine).used == 0
        assert await watcher.until(0) == 0


class TestRecovery:
    """Connections die; callers do not notice."""

    async def test_killed_while_idle(self, make, watcher) -> None:
        """All sessions killed: the next requests succeed, on live connections only."""
        engine = make(pool_size=5)
        assert (await warm_up(engine)).opened == 5
        await watcher.kill_all()
        assert await watcher.until(0) == 0
        while not all(record.is_dead() for record in engine.pool.idle()):
            await asyncio.sleep(0.01)  # the server has ended them; let the news arrive
        await asyncio.gather(*(self.one(engine) for _ in range(20)))
        assert await watcher.until(pool_stats(engine).idle) <= 10

    async def test_killed_in_use_has_the_siblings_checked(self, make, watcher) -> None:
        """One caller finds its connection dead; the idle ones are checked, not dropped."""
        engine = make(pool_size=3, max_overflow=0)
        await warm_up(engine)
        async with engine.connect() as connection:
            pid = (await connection.execute(text("SELECT pg_backend_pid()"))).scalar()
            async with watcher.engine.connect() as outside:
                await outside.execute(text("SELECT pg_terminate_backend(:p)"), {"p": pid})
            # On SQLAlchemy 2.0 what asyncpg raises is not always wrapped.
            with pytest.raises((DBAPIError, asyncpg.InternalClientError)):
                await connection.execute(SELECT_1)
        while pool_stats(engine).used:
            await asyncio.sleep(0.01)
        stats = pool_stats(engine)
        assert (stats.idle, stats.pings, stats.pings_failed) == (2, 2, 0)

    @staticmethod
    async def one(engine) -> None:
        async with engine.connect() as connection:
            assert (await connection.execute(SELECT_1)).scalar() == 1


class TestLimits:
    """Waiting has an end, and its error says how things stand."""

    async def test_timeout(self, make) -> None:
        """The message begins as SQLAlchemy's and goes on with the pool's state."""
        engine = make(pool_size=1, max_overflow=0, pool_timeout=0.2)
        async with engine.connect():
            with pytest.raises(
                PoolTimeout, match=r"^QueuePool limit of size 1 overflow 0 reached, connection timed out, timeout 0\.20 \(used=1, idle=0, opening=0, waiting=1; longest holder"
            ):  # fmt: skip
                await engine.connect()
        assert pool_stats(engine).timeouts == 1

    async def test_no_wait(self, make) -> None:
        """pool_timeout=0 fails at once if all are in use, and takes an idle one."""
        engine = make(pool_size=1, max_overflow=0, pool_timeout=0)
        async with engine.connect():
            with pytest.raises(PoolTimeout):
                await engine.connect()
        for _ in range(3):
            async with engine.connect():
                pass

    async def test_max_waiting(self, make) -> None:
        """The caller beyond the limit is refused at once."""
        engine = make(pool_size=1, max_overflow=0, pool_max_waiting=1)
        async with engine.connect():
            waiting = asyncio.ensure_future(engine.connect().start())
            await asyncio.sleep(0)
            with pytest.raises(PoolOverloaded, match="pool_max_waiting=1 callers wait"):
                await engine.connect()
        await (await waiting).close()


class TestEnds:
    """Dispose, drain, garbage, forks and second loops."""

    async def test_drain(self, make, watcher) -> None:
        """Waits for what is in use, refuses the rest, drops stragglers: no session is left."""
        engine = make(pool_size=3, max_overflow=0)
        await warm_up(engine)
        quick, slow = await engine.connect(), await engine.connect()
        asyncio.get_running_loop().call_later(0.1, asyncio.ensure_future, quick.close())
        report = await drain(engine, timeout=0.5)
        assert report.terminated == 1
        assert await watcher.until(0) == 0
        with pytest.raises(PoolDraining):
            await engine.connect()
        with suppress(DBAPIError):
            await slow.close()

    async def test_drain_ends_a_statement_that_runs(self, make, watcher) -> None:
        """A straggler in mid-statement is ended at the server too."""
        engine = make(pool_size=1)

        async def run() -> None:
            async with engine.connect() as connection:
                await connection.execute(text("SELECT pg_sleep(60)"))

        running = asyncio.ensure_future(run())
        while not pool_stats(engine).used:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)  # let the statement reach the server
        report = await drain(engine, timeout=0.1)
        assert report.terminated == 1
        assert await watcher.until(0) == 0
        with pytest.raises(Exception, match=r"(?i)terminat|closed|lost"):
            await running

    def test_a_loop_that_ended_without_dispose(self, server, named) -> None:
        """Disposed of later, from another loop: its sessions end, and nothing is printed."""
        engine = create_async_engine(server.url + f"?application_name={named}")

        async def use() -> None:
            async with engine.connect() as connection:
                await connection.execute(SELECT_1)

        async def clean_up() -> int:
            outside = create_async_engine(server.url)
            before = await Watcher(outside, named).sessions()
            await engine.dispose()
            after = await Watcher(outside, named).until(0)
            await outside.dispose()
            return before, after

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # asyncio's, of the dead loop
            asyncio.run(use())
            assert asyncio.run(clean_up()) == (1, 0)
            gc.collect()

    async def test_dispose_and_go_on(self, make, watcher) -> None:
        """What is in use is closed as it comes back; the engine goes on with all its settings."""
        engine = make(pool_size=2, pool_max_waiting=7)
        held = await engine.connect()
        async with engine.connect():
            pass
        await engine.dispose()
        assert await watcher.until(1) == 1
        await held.close()
        assert await watcher.until(0) == 0
        async with engine.connect() as connection:
            await connection.execute(SELECT_1)
        assert pool_stats(engine).opened == 3
        assert engine.pool._max_waiting == 7

    async def test_lost_to_the_garbage_collector(self, make, watcher) -> None:
        """The slot is freed, the session ended, and the loss counted."""
        engine = make(pool_size=1, max_overflow=0)
        events: list[object] = []
        observe(engine, events.append)

        async def forget() -> None:
            connection = await engine.connect()
            await connection.execute(SELECT_1)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            await forget()
            gc.collect()
        async with engine.connect() as connection:
            await connection.execute(SELECT_1)
        assert pool_stats(engine).closed[CloseReason.GARBAGE_COLLECTED] == 1
        closed = [event for event in events if isinstance(event, ConnectionClosed)]
        assert [event.reason for event in closed] == [CloseReason.GARBAGE_COLLECTED]
        assert await watcher.until(1) == 1

    async def test_long_holders(self, make) -> None:
        """Reported with the task's name and place, and again when they return."""
        engine = make(leak_threshold=0.05)
        events: list[object] = []
        observe(engine, events.append)

        async def hold_on() -> None:
            async with engine.connect():
                while not any(isinstance(event, LongHolder) for event in events):
                    await asyncio.sleep(0.01)

        async def around() -> None:
            await hold_on()

        await asyncio.create_task(around(), name="the culprit")
        (held,) = [event for event in events if isinstance(event, LongHolder)]
        (back,) = [event for event in events if isinstance(event, LongHolderReturned)]
        assert held.task == back.task == "the culprit"
        assert held.stack.index("around") < held.stack.index("hold_on")
        assert pool_stats(engine).long_holders == 1

    def test_a_second_loop(self, server) -> None:
        """It is an error that says what to use; dispose works from there, quietly."""
        engine = create_async_engine(server.url)

        async def use() -> None:
            async with engine.connect() as connection:
                await connection.execute(SELECT_1)

        with asyncio.Runner() as first, asyncio.Runner() as second:
            first.run(use())
            with pytest.raises(WrongEventLoop, match=r"get_engine\(\)"):
                second.run(use())
            second.run(engine.dispose())
            second.run(use())
            second.run(engine.dispose())
            first.run(asyncio.sleep(0.05))

    def test_dispose_while_everything_is_cancelled(self, server) -> None:
        """asyncio.run cancels all tasks at its end; a dispose in a finally clause still works."""

        async def serve() -> None:
            engine = create_async_engine(server.url)
            try:
                async with engine.connect() as connection:
                    await connection.execute(text("SELECT pg_sleep(60)"))
            finally:
                await engine.dispose()

        async def main() -> None:
            asyncio.ensure_future(serve())  # noqa: RUF006
            await asyncio.sleep(0.2)

        asyncio.run(main())

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
    async def test_a_fork(self, make, watcher) -> None:
        """The child starts empty and leaves the parent's sessions alone."""
        engine = make(pool_size=2)
        await warm_up(engine)
        async with engine.connect() as held:
            await held.execute(SELECT_1)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
            if child == 0:
                gc.collect()
                clean = (engine.pool.checkedin(), engine.pool.checkedout()) == (0, 0)
                os._exit(0 if clean else 1)
            _, status = await asyncio.to_thread(os.waitpid, child, 0)
            assert os.waitstatus_to_exitcode(status) == 0
            await held.execute(SELECT_1)
        assert await watcher.until(2) == 2


async def test_as_a_poolclass(server) -> None:
    """With SQLAlchemy's own factory and QueuePool's arguments, and after dispose."""
    url = server.url.replace("postgresql", "postgresql+asyncpg")
    engine = sqlalchemys_own(
        url, poolclass=HandoffPool, pool_size=2, max_overflow=1, pool_timeout=3, pool_recycle=60,
        pool_max_waiting=9,
    )  # fmt: skip
    for _ in range(2):
        async with engine.connect() as connection:
            assert (await connection.execute(SELECT_1)).scalar() == 1
        assert isinstance(engine.pool, HandoffPool)
        assert (engine.pool.size(), engine.pool.timeout()) == (2, 3)
        await engine.dispose()


async def test_warm_up(make, server) -> None:
    """As many as asked for, at most the size, side by side; failures are reported, not raised."""
    engine = make(pool_size=4)
    report = await warm_up(engine, 3)
    assert (report.opened, report.failures, pool_stats(engine).idle) == (3, (), 3)
    assert (await warm_up(engine, 99)).opened == 1
    bad = create_async_engine(server.url, password="wrong", pool_size=2)
    failed = await warm_up(bad)
    assert (failed.opened, len(failed.failures)) == (0, 2)
    await bad.dispose()


async def test_a_drain_of_somebody_elses_connections(server) -> None:
    """Their sessions are not ended by another one: nobody knows what stands in between."""
    url = server.url.replace("postgresql://", "postgresql+asyncpg://")
    theirs = sqlalchemys_own(url, poolclass=HandoffPool)
    holding = await theirs.connect()
    report = await drain(theirs, timeout=0)
    assert (report.terminated, report.closed) == (1, 0)
    await holding.close()
