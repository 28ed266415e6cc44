"""The demo's faults: each is provoked, watched from the caller's side and the pool's, checked."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from poolkit.cli import burst
from poolkit.cli.outcome import Outcome
from poolkit.cli.output import duration
from poolkit.cli.watch import Watch
from poolkit.engine import create_async_engine
from poolkit.errors import ConnectError, PoolDraining, StatementTimeout
from poolkit.lifecycle import drain

LIMIT = 0.3
"""Seconds: the statement timeout that is provoked."""

SLEEP = 10
"""Seconds that a statement would take if nothing ended it."""

DYING = 0.2
"""Seconds that a killed backend is given to go."""

BEFORE_KILL = 0.3
"""Seconds into a query at which its backend is killed."""

QUICK = 0.3
"""Seconds that the query takes that is let finish before a shutdown."""

DRAIN_LIMIT = 0.6
CONNECT_LIMIT = 1
REQUESTS = 5

_PID = text("SELECT pg_backend_pid()")
_SLEEP = text(f"SELECT pg_sleep({SLEEP})")
_KILL = text("SELECT pg_terminate_backend(:pid)")
_SESSIONS = text("""
    SELECT count(*) FROM pg_stat_activity
    WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'
""")
_KILL_IDLE = text("""
    SELECT count(*) FILTER (WHERE pg_terminate_backend(pid)) FROM pg_stat_activity
    WHERE pid <> pg_backend_pid() AND state = 'idle' AND datname = current_database()
""")


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault to provoke.

    Attributes:
        title: What it is.
        code: How it is provoked.
        claim: What is checked.
        provoke: Does it, on the demo's engine or one of its own.
        timeline: Whether the pool's gauges over time are worth a look.
    """

    title: str
    code: str
    claim: str
    provoke: Callable[[AsyncEngine, Watch], Awaitable[Outcome]]
    timeline: bool = False


@dataclass(slots=True)
class _Caught:
    error: BaseException | None = None
    seconds: float = 0.0

    @property
    def told(self) -> str:
        name = type(self.error).__name__ if self.error else "no error"
        return f"{name} after {duration(self.seconds)}"


@contextmanager
def _caught() -> Iterator[_Caught]:
    """Time a block, and keep what it raises."""
    result, started = _Caught(), time.perf_counter()
    try:
        yield result
    except ExceptionGroup as group:
        result.error = group.exceptions[0]
    except Exception as error:  # noqa: BLE001 (what it is, is what the demo shows and checks)
        result.error = error
    finally:
        result.seconds = time.perf_counter() - started


async def statement_timeout(engine: AsyncEngine, watch: Watch) -> Outcome:
    """The server ends a statement at its limit; the connection is kept."""
    async with watch(engine) as seen, engine.connect() as connection:
        before = await connection.scalar(_PID)
        with _caught() as caught:
            await connection.execute(_SLEEP, execution_options={"statement_timeout": LIMIT})
        await connection.rollback()
        kept = before == await connection.scalar(_PID)
    in_time = LIMIT * 0.9 < caught.seconds < LIMIT + 1
    return Outcome(
        f"the server ended the statement; its connection is {'kept' if kept else 'gone'}",
        caught.told,
        isinstance(caught.error, StatementTimeout) and in_time and kept,
        caught.error,
        seen,
    )


