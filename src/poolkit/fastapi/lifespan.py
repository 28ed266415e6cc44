"""An application's beginning and end: connections before traffic, none after it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine

from poolkit.errors import ConfigurationError
from poolkit.fastapi import engines
from poolkit.lifecycle import drain, pool_stats
from poolkit.lifecycle import warm_up as warm
from poolkit.options import Password
from poolkit.settings import DatabaseSettings

DRAIN_TIMEOUT = 10.0

_log = logging.getLogger("poolkit.fastapi")

Lifespan = Callable[[Any], AbstractAsyncContextManager[Any]]
"""What FastAPI and Starlette take as ``lifespan=``."""


def lifespan(
    inner: Lifespan | None = None,
    *,
    settings: DatabaseSettings | Callable[[], DatabaseSettings] | None = None,
    password: Password | None = None,
    warm_up: int | None = 1,
    drain_timeout: float = DRAIN_TIMEOUT,
) -> Lifespan:
    """The engine for the life of an application: ``FastAPI(lifespan=lifespan())``.

    It is ``get_engine(settings, password=password)``, warmed up before the first request and
    drained after the last. A database that cannot be reached is logged and does not keep the
    application from starting. Within a lifespan of one's own: ``async with lifespan()(app)``.

    Args:
        inner: Your own lifespan; begins when the engine is there, and ends before it is drained.
        settings: The configuration, or what is called for it at the start; None reads
            ``DATABASE_*``.
        password: In place of the settings' own: a string, or a callable, sync or async, asked at
            every physical connect.
        warm_up: Connections to open at the start, at most the pool's size; None is the pool's
            size, 0 none. The start waits for them, ``DATABASE_CONNECTION_TIMEOUT`` at most for
            each round of connects.
        drain_timeout: Seconds that connections in use have to come back at the end; then they are
            terminated. The server has finished its requests before. Both together must stay below
            what the process is given between its signal and its end (gunicorn's
            ``graceful_timeout`` and Kubernetes: 30 s).

    Raises:
        ConfigurationError: At the start: the settings will not do.
    """

    @asynccontextmanager
    async def run(app: Any) -> AsyncIterator[Any]:
        engine = engines.register(app, settings() if callable(settings) else settings, password)
        try:
            await _begin(engine, warm_up)
            async with nullcontext() if inner is None else inner(app) as state:
                yield state
        finally:
            if engines.leave(engine):
                await _end(engine, drain_timeout)

    return run


async def _begin(engine: AsyncEngine, connections: int | None) -> None:
    if pool_stats(engine).draining:
        await engine.dispose()  # by the end of an earlier lifespan on this loop: a new pool
    if connections is not None and connections <= 0:
        return
    failures = (await warm(engine, connections)).failures
    for error in failures:
        if isinstance(error, ConfigurationError):
            raise error
    if failures:
        _log.warning("the application starts without a database: %s", type(failures[0]).__name__)


async def _end(engine: AsyncEngine, timeout: float) -> None:
    report = await drain(engine, timeout)
    if report.terminated:
        _log.warning(
            "the application ended with %d connections in use for more than %g s: terminated",
            report.terminated,
            timeout,
        )
