"""The status page: one process's pool, live, on one page that needs nothing from anywhere else."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import ipaddress
import logging
import os
import re
import weakref
from collections.abc import Callable
from enum import Enum
from importlib.resources import files

from fastapi import FastAPI, params
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route

from poolkit.errors import ConfigurationError
from poolkit.fastapi.status.watch import Watch, snapshot
from poolkit.faults import Fault

__all__ = ["Guard", "StatusPage"]


class Guard(Enum):
    """Who may see the status page, where no dependency of the application's decides."""

    LOOPBACK = "loopback"
    """Clients on the same machine; everybody else is told that there is no such page."""
    PUBLIC = "public"
    """Everybody who can reach the application."""


Find = Callable[[HTTPConnection], AsyncEngine]

_FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip", "via")
_PAGE = files(__package__).joinpath("page.html").read_text(encoding="utf-8")


def _hashes(tag: str) -> str:
    """What a Content-Security-Policy calls the page's own scripts, or styles."""
    inline = re.findall(rf"<{tag}>(.*?)</{tag}>", _PAGE, re.DOTALL)
    digests = (hashlib.sha256(each.encode()).digest() for each in inline)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)


_HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {_hashes('script')}; style-src {_hashes('style')};"
        " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'"
    ),
}


class StatusPage:
    """The page, what it reads, and what is watched for it.

    Args:
        path: Where it is; what it reads is at ``data`` below.
        guard: Who may see it.
        find: Gives the engine.
    """

    def __init__(self, path: str, guard: Guard | params.Depends, find: Find) -> None:
        self._path = path
        self._guard = guard
        self._find = find
        self._watches: weakref.WeakKeyDictionary[AsyncEngine, Watch] = weakref.WeakKeyDictionary()

    def watch(self, connection: HTTPConnection) -> tuple[AsyncEngine, Watch]:
        """Watch the engine from now on, unless it is watched already."""
        engine = self._find(connection)
        watch = self._watches.get(engine)
        if watch is None:
            self._watches[engine] = watch = Watch(engine)
        watch.begin()
        return engine, watch

    def note(self, connection: HTTPConnection, fault: Fault, line: str) -> None:
        """Have a fault among the last ones that none of the engine's events tells of."""
        with contextlib.suppress(ConfigurationError):  # the application's engine is not ours
            _, watch = self.watch(connection)
            watch.faults.add(fault.kind, logging.WARNING, str(fault.kind), line)

    async def page(self, request: Request) -> Response:
        """The page."""
        self._admit(request)
        return HTMLResponse(_PAGE, headers=_HEADERS)

    async def data(self, request: Request) -> Response:
        """What it shows; with ``after``, of the samples only those of higher numbers."""
        self._admit(request)
        try:
            found = snapshot(*self.watch(request), _after(request))
        except ConfigurationError as error:
            return JSONResponse({"error": str(error)}, 501, _HEADERS)
        return JSONResponse(found, headers=_HEADERS)

    def routes(self, app: Starlette) -> list[BaseRoute]:
        """The page's and its data's."""
        endpoints = {self._path: self.page, f"{self._path}/data": self.data}
        if isinstance(self._guard, Guard):
            return [Route(path, endpoint) for path, endpoint in endpoints.items()]
        return [self._guarded(app, path, endpoint) for path, endpoint in endpoints.items()]

    def _guarded(self, app: Starlette, path: str, endpoint: Callable[..., object]) -> BaseRoute:
        if not isinstance(app, FastAPI):
            raise ConfigurationError("status_guard=Depends(...) needs a FastAPI application")
        assert isinstance(self._guard, params.Depends)  # noqa: S101 (for the type checker)
        app.add_api_route(
            path,
            endpoint,
            methods=["GET", "HEAD"],
            dependencies=[self._guard],
            response_model=None,
            include_in_schema=False,
        )
        return app.router.routes.pop()

    def _admit(self, request: Request) -> None:
        """Turn away whoever is not from here, if nothing else decides."""
        if self._guard is Guard.LOOPBACK and not _is_from_here(request):
            raise HTTPException(404)


def _after(request: Request) -> int:
    """The number of the last sample that the page has, if it has it from this process."""
    asked = request.query_params
    known = asked.get("pid") == str(os.getpid()) and re.fullmatch(
        "[0-9]{1,15}", asked.get("after", "")
    )
    return int(asked["after"]) if known else -1


def _is_from_here(request: Request) -> bool:
    """Whether it is the same machine that asks, for itself.

    Not a proxy on this machine that asks for another, nor a browser that a foreign name was made
    to point here: its ``Host`` is that name.
    """
    if request.client is None or any(name in request.headers for name in _FORWARDED):
        return False
    return _is_loopback(request.client.host) and _is_local_name(request.url.hostname or "")


def _is_local_name(host: str) -> bool:
    return host == "localhost" or _is_loopback(host)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False
