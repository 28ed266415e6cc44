"""A driver without a network: connects that are slow, fail or hang, connections that die.

It remembers every connection ever made and who has it, so that the pool's counts can be compared
with the truth. Time is the event loop's, which the tests make virtual.
"""

import asyncio
import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import looptime
from sqlalchemy.pool import PoolProxiedConnection
from sqlalchemy.util import await_only, greenlet_spawn
from sqlalchemy.util.concurrency import in_greenlet

from poolkit.pool import HandoffPool

CONNECT_BOUND = 10.0
"""Seconds after which a connect that hangs gives up, as poolkit's connector does."""


class ConnectionLost(Exception):
    """What the fake driver raises on a connection that is gone."""


class CannotConnect(OSError):
    """What it raises when a connect is to fail."""


class FakeDriverConnection:
    """One connection, as the driver has it.

    Attributes:
        number: Counted from 1, in the order in which they were made.
        closed: The driver knows that it is gone.
        frozen: The peer vanished: nothing is ever answered.
        broken: The peer answers each statement with an error.
        said_goodbye: It was closed in good order.
        closing: A close is under way.
        holders: Who has it now; more than one is a fault of the pool.
        pings: How many ``SELECT 1`` it was sent.
    """

    def __init__(self, server: "FakeServer", number: int) -> None:
        self.server = server
        self.number = number
        self.closed = self.frozen = self.broken = self.said_goodbye = self.closing = False
        self.holders: list[object] = []
        self.pings = 0
        self._unanswered: set[asyncio.Future[None]] = set()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "frozen" if self.frozen else "open"
        return f"<connection {self.number}, {state}>"

    def is_closed(self) -> bool:
        return self.closed

    def terminate(self) -> None:
        """Drop the socket; whoever waits for an answer learns of it."""
        self.closed = True
        for future in self._unanswered:
            if not future.done():
                future.set_exception(ConnectionLost("connection lost"))

    kill = terminate
    """The server ends the session, and the driver is told at once."""

    async def close(self, *, timeout: float | None = None) -> None:
        if self.closed:
            return
        self.closing = True
        try:
            async with asyncio.timeout(timeout):
                with contextlib.suppress(ConnectionLost):
                    await self.round_trip(self.server.close_delay)
            self.said_goodbye = True
        finally:  # as asyncpg: aborted if it was interrupted
            self.closing = False
            self.terminate()

    async def execute(self, query: str) -> str:
        assert query == "SELECT 1"
        self.pings += 1
        await self.round_trip(self.server.ping_delay)
        return query

    async def round_trip(self, delay: float) -> None:
        if self.closed:
            raise ConnectionLost("the connection is closed")
        if self.frozen or delay:
            answer = asyncio.get_running_loop().create_future()
            self._unanswered.add(answer)
            try:
                async with asyncio.timeout(None if self.frozen else delay):
                    await answer
            except TimeoutError:
                if self.frozen:  # it vanished in the meantime
                    await answer
            finally:
                self._unanswered.discard(answer)
        if self.closed:
            raise ConnectionLost("connection lost")
        if self.broken:
            raise ConnectionLost("the server is in no mood")


class FakeConnection:
    """The DBAPI's side of it, as SQLAlchemy adapts an async driver."""

    def __init__(self, driver: FakeDriverConnection) -> None:
        self.driver = driver
        self.calls: list[str] = []
        self.in_transaction = False

    def rollback(self) -> None:
        self._end_transaction("rollback")

    def commit(self) -> None:
        self._end_transaction("commit")

    def _end_transaction(self, how: str) -> None:
        self.calls.append(how)
        if self.in_transaction:
            self.in_transaction = False
            await_only(self.driver.round_trip(self.driver.server.rollback_delay))

    def close(self) -> None:
        self.calls.append("close")
        await_only(self.driver.close())

    def terminate(self) -> None:
        """As ``sqlalchemy.connectors.asyncio.AsyncAdapt_terminate``: with good manners if it can."""
        self.calls.append("terminate")
        if not in_greenlet():
            self.driver.terminate()
            return
        closing = asyncio.ensure_future(self.driver.close(timeout=2))
        closing.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            await_only(asyncio.shield(closing))
        except (TimeoutError, asyncio.CancelledError, OSError, ConnectionLost) as error:
            self.driver.terminate()
            if isinstance(error, asyncio.CancelledError):
                raise


