"""A pool as it works: its gauges sampled, its events counted, and a picture of both."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from rich.table import Table
from rich.text import Text
from sqlalchemy.ext.asyncio import AsyncEngine

from poolkit.cli.output import count, duration
from poolkit.events import (
    CheckedOut,
    CheckoutRefused,
    CheckoutTimedOut,
    CloseReason,
    ConnectionClosed,
    ConnectionOpened,
    ConnectionOpenFailed,
    Event,
    OverloadBegan,
    OverloadEnded,
)
from poolkit.lifecycle import observe, pool_stats

SAMPLE_EVERY = 0.01
SHOW_EVERY = 0.1
came: ContextVar[int] = ContextVar("came", default=0)
"""A caller's place in the order in which they came; not by a clock, which a busy machine stops."""

WIDTH = 48  # characters of a time line
LEVELS, LEVELS_ASCII = "·▁▂▃▄▅▆▇█", ".:-=+*oO#"


class Sample(NamedTuple):
    """The gauges at one instant."""

    used: int
    idle: int
    opening: int
    waiting: int


@dataclass(slots=True)
class Seen:
    """What was seen of a pool.

    Attributes:
        limit: Connections at most.
        samples: The gauges, every 10 ms.
        events: Events by kind; connections closed are in ``closed``.
        closed: Connections that left the pool, by reason.
        waits: Seconds that each caller waited who had to, in the order in which they were served.
        overtaken: Callers that were served after one who had come later.
        pings: Liveness checks.
        pings_failed: Those of them that found the connection dead.
    """

    limit: int = 0
    samples: list[Sample] = field(default_factory=list)
    events: Counter[type[Event]] = field(default_factory=Counter)
    closed: Counter[CloseReason] = field(default_factory=Counter)
    waits: list[float] = field(default_factory=list)
    overtaken: int = 0
    pings: int = 0
    pings_failed: int = 0
    _latest: int = 0

    def note(self, event: Event) -> None:
        """Be told of an event."""
        self.events[type(event)] += 1
        match event:
            case CheckedOut(wait=wait) if wait:
                place = came.get()
                self.overtaken += place < self._latest
                self._latest = max(place, self._latest)
                self.waits.append(wait)
            case ConnectionClosed(reason=reason):
                self.closed[reason] += 1

    def sample(self, engine: AsyncEngine) -> None:
        """Look at the gauges."""
        stats = pool_stats(engine)
        self.limit = stats.limit or 0
        self.samples.append(Sample(stats.used, stats.idle, stats.opening, stats.waiting))

    @property
    def told(self) -> str:
        """The events in words; kinds that did not happen are left out."""
        return "; ".join(part for part in self._parts() if part) or "nothing"

    def _parts(self) -> Iterator[str]:
        if served := self.events[CheckedOut]:
            yield count(served, "checkout") + self._waited()
        for kind, words in _WORDS.items():
            if number := self.events[kind]:
                yield f"{number} {words}"
        if self.closed:
            reasons = (f"{number} {reason}" for reason, number in self.closed.items())
            yield f"closed: {', '.join(reasons)}".replace("_", " ")
        if self.pings:
            failed = f", {self.pings_failed} failed" if self.pings_failed else ""
            yield f"{count(self.pings, 'ping')}{failed}"

    def _waited(self) -> str:
        if not self.waits:
            return ""
        return f", {len(self.waits)} after a wait of up to {duration(max(self.waits))}"


_WORDS = {
    CheckoutTimedOut: "timed out",
    CheckoutRefused: "refused",
    ConnectionOpened: "opened",
    ConnectionOpenFailed: "could not be opened",
    OverloadBegan: "overload begun",
    OverloadEnded: "overload ended",
}

Watch = Callable[[AsyncEngine], AbstractAsyncContextManager[Seen]]
"""Watches an engine for the length of an ``async with`` block."""


def _ignore(_: Seen) -> None:
    pass


@asynccontextmanager
async def watching(
    engine: AsyncEngine, show: Callable[[Seen], object] = _ignore
) -> AsyncIterator[Seen]:
    """Watch an engine.

    Args:
        engine: Its pool is poolkit's own.
        show: Told what was seen so far, several times a second.
    """
    seen, before = Seen(), pool_stats(engine)
    end = observe(engine, seen.note)
    sampler = asyncio.create_task(_sample(engine, seen, show))
    try:
        yield seen
    finally:
        sampler.cancel()
        end()
        after = pool_stats(engine)
        seen.pings = after.pings - before.pings
        seen.pings_failed = after.pings_failed - before.pings_failed


async def _sample(engine: AsyncEngine, seen: Seen, show: Callable[[Seen], object]) -> None:
    shown = 0.0
    while True:
        seen.sample(engine)
        if time.perf_counter() - shown >= SHOW_EVERY:
            show(seen)
            shown = time.perf_counter()
        await asyncio.sleep(SAMPLE_EVERY)


def timeline(seen: Seen, *, ascii_only: bool = False) -> Table:
    """Each gauge from left to right: the highest value in each step of time."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for name, values in _gauges(seen).items():
        highest = max(values, default=0)
        scale = highest if name == "waiting" else seen.limit
        line = _line(_condensed(values, WIDTH), scale, LEVELS_ASCII if ascii_only else LEVELS)
        table.add_row(Text(name, "cyan"), Text(line), Text(f"at most {highest}"))
    return table


def picture(seen: Seen, *, ascii_only: bool = False) -> Table:
    """The gauges now, as bars, and the events so far."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, width=WIDTH)
    table.add_column(justify="right")
    block = LEVELS_ASCII[-1] if ascii_only else LEVELS[-1]
    for name, values in _gauges(seen).items():
        now, scale = (values or [0])[-1], max(seen.limit, *values, 1)
        bar = block * -(-WIDTH * now // scale)
        table.add_row(Text(name, "cyan"), Text(bar, _STYLES[name]), str(now))
    table.add_row(Text("events", "cyan"), Text(seen.told, overflow="ellipsis"))
    return table


_STYLES = {"used": "green", "idle": "blue", "opening": "magenta", "waiting": "yellow"}


def _gauges(seen: Seen) -> dict[str, list[int]]:
    return {name: [getattr(s, name) for s in seen.samples] for name in Sample._fields}


def _condensed(values: Sequence[int], width: int) -> list[int]:
    """At most so many values, each the highest of its share."""
    steps = min(width, len(values))
    cuts = [len(values) * step // steps for step in range(steps + 1)] if steps else []
    return [max(values[a:b]) for a, b in pairwise(cuts)]


def _line(values: Sequence[int], scale: int, levels: str) -> str:
    top = len(levels) - 1
    return "".join(levels[min(-(-top * value // max(scale, 1)), top)] for value in values)
