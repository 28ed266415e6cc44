"""The server goes and comes back, and callers are served again at once, by live connections."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from poolkit import (
    ConnectionLost,
    ConnectTimeout,
    ReadOnlyServer,
    observe,
    pool_stats,
    warm_up,
)
from poolkit.events import CloseReason, ConnectionClosed
from poolkit.testing import FaultProxy, PostgresServer, postgres, standby

SOON = 1.5
"""Seconds until the first success; 0.5 s on a machine that has nothing else to do."""

SLACK = 5.0
SELECT = text("SELECT 1")
PING = 0.3


@pytest.fixture(scope="module")
def own() -> Iterator[PostgresServer]:
    """A server that may be stopped."""
    with postgres() as running:
        yield running


@pytest.fixture
def proxy(own: PostgresServer) -> Iterator[FaultProxy]:
    with FaultProxy(own) as running:
        yield running


@pytest.fixture
def make(make_engine):
    """An engine with settings given by name."""

    def engine_on(url: str, **settings) -> AsyncEngine:
        defaults = {"pool_size": 4, "max_overflow": 4, "pool_ping_timeout": PING}
        defaults |= {"statement_timeout": 0.5, "pool_max_connecting": 2}
        separator = "&" if "?" in url else "?"
        url = f"{url}{separator}sslmode=disable"
        return make_engine(settings={"url": url} | defaults | settings)

    return engine_on


# -- What callers see ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """One caller's experience."""

    began: float
    ended: float
    error: BaseException | None


Work = Callable[[AsyncEngine], Awaitable[object]]


