"""``install``: an application answers database faults, tells its health, and shows its pool."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import params
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.applications import Starlette
from starlette.requests import HTTPConnection

from poolkit.errors import ConfigurationError
from poolkit.fastapi import health as probes
from poolkit.fastapi import problems
from poolkit.fastapi.engines import engine_of
from poolkit.fastapi.status import Guard, StatusPage

HEALTH, STATUS_PAGE = "/health", "/poolkit"
"""Where they are unless another path is given."""

_INSTALLED = "_poolkit_installed"


def install(
    app: Starlette,
    *,
    engine: AsyncEngine | None = None,
    health: bool | str = True,
    ready_within: float = 1.0,
    status_page: bool | str = False,
    status_guard: Guard | params.Depends = Guard.LOOPBACK,
) -> None:
    """Add exception handlers, health endpoints and, if asked for, a status page.

    Before or after the application's own routes and handlers, and before it serves. Its own
    handlers for the same or more specific classes of errors win.

    Args:
        app: A FastAPI application, or a Starlette one.
        engine: The engine; by default the one of the application's ``lifespan()``, or else
            ``get_engine()`` of the loop that serves the request.
        health: Whether there are ``/health/live`` and ``/health/ready``, or what to put in the
            place of ``/health``.
        ready_within: Seconds that the server has to answer when readiness is asked for.
        status_page: Whether there is a status page at ``/poolkit``, or its path.
        status_guard: Who may see it: by default only clients on the same machine. A dependency
            such as ``Depends(require_admin)``, or ``Guard.PUBLIC``.

    Raises:
        ConfigurationError: It was installed already, the application serves already, or an
            argument cannot be honoured.
    """
    if getattr(app.state, _INSTALLED, False):
        raise ConfigurationError("poolkit.fastapi.install() was called for this application before")
    if app.middleware_stack is not None:
        raise ConfigurationError("call poolkit.fastapi.install() before the application serves")
    if ready_within <= 0:
        raise ConfigurationError(f"ready_within={ready_within}: give it some seconds, such as 1")
    at, page_at = _path("health", health, HEALTH), _path("status_page", status_page, STATUS_PAGE)
    life = _Life(app, engine)
    page = StatusPage(page_at, status_guard, life.engine) if page_at else None
    routes = list(page.routes(app)) if page else []
    if at:
        routes += probes.routes(at, life.engine, life.is_ending, ready_within)
    app.router.routes[:0] = routes  # before a mount at "/", whenever that was added
    problems.install(app, page.note if page else None)
    life.follow(page)
    setattr(app.state, _INSTALLED, True)


def _path(name: str, given: bool | str, usual: str) -> str:  # noqa: FBT001 (as it was given)
    if isinstance(given, bool):
        return usual if given else ""
    if not given.startswith("/") or given.endswith("/") or "{" in given:
        raise ConfigurationError(f"{name}={given!r}: a path such as {usual!r} is wanted")
    return given


class _Life:
    """What is known of an application at a request: its engine, and whether it is ending."""

    def __init__(self, app: Starlette, engine: AsyncEngine | None) -> None:
        self._app = app
        self._given = engine
        self._ending = False

    def engine(self, connection: HTTPConnection) -> AsyncEngine:
        """The engine that a request is about."""
        return engine_of(connection) if self._given is None else self._given

    def is_ending(self) -> bool:
        """Whether the application's lifespan is at its end."""
        return self._ending

    def follow(self, page: StatusPage | None) -> None:
        """Note the lifespan's end before the application's own does its work."""
        inner: Callable[[Any], Any] = self._app.router.lifespan_context

        @asynccontextmanager
        async def lifespan(app: Any) -> AsyncIterator[Any]:
            async with inner(app) as state:
                self._ending = False
                if page is not None:
                    with contextlib.suppress(ConfigurationError):  # the page itself says it
                        page.watch(HTTPConnection({"type": "http", "app": app}))
                try:
                    yield state
                finally:
                    self._ending = True

        self._app.router.lifespan_context = lifespan
