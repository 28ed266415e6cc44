"""How many connections the server has, of all its clients: looked at every so often."""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from opentelemetry.metrics import CallbackOptions, CallbackT, Meter, MeterProvider, Observation
from sqlalchemy import Engine

from poolkit.events import CheckedOut, ConnectionOpened, Event
from poolkit.pool import HandoffPool, aside
from poolkit.telemetry.attributes import POOL_NAME, database_attributes, pool_name
from poolkit.telemetry.meters import PerProvider, observable

BOUND = 5.0
"""Seconds that a connect for a look may take, and the answer."""

FIRST = 0.5
"""Seconds until the first look, at most: a connection that has just been opened is idle then."""

STALE = 3
"""Intervals after which what was seen is not reported any more."""

# pg_stat_activity does not tell an ordinary role which sessions of others are clients'.
_QUERY = (
    "SELECT sum(numbackends)::int AS connections, current_setting('max_connections')::int AS most"
    " FROM pg_catalog.pg_stat_database"
)

_log = logging.getLogger("poolkit.telemetry")


@dataclass(frozen=True, slots=True)
class Seen:
    """What a look found.

    Attributes:
        connections: Sessions in any database.
        most: ``max_connections``.
        at: When, in seconds of the monotonic clock.
    """

    connections: int
    most: int
    at: float


def install(
    engine: Engine, interval: float, meter_provider: MeterProvider | None
) -> Callable[[], None]:
    """Look at the server's connections, as long as the engine has some itself.

    For one engine and one provider once: what is on already is left to whoever turned it on.

    Args:
        engine: The engine; nothing happens if its pool is not poolkit's.
        interval: Seconds between looks.
        meter_provider: Where the metrics go; None is OpenTelemetry's global one.

    Returns:
        What ends that.
    """
    if not isinstance(engine.pool, HandoffPool):
        return _nothing
    gauges = _gauges.of(meter_provider)
    if gauges.has(engine):
        return _nothing
    attributes = {POOL_NAME: pool_name(engine), **database_attributes(engine)}
    lookout = Lookout(engine, interval, attributes)
    ends = ExitStack()
    ends.callback(gauges.add(lookout))
    ends.callback(lookout.stop)
    ends.callback(engine.pool.observers.add(lookout.begin, [ConnectionOpened]))
    lookout.begin_with_next_checkout(engine.pool)
    return ends.close


class Lookout:
    """Looks at the server by a timer on the engine's loop, which holds neither of them.

    Args:
        engine: The engine; only a weak reference is kept.
        interval: Seconds between looks.
        attributes: The metrics'.
    """

    def __init__(self, engine: Engine, interval: float, attributes: Mapping[str, Any]) -> None:
        self.attributes = attributes
        self._engine = weakref.ref(engine)
        self._interval = interval
        self._seen: Seen | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._look: asyncio.Task[None] | None = None
        self._is_failing = self._is_over = False

    def seen(self) -> Seen | None:
        """What the last look found, unless that is too long ago."""
        seen = self._seen
        if seen is None or time.monotonic() - seen.at > STALE * self._interval:
            return None
        return seen

    def looks_for(self, engine: Engine) -> bool:
        """Whether it is this engine's."""
        return self._engine() is engine

    def begin_with_next_checkout(self, pool: HandoffPool) -> None:
        """For an engine that has its connections already."""

        def begin(event: CheckedOut) -> None:
            end()
            self.begin(event)

        end = pool.observers.add(begin, [CheckedOut])

    def begin(self, _: Event) -> None:
        """There is a connection: look from now on, if nobody does on this loop."""
        loop = asyncio.get_running_loop()
        if self._is_over or (self._loop is loop and self._is_at_it()):
            return
        self._loop = loop
        self._wait(min(self._interval, FIRST))

    def stop(self) -> None:
        """Look no more, and forget what was seen."""
        self._is_over, self._seen = True, None
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def _is_at_it(self) -> bool:
        return self._timer is not None or (self._look is not None and not self._look.done())

    def _wait(self, seconds: float) -> None:
        assert self._loop is not None  # noqa: S101 (for the type checker)
        self._timer = self._loop.call_later(seconds, _tick, weakref.ref(self))

    def tick(self) -> None:
        """Look once, and again later; nothing more if there is no connection left."""
        self._timer = None
        engine = self._engine()
        pool = None if engine is None else engine.pool
        if isinstance(pool, HandoffPool) and pool.has_connections() and self._loop is not None:
            if self._look is None or self._look.done():
                self._look = self._loop.create_task(self._look_once(pool))
            self._wait(self._interval)

    async def _look_once(self, pool: HandoffPool) -> None:
        try:
            await aside.ask(pool, self._note, BOUND)
        except Exception:  # noqa: BLE001 (logged; there is no value for now)
            if not self._is_failing:
                _log.warning("the server's connections could not be counted", exc_info=True)
            self._is_failing = True
        else:
            self._is_failing = False

    async def _note(self, connection: Any) -> None:
        row = await connection.fetchrow(_QUERY)
        if not self._is_over:
            self._seen = Seen(row["connections"], row["most"], time.monotonic())


def _tick(reference: weakref.ref[Lookout]) -> None:
    lookout = reference()
    if lookout is not None:
        lookout.tick()


class Gauges:
    """The instruments on one meter, and who looks at servers for them."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._lookouts: list[weakref.ref[Lookout]] = []
        self._observables = [
            observable(meter, "poolkit.server.connections", self._reader(lambda s: s.connections)),
            observable(meter, "poolkit.server.connections.max", self._reader(lambda s: s.most)),
        ]

    def has(self, engine: Engine) -> bool:
        """Whether somebody looks at this engine's server."""
        lookouts = [each() for each in self._lookouts]
        return any(each is not None and each.looks_for(engine) for each in lookouts)

    def add(self, lookout: Lookout) -> Callable[[], None]:
        """Report what this one sees; what is returned ends that."""
        reference = weakref.ref(lookout)
        self._lookouts = [*(each for each in self._lookouts if each() is not None), reference]

        def end() -> None:
            self._lookouts = [each for each in self._lookouts if each is not reference]

        return end

    def _reader(self, read: Callable[[Seen], int]) -> CallbackT:
        def observe(_: CallbackOptions) -> Iterator[Observation]:
            for attributes, seen in self._latest().values():
                yield Observation(read(seen), attributes)

        return observe

    def _latest(self) -> dict[frozenset[tuple[str, Any]], tuple[Mapping[str, Any], Seen]]:
        """By the attributes: of several engines on one server, the one that looked last."""
        found: dict[frozenset[tuple[str, Any]], tuple[Mapping[str, Any], Seen]] = {}
        for lookout in [each() for each in self._lookouts]:
            seen = None if lookout is None else lookout.seen()
            if lookout is None or seen is None:
                continue
            key = frozenset(lookout.attributes.items())
            if key not in found or found[key][1].at < seen.at:
                found[key] = (lookout.attributes, seen)
        return found


def _nothing() -> None:
    pass


_gauges = PerProvider(Gauges)
