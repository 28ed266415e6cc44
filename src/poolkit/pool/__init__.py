"""The connection pool."""

from poolkit.pool import forks as _forks  # noqa: F401 (registers its hook)
from poolkit.pool.draining import DrainReport
from poolkit.pool.handoff import HandoffPool
from poolkit.pool.stats import PoolStats

__all__ = ["DrainReport", "HandoffPool", "PoolStats"]
