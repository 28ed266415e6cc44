"""No wait without an end: whatever is under way, whenever the peer freezes, however one leaves."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

from poolkit import (
    ConnectTimeout,
    DatabaseSettings,
    PoolTimeout,
    StatementTimeout,
    create_async_engine,
    drain,
    pool_stats,
)
from poolkit.driver import BACKSTOP_MARGIN, CLOSE_TIMEOUT
from poolkit.pool.connects import MARGIN
from poolkit.testing import At, FaultProxy, PostgresServer, Signal

CONNECT = 1.0
PING = 0.3
POOL = 1.0
STATEMENT = 1.0
DRAIN = 0.2

ANSWER = STATEMENT + BACKSTOP_MARGIN
"""Seconds that the client waits for the answer to any one thing it says to the server."""

FAREWELL = CLOSE_TIMEOUT
"""Seconds that a peer has to acknowledge the end of a connection that is closed or discarded."""

SLACK = 3.0
"""Seconds that a busy machine may take for what takes none."""

LONGEST = 40.0
"""Seconds for all cases, side by side; 5 on a machine that has nothing else to do."""

MARK = text("SELECT 1 AS mark")
ROWS = text("SELECT generate_series(1, 100) AS mark")

_numbers = count(1)


# -- What the caller does ------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """What a case has to itself.

    Attributes:
        arm: Has the peer freeze, now or at its moment.
        held: Connections to give back at the end.
    """

    engine: AsyncEngine
    arm: Callable[[], None]
    held: list[AsyncConnection] = field(default_factory=list)


Work = Callable[[Scene], Awaitable[object]]
Fault = Callable[[FaultProxy], Signal[Any]]


async def check_out(scene: Scene) -> None:
    scene.arm()
    async with scene.engine.connect():
        pass


async def execute(scene: Scene) -> None:
    scene.arm()
    async with scene.engine.connect() as connection:
        await connection.execute(ROWS)


async def execute_anew(scene: Scene) -> None:
    """A statement that is in no cache yet."""
    scene.arm()
    async with scene.engine.connect() as connection:
        await connection.execute(text(f"SELECT 1 AS mark, {next(_numbers)}"))


async def execute_in_autocommit(scene: Scene) -> None:
    engine = scene.engine.execution_options(isolation_level="AUTOCOMMIT")
    scene.arm()
    async with engine.connect() as connection:
        await connection.execute(ROWS)


async def execute_many(scene: Scene) -> None:
    scene.arm()
    async with scene.engine.connect() as connection:
        await connection.execute(
            text("SELECT set_config('poolkit.mark', :mark, true)"),
            [{"mark": str(number)} for number in range(9)],
        )


async def limit_in_mid_transaction(scene: Scene) -> None:
    """One more statement before, and one after."""
    async with scene.engine.connect() as connection:
        await connection.execute(MARK)
        scene.arm()
        await connection.execute(ROWS, execution_options={"statement_timeout": STATEMENT / 2})


async def savepoint(scene: Scene) -> None:
    scene.arm()
    async with scene.engine.connect() as connection, connection.begin_nested() as inner:
        await connection.execute(MARK)
        await inner.rollback()


async def commit(scene: Scene) -> None:
    scene.arm()
    async with scene.engine.begin() as connection:
        await connection.execute(MARK)


async def leave_block(scene: Scene) -> None:
    scene.arm()
    async with scene.engine.connect() as connection:
        await connection.execute(MARK)


async def roll_back(scene: Scene) -> None:
    scene.arm()
    async with scene.engine.connect() as connection:
        await connection.execute(MARK)
        await connection.rollback()


async def leave_by_an_error(scene: Scene) -> None:
    scene.arm()
    with suppress(ZeroDivisionError):
        async with scene.engine.begin() as connection:
            await connection.execute(MARK)
            raise ZeroDivisionError


async def stream(scene: Scene) -> None:
    scene.arm()
    options = {"yield_per": 10}
    async with (
        scene.engine.connect() as connection,
        connection.stream(ROWS, execution_options=options) as rows,
    ):
        async for _ in rows:
            pass


async def go_on_streaming(scene: Scene) -> None:
    options = {"yield_per": 10}
    async with (
        scene.engine.connect() as connection,
        connection.stream(ROWS, execution_options=options) as rows,
    ):
        await rows.fetchone()
        scene.arm()
        async for _ in rows:
            pass


async def stop_streaming(scene: Scene) -> None:
    options = {"yield_per": 10}
    async with (
        scene.engine.connect() as connection,
        connection.stream(ROWS, execution_options=options) as rows,
    ):
        await rows.fetchone()
        scene.arm()


async def use_session(scene: Scene) -> None:
    scene.arm()
    async with AsyncSession(scene.engine) as session:
        await session.execute(MARK)


async def close_session(scene: Scene) -> None:
    session = AsyncSession(scene.engine)
    await session.execute(MARK)
    scene.arm()
    await session.close()


async def commit_session(scene: Scene) -> None:
    scene.arm()
    async with AsyncSession(scene.engine) as session, session.begin():
        await session.execute(MARK)


async def dispose(scene: Scene) -> None:
    scene.arm()
    await scene.engine.dispose()


async def dispose_in_use(scene: Scene) -> None:
    """What is in use is closed as it comes back."""
    async with scene.engine.connect() as connection:
        await connection.execute(MARK)
        scene.arm()
        await scene.engine.dispose()


async def drain_idle(scene: Scene) -> None:
    scene.arm()
    await drain(scene.engine, DRAIN)


async def drain_in_use(scene: Scene) -> None:
    """A holder that does not give its connection back."""
    connection = await scene.engine.connect().start()
    scene.held.append(connection)
    await connection.execute(MARK)
    scene.arm()
    await drain(scene.engine, DRAIN)


async def stand_in_line(scene: Scene) -> None:
    """Behind a holder that does not give its connection back for longer than one waits."""
    scene.held.append(await scene.engine.connect().start())
    scene.arm()
    async with scene.engine.connect():
        pass


# -- When the peer freezes -----------------------------------------------------------------------


def before(moment: Any, **options: bool) -> Fault:
    return lambda proxy: proxy.freeze_at(before=moment, **options)


def after(moment: Any) -> Fault:
    return lambda proxy: proxy.freeze_at(after=moment)


def and_silent(fault: Fault) -> Fault:
    """And nothing gets through on new connections either, such as requests to cancel."""

    def both(proxy: FaultProxy) -> Signal[Any]:
        proxy.silence()
        return fault(proxy)

    return both


def silent(proxy: FaultProxy) -> Signal[Any]:
    proxy.silence()
    return proxy.until(lambda stats: stats.connecting > 0)


def asleep(proxy: FaultProxy) -> Signal[Any]:
    proxy.sleep()
    return proxy.until(lambda stats: stats.connecting > 0)


def now(proxy: FaultProxy) -> Signal[Any]:
    proxy.freeze()
    return proxy.until(lambda stats: True)


def never(proxy: FaultProxy) -> Signal[Any]:
    return proxy.until(lambda stats: True)


@dataclass(frozen=True)
class Case:
    """One thing to do, and one moment at which the peer freezes.

    Attributes:
        bound: Seconds from that moment until who waits has a result.
        leave: Seconds from then until who is cancelled is gone.
        error: What the one gets who waits; None: what it wanted.
        is_shielded: SQLAlchemy finishes it first: who is cancelled gets the result all the same.
            Earlier releases of 2.0 let the cancellation through.
        cold: Whether there is no connection yet.
    """

    name: str
    work: Work
    fault: Fault
    bound: float = ANSWER + FAREWELL
    leave: float = FAREWELL
    error: type[Exception] | None = StatementTimeout
    is_shielded: bool = False
    cold: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


def connecting(name: str, fault: Fault, error: type[Exception] | None = ConnectTimeout) -> Case:
    return Case(f"connect: {name}", check_out, fault, CONNECT, 0.0, error, cold=True)


def pinging(name: str, fault: Fault, bound: float, error: type[Exception] | None) -> Case:
    return Case(name, check_out, fault, bound, 0.0, error, settings={"pool_ping_idle": 0})


def leaving(name: str, work: Work, fault: Fault) -> Case:
    """The end of an `async with` block, which SQLAlchemy has in a task of its own."""
    bound = ANSWER + FAREWELL
    return Case(name, work, fault, bound, leave=bound, is_shielded=True)


def ending(name: str, work: Work, fault: Fault, bound: float = FAREWELL) -> Case:
    return Case(name, work, fault, bound, leave=0.0, error=None)


CASES = [
    Case("stand in line", stand_in_line, never, POOL, leave=0.0, error=PoolTimeout),
    connecting("silence", silent),
    connecting("sleep", asleep),
    connecting("startup packet", before(At("StartupMessage"), every=True)),
    connecting("SASL", before(At("AuthenticationSASL"), every=True)),
    connecting("SASL initial response", before(At("SASLInitialResponse"))),
    connecting("SASL continue", before(At("AuthenticationSASLContinue"))),
    connecting("SASL response", before(At("SASLResponse"))),
    connecting("SASL final", before(At("AuthenticationSASLFinal"))),
    connecting("after AuthenticationOk", after(At("AuthenticationOk"))),
    connecting("before ReadyForQuery", before(At("ReadyForQuery"))),
    connecting("look for a pooler", before("SELECT 1 WHERE")),
    Case(
        "first connect: SQLAlchemy asks for the version",
        check_out,
        before(At("Parse", "select pg_catalog.version")),
        CONNECT + MARGIN + FAREWELL,
        error=ConnectTimeout,
        cold=True,
    ),
    pinging("ping", before("SELECT 1"), PING, None),
    pinging("ping, reply", after("SELECT 1"), PING, None),
    pinging("ping, network down", and_silent(before("SELECT 1")), PING + CONNECT, ConnectTimeout),
    Case("BEGIN", execute, before("BEGIN")),
    Case("BEGIN, reply", execute, after("BEGIN")),
    Case("Parse", execute_anew, before(At("Parse"))),
    Case("Describe", execute_anew, before(At("Describe"))),
    Case("ParseComplete", execute_anew, before(At("ParseComplete"))),
    Case("Bind", execute, before(At("Bind"))),
    Case("Execute", execute, before(At("Execute"))),
    Case("Execute, replies only", execute, before(At("BindComplete"), replies_only=True)),
    Case("mid-result", execute, after(At("DataRow"))),
    Case("after the result", execute, after(At("CommandComplete", "SELECT"))),
    Case("statement, network down", execute, and_silent(before(At("Bind")))),
    Case("AUTOCOMMIT", execute_in_autocommit, before(At("Bind"))),
    Case("executemany", execute_many, before(At("Execute"))),
    Case("own limit: set", limit_in_mid_transaction, before(re.compile("set_config"))),
    Case("own limit: statement", limit_in_mid_transaction, before(re.compile("mark"))),
    Case("SAVEPOINT", savepoint, before("SAVEPOINT")),
    Case("ROLLBACK TO", savepoint, before("ROLLBACK TO")),
    Case("COMMIT", commit, before("COMMIT")),
    Case("COMMIT, reply", commit, after("COMMIT")),
    Case("COMMIT, network down", commit, and_silent(before("COMMIT"))),
    Case("ROLLBACK", roll_back, before("ROLLBACK")),
    Case("ROLLBACK after an error", leave_by_an_error, before("ROLLBACK")),
    leaving("ROLLBACK on exit", leave_block, before("ROLLBACK")),
    leaving("ROLLBACK on exit, reply", leave_block, after("ROLLBACK")),
    leaving("ROLLBACK on exit, network down", leave_block, and_silent(before("ROLLBACK"))),
    Case("stream: Bind", stream, before(At("Bind"))),
    Case("stream: first fetch", stream, before(At("Execute"))),
    Case("stream: later fetch", go_on_streaming, before(At("Execute"))),
    Case("stream: mid-fetch", go_on_streaming, after(At("DataRow"))),
    leaving("stream: exit", stop_streaming, before("ROLLBACK")),
    Case("session: statement", use_session, before(At("Bind"))),
    Case("session: COMMIT", commit_session, before("COMMIT")),
    Case("session: close()", close_session, before("ROLLBACK")),
    leaving("session: exit", use_session, before("ROLLBACK")),
    ending("dispose: Terminate", dispose, before(At("Terminate"))),
    ending("dispose: frozen", dispose, now),
    leaving("dispose: in use", dispose_in_use, now),
    ending("drain: idle", drain_idle, now),
    ending("drain: in use", drain_in_use, now, DRAIN + FAREWELL),
    ending("drain: in use, network down", drain_in_use, and_silent(now), DRAIN + FAREWELL),
]

RESCUED = [
    # No byte has come, so that a second attempt is begun beside the first.
    connecting("startup packet, once", before(At("StartupMessage")), None),
    connecting("SASL, once", before(At("AuthenticationSASL")), None),
]


# -- How the caller leaves -----------------------------------------------------------------------


async def wait(task: asyncio.Task[None], limit: asyncio.Timeout) -> None:
    """No help from outside: the bound ends it."""


async def reach_deadline(task: asyncio.Task[None], limit: asyncio.Timeout) -> None:
    """An `asyncio.timeout` that ends now."""
    limit.reschedule(asyncio.get_running_loop().time())


async def cancel(task: asyncio.Task[None], limit: asyncio.Timeout) -> None:
    task.cancel()


async def cancel_twice(task: asyncio.Task[None], limit: asyncio.Timeout) -> None:
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()


Leave = Callable[[asyncio.Task[None], asyncio.Timeout], Awaitable[None]]


def expected(case: Case, how: Leave) -> tuple[float, set[type[BaseException]]]:
    """How long it may take, and what may be raised."""
    result = case.error or type(None)
    if how is wait:
        return case.bound, {result}
    gone = TimeoutError if how is reach_deadline else asyncio.CancelledError
    if case.is_shielded:
        return case.bound, {result, gone}
    return case.leave, {gone}


# -- The test ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", [wait, reach_deadline, cancel, cancel_twice], ids=lambda f: f.__name__
)
async def test_every_wait_ends(server: PostgresServer, how: Leave) -> None:
    """In time, with the right error; no slot, task or session is left, and the pool serves on."""
    cases = CASES + RESCUED if how is wait else CASES
    few = asyncio.Semaphore(2)
    runs = [asyncio.create_task(play(case, how, server, few), name=case.name) for case in cases]
    _, late = await asyncio.wait(runs, timeout=LONGEST)
    assert [run.get_name() for run in late] == []
    failed = {run.get_name(): run.exception() for run in runs if run.exception() is not None}
    assert failed == {}
    async with asyncio.timeout(SLACK):
        while asyncio.all_tasks() != {asyncio.current_task()}:
            await asyncio.sleep(0.01)


async def play(case: Case, how: Leave, server: PostgresServer, few: asyncio.Semaphore) -> None:
    """A case; `few` begin or connect at once, so that a crowd does not wait for the processor."""
    name = f"wait-{next(_numbers)}"
    with ExitStack() as stack:
        async with few:
            proxy = stack.enter_context(FaultProxy(server))
            engine = create_async_engine(settings=settings(case, proxy, name))
            if not case.cold:
                await warm(engine)
        bound, errors = expected(case, how)
        took, raised = await leave(case, how, proxy, engine)
        assert took < bound + SLACK
        assert type(raised) in errors
        await until_settled(engine)
        proxy.heal()
        if case.work in {drain_idle, drain_in_use}:
            await engine.dispose()
        async with few, asyncio.timeout(SLACK):
            await warm(engine)
        await engine.dispose()
        assert await sessions_left(server, name) == 0


def settings(case: Case, proxy: FaultProxy, name: str) -> DatabaseSettings:
    values = {
        "url": f"{proxy.url}?sslmode=disable",
        "application_name": name,
        "connection_timeout": CONNECT,
        "statement_timeout": STATEMENT,
        "pool_timeout": POOL,
        "pool_ping_timeout": PING,
        "pool_size": 1,
        "max_overflow": 0,
    }
    return DatabaseSettings(**(values | case.settings))


async def warm(engine: AsyncEngine) -> None:
    """A connection that knows the statements."""
    async with engine.connect() as connection:
        await connection.execute(ROWS)
        assert (await connection.execute(MARK)).scalar() == 1


async def leave(
    case: Case, how: Leave, proxy: FaultProxy, engine: AsyncEngine
) -> tuple[float, BaseException | None]:
    """How long the caller takes from the moment on, and what it ends with."""
    loop = asyncio.get_running_loop()
    armed: asyncio.Future[Signal[Any]] = loop.create_future()
    scene = Scene(engine, lambda: armed.set_result(case.fault(proxy)))
    limit = asyncio.timeout(None)

    async def work() -> None:
        async with limit:
            await case.work(scene)

    task = asyncio.create_task(work())
    await (await armed)
    for _ in range(100):
        await asyncio.sleep(0)  # where no message tells, until it stands at its wait
    began = loop.time()
    await how(task, limit)
    done, _ = await asyncio.wait({task}, timeout=case.bound + SLACK)
    assert done, f"{case.name} has no end"
    took = loop.time() - began
    for connection in scene.held:
        with suppress(DBAPIError):
            await connection.close()
    return took, asyncio.CancelledError() if task.cancelled() else task.exception()


async def until_settled(engine: AsyncEngine) -> None:
    """No slot is in use although the peer is still frozen, and a connect for nobody ends, too."""
    async with asyncio.timeout(CONNECT + ANSWER + FAREWELL + SLACK):
        while (stats := pool_stats(engine)).used or stats.opening:
            await asyncio.sleep(0.01)
    assert stats.waiting == 0


async def sessions_left(server: PostgresServer, name: str) -> int:
    """The engine's sessions at the server, once there are none or some seconds have passed."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1"
    outside = await asyncpg.connect(server.url)
    with suppress(TimeoutError):
        async with asyncio.timeout(SLACK):
            while await outside.fetchval(query, name):
                await asyncio.sleep(0.01)
    left = await outside.fetchval(query, name)
    await outside.close()
    return left
