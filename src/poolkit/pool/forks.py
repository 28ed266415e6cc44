"""A forked child starts with empty pools and leaves its parent's sockets alone."""

from __future__ import annotations

import os

from poolkit.pool.base import pools

_parents: list[object] = []
"""Held for ever: asyncpg's clean-up in the child would end the parent's sessions (measured)."""


def _after_fork_in_child() -> None:
    _parents.extend([pool.forget() for pool in list(pools)])


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
