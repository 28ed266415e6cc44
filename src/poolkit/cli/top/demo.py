"""``poolkit top --demo``: a throwaway server with services that wait, hold, block and fail."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

from sqlalchemy import TextClause, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from poolkit.cli.demo import environment
from poolkit.cli.top.endpoint import Metrics
from poolkit.cli.top.exposition import Endpoint
from poolkit.cli.top.server import Server
from poolkit.cli.top.view import Source
from poolkit.engine import create_async_engine
from poolkit.settings import DatabaseSettings
from poolkit.telemetry.prometheus import start_metrics_server
from poolkit.testing import postgres

HOST = "127.0.0.1"
BEFORE = 2.0
"""Seconds that the services have before the first look."""

CALM, BUSY, THINKING = 4, 40, 0.3
"""Customers of the shop at quiet times and at busy ones, and seconds between their requests."""

TURN = 8.0
"""Seconds until quiet turns to busy, and back."""

_CREATE = (
    text("CREATE TABLE orders (id int PRIMARY KEY, total int NOT NULL)"),
    text("INSERT INTO orders SELECT n, 0 FROM generate_series(1, 1000) AS n"),
)
_BUY = text("UPDATE orders SET total = total + 1 WHERE id = :id")
_LOOK_AROUND = text("SELECT count(*), pg_sleep(0.02) FROM orders")
_REPORT = text("SELECT sum(total), pg_sleep(25) FROM orders")
_READ = text("SELECT total FROM orders WHERE id = 17")
_CLOSE_BOOKS = text("UPDATE orders SET total = 0 WHERE id <= 2")
_MIGRATE = text("ALTER TABLE orders ADD COLUMN IF NOT EXISTS note text")
_KILL = text("""
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE application_name = 'shop' AND state = 'idle' LIMIT 1
""")


@asynccontextmanager
async def opened(interval: float) -> AsyncIterator[Sequence[Source]]:
    """The demo's pool by its metrics, and its server by its sessions, while the demo runs."""
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(postgres())
        stack.enter_context(environment(server))
        port = _free_port()
        stack.callback(start_metrics_server(port, HOST))
        await _start(stack)
        await asyncio.sleep(BEFORE)
        sources = (
            Metrics(Endpoint(f"http://{HOST}:{port}/metrics"), interval),
            Server(DatabaseSettings()),
        )
        for source in sources:
            stack.push_async_callback(source.close)
        yield sources


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        port: int = taken.getsockname()[1]
        return port


async def _start(stack: AsyncExitStack) -> None:
    def engine(application: str, **settings: Any) -> AsyncEngine:
        made = create_async_engine(
            settings=DatabaseSettings(application_name=application, **settings)
        )
        stack.push_async_callback(made.dispose)
        return made

    shop = engine(
        "shop", pool_name="shop", pool_size=4, max_overflow=2, pool_timeout=1.0, telemetry="metrics"
    )
    reports, billing = engine("reports"), engine("billing")
    migration = engine("migration", lock_timeout=4.0)
    async with shop.begin() as connection:
        for statement in _CREATE:
            await connection.execute(statement)
    scenes = (_trade(shop), _report(reports), _linger(reports), _kill(billing))
    tasks = [asyncio.create_task(scene) for scene in (*scenes, _block(billing, shop, migration))]
    stack.push_async_callback(_end, tasks)


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _trade(shop: AsyncEngine) -> None:
    """Customers come and go: the pool is idle, then has a queue."""
    async with asyncio.TaskGroup() as group:
        for number in range(BUSY):
            group.create_task(_shop(shop, early=number < CALM))


async def _shop(shop: AsyncEngine, *, early: bool) -> None:
    loop = asyncio.get_running_loop()
    while True:
        if early or int(loop.time() / TURN) % 2:
            await _try(shop, _LOOK_AROUND, pause=0.0)
            await _try(shop, _BUY, pause=0.0, id=random.randint(3, 1000))  # noqa: S311 (an order)
        await asyncio.sleep(random.uniform(0, 2 * THINKING))  # noqa: S311 (no secret)


async def _try(
    engine: AsyncEngine, statement: TextClause, *, pause: float, **parameters: object
) -> None:
    """One transaction, which pauses before its end; what it fails of is for the picture."""
    with suppress(SQLAlchemyError):
        async with engine.begin() as connection:
            await connection.execute(statement, parameters)
            if pause:
                await asyncio.sleep(pause)


async def _again(pause: float, work: Callable[[], Awaitable[None]]) -> None:
    while True:
        await work()
        await asyncio.sleep(pause)


def _report(reports: AsyncEngine) -> Coroutine[Any, Any, None]:
    """A statement that takes long."""

    async def report() -> None:
        with suppress(SQLAlchemyError):
            async with reports.connect() as connection:
                await connection.execute(_REPORT, execution_options={"statement_timeout": 30.0})

    return _again(5.0, report)


def _linger(reports: AsyncEngine) -> Coroutine[Any, Any, None]:
    """Somebody reads, and forgets to end the transaction."""
    return _again(4.0, lambda: _try(reports, _READ, pause=15.0))


def _kill(billing: AsyncEngine) -> Coroutine[Any, Any, None]:
    """An idle connection dies now and then."""
    return _again(7.0, lambda: _try(billing, _KILL, pause=0.0))


def _block(
    billing: AsyncEngine, shop: AsyncEngine, migration: AsyncEngine
) -> Coroutine[Any, Any, None]:
    """One holds two rows; a customer waits for one of them, a migration for the table."""

    async def block() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(_try(billing, _CLOSE_BOOKS, pause=8.0))
            await asyncio.sleep(1.0)
            for order in (1, 2):
                group.create_task(_try(shop, _BUY, pause=0.0, id=order))
            await asyncio.sleep(4.0)
            group.create_task(_try(migration, _MIGRATE, pause=0.0))

    return _again(6.0, block)
