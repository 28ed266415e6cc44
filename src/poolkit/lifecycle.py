"""An engine's beginning and end, and what can be seen of it in between."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, overload

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from poolkit.errors import ConfigurationError
from poolkit.events import E, Event, Observer
from poolkit.pool import DrainReport, HandoffPool, PoolStats
from poolkit.pool.base import living


@dataclass(frozen=True, slots=True)
class WarmUpReport:
    """How a warm-up went.

    Attributes:
        opened: Connections that were made.
        failures: One error for each that was not.
        seconds: How long it took.
    """

    opened: int
    failures: tuple[BaseException, ...]
    seconds: float


def pool_stats(engine: AsyncEngine | Engine) -> PoolStats:
    """How the engine's pool stands, and what it has done since the engine was made.

    Raises:
        ConfigurationError: The engine's pool is not a ``HandoffPool``.
    """
    return _pool(engine).stats()


@overload
def observe(
    engine: AsyncEngine | Engine, observer: Observer, events: None = None
) -> Callable[[], None]: ...


@overload
def observe(
    engine: AsyncEngine | Engine, observer: Callable[[E], object], events: Iterable[type[E]]
) -> Callable[[], None]: ...


def observe(
    engine: AsyncEngine | Engine,
    observer: Callable[[Any], object],
    events: Iterable[type[Event]] | None = None,
) -> Callable[[], None]:
    """Tell the observer of the engine's events; call what is returned to end that.

    Args:
        engine: The engine.
        observer: Any callable that takes one event.
        events: Kinds of events to tell it of; None is every kind. What nobody wants costs nothing.

    Raises:
        ConfigurationError: The engine's pool is not a ``HandoffPool``.
    """
    observers = _pool(engine).observers
    return observers.add(observer) if events is None else observers.add(observer, events)


async def warm_up(engine: AsyncEngine, n: int | None = None) -> WarmUpReport:
    """Open connections before there is traffic, side by side.

    Args:
        engine: The engine.
        n: Connections that should be there; at most, and by default, the pool's size.

    Raises:
        ConfigurationError: The engine's pool is not a ``HandoffPool``.
    """
    pool = _pool(engine)
    loop = asyncio.get_running_loop()
    began = loop.time()
    wanted = pool.size() if n is None else min(n, pool.size())
    results = await pool.open(wanted)
    failures = tuple(error for error in results if error is not None)
    return WarmUpReport(len(results) - len(failures), failures, loop.time() - began)


async def drain(engine: AsyncEngine, timeout: float = 30.0) -> DrainReport:
    """Before a shutdown: give out no connection any more, wait for those in use, drop the rest.

    Afterwards the server has no session of this engine left, and the engine refuses checkouts
    with ``PoolDraining``.

    Args:
        engine: The engine.
        timeout: Seconds to wait for connections in use.

    Raises:
        ConfigurationError: The engine's pool is not a ``HandoffPool``.
    """
    return await _pool(engine).drain(timeout)


def pools_of(engine: AsyncEngine | Engine) -> list[HandoffPool]:
    """The engine's pool and those that it has replaced, as far as they are there."""
    return living(engine.pool.lineage) if isinstance(engine.pool, HandoffPool) else []


def _pool(engine: AsyncEngine | Engine) -> HandoffPool:
    if not isinstance(engine.pool, HandoffPool):
        raise ConfigurationError(
            f"the engine's pool is {type(engine.pool).__name__}, which has no such interface:"
            " leave out poolclass=, or pass poolkit.pool.HandoffPool"
        )
    if engine.pool.serving is None or asyncio._get_running_loop() is None:  # noqa: SLF001 (public in all but name)
        return engine.pool
    return engine.pool.here()
