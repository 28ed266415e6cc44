"""One engine for each event loop and settings, closed with its loop.

A loop owns its engines: it holds them by a timer that never comes, and this module by weak
references only. They are closed in good order when the loop shuts down its asynchronous generators,
as ``asyncio.run`` and the runners of pytest's plugins have it do. A bare ``loop.close()`` drops its
timers, and the engines' sockets with them.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from poolkit import sources
from poolkit.engine import create_async_engine, read_environment
from poolkit.lifecycle import pools_of
from poolkit.loops import before_end
from poolkit.options import Password
from poolkit.sessions import commit, make_sessionmaker
from poolkit.settings import DatabaseSettings

GRACE = 1.0
"""Seconds that connections in use have to come back when their loop ends."""

_NEVER = 10 * 365 * 86_400.0
"""Seconds after which the timer would come that holds a loop's engines: ten years."""


def get_engine(
    settings: DatabaseSettings | None = None, *, password: Password | None = None
) -> AsyncEngine:
    """The engine of the running event loop; made at the first call, and closed with the loop.

    There is one for each loop and settings. Where no loop runs, as at module level, the engine
    belongs to no loop yet, and serves whichever uses it.

    Args:
        settings: The configuration; None reads ``DATABASE_*``, anew at every call.
        password: In place of the settings' own: a string, or a callable, sync or async, asked at
            every physical connect. Another callable is another engine.

    Raises:
        ConfigurationError: As ``create_async_engine``.
    """
    wanted = _key(settings, password)
    loop = asyncio._get_running_loop()  # noqa: SLF001 (public in all but name)
    return _engine_of_no_loop(wanted) if loop is None else _home_of(loop).engine(wanted)


def get_sessionmaker(
    settings: DatabaseSettings | None = None, *, password: Password | None = None
) -> async_sessionmaker[AsyncSession]:
    """A session maker on ``get_engine(settings)``; objects stay readable after a commit.

    Args:
        settings: The configuration; None reads ``DATABASE_*``, anew at every call.
        password: In place of the settings' own: a string, or a callable, sync or async, asked at
            every physical connect. Another callable is another engine.

    Raises:
        ConfigurationError: As ``create_async_engine``.
    """
    wanted = _key(settings, password)
    loop = asyncio._get_running_loop()  # noqa: SLF001 (public in all but name)
    if loop is None:
        return make_sessionmaker(_engine_of_no_loop(wanted))
    return _home_of(loop).sessionmaker(wanted)


@asynccontextmanager
async def session(
    settings: DatabaseSettings | None = None, *, password: Password | None = None
) -> AsyncIterator[AsyncSession]:
    """A session of ``get_sessionmaker(settings)``, committed at the end of the block.

    It takes a connection at its first use. After any exception, a cancellation too, it is rolled
    back. The block may commit in between.

    Args:
        settings: The configuration; None reads ``DATABASE_*``.
        password: In place of the settings' own, as in ``get_engine``.

    Raises:
        ConfigurationError: As ``create_async_engine``.
        TransactionAborted: At the end: the block swallowed an error of the database, so nothing is
            committed.
    """
    async with get_sessionmaker(settings, password=password)() as opened:
        yield opened
        await commit(opened)


async def dispose_engines() -> None:
    """Dispose of every engine that ``get_engine`` has given, as ``engine.dispose()`` does.

    Connections in use are closed as they come back, and an engine that is used again opens new
    ones. Of engines of other loops the sockets are dropped.
    """
    here = asyncio.get_running_loop()
    for home in _all_homes():
        if home.loop is here:
            await asyncio.gather(*(engine.dispose() for engine in home.engines()))
        else:
            for engine in home.engines():
                engine.sync_engine.dispose()


class _Key(NamedTuple):
    """What tells engines of one loop apart."""

    settings: DatabaseSettings
    password: Password | None

    def make(self) -> AsyncEngine:
        """An engine with it."""
        return create_async_engine(settings=self.settings, password=self.password)


def _key(settings: DatabaseSettings | None, password: Password | None) -> _Key:
    return _Key(_current_settings() if settings is None else settings, password)


# -- Loops -------------------------------------------------------------------------------------