class FakeDialect:
    """As much of a dialect as a pool asks for."""

    is_async = True
    has_terminate = True

    def do_rollback(self, connection: Any) -> None:
        connection.rollback()

    def do_commit(self, connection: Any) -> None:
        connection.commit()

    def do_close(self, connection: Any) -> None:
        connection.close()

    def do_terminate(self, connection: Any) -> None:
        connection.terminate()

    def get_driver_connection(self, connection: Any) -> Any:
        return connection.driver


class FakeServer:
    """Makes connections the way it is told to.

    Attributes:
        made: Every connection ever made.
        connecting: The tasks that have a connect under way.
        connects: Connects ever begun.
        connect_delay, ping_delay, rollback_delay, close_delay: Seconds that each takes.
        errors: Raised by the next connects, one each, in this order.
        refusing: Every connect fails.
        hanging: A connect gets no answer before ``CONNECT_BOUND``.
    """

    def __init__(self) -> None:
        self.made: list[FakeDriverConnection] = []
        self.connecting: list[asyncio.Task[Any] | None] = []
        self.connects = 0
        self.connect_delay = self.ping_delay = self.rollback_delay = self.close_delay = 0.0
        self.errors: list[BaseException] = []
        self.refusing = self.hanging = False

    def connect(self) -> FakeConnection:
        """A pool's creator."""
        return FakeConnection(await_only(self._connect()))

    async def _connect(self) -> FakeDriverConnection:
        self.connects += 1
        task = asyncio.current_task()
        self.connecting.append(task)
        error = self.errors.pop(0) if self.errors else None
        if error is None and self.refusing:
            error = CannotConnect("refused")
        try:
            if self.hanging:
                await asyncio.sleep(CONNECT_BOUND)
                raise TimeoutError("no answer")
            if self.connect_delay:
                await asyncio.sleep(self.connect_delay)
            if error is not None:
                raise error
        finally:
            self.connecting.remove(task)
        self.made.append(FakeDriverConnection(self, len(self.made) + 1))
        return self.made[-1]

    @property
    def open(self) -> list[FakeDriverConnection]:
        """Connections that have not ended."""
        return [connection for connection in self.made if not connection.closed]


