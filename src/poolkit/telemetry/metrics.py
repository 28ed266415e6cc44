"""A pool's metrics: its state as it is when they are collected, and how long things took."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from opentelemetry.metrics import CallbackOptions, CallbackT, Meter, MeterProvider, Observation
from sqlalchemy import Engine

from poolkit.events import CheckedIn, CheckedOut, CloseReason, ConnectionOpened, Observers
from poolkit.faults import CONNECTING, FaultKind
from poolkit.pool import HandoffPool
from poolkit.pool.base import PoolBase, living
from poolkit.pool.stats import Counters
from poolkit.telemetry.attributes import POOL_NAME, database_attributes, pool_name
from poolkit.telemetry.catalogue import CLOSE_REASON, FAULT_KIND, STATE
from poolkit.telemetry.meters import PerProvider, histogram, observable
from poolkit.telemetry.recorder import Recorders

_log = logging.getLogger("poolkit.telemetry")

Value = tuple[float, Mapping[str, str]]
"""A number, and the attributes that it has besides the pool's own."""


def install(engine: Engine, meter_provider: MeterProvider | None) -> Callable[[], None]:
    """Emit the metrics of an engine's pool; what is returned ends that.

    For one engine and one provider once: what is on already is left to whoever turned it on.
    Several engines with the same name and database are added up.
    """
    pool = engine.pool
    if not isinstance(pool, HandoffPool):
        _log.warning(
            "no pool metrics of %r: its pool is %s; leave out poolclass=, or pass"
            " poolkit.pool.HandoffPool",
            engine.url,
            type(pool).__name__,
        )
        return _nothing
    attributes = {POOL_NAME: pool_name(engine), **database_attributes(engine)}
    return instruments.of(meter_provider).add(pool, attributes)


class Source:
    """The numbers of one engine, by what its pools share; it keeps none of them alive.

    Attributes:
        counters: What its pools have counted.
        left: What they had when its metrics were turned off; None while they are on.
    """

    def __init__(self, pool: PoolBase) -> None:
        self.counters = pool.counters
        self.left: Counters | None = Counters()
        self._lineage = pool.lineage

    def pools(self) -> list[PoolBase]:
        """Its pools; one that was replaced may still have connections in use."""
        return living(self._lineage)

    def counted(self) -> Counters:
        """What counts."""
        return self.counters if self.left is None else self.left

    def turn_off(self) -> None:
        """Report nothing more."""
        self.left = _sum_of([self.counters])


@dataclass(frozen=True, slots=True)
class Group:
    """The engines with the same attributes. Replaced and never changed: other threads read it.

    Attributes:
        attributes: The pool's and its database's.
        sources: The engines.
        gone: What those had counted that are no more.
        was_on: Whether one of those had its metrics on when it went.
    """

    attributes: Mapping[str, Any]
    sources: tuple[Source, ...] = ()
    gone: Counters = field(default_factory=Counters)
    was_on: bool = False

    def source_of(self, pool: PoolBase) -> Source | None:
        """An engine's, which may have had its metrics on before."""
        return next((s for s in self.sources if s.counters is pool.counters), None)

    def with_source(self, source: Source) -> Group:
        """One more; what engines that are no more had counted becomes one sum."""
        gone = [s for s in self.sources if not s.pools()]
        return Group(
            self.attributes,
            (*(s for s in self.sources if s not in gone), source),
            _sum_of([self.gone, *(s.counted() for s in gone)]),
            self.was_on or any(s.left is None for s in gone),
        )

    def standing(self) -> Standing:
        """How the pools stand now."""
        pools = [pool for s in self.sources if s.left is None for pool in s.pools()]
        return Standing(pools, [pool for pool in pools if pool.gives_out()])

    def is_on(self) -> bool:
        """Whether anything of it is to be reported."""
        return self.was_on or any(s.left is None for s in self.sources)

    def counted(self) -> list[Counters]:
        """What was counted so far, to be added up."""
        return [self.gone, *(s.counted() for s in self.sources)]


class Standing(NamedTuple):
    """Pools at one instant.

    Attributes:
        pools: All of them.
        current: Those that have not been replaced.
    """

    pools: list[PoolBase]
    current: list[PoolBase]

    def sum(self, read: Callable[[PoolBase], float]) -> list[Value]:
        """Of all pools, added up."""
        return [(sum(map(read, self.pools)), {})] if self.pools else []

    def limit(self, read: Callable[[PoolBase], float]) -> list[Value]:
        """Of the current pools, added up; nothing if one is unlimited."""
        total = sum(map(read, self.current))
        return [] if not self.current or total == math.inf else [(int(total), {})]


def _connections(now: Standing) -> list[Value]:
    if not now.pools:
        return []
    used, idle = (sum(map(read, now.pools)) for read in (PoolBase.checkedout, PoolBase.checkedin))
    return [(used, {STATE: "used"}), (idle, {STATE: "idle"})]


def _utilisation(now: Standing) -> list[Value]:
    used = sum(pool.checkedout() for pool in now.current)
    return [(used / most, {}) for most, _ in now.limit(PoolBase.limit)]


def _greatest(read: Callable[[PoolBase], float]) -> Callable[[Standing], list[Value]]:
    return lambda now: [(max(map(read, now.pools)), {})] if now.pools else []


