"""The end of a pool: no connection is given out any more, and the server has no session of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from poolkit.driver import CLOSE_TIMEOUT
from poolkit.errors import PoolDraining
from poolkit.events import CloseReason

if TYPE_CHECKING:
    from poolkit.pool.handoff import HandoffPool
    from poolkit.pool.record import PooledRecord

_log = logging.getLogger("poolkit.pool")


@dataclass(frozen=True, slots=True)
class DrainReport:
    """How a drain went.

    Attributes:
        seconds: How long it took.
        closed: Connections that were closed in good order.
        terminated: Connections still in use when the time was up, and dropped.
        refused: Callers in the queue that were turned away.
    """

    seconds: float
    closed: int
    terminated: int
    refused: int


async def drain(pool: HandoffPool, timeout: float) -> DrainReport:
    """Give out nothing any more, wait for what is in use, drop the rest.

    Args:
        pool: The pool.
        timeout: Seconds to wait for connections in use.
    """
    loop = asyncio.get_running_loop()
    if loop is not pool.loop:
        pool._bind(loop)
    began, closed = pool.now(), sum(pool.counters.closed.values())
    pool._draining = True
    pool._let_held_expire()
    pool._connects.stop_probing()
    refused = _refuse_all(pool)
    for record in list(pool.idle()):
        pool.close_idle(record, CloseReason.DRAINED)
    stragglers = await _wait_until_unused(pool, timeout)
    if stragglers:
        pool._spawn(_end_sessions(pool, stragglers))
    await _finished(pool._tasks)
    for record in stragglers:
        record.terminate()
    pool._stop_keeper()
    ended = sum(pool.counters.closed.values()) - closed
    return DrainReport(pool.now() - began, ended, len(stragglers), refused)


def _refuse_all(pool: HandoffPool) -> int:
    waiting = list(pool._queue.in_turn())
    for waiter in waiting:
        pool._fail(waiter, pool._refused(PoolDraining("the engine is being drained")))
    return len(waiting)


async def _wait_until_unused(pool: HandoffPool, timeout: float) -> list[PooledRecord]:
    if pool._held:
        if pool._drained is None:
            pool._drained = asyncio.get_running_loop().create_future()
        await asyncio.wait({pool._drained}, timeout=timeout)
    return list(pool._held)


async def _end_sessions(pool: HandoffPool, records: list[PooledRecord]) -> None:
    """Have the server end them; a statement that runs does not notice a dropped socket."""
    pids = [pid for record in records if (pid := record.session_pid()) is not None]
    if not pids:
        return
    try:
        helper = await pool._connects.make()
    except Exception:  # noqa: BLE001 (logged; what is left to do is done without)
        _log.warning("no connection to end %d sessions with", len(pids), exc_info=True)
        return
    try:
        await helper.end_sessions(pids)
    finally:
        await helper.close_within(CLOSE_TIMEOUT)


async def _finished(tasks: set[asyncio.Task[Any]]) -> None:
    """Wait until none is left, those that begin meanwhile too; after 2 s end what is left."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(CLOSE_TIMEOUT):
            while tasks:
                await asyncio.wait(set(tasks))
    for task in set(tasks):
        task.cancel()
    if tasks:
        await asyncio.wait(set(tasks))