async def read(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        await connection.execute(SELECT)


async def write(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TEMPORARY TABLE t (x int) ON COMMIT DROP"))
        await connection.execute(text("SELECT txid_current()"))


class Traffic:
    """Callers that go on asking, whatever happens."""

    def __init__(self, engine: AsyncEngine, work: Work, group: asyncio.TaskGroup) -> None:
        self.requests: list[Request] = []
        self.most_opening = 0
        self._engine, self._work, self._group = engine, work, group
        self._over = asyncio.Event()

    def grow(self, callers: int) -> None:
        """More callers."""
        for _ in range(callers):
            self._group.create_task(self._ask())

    async def _ask(self) -> None:
        now = asyncio.get_running_loop().time
        while not self._over.is_set():
            began, error = now(), None
            try:
                await self._work(self._engine)
            except Exception as caught:  # noqa: BLE001 (whatever it is, it is looked at)
                error = caught
            self.requests.append(Request(began, now(), error))
            self._look()
            await asyncio.sleep(0.01)

    def _look(self) -> None:
        stats = pool_stats(self._engine)
        assert stats.used + stats.idle + stats.opening <= stats.limit
        self.most_opening = max(self.most_opening, stats.opening)

    def stop(self) -> None:
        self._over.set()

    async def until_served(self, since: float) -> float:
        """Seconds from then until the first request that began later succeeded."""
        async with asyncio.timeout(SLACK):
            while True:
                for request in self.requests:
                    if request.began >= since and request.error is None:
                        return request.ended - since
                await asyncio.sleep(0.005)

    def errors(self, since: float) -> list[BaseException]:
        """What requests got that began later."""
        return [r.error for r in self.requests if r.began >= since and r.error is not None]


@asynccontextmanager
async def traffic(
    engine: AsyncEngine, work: Work = read, callers: int = 4
) -> AsyncIterator[Traffic]:
    """Some callers in the background, on a pool that is warm."""
    await warm_up(engine)
    async with asyncio.TaskGroup() as group:
        going = Traffic(engine, work, group)
        going.grow(callers)
        await asyncio.sleep(0.1)
        yield going
        going.stop()


async def assert_served(going: Traffic, since: float) -> None:
    """Soon, and nobody who came later met a connection of before."""
    assert await going.until_served(since) < SOON
    await asyncio.sleep(0.3)
    assert going.errors(since) == []


def now() -> float:
    return asyncio.get_running_loop().time()


# -- One server ----------------------------------------------------------------------------------


class TestOneServer:
    """Whatever ended the connections."""

    @pytest.mark.parametrize("mode", ["fast", "immediate"])
    async def test_restart(self, make, own, mode) -> None:
        """In an orderly way, and by a crash."""
        engine = make(own.url)
        async with traffic(engine) as going:
            await asyncio.to_thread(own.restart, mode)
            await assert_served(going, now())
        assert going.most_opening <= 2

    @pytest.mark.parametrize("mode", ["fast", "immediate"])
    async def test_no_stampede(self, make, own, proxy, mode) -> None:
        """Each connect has one attempt, and one more beside it while it is without an answer.

        And one scout finds out for all of them whether there is an answer.
        """
        engine = make(proxy.url)
        async with traffic(engine, callers=40) as going:
            await asyncio.to_thread(own.restart, mode)
            await assert_served(going, now())
        assert going.most_opening <= 2
        assert proxy.stats.max_connecting <= 2 * 2 + 1

    async def test_backends_killed(self, make, own) -> None:
        """All of them, in use and idle."""
        engine = make(own.url, application_name="to-be-killed")
        kill = (
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE application_name = 'to-be-killed'"
        )
        outside = await asyncpg.connect(own.url)
        async with traffic(engine) as going:
            await outside.execute(kill)
            await asyncio.sleep(0.1)  # until the client has read it
            await assert_served(going, now())
        await outside.close()

    async def test_way_reset(self, make, proxy) -> None:
        """A load balancer that forgets its connections."""
        engine = make(proxy.url)
        async with traffic(engine) as going:
            proxy.reset()
            await asyncio.sleep(0.1)  # until the client has read it
            await assert_served(going, now())

    async def test_wake_up(self, make, proxy) -> None:
        """All who come while it sleeps are served when it wakes; its old connections are dead."""
        engine = make(proxy.url, pool_ping_idle=0)
        await warm_up(engine)
        proxy.sleep(wake_after=1.0)
        awake = now() + 1.0
        ended = []

        async def ask() -> None:
            await read(engine)
            ended.append(now())

        async with asyncio.TaskGroup() as group:
            for _ in range(20):
                group.create_task(ask())
        assert min(ended) < awake + SOON
        assert pool_stats(engine).pings_failed == 4
        assert proxy.stats.max_connecting <= 2 * 2 + 1

    async def test_siblings_are_checked(self, make, proxy) -> None:
        """One is lost under a statement: the idle ones, dead in silence, are found out."""
        engine = make(proxy.url, max_overflow=0)
        await warm_up(engine)
        async with engine.connect() as connection:
            await connection.execute(SELECT)
            proxy.freeze()
            used = connection.sync_connection.connection.driver_connection
            used.terminate()
            with pytest.raises(ConnectionLost):
                await connection.execute(SELECT)
        began = now()
        await asyncio.gather(*(read(engine) for _ in range(4)))
        assert now() - began < PING + SOON
        async with asyncio.timeout(PING + SLACK):
            while pool_stats(engine).used:
                await asyncio.sleep(0.01)
        stats = pool_stats(engine)
        assert (stats.pings, stats.pings_failed, stats.idle) == (3, 3, 1)


# -- Two servers ---------------------------------------------------------------------------------


@pytest.fixture
def pair() -> Iterator[tuple[PostgresServer, PostgresServer]]:
    """A primary and its standby."""
    with postgres() as primary, standby(primary) as second:
        yield primary, second


class TestFailover:
    """The engine is in use throughout, and several hosts with read-write follow the primary."""

    @staticmethod
    def both(first: PostgresServer | FaultProxy, second: PostgresServer, primary) -> str:
        login = primary.url.split("@")[0]
        hosts = f"127.0.0.1:{first.port},127.0.0.1:{second.port}"
        return f"{login}@{hosts}/postgres?target_session_attrs=read-write"

    @pytest.mark.parametrize("mode", ["fast", "immediate"])
    async def test_stopped(self, make, pair, mode) -> None:
        """Its port refuses."""
        primary, second = pair
        engine = make(self.both(primary, second, primary))
        async with traffic(engine, write) as going:
            await asyncio.to_thread(primary.stop, mode)
            await asyncio.to_thread(second.promote)
            await assert_served(going, now())
            assert await port(engine) == second.port

    async def test_frozen(self, make, pair) -> None:
        """Its packets vanish, as with a machine that has stopped."""
        primary, second = pair
        with FaultProxy(primary) as proxy:
            engine = make(self.both(proxy, second, primary))
            async with traffic(engine, write) as going:
                proxy.freeze()
                proxy.silence()
                await asyncio.to_thread(second.promote)
                await asyncio.sleep(1.1)  # until what is idle is checked before use
                back = now()
                going.grow(4)  # the others wait for their statements' limit
                await assert_served(going, back)
                assert await port(engine) == second.port

    async def test_made_read_only(self, make, pair) -> None:
        """It answers, and refuses to write: the connections that are there are left."""
        primary, second = pair
        engine = make(self.both(primary, second, primary))
        async with traffic(engine, write) as going:
            await asyncio.to_thread(second.promote)
            assert await port(engine) == primary.port
            began = now()
            await asyncio.to_thread(primary.set_read_only)
            async with asyncio.timeout(SLACK):
                while not going.errors(began):
                    await asyncio.sleep(0.005)
            await assert_served(going, now())
            assert {type(error) for error in going.errors(began)} == {ReadOnlyServer}
            assert await port(engine) == second.port


async def port(engine: AsyncEngine) -> int:
    async with engine.connect() as connection:
        return int((await connection.execute(text("SHOW port"))).scalar())


class TestReadOnly:
    """25006 on a server that should take writes."""

    @pytest.fixture
    async def read_only(self, own) -> AsyncIterator[Callable[..., Awaitable[None]]]:
        async def set_it(value: bool) -> None:  # noqa: FBT001
            await asyncio.to_thread(own.set_read_only, value)

        yield set_it
        await set_it(False)

    async def test_it_is_left(self, make, own, read_only) -> None:
        """The connection and all its siblings, in use or idle; new ones are made."""
        engine = make(own.url)
        await warm_up(engine)
        closed = []
        observe(engine, closed.append)
        async with engine.connect() as other:
            await other.execute(SELECT)
            await read_only(True)
            with pytest.raises(ReadOnlyServer) as caught:
                await write(engine)
            assert caught.value.connection_invalidated
            assert pool_stats(engine).idle == 0
        assert pool_stats(engine).idle == 0
        reasons = [event.reason for event in closed if isinstance(event, ConnectionClosed)]
        assert sorted(reasons) == sorted(
            [CloseReason.INVALIDATED, CloseReason.LOST, CloseReason.LOST, CloseReason.DISPOSED]
        )
        await read_only(False)
        await write(engine)
        assert pool_stats(engine).opened == 5

    async def test_asked_for(self, make, own) -> None:
        """The connections stay."""
        engine = make(own.url)
        await warm_up(engine)
        asked = engine.execution_options(postgresql_readonly=True)
        with pytest.raises(ReadOnlyServer) as caught:
            await write(asked)
        assert not caught.value.connection_invalidated
        assert pool_stats(engine).idle == 4


# -- Failing fast --------------------------------------------------------------------------------


class TestFailingFast:
    """A server that is down costs a caller no time."""

    async def test_silence(self, make, proxy) -> None:
        """Told at once after three in a row, and served soon after it is back."""
        engine = make(proxy.url, connection_timeout=0.3)
        proxy.silence()
        for _ in range(3):
            with pytest.raises(ConnectTimeout):
                await read(engine)
        began = now()
        with pytest.raises(ConnectTimeout) as caught:
            await read(engine)
        assert now() - began < 0.25
        assert caught.value.__notes__
        proxy.accept()
        back = now()
        while True:
            try:
                await read(engine)
            except ConnectTimeout:
                assert now() - back < SOON
                await asyncio.sleep(0.01)
            else:
                break
        assert now() - back < SOON

    async def test_a_cold_start_is_waited_for(self, make, proxy) -> None:
        """All callers get through, in the order in which they came."""
        engine = make(proxy.url, connection_timeout=SLACK, pool_size=2, max_overflow=0)
        proxy.sleep(wake_after=1.5)
        served = []

        async def ask(number: int) -> None:
            async with engine.connect() as connection:
                served.append(number)
                await connection.execute(SELECT)

        await asyncio.gather(*(ask(number) for number in range(20)))
        assert served == list(range(20))
        assert pool_stats(engine).overloads == 0
