"""Whether somebody still waits for the response.

What it leans on beyond documented interfaces stands here, and the tests fail where it changes:

- FastAPI keeps the exit stack of what ends before the response in ``scope[FUNCTION_STACK]``;
- Starlette's ``Request._stream_consumed`` is true once the whole body was read;
- where nothing wraps it, ``receive`` is a method of uvicorn's, whose object has ``disconnected``.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from fastapi import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.types import Message, Receive

FUNCTION_STACK = "fastapi_function_astack"
CLIENT_CLOSED_REQUEST = 499
"""Seen by nobody but middleware; nginx's number for it."""

TURNS = 10
"""Of the event loop, until a middleware's tasks have passed on a message that is there."""


class Client:
    """Who sent the request."""

    __slots__ = ("_answered", "_request")

    def __init__(self, connection: HTTPConnection) -> None:
        self._request = connection if isinstance(connection, Request) else None
        stack = connection.scope.get(FUNCTION_STACK)
        self._answered = not isinstance(stack, AsyncExitStack)
        if isinstance(stack, AsyncExitStack) and self._request is not None:
            # Below whatever ends with the handler, and so called after it.
            stack.callback(self._answer)

    def _answer(self) -> None:
        self._answered = True

    async def must_be_there(self) -> None:
        """Raise before the response if the client has gone; afterwards it may go.

        Raises:
            HTTPException: It has. Nobody sees the status; it keeps what follows from happening.
        """
        if self._request is not None and not self._answered and await _has_gone(self._request):
            raise HTTPException(CLIENT_CLOSED_REQUEST, "the client left before COMMIT: rolled back")


async def _has_gone(request: Request) -> bool:
    """Asks only where the answer cannot be a piece of the body that somebody may still want."""
    known = getattr(getattr(request.receive, "__self__", None), "disconnected", None)
    if isinstance(known, bool):
        return known  # uvicorn's own note, at no cost
    if not request._stream_consumed:  # noqa: SLF001 (see above)
        if _may_have_body(request):
            return False
        try:
            await request.body()  # there is none; the message that says so stays readable
        except ClientDisconnect:
            return True
    message = await _glance(request.receive)
    return message is not None and message["type"] == "http.disconnect"


async def _glance(receive: Receive) -> Message | None:
    """What there is to receive within a few turns of the event loop; else the waiting is cancelled.

    ``BaseHTTPMiddleware`` takes some to pass a message on, and where several are nested, their
    cancellation can end in any error: hence a task, and not ``Request.is_disconnected()``.
    """
    receiving = asyncio.ensure_future(receive())
    try:
        for _ in range(TURNS):
            await asyncio.sleep(0)
            if receiving.done():
                break
    finally:
        receiving.cancel()
        await asyncio.wait({receiving})
    if receiving.cancelled() or receiving.exception() is not None:
        return None
    return receiving.result()


def _may_have_body(request: Request) -> bool:
    if not request.scope.get("http_version", "").startswith("1"):
        return True  # later versions need no header for it
    headers = request.headers
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