class Caller:
    """A task that checks a connection out, and does with it what it is told.

    Attributes:
        name: The task's.
        proxy: What it holds, if it does.
        error: What it got instead.
        driver: The connection that it has.
        leaving: The one that it is giving back.
        detached: The one that it took away from the pool.
        got_at: When it got its connection.
        ended_at: When it was done.
    """

    def __init__(
        self,
        pool: HandoffPool,
        name: str = "caller",
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self.pool = pool
        self.name = name
        self.proxy: PoolProxiedConnection | None = None
        self.error: BaseException | None = None
        self.got_at: float | None = None
        self.ended_at: float | None = None
        self.on_checkout: Callable[[Caller], None] | None = None
        self.driver: FakeDriverConnection | None = None
        self.leaving: FakeDriverConnection | None = None
        self.detached: FakeDriverConnection | None = None
        self.orders: asyncio.Queue[str] = asyncio.Queue()
        loop = loop or asyncio.get_running_loop()
        self.task = loop.create_task(self._main(), name=name)

    async def _main(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            self.proxy = await greenlet_spawn(self.pool.connect)
            self.got_at = loop.time()
            self._take()
            while self.proxy is not None:
                await self._obey(await self.orders.get())
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 (kept for the test)
            self.error = error.with_traceback(None)  # which would hold the proxy
            if self.proxy is not None:
                with contextlib.suppress(asyncio.CancelledError):  # the task would keep it, too
                    await self._leave(error)
        finally:
            self.proxy = None
            self._put_down()
            self.leaving = None
            self.ended_at = loop.time()

    def _take(self) -> None:
        self.driver = self.proxy.driver_connection
        self.driver.holders.append(self)
        if self.on_checkout is not None:
            self.on_checkout(self)

    def _put_down(self) -> None:
        if self.driver is not None:
            self.driver.holders.remove(self)
            self.leaving, self.driver = self.driver, None

    async def _leave(self, error: BaseException) -> None:
        """As SQLAlchemy's ``Connection``: a cancelled statement invalidates, then close."""
        proxy, self.proxy = self.proxy, None
        self._put_down()
        if proxy.is_valid and not proxy.is_detached and isinstance(error, asyncio.CancelledError):
            await greenlet_spawn(proxy.invalidate, error)
        elif proxy.is_valid:
            await greenlet_spawn(proxy.close)

    async def _obey(self, order: str) -> None:
        proxy = self.proxy
        if proxy.is_detached and order in ("soft", "detach", "invalidate", "lose"):
            order = "close"  # anything else leaves it open, on QueuePool too
        if order == "begin":
            proxy.dbapi_connection.in_transaction = True
            return
        if order == "soft":
            proxy.invalidate(soft=True)
            return
        if order == "detach":
            self.detached = self.driver
            await greenlet_spawn(proxy.detach)
            return
        self.proxy = None
        self._put_down()
        if order == "close":
            await greenlet_spawn(proxy.close)
        elif order == "invalidate":
            await greenlet_spawn(proxy.invalidate)
        elif order == "lose":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # SQLAlchemy says what happened, rightly
                del proxy
        else:
            raise AssertionError(order)

    @property
    def holds(self) -> bool:
        return self.proxy is not None

    @property
    def done(self) -> bool:
        return self.task.done()

    def do(self, order: str) -> None:
        """``close``, ``invalidate``, ``soft``, ``detach``, ``lose`` or ``begin``."""
        self.orders.put_nowait(order)

    def cancel(self) -> None:
        self.task.cancel()

    async def get(self) -> PoolProxiedConnection:
        """Wait for the connection, or raise what it got; a minute is for ever."""
        async with asyncio.timeout(60):
            while not self.holds and not self.done:
                await asyncio.sleep(0.001)
        if self.error is not None:
            raise self.error
        assert self.proxy is not None
        return self.proxy

    async def give_back(self, how: str = "close") -> None:
        """Check in, and wait until that is done."""
        self.do(how)
        await asyncio.wait([self.task])


def virtual_loop() -> asyncio.AbstractEventLoop:
    """An event loop that does not wait for time to pass."""
    return looptime.patch_event_loop(asyncio.new_event_loop(), noop_cycles=0)


def on_virtual_time(main: Callable[[], Any]) -> Any:
    """Run a coroutine function; nothing may be left of it, and nothing may have gone unheard."""
    unheard: list[dict[str, Any]] = []

    async def watched() -> Any:
        asyncio.get_running_loop().set_exception_handler(lambda _, what: unheard.append(what))
        return await main()

    with asyncio.Runner(loop_factory=virtual_loop) as runner:
        result = runner.run(watched())
    assert unheard == []
    return result


async def settle(rounds: int = 12) -> None:
    """Let everything run that can run without time passing."""
    for _ in range(rounds):
        await asyncio.sleep(0)


def make_pool(server: FakeServer, **settings: Any) -> HandoffPool:
    """A pool on the fakes, of one connection that waits for ever unless told otherwise."""
    defaults = {"pool_size": 1, "max_overflow": 0, "dialect": FakeDialect()}
    return HandoffPool(server.connect, **(defaults | settings))


async def finish(pool: HandoffPool) -> None:
    """End a test: no connection of the pool's is left."""
    await greenlet_spawn(pool.dispose)
    await asyncio.sleep(CONNECT_BOUND + 3)
    with contextlib.suppress(AttributeError):
        await pool.drain(0)


def on_fakes(test: Callable[[FakeServer], Any]) -> Callable[[], None]:
    """Run ``test(server)`` on virtual time; no task and no unheard error may be left."""

    def run() -> None:
        on_virtual_time(lambda: test(FakeServer()))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


async def callers(pool: HandoffPool, n: int, first: str = "caller") -> list[Caller]:
    """That many tasks that ask for a connection."""
    made = [Caller(pool, f"{first}-{i}") for i in range(n)]
    await settle()
    return made


async def holding(pool: HandoffPool, n: int = 1) -> list[Caller]:
    """That many that have one."""
    made = await callers(pool, n, "holder")
    for caller in made:
        await caller.get()
    return made


async def idle(pool: HandoffPool, n: int = 1) -> None:
    """Leave that many idle connections."""
    for caller in await holding(pool, n):
        await caller.give_back()
