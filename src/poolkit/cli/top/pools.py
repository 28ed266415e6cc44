"""Pools by their metrics: how each stands, and what it did between two readings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

from poolkit.cli.top.exposition import Reading
from poolkit.cli.top.masking import plain
from poolkit.telemetry.attributes import POOL_NAME
from poolkit.telemetry.catalogue import CLOSE_REASON, FAULT_KIND, METRICS, STATE

WORKER = "worker"
"""The label by which an endpoint tells several processes apart."""

ALL = "all"
"""In place of a worker: the sum of them."""

Key = tuple[str, str | None]
"""A pool's name and its worker."""


@dataclass(frozen=True, slots=True)
class Count:
    """A counter.

    Attributes:
        total: Since the service began.
        growth: Since the reading before; None if there is none.
        by: The total by reason, without those that did not occur.
    """

    total: int = 0
    growth: int | None = None
    by: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Wait:
    """How long callers waited for a connection, in seconds, as far as buckets tell it.

    ``inf`` is more than the last bucket's bound.
    """

    p50: float
    p95: float


@dataclass(frozen=True, slots=True)
class Room:
    """Connections that the server has of all its clients, and its ``max_connections``."""

    used: int
    max: int


@dataclass(frozen=True, slots=True)
class Pool:
    """A pool of one process.

    Attributes:
        worker: Which of the service's processes; ``all`` for their sum, None if it is one.
        limit: Connections at most; None if they are unlimited.
        overloaded: Whether it serves the newest in line first.
        longest_use: Seconds; None if the service does not tell.
        checkouts: Per second; None without a reading before.
        wait: Of those checkouts; None if there were none.
        closed: Connections that left the pool, by reason.
        failures: Connects that failed, by what went wrong.
        server: The server's connections; None if the service does not look.
    """

    name: str
    worker: str | None
    used: int
    idle: int
    opening: int
    waiting: int
    limit: int | None
    overloaded: bool
    longest_use: float | None
    checkouts: float | None
    wait: Wait | None
    timeouts: Count
    refusals: Count
    failures: Count
    closed: Count
    retries: Count
    long_holders: Count
    server: Room | None

    @property
    def utilisation(self) -> float | None:
        """Used connections as a fraction of the most there may be."""
        return self.used / self.limit if self.limit else None


def pools(now: Reading, before: Reading | None = None) -> list[Pool]:
    """All pools in a reading, by name and worker; of several workers, their sum comes first.

    Args:
        now: The reading.
        before: An earlier one of the same endpoint, for what happened in between.
    """
    keys = {key for metric in METRICS.values() for key in _keys(now, metric.prometheus)}
    keys |= {(name, ALL) for name, worker in keys if worker is not None}
    return [_pool(key, now, before) for key in sorted(keys, key=_natural)]


def _keys(reading: Reading, name: str) -> Iterator[Key]:
    return (_key(labels) for labels, _ in reading.of(name) if _label(POOL_NAME) in labels)


def _natural(key: Key) -> tuple[str, int, str]:
    """By name, then the sum, then the workers by their numbers."""
    name, worker = key
    number = int(worker) if worker is not None and worker.isdecimal() else -1
    return name, number if worker not in (None, ALL) else -2, worker or ""


def _pool(key: Key, now: Reading, before: Reading | None) -> Pool:
    total, highest = partial(_gauge, now, key, sum), partial(_gauge, now, key, max)
    count = partial(_count, now, before, key)
    states = _by(now, key, "db.client.connection.count", STATE)
    in_use, most = (highest(f"poolkit.server.connections{end}") for end in ("", ".max"))
    limit = total("db.client.connection.max")
    rate, wait = _waits(now, before, key)
    return Pool(
        name=plain(key[0]),
        worker=key[1] and plain(key[1]),
        used=round(states.get("used", 0)),
        idle=round(states.get("idle", 0)),
        opening=round(total("poolkit.connection.opening") or 0),
        waiting=round(total("db.client.connection.pending_requests") or 0),
        limit=None if limit is None else round(limit),
        overloaded=bool(highest("poolkit.pool.overloaded")),
        longest_use=highest("poolkit.connection.longest_use"),
        checkouts=rate,
        wait=wait,
        timeouts=count("db.client.connection.timeouts"),
        refusals=count("poolkit.checkout.refusals"),
        failures=count("poolkit.connection.open_failures", FAULT_KIND),
        closed=count("poolkit.connection.closed", CLOSE_REASON),
        retries=count("poolkit.transaction.retries"),
        long_holders=count("poolkit.connection.long_holders"),
        server=None if in_use is None or most is None else Room(round(in_use), round(most)),
    )