async def refused(_: AsyncEngine, watch: Watch) -> Outcome:
    """Nobody listens: retried until the limit, then an error that says where and why."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listens: nobody else can, either
        port = taken.getsockname()[1]
        url = f"postgresql://demo@127.0.0.1:{port}/demo?connect_timeout={CONNECT_LIMIT}"
        engine = create_async_engine(url)
        async with watch(engine) as seen:
            with _caught() as caught:
                async with engine.connect():
                    pass
        await engine.dispose()
    error = caught.error
    attempts = error.attempts if isinstance(error, ConnectError) else 0
    return Outcome(
        f"refused {attempts} times; it might have been a server that restarts",
        caught.told,
        isinstance(error, ConnectError)
        and isinstance(error.orig, ConnectionRefusedError)
        and caught.seconds < CONNECT_LIMIT + 1,
        error,
        seen,
    )


async def idle_killed(engine: AsyncEngine, watch: Watch) -> Outcome:
    """Idle backends die: the next requests get new connections and notice nothing."""
    await _requests(engine)
    async with engine.connect() as admin:
        killed = await admin.scalar(_KILL_IDLE)
    await asyncio.sleep(DYING)
    async with watch(engine) as seen:
        with _caught() as caught:
            await _requests(engine)
    return Outcome(
        f"{killed} of the pool's connections were killed at the server",
        f"{caught.told} for {REQUESTS} requests",
        caught.error is None and seen.closed.total() >= killed >= REQUESTS - 1,
        caught.error,
        seen,
    )


async def running_killed(engine: AsyncEngine, watch: Watch) -> Outcome:
    """A backend dies in mid-query: an error at once, and the next request is well."""
    async with watch(engine) as seen:
        with _caught() as caught:
            async with engine.connect() as victim:
                killer = asyncio.create_task(_kill_soon(engine, await victim.scalar(_PID)))
                await victim.execute(_SLEEP)
        await killer
        with _caught() as after:
            await _requests(engine)
    return Outcome(
        f"killed after {duration(BEFORE_KILL)}; {after.told} for the next {REQUESTS} requests",
        caught.told,
        caught.error is not None and caught.seconds < SLEEP / 2 and after.error is None,
        caught.error,
        seen,
    )


async def shutdown(engine: AsyncEngine, watch: Watch) -> Outcome:
    """A drain lets what is quick finish, ends the rest, and leaves nothing at the server."""
    outside = create_async_engine(pool_size=1, max_overflow=0)
    quick, slow = (asyncio.create_task(_sleep(engine, s)) for s in (QUICK, SLEEP))
    await asyncio.sleep(QUICK / 3)
    try:
        async with watch(engine) as seen, asyncio.TaskGroup() as group:
            draining = group.create_task(drain(engine, DRAIN_LIMIT))
            late = group.create_task(_sleep(engine, 0))
        left = await _sessions_left(outside)
    finally:
        await outside.dispose()
    report, newcomer, finished, ended = draining.result(), await late, await quick, await slow
    return Outcome(
        f"drained in {duration(report.seconds)}; {report.terminated} straggler ended;"
        f" {left} sessions left at the server",
        f"{finished.told} (the quick), {ended.told} (the slow),"
        f" {type(newcomer.error).__name__} (a newcomer)",
        isinstance(newcomer.error, PoolDraining)
        and finished.error is None
        and ended.error is not None
        and ended.seconds < SLEEP / 2
        and (report.terminated, left) == (1, 0),
        seen=seen,
    )


async def _sleep(engine: AsyncEngine, seconds: float) -> _Caught:
    with _caught() as caught:
        async with engine.connect() as connection:
            await connection.execute(text(f"SELECT pg_sleep({seconds})"))
    return caught


async def _sessions_left(outside: AsyncEngine) -> int:
    """Sessions of others, once there is none or they were given a moment to go."""
    for _ in range(int(DYING / 0.02) + 1):
        async with outside.connect() as connection:
            left = int(await connection.scalar(_SESSIONS) or 0)
        if not left:
            break
        await asyncio.sleep(0.02)
    return left


async def _requests(engine: AsyncEngine) -> None:
    """Some requests at once, each on a connection of its own."""
    together = asyncio.Barrier(REQUESTS)

    async def request() -> None:
        async with engine.connect() as connection:
            await connection.execute(_PID)
            await together.wait()

    async with asyncio.TaskGroup() as group:
        for _ in range(REQUESTS):
            group.create_task(request())


async def _kill_soon(engine: AsyncEngine, pid: int) -> None:
    await asyncio.sleep(BEFORE_KILL)
    async with engine.connect() as admin:
        await admin.execute(_KILL, {"pid": pid})


FAULTS = (
    Fault(
        f"{burst.TIMES} times as many callers as the pool can serve",
        f"{burst.CONNECTIONS} connections, pool_timeout={burst.PATIENCE},"
        f" pool_overload_after={burst.OVERLOAD_AFTER}, for {burst.BURST:g} s",
        "served at the pool's capacity, and quickly; turned to newest first and back",
        burst.overload,
        timeline=True,
    ),
    Fault(
        "A statement that runs too long",
        f"pg_sleep({SLEEP}) with execution_options(statement_timeout={LIMIT})",
        "StatementTimeout at its limit, on a connection that can go on",
        statement_timeout,
    ),
    Fault(
        "A server that is not there",
        f"postgresql://...?connect_timeout={CONNECT_LIMIT}, to a port where nobody listens",
        "tried again, but no longer than connect_timeout; then a typed error",
        refused,
    ),
    Fault(
        "Connections killed while idle",
        f"pg_terminate_backend() of all idle connections, then {REQUESTS} requests",
        "no request notices anything",
        idle_killed,
    ),
    Fault(
        "A connection killed in mid-query",
        f"pg_terminate_backend() during pg_sleep({SLEEP})",
        f"an error at once instead of after {SLEEP} s, and the pool goes on",
        running_killed,
    ),
    Fault(
        "A shutdown",
        f"drain(engine, {DRAIN_LIMIT}) while one query takes {QUICK} s and another {SLEEP} s",
        "what is quick finishes, the rest is ended, no session is left",
        shutdown,
    ),
)
