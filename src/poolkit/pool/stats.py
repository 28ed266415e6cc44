"""What a pool has done and how it stands, as one typed snapshot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType

from poolkit.events import CloseReason
from poolkit.faults import FaultKind


@dataclass(slots=True)
class Counters:
    """What is added up while an engine lives; ``dispose()`` does not reset it."""

    checkouts: int = 0
    waits: int = 0
    wait_seconds: float = 0.0
    timeouts: int = 0
    refused: int = 0
    used_seconds: float = 0.0
    opened: int = 0
    open_failed: int = 0
    open_seconds: float = 0.0
    pings: int = 0
    pings_failed: int = 0
    ping_seconds: float = 0.0
    long_holders: int = 0
    overloads: int = 0
    retries: int = 0
    closed: dict[CloseReason, int] = field(default_factory=lambda: dict.fromkeys(CloseReason, 0))
    open_failures: dict[FaultKind, int] = field(default_factory=lambda: dict.fromkeys(FaultKind, 0))

    def add(self, other: Counters) -> None:
        """Count in what another has counted."""
        for each in fields(self):
            mine, more = getattr(self, each.name), getattr(other, each.name)
            if isinstance(mine, dict):
                for key, number in more.items():
                    mine[key] += number
            else:
                setattr(self, each.name, mine + more)


@dataclass(frozen=True, slots=True)
class PoolStats:
    """A pool's state, and what it has done since the engine was made.

    Attributes:
        used: Current. Connections in callers' hands, being checked for one included.
        idle: Current. Connections ready to be given out.
        opening: Current. Connects under way.
        waiting: Current. Callers in the queue.
        size: Current. Connections that are kept.
        limit: Current. Connections at most, overflow included; None is unlimited.
        utilisation: Current. ``used`` as a fraction of ``limit``; 0 if unlimited.
        overloaded: Current. Whether the newest in line are served first.
        draining: Current. Whether it gives out no connection any more.
        checkouts: Cumulative. Connections given out.
        waits: Cumulative. Those of them that had to wait.
        wait_seconds: Cumulative. Seconds they waited.
        timeouts: Cumulative. Callers that waited in vain.
        refused: Cumulative. Callers turned away at once.
        used_seconds: Cumulative. Seconds that connections were in use, until they came back.
        opened: Cumulative. Connections made.
        open_failed: Cumulative. Connects that failed.
        open_seconds: Cumulative. Seconds that the successful connects took.
        pings: Cumulative. Liveness checks.
        pings_failed: Cumulative. Those that found the connection dead.
        ping_seconds: Cumulative. Seconds they took.
        long_holders: Cumulative. Connections reported as held for too long.
        overloads: Cumulative. Times that the queue turned to newest first.
        retries: Cumulative. Times that ``run_in_transaction`` did the work again.
        closed: Cumulative. Connections that left the pool, by reason; every reason is there.
    """

    used: int
    idle: int
    opening: int
    waiting: int
    size: int
    limit: int | None
    utilisation: float
    overloaded: bool
    draining: bool
    checkouts: int
    waits: int
    wait_seconds: float
    timeouts: int
    refused: int
    used_seconds: float
    opened: int
    open_failed: int
    open_seconds: float
    pings: int
    pings_failed: int
    ping_seconds: float
    long_holders: int
    overloads: int
    retries: int
    closed: Mapping[CloseReason, int]


def frozen(closed: dict[CloseReason, int]) -> Mapping[CloseReason, int]:
    """A copy that cannot be changed."""
    return MappingProxyType(dict(closed))
