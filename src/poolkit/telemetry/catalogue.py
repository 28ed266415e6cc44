"""Every metric that is emitted, in one table: what is made, documented and charted is read here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)
"""Bounds of every histogram, in seconds: the semantic conventions' for operations."""

STATE = "db.client.connection.state"
CLOSE_REASON = "poolkit.close.reason"
FAULT_KIND = "poolkit.fault.kind"
ERROR_TYPE = "error.type"
STATUS_CODE = "db.response.status_code"
OPERATION = "db.operation.name"

_SECONDS = "s"
_RATIO = "1"


class Kind(StrEnum):
    """What a metric is, in OpenTelemetry's words."""

    COUNTER = "counter"
    UP_DOWN_COUNTER = "up-down counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        name: Its name in OpenTelemetry.
        kind: What it is.
        unit: Its unit, in UCUM's form.
        description: What it says, in a sentence.
        attributes: Its attributes besides the pool's own, which every metric has.
    """

    name: str
    kind: Kind
    unit: str
    description: str
    attributes: tuple[str, ...] = ()

    @property
    def prometheus(self) -> str:
        """The name of its family in Prometheus, as OpenTelemetry's exporter writes it.

        A histogram's series have ``_bucket``, ``_count`` and ``_sum`` after it.
        """
        name = self.name.replace(".", "_")
        if self.unit == _SECONDS:
            name += "_seconds"
        return name + "_total" if self.kind is Kind.COUNTER else name


CONVENTIONS = (
    Metric(
        "db.client.connection.count",
        Kind.UP_DOWN_COUNTER,
        "{connection}",
        "Connections by their state, idle or used.",
        (STATE,),
    ),
    Metric(
        "db.client.connection.idle.max",
        Kind.UP_DOWN_COUNTER,
        "{connection}",
        "Idle connections that are kept at most: the pool's size.",
    ),
    Metric(
        "db.client.connection.idle.min",
        Kind.UP_DOWN_COUNTER,
        "{connection}",
        "Idle connections that are kept ready at least.",
    ),
    Metric(
        "db.client.connection.max",
        Kind.UP_DOWN_COUNTER,
        "{connection}",
        "Connections at most, overflow included; absent where that is unlimited.",
    ),
    Metric(
        "db.client.connection.pending_requests",
        Kind.UP_DOWN_COUNTER,
        "{request}",
        "Callers that wait for a connection.",
    ),
    Metric(
        "db.client.connection.timeouts",
        Kind.COUNTER,
        "{timeout}",
        "Callers that waited in vain for the pool's timeout.",
    ),
    Metric(
        "db.client.connection.create_time",
        Kind.HISTOGRAM,
        _SECONDS,
        "Time it took to open a connection, all attempts counted in.",
    ),
    Metric(
        "db.client.connection.wait_time",
        Kind.HISTOGRAM,
        _SECONDS,
        "Time it took a caller to get a connection from the pool.",
    ),
    Metric(
        "db.client.connection.use_time",
        Kind.HISTOGRAM,
        _SECONDS,
        "Time between a connection's checkout and its check-in.",
    ),
    Metric(
        "db.client.operation.duration",
        Kind.HISTOGRAM,
        _SECONDS,
        "Time a statement took, as its caller saw it.",
        (OPERATION, STATUS_CODE, ERROR_TYPE),
    ),
)

BEYOND = (
    Metric(
        "poolkit.pool.utilisation",
        Kind.GAUGE,
        _RATIO,
        "Used connections as a fraction of the most there may be; absent where that is unlimited.",
    ),
    Metric(
        "poolkit.pool.overloaded",
        Kind.GAUGE,
        "{pool}",
        "1 while the newest in line are served first, otherwise 0.",
    ),
    Metric(
        "poolkit.connection.opening",
        Kind.UP_DOWN_COUNTER,
        "{connection}",
        "Connects under way.",
    ),
    Metric(
        "poolkit.connection.open_failures",
        Kind.COUNTER,
        "{failure}",
        "Connects that failed, by what went wrong.",
        (FAULT_KIND,),
    ),
    Metric(
        "poolkit.connection.closed",
        Kind.COUNTER,
        "{connection}",
        "Connections that left the pool, by reason.",
        (CLOSE_REASON,),
    ),
    Metric(
        "poolkit.connection.pings",
        Kind.COUNTER,
        "{ping}",
        "Checks of a connection before use.",
    ),
    Metric(
        "poolkit.connection.ping_failures",
        Kind.COUNTER,
        "{ping}",
        "Checks that found the connection dead.",
    ),
    Metric(
        "poolkit.connection.longest_use",
        Kind.GAUGE,
        _SECONDS,
        "How long the connection has been in use that has been so for longest; 0 if none is.",
    ),
    Metric(
        "poolkit.connection.long_holders",
        Kind.COUNTER,
        "{connection}",
        "Connections reported as held for longer than the leak threshold.",
    ),
    Metric(
        "poolkit.checkout.refusals",
        Kind.COUNTER,
        "{request}",
        "Callers turned away at once: too many wait, or the pool is draining.",
    ),
    Metric(
        "poolkit.pool.overloads",
        Kind.COUNTER,
        "{overload}",
        "Times that the queue turned to newest first.",
    ),
    Metric(
        "poolkit.transaction.retries",
        Kind.COUNTER,
        "{retry}",
        "Times that run_in_transaction did the work again.",
    ),
    Metric(
        "poolkit.server.connections",
        Kind.GAUGE,
        "{connection}",
        "Connections that the server has, of all its clients; only where an interval is set.",
    ),
    Metric(
        "poolkit.server.connections.max",
        Kind.GAUGE,
        "{connection}",
        "The server's max_connections; only where an interval is set.",
    ),
)

METRICS: Mapping[str, Metric] = MappingProxyType({m.name: m for m in CONVENTIONS + BEYOND})
"""All metrics by their names."""
