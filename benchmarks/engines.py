"""The contestants. Each does the same request; those that are not installed are left out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Protocol
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

import poolkit
from poolkit import DatabaseSettings

SELECT = "SELECT 1"

POOLKIT = "poolkit"
STOCK = "SQLAlchemy"
PING = "SQLAlchemy, pre-ping"
RECIPE = "production recipe"
PSYCOPG = "SQLAlchemy, psycopg"
RAW_ASYNCPG = "asyncpg.Pool"
RAW_PSYCOPG = "psycopg_pool"


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the pools are, and how long they let callers wait."""

    size: int = 10
    overflow: int = 0
    timeout: float = 10.0


class Contestant(Protocol):
    """A pool with a database behind it."""

    async def request(self, statement: str = SELECT) -> None:
        """Check out, execute, commit, check in."""

    async def close(self) -> None:
        """Close all connections."""


@dataclass(frozen=True, slots=True)
class OnEngine:
    """A request on an ``AsyncEngine``."""

    engine: AsyncEngine

    async def request(self, statement: str = SELECT) -> None:
        """Check out, execute, commit, check in."""
        async with self.engine.connect() as connection:
            await connection.execute(text(statement))
            await connection.commit()

    async def close(self) -> None:
        """Close all connections."""
        await self.engine.dispose()


@dataclass(frozen=True, slots=True)
class OnAsyncpg:
    """The same request on asyncpg's own pool."""

    pool: asyncpg.Pool

    async def request(self, statement: str = SELECT) -> None:
        """Check out, execute, commit, check in."""
        async with self.pool.acquire() as connection, connection.transaction():
            await connection.fetch(statement)

    async def close(self) -> None:
        """Close all connections."""
        await self.pool.close()


@dataclass(frozen=True, slots=True)
class OnPsycopg:
    """The same request on psycopg's own pool."""

    pool: Any

    async def request(self, statement: str = SELECT) -> None:
        """Check out, execute, commit, check in."""
        async with self.pool.connection() as connection:
            cursor = await connection.execute(statement)
            await cursor.fetchall()

    async def close(self) -> None:
        """Close all connections."""
        await self.pool.close()


def poolkit_engine(url: str, sizes: Sizes, **options: Any) -> AsyncEngine:
    """The engine of poolkit as it comes, liveness checks and timeouts on."""
    settings = DatabaseSettings(url=url)  # type: ignore[arg-type]
    return poolkit.create_async_engine(settings=settings, **_pool(sizes), **options)


def stock_engine(
    url: str, sizes: Sizes, driver: str = "postgresql+asyncpg", **options: Any
) -> AsyncEngine:
    """SQLAlchemy's engine."""
    url = urlsplit(url)._replace(scheme=driver).geturl()
    return create_async_engine(url, **_pool(sizes), **options)


def recipe_engine(url: str, sizes: Sizes) -> AsyncEngine:
    """What is commonly recommended: pre-ping, no caches, and a name for each statement."""
    return stock_engine(url, sizes, pool_pre_ping=True, connect_args=recipe_arguments())


def recipe_arguments() -> dict[str, Any]:
    """The connect arguments of what is commonly recommended."""
    return {
        "statement_cache_size": 0,
        "prepared_statement_cache_size": 0,
        "prepared_statement_name_func": lambda: f"__asyncpg_{uuid4()}__",
    }


def _pool(sizes: Sizes) -> dict[str, Any]:
    return {
        "pool_size": sizes.size,
        "max_overflow": sizes.overflow,
        "pool_timeout": sizes.timeout,
    }


_ENGINES: dict[str, Callable[[str, Sizes], AsyncEngine]] = {
    POOLKIT: poolkit_engine,
    STOCK: stock_engine,
    PING: partial(stock_engine, pool_pre_ping=True),
    RECIPE: recipe_engine,
    PSYCOPG: partial(stock_engine, driver="postgresql+psycopg"),
}


async def _make(name: str, url: str, sizes: Sizes) -> Contestant:
    if name == RAW_ASYNCPG:
        # Without its own reset of a session's state, a round trip which no other one makes.
        return OnAsyncpg(await asyncpg.create_pool(url, min_size=1, max_size=sizes.size, reset=_no))
    if name == RAW_PSYCOPG:
        return OnPsycopg(await _psycopg_pool(url, sizes))
    return OnEngine(_ENGINES[name](url, sizes))


async def _no(_: Any) -> None:
    pass


async def _psycopg_pool(url: str, sizes: Sizes) -> Any:
    from psycopg_pool import AsyncConnectionPool  # noqa: PLC0415 (may not be installed)

    pool = AsyncConnectionPool(url, min_size=1, max_size=sizes.size, open=False)
    await pool.open()
    return pool


def available() -> tuple[str, ...]:
    """The names of the contestants whose packages are installed."""
    names = [POOLKIT, STOCK, PING, RECIPE]
    if find_spec("psycopg"):
        names.append(PSYCOPG)
    names.append(RAW_ASYNCPG)
    if find_spec("psycopg_pool"):
        names.append(RAW_PSYCOPG)
    return tuple(names)


@asynccontextmanager
async def contest(
    names: Iterable[str], url: str, sizes: Sizes
) -> AsyncIterator[dict[str, Contestant]]:
    """The contestants on one server; names that begin alike, such as ``x (again)``, are one."""
    async with AsyncExitStack() as stack:
        made = {}
        for name in names:
            made[name] = await _make(name.removesuffix(AGAIN), url, sizes)
            stack.push_async_callback(made[name].close)
        yield made


AGAIN = " (again)"
"""A second engine of the same kind: how far apart two equals are is the run's own spread."""


async def side_by_side(contestant: Contestant, tasks: int, requests: int) -> list[float]:
    """Seconds for each request of so many tasks with so many requests each."""
    clock = asyncio.get_running_loop().time
    times: list[float] = []

    async def task() -> None:
        for _ in range(requests):
            began = clock()
            await contestant.request()
            times.append(clock() - began)

    await asyncio.gather(*(task() for _ in range(tasks)))
    return times


def through(url: str, port: int) -> str:
    """The same database by way of a proxy."""
    parts = urlsplit(url)
    credentials, _, _ = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{credentials}@127.0.0.1:{port}").geturl()