def _label(attribute: str) -> str:
    return attribute.replace(".", "_")


def _key(labels: Mapping[str, str]) -> Key:
    return labels.get(_label(POOL_NAME), ""), labels.get(WORKER)


def _series(reading: Reading, key: Key, name: str) -> Iterator[tuple[Mapping[str, str], float]]:
    """A pool's samples of that name; those that are no number are left out."""
    pool, worker = key
    for labels, value in reading.of(name):
        found = _key(labels)
        if found[0] == pool and worker in (ALL, found[1]) and math.isfinite(value):
            yield labels, value


def _gauge(
    reading: Reading, key: Key, combine: Callable[[list[float]], float], metric: str
) -> float | None:
    """A gauge; several databases may have pools of the same name."""
    values = [value for _, value in _series(reading, key, METRICS[metric].prometheus)]
    return combine(values) if values else None


def _by(reading: Reading, key: Key, metric: str, attribute: str) -> dict[str, float]:
    """The values by an attribute."""
    found: dict[str, float] = {}
    for labels, value in _series(reading, key, METRICS[metric].prometheus):
        name = plain(labels.get(_label(attribute), ""))
        found[name] = found.get(name, 0) + value
    return found


def _count(
    now: Reading, before: Reading | None, key: Key, metric: str, attribute: str | None = None
) -> Count:
    name = METRICS[metric].prometheus
    total = sum(value for _, value in _series(now, key, name))
    by = {} if attribute is None else _by(now, key, metric, attribute)
    growth = None if before is None else round(sum(_growth(now, before, key, name).values()))
    return Count(round(total), growth, {name: round(v) for name, v in by.items() if v})


def _growth(
    now: Reading, before: Reading, key: Key, name: str
) -> dict[frozenset[tuple[str, str]], float]:
    """What each series gained. One that is lower than it was began anew, with the process."""
    earlier = {frozenset(labels.items()): value for labels, value in _series(before, key, name)}
    grown: dict[frozenset[tuple[str, str]], float] = {}
    for labels, value in _series(now, key, name):
        series = frozenset(labels.items())
        was = earlier.get(series, 0.0)
        grown[series] = value - was if value >= was else value
    return grown


def _waits(now: Reading, before: Reading | None, key: Key) -> tuple[float | None, Wait | None]:
    """Checkouts per second, and how long they took."""
    if before is None or now.at <= before.at:
        return None, None
    buckets: dict[float, float] = {}
    name = METRICS["db.client.connection.wait_time"].prometheus
    for series, value in _growth(now, before, key, f"{name}_bucket").items():
        bound = float(dict(series).get("le", "nan"))
        buckets[bound] = buckets.get(bound, 0.0) + value
    count = sum(_growth(now, before, key, f"{name}_count").values())
    quantile: Callable[[float], float | None] = partial(_quantile, sorted(buckets.items()))
    p50, p95 = quantile(0.5), quantile(0.95)
    wait = None if p50 is None or p95 is None else Wait(p50, p95)
    return count / (now.at - before.at), wait


def _quantile(buckets: list[tuple[float, float]], share: float) -> float | None:
    """As Prometheus' ``histogram_quantile``: evenly spread in a bucket; ``inf`` beyond the last."""
    if not buckets or not buckets[-1][1]:
        return None
    rank = share * buckets[-1][1]
    for (low, below), (high, count) in pairwise([(0.0, 0.0), *buckets]):
        if count >= rank and count > below:
            reached = (rank - below) / (count - below)
            return low + (high - low) * reached
    return math.inf
