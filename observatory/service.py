"""A service as any other, whose behaviour is told to it line by line: ``calm``, ``crowd``, ...

Its engine comes from ``DATABASE_*``, its metrics are where ``METRICS_PORT`` says.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import sys
import time
import warnings
from collections.abc import Awaitable, Callable

from sqlalchemy import text
from sqlalchemy.exc import SAWarning
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from poolkit import create_async_engine, run_in_transaction
from poolkit.telemetry.prometheus import start_metrics_server

_CALM = 3
"""Workers of the everyday load, fewer than the pool has connections."""

_CROWD = 120
_WAVE, _GRIP = 0.6, 0.25
"""Seconds between the waves that the crowd comes in, and that each keeps its connection."""

_LATE = 0.3
"""Seconds that some come after a wave, so that the queue is not empty before the next."""

_STATEMENTS = (
    text("SELECT count(*) FROM orders"),
    text("INSERT INTO orders (item) VALUES ('tea')"),
    text("UPDATE orders SET item = 'coffee' WHERE id = (SELECT min(id) FROM orders)"),
)
_SLEEP = text("SELECT pg_sleep(600)")
_GRIP_STATEMENT = text(f"SELECT pg_sleep({_GRIP})")

_PAUSE = 0.01
_PATIENCE = 1.0
"""Seconds that tasks may take to end by themselves."""

Work = Callable[[AsyncEngine], Awaitable[None]]


async def _order(engine: AsyncEngine) -> None:
    """What the service is there for."""
    await asyncio.sleep(random.uniform(0.01, 0.06))

    async def work(connection: AsyncConnection) -> None:
        await connection.execute(random.choice(_STATEMENTS))

    await run_in_transaction(engine, work)


async def _grip(engine: AsyncEngine) -> None:
    """One of the crowd."""
    await asyncio.sleep(_WAVE - time.time() % _WAVE)
    if random.random() < 0.1:  # noqa: PLR2004
        await asyncio.sleep(_LATE)
    async with engine.connect() as connection:
        await connection.execute(_GRIP_STATEMENT)


async def _sleep(engine: AsyncEngine) -> None:
    """A statement that runs into its timeout."""
    async with engine.connect() as connection:
        await connection.execute(_SLEEP)


async def _hold(engine: AsyncEngine) -> None:
    """A connection in hand, while something else is waited for."""
    async with engine.connect():
        await asyncio.Event().wait()


async def _forget(engine: AsyncEngine) -> None:
    """A connection that nobody closes."""
    connection = await engine.connect()
    del connection
    gc.collect()
    await asyncio.sleep(600)


DOES: dict[str, tuple[Work, int]] = {
    "calm": (_order, 0),
    "crowd": (_grip, _CROWD),
    "slow": (_sleep, 2),
    "hold": (_hold, 1),
    "forget": (_forget, 1),
}
"""What it can be told, and by how many tasks besides the everyday load it is done."""


async def _again_and_again(work: Work, engine: AsyncEngine, over: asyncio.Event) -> None:
    while not over.is_set():
        try:
            await work(engine)
        except Exception:  # noqa: BLE001 (they are provoked)
            await asyncio.sleep(_PAUSE)  # a pool that fails at once does so without a pause


class _Tasks:
    """Some that do the same until they are told to end, and are cancelled where they cannot."""

    def __init__(self, work: Work, many: int, engine: AsyncEngine) -> None:
        self._over = asyncio.Event()
        doing = (_again_and_again(work, engine, self._over) for _ in range(many))
        self._tasks = [asyncio.create_task(each) for each in doing]

    async def end(self) -> None:
        self._over.set()
        if self._tasks:
            _, left = await asyncio.wait(self._tasks, timeout=_PATIENCE)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)


async def _main() -> None:
    engine = create_async_engine()
    async with engine.begin() as connection:
        await connection.execute(
            text("CREATE TABLE orders (id bigint GENERATED ALWAYS AS IDENTITY, item text)")
        )
    start_metrics_server(port=int(os.environ["METRICS_PORT"]))
    everyday, besides = _Tasks(_order, _CALM, engine), _Tasks(_order, 0, engine)
    print("ready", flush=True)
    while told := (await asyncio.to_thread(sys.stdin.readline)).strip():
        await besides.end()
        besides = _Tasks(*DOES[told], engine)
    await besides.end()
    await everyday.end()
    await engine.dispose()


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)  # faults are provoked by the hundred
    warnings.simplefilter("ignore", SAWarning)  # of the connection that is forgotten on purpose
    asyncio.run(_main())
