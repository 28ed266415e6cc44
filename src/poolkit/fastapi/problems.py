"""Database faults as HTTP answers: problem details (RFC 9457) with nothing internal in them.

Only what ``classify`` gives a 503 or a 504 is answered; anything else goes on as without poolkit.
"""

from __future__ import annotations

import inspect
import logging
import random
from collections.abc import Callable
from http import HTTPStatus

from asyncpg.exceptions import InterfaceError, InternalClientError, PostgresError
from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, Response

from poolkit.errors import Outcome, causes
from poolkit.faults import CONNECTING, Fault, FaultKind, classify
from poolkit.moments import moment_of

RETRY_AFTER = (1, 5)
"""Least and most seconds of ``Retry-After``, one of them at random.

A pool in overload and a server that restarts both need about a second or two; the spread keeps
clients that were turned away together from coming back together.
"""

_DATABASES = (SQLAlchemyError, PostgresError, InterfaceError, InternalClientError)
_HANDLED: tuple[type[Exception], ...] = (*_DATABASES, OSError)
_TEMPORARY = (HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT)
_SAFE = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
"""Methods that change nothing (RFC 9110, 9.2.1): to repeat them does no harm."""

_DETAILS = {
    HTTPStatus.SERVICE_UNAVAILABLE: "The service cannot do this at the moment. Try again later.",
    HTTPStatus.GATEWAY_TIMEOUT: "This took longer than it may, and was given up.",
}
_UNKNOWN = (
    "It is not known whether this took effect: the answer was lost. Look before trying again,"
    " which could do it twice."
)

_TOLD_BY_THE_POOL = CONNECTING | {
    FaultKind.POOL_TIMEOUT,
    FaultKind.POOL_OVERLOADED,
    FaultKind.POOL_DRAINING,
    FaultKind.CONNECTION_LOST,
}
"""What the engine's own log lines tell already."""

_log = logging.getLogger("poolkit.fastapi")


Told = Callable[[HTTPConnection, Fault, str], object]
"""Told of an answer that nobody else tells of: for which fault, and the line in the log."""


def install(app: Starlette, told: Told | None = None) -> None:
    """Have an application answer database faults; handlers of its own for the same class stay."""
    handler = FaultHandler(told)
    for kind in _HANDLED:
        app.exception_handlers.setdefault(kind, handler)


class FaultHandler:
    """Starlette's exception handler: a problem, or what there would be without poolkit."""

    def __init__(self, told: Told | None = None) -> None:
        self._told = told

    async def __call__(self, connection: HTTPConnection, error: Exception) -> Response | None:
        """Answer, if it is a database's fault and there is a response to give."""
        fault = fault_of(error) if connection.scope["type"] == "http" else None
        if fault is None:
            return await _as_without(connection, error)
        method = str(connection.scope["method"])
        if fault.kind not in _TOLD_BY_THE_POOL:
            line = _line(connection, method, fault)
            _log.warning("%s", line)
            if self._told is not None:
                self._told(connection, fault, line)
        return problem(fault, method)


def fault_of(error: Exception) -> Fault | None:
    """What a database error means, if it is a 503 or a 504."""
    if not _concerns_a_database(error):
        return None
    fault = classify(error)
    return fault if fault.http_status in _TEMPORARY else None


def problem(fault: Fault, method: str) -> Response:
    """The answer to a request of that method.

    Its ``type`` is ``about:blank``: the status says all that a client can act upon, and which
    fault it was is nobody's business outside. Where nobody can tell what became of the work, the
    member ``outcome`` is ``unknown``, and there is no ``Retry-After``.
    """
    status = HTTPStatus(fault.http_status)
    unknown = fault.outcome is Outcome.UNKNOWN and method not in _SAFE
    body = {
        "type": "about:blank",
        "title": status.phrase,
        "status": int(status),
        "detail": _UNKNOWN if unknown else _DETAILS[status],
    }
    headers = {"Cache-Control": "no-store"}
    if unknown:
        body["outcome"] = str(Outcome.UNKNOWN)
    elif status is HTTPStatus.SERVICE_UNAVAILABLE:
        headers["Retry-After"] = str(random.randint(*RETRY_AFTER))  # noqa: S311
    return JSONResponse(body, status, headers, media_type="application/problem+json")


def _concerns_a_database(error: Exception) -> bool:
    """Not so an OSError, or a timeout, of another client."""
    return any(
        isinstance(cause, _DATABASES) or moment_of(cause.__traceback__) is not None
        for cause in causes(error)
    )


async def _as_without(connection: HTTPConnection, error: Exception) -> Response | None:
    """What the application's handlers for the error's more general classes make of it."""
    handlers = connection.scope["starlette.exception_handlers"][0]
    found = (handlers.get(kind) for kind in type(error).__mro__)
    handler = next(
        (each for each in found if each is not None and not isinstance(each, FaultHandler)), None
    )
    if handler is None:
        raise error
    if inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(handler.__call__):
        theirs: Response | None = await handler(connection, error)
        return theirs
    return await run_in_threadpool(handler, connection, error)


def _line(connection: HTTPConnection, method: str, fault: Fault) -> str:
    """What is logged; a statement's text may hold what must not be."""
    route = getattr(connection.scope.get("route"), "path", "a request")
    return (
        f"{method} {route} answered with {fault.http_status}: {fault.kind},"
        f" SQLSTATE {fault.sqlstate}, outcome {fault.outcome}"
    )
