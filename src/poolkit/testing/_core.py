"""The proxy itself, in its own thread: connections in, connections out, and what they suffer."""

import asyncio
import socket
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, Literal

from poolkit.testing._dialogue import Message, Sender
from poolkit.testing._link import End, Link
from poolkit.testing._listener import Listener
from poolkit.testing._moments import FaultProxyError, Signal
from poolkit.testing._pipe import Line
from poolkit.testing._record import ProxyStats, Record
from poolkit.testing._traps import ByteTrap, Call, Trap, Traps
from poolkit.testing._upstream import Upstream

Door = Literal["open", "refusing", "silent", "asleep"]

_OVER = FaultProxyError("the proxy has been stopped")


class Core:
    """What a `FaultProxy` does; all of it is called in the proxy's thread.

    Args:
        upstream: The server.
        host: The address to listen on.
        port: The port to listen on; None picks a free one.
        refuse_encryption: Answer requests for encryption with no.
        call: Runs a function in the proxy's thread.
    """

    def __init__(
        self,
        upstream: Upstream,
        host: str,
        port: int | None,
        *,
        refuse_encryption: bool,
        call: Call,
    ) -> None:
        self.traps = Traps(call)
        self.record = Record()
        self._line = Line()
        self.listener = Listener(host, port, self._accepted)
        self.links: dict[int, Link] = {}
        self.failure: FaultProxyError | None = None
        self._upstream = upstream
        self._refuse_encryption = refuse_encryption
        self._door: Door = "open"
        self._alarm: asyncio.TimerHandle | None = None
        self._awake = asyncio.Event()
        self._awake.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._awaited: list[tuple[Callable[[ProxyStats], bool], Signal[ProxyStats]]] = []
        self._counts: Counter[str] = Counter()
        self._trips: Counter[int] = Counter()
        self._max_open = 0
        self._max_connecting = 0
        self.listener.open()

    # New connections.

    def set_door(self, door: Door) -> None:
        """What becomes of connections from now on; those that are made already are let in."""
        self.listener.take()
        self._door = door
        if self._alarm is not None:
            self._alarm.cancel()
        if door == "asleep":
            self._awake.clear()
        else:
            self._awake.set()
        if door == "refusing":
            self.listener.refuse()
        else:
            self.listener.open()

    def sleep(self, wake_after: float | None) -> None:
        for link in self.present():
            if self._door != "asleep" or link.opening is None or link.opening.done():
                link.bury()
        self.set_door("asleep")
        if wake_after is not None:
            loop = asyncio.get_running_loop()
            self._alarm = loop.call_later(wake_after, self.set_door, "open")

    def present(self, number: int | None = None) -> list[Link]:
        """The links that there are, or the one with a number."""
        self.listener.take()
        return [link for link in self.links.values() if number in {None, link.number}]

    def _accepted(self, sock: socket.socket) -> None:
        self._counts["accepted"] += 1
        number = self._counts["accepted"]
        link = Link(number, replace(self._line), self, refuse_encryption=self._refuse_encryption)
        link.dead = self._door == "silent"
        self.links[number] = link
        self._max_open = max(self._max_open, self._open_links)
        self._max_connecting = max(self._max_connecting, self._connecting_links)
        self._spawn(self._attach(link, sock))
        self.changed()

    async def _attach(self, link: Link, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(lambda: End(link, "client"), sock)
        except OSError:
            sock.close()
            link.end(reset=True)
            self.gone(link)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def admit(self, link: Link) -> None:
        """A client is there: find it a server, unless it is to be met with silence."""
        if not link.dead:
            link.opening = self._spawn(self._open(link))

    async def _open(self, link: Link) -> None:
        await self._awake.wait()
        try:
            await self._upstream.connect(lambda: End(link, "server"))
        except OSError:
            link.end(reset=True)

    # What links report.

    def told(self, link: Link, message: Message) -> None:
        if message.type == "ReadyForQuery" and not link.ready:
            link.ready = True
            self._counts["ready"] += 1
        elif message.type == "CancelRequest":
            link.ready = True
            self._counts["cancel_requests"] += 1
        self.record.add(message)
        self.changed()

    def encrypted(self, link: Link) -> None:
        link.ready = True
        error = unreadable(link)
        if self.traps.fail(link.number, error) | self.record.fail(link.number, error):
            self.failure = error
        self.changed()

    def round_trip(self, link: Link) -> None:
        self._counts["round_trips"] += 1
        self._trips[link.number] += 1

    def carried(self, sender: Sender, size: int) -> None:
        self._counts[f"{sender}_bytes"] += size

    def gone(self, link: Link) -> None:
        self.links.pop(link.number, None)
        self.changed()

    def changed(self) -> None:
        if self._awaited:
            stats = self.stats()
            self._awaited = [each for each in self._awaited if not _holds(*each, stats)]

    # What the outside asks.

    def stats(self) -> ProxyStats:
        return ProxyStats(
            open=self._open_links,
            connecting=self._connecting_links,
            max_open=self._max_open,
            max_connecting=self._max_connecting,
            accepted=self._counts["accepted"],
            ready=self._counts["ready"],
            cancel_requests=self._counts["cancel_requests"],
            round_trips=self._counts["round_trips"],
            client_bytes=self._counts["client_bytes"],
            server_bytes=self._counts["server_bytes"],
        )

    def until(self, condition: Callable[[ProxyStats], bool]) -> Signal[ProxyStats]:
        signal: Signal[ProxyStats] = Signal("the condition holds")
        self._awaited.append((condition, signal))
        self.changed()
        return signal

    def arm(self, trap: Trap) -> None:
        if not isinstance(trap, ByteTrap):
            self.must_be_readable(trap.connection)
        self.traps.arm(trap)

    def seen(
        self, fits: Callable[[Message], bool], connection: int | None, told: str
    ) -> Signal[Message]:
        self.must_be_readable(connection)
        return self.record.seen(fits, connection, told)

    def forget(self) -> None:
        self.record.messages.clear()
        self._trips.clear()

    def trips_of(self, number: int | None) -> int:
        return self._trips.total() if number is None else self._trips[number]

    def line_of(self, number: int | None) -> Line:
        return self._line if number is None else self._link(number).line

    def set_line(self, number: int | None, **changes: float | None) -> None:
        """Change the network of one connection, or of all that there are and will be."""
        lines = [link.line for link in self.present(number)]
        for line in lines if number is not None else [self._line, *lines]:
            for name, value in changes.items():
                setattr(line, name, value)

    def heal(self) -> None:
        self.set_line(None, latency=0.0, bandwidth=None)
        self.traps.clear()
        for link in self.present():
            link.thaw()
        self.set_door("open")

    def _link(self, number: int) -> Link:
        if number not in self.links:
            raise FaultProxyError(f"connection {number} is over")
        return self.links[number]

    def must_be_readable(self, connection: int | None) -> None:
        """Raise FaultProxyError if an open connection, or the one meant, is encrypted."""
        for link in self.present(connection):
            if link.dialogue.encrypted and not link.client_gone:
                raise unreadable(link)

    async def stop(self) -> None:
        """End everything, and leave nothing behind."""
        if self._alarm is not None:
            self._alarm.cancel()
        self.listener.close()
        self.traps.stop(_OVER)
        self.record.stop(_OVER)
        for _, signal in self._awaited:
            signal.fail(_OVER)
        for link in tuple(self.links.values()):
            link.end(reset=True)
        while self.links or self._tasks:  # noqa: ASYNC110 (a step or two of the loop)
            await asyncio.sleep(0)

    @property
    def _open_links(self) -> int:
        return sum(not link.client_gone for link in self.links.values())

    @property
    def _connecting_links(self) -> int:
        return sum(not (link.client_gone or link.ready) for link in self.links.values())


def unreadable(link: Link) -> FaultProxyError:
    return FaultProxyError(
        f"connection {link.number} is encrypted: its messages cannot be told apart. Connect with "
        "sslmode=disable, or use FaultProxy(..., refuse_encryption=True)"
    )


def _holds(
    condition: Callable[[ProxyStats], bool], signal: Signal[ProxyStats], stats: ProxyStats
) -> bool:
    try:
        holds = condition(stats)
    except Exception as error:  # noqa: BLE001 (the waiter's own, and raised there)
        signal.fail(error)
        return True
    if holds:
        signal.happen(stats)
    return holds
