"""A question to the server, on a connection that no caller misses."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from poolkit.driver import CLOSE_TIMEOUT
from poolkit.events import CloseReason

if TYPE_CHECKING:
    from poolkit.pool.handoff import HandoffPool
    from poolkit.pool.record import PooledRecord

Question = Callable[[Any], Awaitable[None]]


async def ask(pool: HandoffPool, question: Question, seconds: float) -> None:
    """Put a question to the driver's connection that has been idle for longest.

    If none is idle, to one of its own that is opened for it beside the pool and closed again: it
    stands in no line, and takes no caller's slot.

    Args:
        pool: The pool, on its own event loop.
        question: What to do with the driver's connection; it goes back as it was.
        seconds: How long connect and answer may take, each.
    """
    if pool._idle:
        await _ask_idle(pool, pool._idle.popleft(), question, seconds)
        return
    async with asyncio.timeout(seconds):
        own = await pool._connects.make()
    try:
        async with asyncio.timeout(seconds):
            await question(own.driver_connection)
    finally:
        await own.close_within(CLOSE_TIMEOUT)


async def _ask_idle(
    pool: HandoffPool, record: PooledRecord, question: Question, seconds: float
) -> None:
    pool._held[record] = None  # counts as in use, as during a check
    record.taken_at = pool.now()
    try:
        async with asyncio.timeout(seconds):
            await question(record.driver_connection)
    except BaseException as error:
        if pool._held.pop(record, pool) is None:
            pool._discard(record, CloseReason.LOST, error)
            pool._capacity_freed()
        raise
    if pool._held.pop(record, pool) is None:
        record.answered_at = pool.now()
        pool._accept(record)
        if pool._idle and pool._idle[-1] is record:
            pool._idle.rotate(1)  # it stays the first to age out