class _Home:
    """The engines of one event loop, which owns it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._engines: dict[_Key, AsyncEngine] = {}
        self._sessionmakers: dict[_Key, async_sessionmaker[AsyncSession]] = {}
        self._stay()
        self._ending = before_end(partial(_close, weakref.ref(self)))

    def _stay(self) -> None:
        """Have the loop refer to this; a virtual clock may get that far."""
        self.loop.call_later(_NEVER, self._stay)

    def engines(self) -> list[AsyncEngine]:
        """Those that are there."""
        return list(self._engines.values())

    def engine(self, key: _Key) -> AsyncEngine:
        """The one with these settings."""
        found = self._engines.get(key)
        if found is None:
            with _guard.lock:
                found = self._engines[key] = _unclaimed(key) or key.make()
        return found

    def sessionmaker(self, key: _Key) -> async_sessionmaker[AsyncSession]:
        """The one on the engine with these settings."""
        found = self._sessionmakers.get(key)
        if found is None:
            found = self._sessionmakers[key] = make_sessionmaker(self.engine(key))
        return found

    def has(self, engine: AsyncEngine) -> bool:
        """Whether an engine is one of these, on a loop that is not closed."""
        return not self.loop.is_closed() and any(e is engine for e in self.engines())

    async def close(self) -> None:
        """Close every connection, of pools that were replaced too."""
        pools = [pool for engine in self.engines() for pool in pools_of(engine)]
        engines = self.engines()
        self._engines.clear()
        self._sessionmakers.clear()
        await asyncio.gather(*(pool.drain(GRACE) for pool in pools if pool.loop is self.loop))
        for engine in engines:
            await engine.dispose()  # one of no loop can serve the next

    def __del__(self) -> None:
        """Drop the sockets: the loop was closed, and nobody waited for its generators."""
        for engine in self.engines():
            for pool in pools_of(engine):
                if pool.loop is self.loop:
                    pool.abandon()


async def _close(reference: weakref.ref[_Home]) -> None:
    home = reference()
    if home is not None:
        await home.close()


_homes: weakref.WeakValueDictionary[int, _Home] = weakref.WeakValueDictionary()
"""By the loop's id."""


def _home_of(loop: asyncio.AbstractEventLoop) -> _Home:
    home = _homes.get(id(loop))
    if home is None or home.loop is not loop:
        home = _Home(loop)
        with _guard.lock:
            _homes[id(loop)] = home
    return home


def _all_homes() -> list[_Home]:
    with _guard.lock:
        return list(_homes.values())


# -- Engines of no loop ------------------------------------------------------------------------

_of_no_loop: weakref.WeakValueDictionary[_Key, AsyncEngine] = weakref.WeakValueDictionary()
"""Those that were asked for where no loop ran, as long as somebody has them."""


def _engine_of_no_loop(key: _Key) -> AsyncEngine:
    with _guard.lock:
        engine = _of_no_loop.get(key)
        if engine is None:
            engine = _of_no_loop[key] = key.make()
            pool: Any = engine.pool
            pool.serving = partial(_pool_on, key)
    return engine


def _unclaimed(key: _Key) -> AsyncEngine | None:
    """The one of no loop, unless a loop has made it its own; that of a closed loop is free."""
    engine = _of_no_loop.get(key)
    if engine is None or any(home.has(engine) for home in _all_homes()):
        return None
    return engine


def _pool_on(key: _Key, loop: asyncio.AbstractEventLoop) -> Any:
    return _home_of(loop).engine(key).pool


# -- The environment ---------------------------------------------------------------------------

_VISIBLE = frozenset({sources.ENVIRONMENT, sources.DOTENV, sources.PARAMETERS})
"""Origins whose change is seen below; not the files that variables name."""

_last_read: tuple[Any, DatabaseSettings] | None = None


def _current_settings() -> DatabaseSettings:
    """What ``DatabaseSettings()`` would be, read only if something has changed since."""
    global _last_read  # noqa: PLW0603 (a memory of one)
    if _last_read is not None and _last_read[0] == _surroundings():
        return _last_read[1]
    before = _surroundings()
    settings, origins = read_environment()
    can_tell = _VISIBLE.issuperset(origins.values())
    _last_read = (before, settings) if can_tell else None
    return settings


def _surroundings() -> Any:
    """What the settings are read from."""
    try:
        found = Path(".env").stat()
        dotenv = (found.st_ino, found.st_mtime_ns, found.st_size)
    except OSError:
        dotenv = None
    return dict(os.environ), dotenv, sys.argv[:1]


# -- Threads and forks -------------------------------------------------------------------------


class _Guard:
    """The lock around what loops in several threads share; a forked child has a fresh one."""

    def __init__(self) -> None:
        self.renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.renew)

    def renew(self) -> None:
        """Nobody in this process has it."""
        self.lock = threading.RLock()


_guard = _Guard()