STATES: Mapping[str, Callable[[Standing], list[Value]]] = {
    "db.client.connection.count": _connections,
    "db.client.connection.idle.max": lambda now: now.limit(PoolBase.kept),
    "db.client.connection.idle.min": lambda now: now.limit(lambda pool: pool.min_idle),
    "db.client.connection.max": lambda now: now.limit(PoolBase.limit),
    "db.client.connection.pending_requests": lambda now: now.sum(PoolBase.waiting),
    "poolkit.pool.utilisation": _utilisation,
    "poolkit.pool.overloaded": _greatest(PoolBase.serves_newest_first),
    "poolkit.connection.opening": lambda now: now.sum(PoolBase.opening),
    "poolkit.connection.longest_use": _greatest(PoolBase.longest_use),
}
"""What is read from the pools."""


def _total(name: str) -> Callable[[list[Counters]], list[Value]]:
    return lambda counted: [(sum(getattr(each, name) for each in counted), {})]


def _closed(counted: list[Counters]) -> list[Value]:
    return [
        (sum(each.closed[reason] for each in counted), {CLOSE_REASON: reason.value})
        for reason in CloseReason
    ]


def _open_failures(counted: list[Counters]) -> list[Value]:
    numbers = ((kind, sum(each.open_failures[kind] for each in counted)) for kind in FaultKind)
    return [
        (number, {FAULT_KIND: kind.value})
        for kind, number in numbers
        # 0 from the start for each, so that the first is seen as a rise.
        if number or kind in CONNECTING
    ]


COUNTS: Mapping[str, Callable[[list[Counters]], list[Value]]] = {
    "db.client.connection.timeouts": _total("timeouts"),
    "poolkit.connection.open_failures": _open_failures,
    "poolkit.connection.closed": _closed,
    "poolkit.connection.pings": _total("pings"),
    "poolkit.connection.ping_failures": _total("pings_failed"),
    "poolkit.connection.long_holders": _total("long_holders"),
    "poolkit.checkout.refusals": _total("refused"),
    "poolkit.pool.overloads": _total("overloads"),
    "poolkit.transaction.retries": _total("retries"),
}
"""What is read from the counters."""


class Instruments:
    """The instruments on one meter, and the engines whose numbers they report.

    Attributes:
        durations: Takes those of statements.
    """

    def __init__(self, meter: Meter) -> None:
        self._groups: dict[frozenset[tuple[str, Any]], Group] = {}
        self._lock = threading.Lock()
        self._meter = meter
        self._create, self._wait, self._use = (
            Recorders(histogram(meter, f"db.client.connection.{what}_time"))
            for what in ("create", "wait", "use")
        )
        self.durations = Recorders(histogram(meter, "db.client.operation.duration"))
        # Last: another thread may collect them at once.
        self._observables = [
            *(observable(meter, name, self._reader(_state(read))) for name, read in STATES.items()),
            *(observable(meter, name, self._reader(_count(read))) for name, read in COUNTS.items()),
        ]

    def add(self, pool: HandoffPool, attributes: Mapping[str, Any]) -> Callable[[], None]:
        """Report an engine's numbers; what is returned ends that, if they were not reported."""
        key = frozenset(attributes.items())
        with self._lock:
            group = self._groups.get(key) or Group(attributes)
            source = group.source_of(pool)
            if source is None:
                source = Source(pool)
                self._groups[key] = group.with_source(source)
            if source.left is None:
                return _nothing
            source.left = None
        return self._watch(pool.observers, group.attributes, source.turn_off)

    def _watch(
        self, observers: Observers, attributes: Mapping[str, Any], last: Callable[[], None]
    ) -> Callable[[], None]:
        create, wait, use = (
            each.of(attributes).record for each in (self._create, self._wait, self._use)
        )

        def opened(event: ConnectionOpened) -> None:
            create(event.duration)

        def checked_out(event: CheckedOut) -> None:
            wait(event.wait + event.ping)

        def checked_in(event: CheckedIn) -> None:
            use(event.use)

        ends = ExitStack()
        ends.callback(last)
        ends.callback(observers.add(opened, [ConnectionOpened]))
        ends.callback(observers.add(checked_out, [CheckedOut]))
        ends.callback(observers.add(checked_in, [CheckedIn]))
        return ends.close

    def _reader(self, read: Callable[[Group], list[Value]]) -> CallbackT:
        def observe(_: CallbackOptions) -> Iterator[Observation]:
            for each in (self._create, self._wait, self._use, self.durations):
                each.pass_on()
            for group in list(self._groups.values()):
                for number, more in read(group):
                    yield Observation(number, {**group.attributes, **more})

        return observe


def _state(read: Callable[[Standing], list[Value]]) -> Callable[[Group], list[Value]]:
    return lambda group: read(group.standing())


def _count(read: Callable[[list[Counters]], list[Value]]) -> Callable[[Group], list[Value]]:
    return lambda group: read(group.counted()) if group.is_on() else []


def _sum_of(each: Iterable[Counters]) -> Counters:
    total = Counters()
    for counters in each:
        total.add(counters)
    return total


def _nothing() -> None:
    pass


instruments = PerProvider(Instruments)
