"""Which engine a request is for."""

from __future__ import annotations

import asyncio
import weakref
from dataclasses import dataclass
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.requests import HTTPConnection

from poolkit.options import Password
from poolkit.registry import get_engine
from poolkit.settings import DatabaseSettings


@dataclass(frozen=True, slots=True)
class Registration:
    """What an application's lifespan found.

    Attributes:
        engine: Not kept alive: its loop owns it.
        loop: The loop that the lifespan runs on.
        settings: Those of the engine; None is the environment.
        password: As for ``get_engine``.
    """

    engine: weakref.ref[AsyncEngine]
    loop: weakref.ref[asyncio.AbstractEventLoop]
    settings: DatabaseSettings | None
    password: Password | None

    def here(self) -> AsyncEngine:
        """The engine, or on another loop that loop's."""
        engine = self.engine()
        if engine is not None and self.loop() is asyncio.get_running_loop():
            return engine
        return get_engine(self.settings, password=self.password)


_registrations: weakref.WeakKeyDictionary[Any, Registration] = weakref.WeakKeyDictionary()
"""By application."""

_users: list[AsyncEngine] = []
"""The engine of each lifespan that is under way."""


def register(app: Any, settings: DatabaseSettings | None, password: Password | None) -> AsyncEngine:
    """Make the running loop's engine the application's; it stays so after its end."""
    engine = get_engine(settings, password=password)
    loop = asyncio.get_running_loop()
    _registrations[app] = Registration(weakref.ref(engine), weakref.ref(loop), settings, password)
    _users.append(engine)
    return engine


def leave(engine: AsyncEngine) -> bool:
    """An application has ended. Whether it was the last that uses the engine."""
    _users.remove(engine)
    return engine not in _users


def engine_of(connection: HTTPConnection) -> AsyncEngine:
    """The engine of the application's lifespan; without one, ``get_engine()``.

    A mounted application has its own, or that of the outermost application.
    """
    found = _registrations.get(connection.scope.get("app"))
    if found is None:
        found = _of_outermost(connection.scope.get("router"))
    return get_engine() if found is None else found.here()


def _of_outermost(router: Any) -> Registration | None:
    """By the router that was the first to see the request."""
    for app, registration in list(_registrations.items()):
        if router is not None and getattr(app, "router", None) is router:
            return registration
    return None
