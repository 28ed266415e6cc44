"""Whether the server still answers on a connection: asked before use, and in the background."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from poolkit.events import CloseReason

if TYPE_CHECKING:
    from poolkit.pool.handoff import HandoffPool
    from poolkit.pool.record import PooledRecord


async def ping(pool: HandoffPool, record: PooledRecord) -> Exception | None:
    """One round trip within its bound; returns what went wrong, if anything did."""
    began = pool.now()
    pool.counters.pings += 1
    try:
        async with asyncio.timeout(pool._ping_timeout):
            await record.ping()
    except Exception as error:  # noqa: BLE001 (whatever it is, the connection is not fit)
        pool.counters.pings_failed += 1
        return error
    finally:
        pool.counters.ping_seconds += pool.now() - began
    record.answered_at = pool.now()
    return None


def check_idle(pool: HandoffPool) -> None:
    """A connection was lost: check the idle ones, at once and side by side, before their use."""
    now = pool.now()
    siblings = list(pool._idle)
    pool._idle.clear()
    for record in siblings:
        _check_in_background(pool, record, now)


def keep_alive(pool: HandoffPool, record: PooledRecord) -> None:
    """Check an idle connection as a heartbeat."""
    pool._idle.remove(record)
    _check_in_background(pool, record, pool.now(), stay_cold=True)


def _check_in_background(
    pool: HandoffPool, record: PooledRecord, now: float, *, stay_cold: bool = False
) -> None:
    record.taken_at = now
    pool._held[record] = None
    task = pool._spawn(_check(pool, record, stay_cold=stay_cold))
    task.add_done_callback(lambda _: _drop_if_unchecked(pool, record, task))


async def _check(pool: HandoffPool, record: PooledRecord, *, stay_cold: bool) -> None:
    try:
        error = await ping(pool, record)
    except asyncio.CancelledError:
        pool._held.pop(record, None)
        pool._discard(record, CloseReason.PING_FAILED)
        raise
    if record not in pool._held:
        return
    del pool._held[record]
    if error is None:
        pool._accept(record)
        if stay_cold and pool._idle and pool._idle[-1] is record:
            pool._idle.rotate(1)  # a heartbeat is no use: it stays the first to age out
    else:
        pool._discard(record, CloseReason.PING_FAILED, error)
        pool._capacity_freed()


def _drop_if_unchecked(pool: HandoffPool, record: PooledRecord, check: asyncio.Task[None]) -> None:
    """The check was cancelled before it began, as when the event loop ends."""
    if check.cancelled() and record in pool._held:
        del pool._held[record]
        pool._discard(record, CloseReason.PING_FAILED)
        pool._capacity_freed()
