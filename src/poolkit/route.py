"""The way that asyncpg takes to a server: to one address of its name, and with an ear for answers.

asyncpg's ``host`` is more than where to connect to: it is the name for TLS (SNI and the
certificate), for the password file and for Kerberos. So it keeps the name, and only where the
sockets go is settled here, through asyncpg's ``loop`` argument.

Leans on asyncpg asking that loop for ``create_connection`` and ``create_unix_connection``, and on
``asyncpg.Connection.__init__`` being handed the loop; ``tests/test_route.py`` fails where that
changes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from poolkit.driver import DriverConnection
from poolkit.scouts import Endpoint


class TimeLimit:
    """The limit of whatever operation a connection is at, by a timer that outlasts the operations.

    asyncpg sets and cancels a limit for every message it awaits an answer to, several times for
    each statement. A timer of the event loop for each of them is a tenth of a fast statement's
    time. Here the timer is left to run, and looks what has become of the limit when it ends.
    """

    __slots__ = ("_args", "_callback", "_due", "_loop", "_time", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._time = loop.time
        self._timer: asyncio.TimerHandle | None = None
        self._callback: Callable[..., Any] | None = None
        self._args: tuple[Any, ...] = ()
        self._due = 0.0

    def set(self, seconds: float, callback: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Begin one; returns what has ``cancel()``."""
        if self._callback is not None:  # never seen: asyncpg awaits one answer at a time
            return self._loop.call_later(seconds, callback, *args)
        self._callback, self._args = callback, args
        self._due = due = self._time() + seconds
        if self._timer is None or self._timer.when() > due:
            self._look_at(due)
        return self

    def cancel(self) -> None:
        """The operation is done."""
        self._callback = None
        self._args = ()

    def _look_at(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(when, self._look)

    def _look(self) -> None:
        self._timer = None
        callback, args = self._callback, self._args
        if callback is None:
            return
        if self._time() < self._due:
            self._look_at(self._due)
            return
        self.cancel()
        callback(*args)


class Route:
    """An event loop that connects to a given address, and tells of the first answer.

    Everything else is the loop's own.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        endpoint: Endpoint | None,
        answered: Callable[[], None],
    ) -> None:
        self.loop = loop
        self._endpoint = endpoint
        self._answered = answered
        self._limit = TimeLimit(loop)
        self._made: list[asyncio.Transport] = []

    def abort(self) -> None:
        """Drop what was connected, at once.

        Under TLS the driver's close waits for the peer's goodbye, for longer than a loop may last.
        """
        for transport in self._made:
            transport.abort()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.loop, name)
        setattr(self, name, found)  # the driver asks for some of them at every statement
        return found

    def call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> Any:
        """As the loop's; the driver's time limits, one at a time, share one timer."""
        return self._limit.set(delay, callback, args)

    async def create_connection(
        self, factory: Callable[[], Any], host: str, port: int, **options: Any
    ) -> tuple[asyncio.Transport, Any]:
        """As the loop's, but to our address; TLS is still told the name."""
        if options.get("ssl"):
            options.setdefault("server_hostname", host)
        where = self._endpoint or (host, port)
        transport, ear = await self.loop.create_connection(
            lambda: _Ear(factory(), self._answered), *where, **options
        )
        self._made.append(transport)
        return transport, ear.protocol

    async def create_unix_connection(
        self, factory: Callable[[], Any], path: str, **options: Any
    ) -> tuple[asyncio.Transport, Any]:
        """As the loop's."""
        transport, ear = await self.loop.create_unix_connection(
            lambda: _Ear(factory(), self._answered), path, **options
        )
        self._made.append(transport)
        return transport, ear.protocol


class RoutedConnection(DriverConnection):
    """A connection that, once it is made, runs on the loop itself."""

    def __init__(self, protocol: Any, transport: Any, loop: Any, *args: Any) -> None:
        # asyncio finds the current task by the loop's identity.
        super().__init__(protocol, transport, getattr(loop, "loop", loop), *args)


class _Ear(asyncio.Protocol):
    """Stands before a protocol until the first bytes come, and steps aside."""

    def __init__(self, protocol: Any, answered: Callable[[], None]) -> None:
        self.protocol = protocol
        self._answered = answered
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self.protocol.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        self._transport.set_protocol(self.protocol)
        self._answered()
        self.protocol.data_received(data)

    def eof_received(self) -> bool | None:
        answer: bool | None = self.protocol.eof_received()
        return answer

    def connection_lost(self, error: Exception | None) -> None:
        self.protocol.connection_lost(error)

    def pause_writing(self) -> None:
        self.protocol.pause_writing()

    def resume_writing(self) -> None:
        self.protocol.resume_writing()
