"""The keeper: what a pool does in the background, by one timer on the engine's own loop.

A timer and no task: it cannot hold the loop open, it holds the pool by a weak reference, and a
closed loop forgets it. It closes idle connections that are too old or idle for too long, from
the cold end; keeps the minimum idle; sends keepalives; reports long holders.
"""

from __future__ import annotations

import asyncio
import math
import traceback
import weakref
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from poolkit import reports
from poolkit.events import CloseReason, LongHolder, LongHolderReturned
from poolkit.pool import liveness

if TYPE_CHECKING:
    from poolkit.pool.handoff import HandoffPool
    from poolkit.pool.record import PooledRecord

LONGEST_NAP = 5.0
"""Seconds after which the keeper looks for connections that are too old, at the latest."""


def start(pool: HandoffPool) -> None:
    """Have the keeper look at the pool, if it has anything to do and is not waiting already."""
    if pool.keeper_timer is None:
        _schedule(pool, pool.now())


def _schedule(pool: HandoffPool, looked: float) -> None:
    interval = _shortest_interval(pool)
    if interval == math.inf or not (pool.min_idle or pool.has_connections()):
        return  # the next connection that is opened starts the keeper again
    # What was due at the last look and is still there is kept for a reason, as the minimum idle.
    due = min((time for time in _due_times(pool) if time > looked), default=math.inf)
    # Nothing that begins after now can be due before the shortest interval has passed.
    nap = min(max(due - pool.now(), 0.0), interval)
    loop = asyncio.get_running_loop()
    pool.keeper_timer = loop.call_later(nap, _tick, weakref.ref(pool))


def _shortest_interval(pool: HandoffPool) -> float:
    intervals = [pool.idle_timeout, pool.keepalive, pool.leak_threshold]
    intervals += [LONGEST_NAP if pool.recycles() else 0.0, 1.0 if pool.min_idle else 0.0]
    return min((interval for interval in intervals if interval > 0), default=math.inf)


def _due_times(pool: HandoffPool) -> Iterator[float]:
    for record in pool.idle():
        yield record.expires_at
        if pool.idle_timeout:
            yield record.idle_since + pool.idle_timeout
        if pool.keepalive:
            yield record.answered_at + pool.keepalive
    for record in pool.held():
        if pool.leak_threshold and not record.reported:
            yield record.taken_at + pool.leak_threshold


def _tick(reference: weakref.ref[HandoffPool]) -> None:
    pool = reference()
    if pool is None:
        return
    pool.keeper_timer = None
    now = pool.now()
    _close_old(pool, now)
    _close_unused(pool, now)
    if pool.min_idle:
        pool._connects.top_up()
    if pool.keepalive:
        for record in [r for r in pool.idle() if now - r.answered_at >= pool.keepalive]:
            liveness.keep_alive(pool, record)
    if pool.leak_threshold:
        for record in [r for r in pool.held() if _is_long_held(pool, r, now)]:
            _report(pool, record, now)
    _schedule(pool, now)


def _close_old(pool: HandoffPool, now: float) -> None:
    for record in [r for r in pool.idle() if r.expires_at <= now]:
        pool.close_idle(record, CloseReason.RECYCLED)


def _close_unused(pool: HandoffPool, now: float) -> None:
    if not pool.idle_timeout:
        return
    unused = [r for r in pool.idle() if now - r.idle_since >= pool.idle_timeout]
    surplus = pool.checkedin() - pool.min_idle
    for record in sorted(unused, key=lambda r: r.idle_since)[: max(surplus, 0)]:
        pool.close_idle(record, CloseReason.IDLE)


def _is_long_held(pool: HandoffPool, record: PooledRecord, now: float) -> bool:
    return not record.reported and now - record.taken_at >= pool.leak_threshold


def _report(pool: HandoffPool, record: PooledRecord, now: float) -> None:
    record.reported = True
    pool.counters.long_holders += 1
    held = now - record.taken_at
    name, stack = whereabouts(record.task() if record.task else None)
    event = LongHolder(held, name, stack)
    reports.long_holder(event, pool.name).write()
    pool.observers.notify(event)


def whereabouts(task: asyncio.Task[Any] | None) -> tuple[str | None, str]:
    """A task's name, and where it stands, as a traceback prints it."""
    if task is None or task.done():
        return None, "the task has ended"
    frames = traceback.StackSummary.extract((f, f.f_lineno) for f in _frames(task.get_coro()))
    return task.get_name(), "".join(frames.format())


def _frames(awaited: Any) -> Iterator[FrameType]:
    """From the outermost coroutine inwards; ``Task.get_stack`` gives only the outermost."""
    while awaited is not None:
        frame = getattr(awaited, "cr_frame", None) or getattr(awaited, "gi_frame", None)
        if frame is not None:
            yield frame
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "gi_yieldfrom", None)


def report_returned(pool: HandoffPool, record: PooledRecord, held: float) -> None:
    """A reported connection is back."""
    task = record.task() if record.task else None
    name = None if task is None else task.get_name()
    record.reported = False
    event = LongHolderReturned(held, name)
    reports.long_holder_returned(event, pool.name).write()
    pool.observers.notify(event)
