"""A driver without a network: SQLAlchemy's asyncpg adapter on a connection that does nothing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from sqlalchemy import URL
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.postgresql.asyncpg import PGDialect_asyncpg
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import Pool


class FakeConnection:
    """As much of ``asyncpg.Connection`` as a checkout touches."""

    def __init__(self) -> None:
        self._closed = False

    def is_closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    async def execute(self, *_: Any, **__: Any) -> str:
        """Answer at once."""
        return "SELECT 1"

    async def close(self, **_: Any) -> None:
        """Close."""
        self._closed = True

    def terminate(self) -> None:
        """Close."""
        self._closed = True


class FakeDialect(PGDialect_asyncpg):
    """asyncpg's dialect, which asks a fake server nothing."""

    supports_statement_cache = True

    def initialize(self, connection: Any) -> None:
        """There is nobody to ask for a version."""

    def on_connect(self) -> None:
        """There are no types to register."""


async def _connect(*_: Any, **__: Any) -> FakeConnection:
    return FakeConnection()


def fake_engine(
    poolclass: type[Pool] | None = None,
    connect: Callable[..., Awaitable[Any]] = _connect,
    **options: Any,
) -> AsyncEngine:
    """An engine on the fake driver; without a pool class, on SQLAlchemy's own."""
    registry.register("postgresql.poolkit_fake", __name__, FakeDialect.__name__)
    url = URL.create("postgresql+poolkit_fake", host="nowhere")
    if poolclass is not None:
        options["poolclass"] = poolclass
    return create_async_engine(url, connect_args={"async_creator_fn": connect}, **options)
