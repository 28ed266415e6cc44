"""What the status page knows of one engine: samples of the last minutes, faults, holders."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine

from poolkit import events
from poolkit.events import Event
from poolkit.lifecycle import observe, pool_stats
from poolkit.logs import WANTED, Reporter, place, pool_name
from poolkit.pool import HandoffPool, keeper
from poolkit.pool.record import PooledRecord
from poolkit.reports import Report

EVERY = 1.0
"""Seconds between samples."""

SAMPLES = 300
FAULTS = 40
HOLDERS = 8
"""Lines at most; of the holders, those that hold for longest."""

HELD_FOR = 1.0
"""Seconds from which on a holder is shown."""

APART = 60.0
"""Seconds without its like after which a fault begins a line of its own."""

LONGEST_TEXT = 600

_numbers = itertools.count()
"""Of samples, for the life of the process: those of an engine's successor go on."""


class Watch:
    """Watches one engine from now on.

    A timer and no task: it cannot hold the loop open, and it holds neither the watch nor the
    engine. It costs a snapshot of the pool each second.

    Args:
        engine: Its pool is poolkit's own; only a weak reference is kept.

    Raises:
        ConfigurationError: It is not.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        pool_stats(engine)
        self.faults = Faults(engine)
        self._engine = weakref.ref(engine.sync_engine)
        self._samples: deque[list[float]] = deque(maxlen=SAMPLES)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        kinds = (*WANTED, events.LongHolder, events.LongHolderReturned, events.TransactionRetried)
        observe(engine, self.faults, kinds)

    def begin(self) -> None:
        """Sample on this loop, if that is not done already."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._timer is not None:
                self._timer.cancel()
            self._loop = loop
            self.tick()

    def tick(self) -> None:
        """Take a sample, and another one later, as long as the engine is there."""
        engine, loop = self._engine(), self._loop
        if engine is None or loop is None:
            return
        self._samples.append(_sample(next(_numbers), engine.pool))
        self._timer = loop.call_later(EVERY, _tick, weakref.ref(self))

    def samples(self, after: int) -> list[list[float]]:
        """Those with a higher number, the oldest first."""
        return [sample for sample in self._samples if sample[0] > after]


def _tick(reference: weakref.ref[Watch]) -> None:
    watch = reference()
    if watch is not None:
        watch.tick()


def _sample(number: int, pool: Any) -> list[float]:
    """The number and the time, the gauges, and what is cumulative; the page takes differences."""
    stats = pool.stats()
    gauges = [stats.used, stats.idle, stats.opening, stats.waiting]
    served = [stats.checkouts, stats.waits, round(stats.wait_seconds, 4)]
    return [number, round(time.time(), 2), *gauges, *served, stats.timeouts + stats.refused]


@dataclass(slots=True)
class Fault:
    """Faults of a kind that came one soon after the other.

    Attributes:
        key: The same for its like.
        level: As in ``logging``.
        event: What happened, in a word.
        text: The last of them, in words.
        first: When the first was, in seconds since the epoch.
        last: When the last was.
        count: How many there were.
    """

    key: object
    level: int
    event: str
    text: str
    first: float
    last: float
    count: int = 1


class Faults(Reporter):
    """An observer that keeps the last faults of an engine, each with the number of its like."""

    def __init__(self, engine: AsyncEngine) -> None:
        super().__init__(engine.sync_engine, Report.write)
        self._kept: deque[Fault] = deque(maxlen=FAULTS)

    def __call__(self, event: Event) -> None:
        """Keep it, if it is worth telling."""
        for report in self._reports(event):
            if report.level > logging.DEBUG:
                text = (report.headline or report.message) % report.values
                self.add(report.key, report.level, report.event, text)

    def add(self, key: object, level: int, event: str, text: str) -> None:
        """Keep one, or count it with its like."""
        now, text = time.time(), text[:LONGEST_TEXT]
        found = next((each for each in reversed(self._kept) if each.key == key), None)
        if found is None or now - found.last > APART:
            self._kept.append(Fault(key, level, event, text, now, now))
            return
        self._kept.remove(found)
        self._kept.append(found)
        found.last, found.text = now, text
        found.count += 1

    def newest(self) -> list[dict[str, Any]]:
        """The last one first."""
        return [
            {
                "level": logging.getLevelName(fault.level).lower(),
                "event": fault.event.replace("_", " "),
                "text": fault.text,
                "first": fault.first,
                "last": fault.last,
                "count": fault.count,
            }
            for fault in reversed(self._kept)
        ]


def snapshot(engine: AsyncEngine, watch: Watch, after: int) -> dict[str, Any]:
    """All that the page shows; of the samples, those after a number."""
    pool = engine.pool
    assert isinstance(pool, HandoffPool)  # noqa: S101 (for the type checker; a watch needs one)
    stats = pool.stats()
    return {
        "pool": pool_name(engine.sync_engine),
        "pid": os.getpid(),
        "now": time.time(),
        "every": EVERY,
        "state": {
            "used": stats.used,
            "idle": stats.idle,
            "opening": stats.opening,
            "waiting": stats.waiting,
            "size": stats.size,
            "limit": stats.limit,
            "utilisation": stats.utilisation,
            "overloaded": stats.overloaded,
            "draining": stats.draining,
        },
        "totals": {
            "checkouts": stats.checkouts,
            "timeouts": stats.timeouts,
            "refused": stats.refused,
            "opened": stats.opened,
            "could not be opened": stats.open_failed,
            "long holders": stats.long_holders,
            "overloads": stats.overloads,
            "transactions retried": stats.retries,
        },
        "samples": watch.samples(after),
        "faults": watch.faults.newest(),
        "holders": list(_holders(pool)),
        "holdersAreNamed": pool.leak_threshold > 0,
        "settings": _settings(engine, pool),
    }


def _holders(pool: HandoffPool) -> Iterator[dict[str, Any]]:
    now = pool.now() if pool.has_connections() else 0.0
    held = sorted(pool.held(), key=lambda record: record.taken_at)
    for record in held[:HOLDERS]:
        seconds = now - record.taken_at
        if seconds >= HELD_FOR:
            name, stack = _whereabouts(record, seconds, pool.leak_threshold)
            yield {"held": round(seconds, 1), "task": name, "stack": stack}


def _whereabouts(
    record: PooledRecord, seconds: float, threshold: float
) -> tuple[str | None, str | None]:
    """Its task's name, and where that stands once it has held for too long."""
    if not threshold:
        return None, None  # the pool does not note who takes a connection
    task = record.task() if record.task else None
    if seconds >= threshold:
        return keeper.whereabouts(task)
    return None if task is None else task.get_name(), None


def _settings(engine: AsyncEngine, pool: HandoffPool) -> dict[str, str]:
    """Those that matter; no password is among them."""
    host, port, database = place(engine.sync_engine)
    timeout = pool.timeout()
    return {
        "server": f"{host}:{port}",
        "database": database,
        "user": engine.url.username or "",
        "pool size": _number(pool.kept(), "unlimited"),
        "connections at most": _number(pool.limit(), "unlimited"),
        "pool timeout": "no limit" if timeout is None else f"{timeout:g} s",
        "idle timeout": _seconds(pool.idle_timeout),
        "minimum idle": str(pool.min_idle),
        "keepalive": _seconds(pool.keepalive),
        "leak threshold": _seconds(pool.leak_threshold),
    }


def _number(value: float, unlimited: str) -> str:
    return unlimited if value == float("inf") else str(int(value))


def _seconds(value: float) -> str:
    return f"{value:g} s" if value else "off"
