"""One connection through the proxy: two ends, and a pipe for each direction."""

import asyncio
import contextlib
import socket
import struct
from typing import Protocol

from poolkit.testing._dialogue import Dialogue, Message, Sender, Unit
from poolkit.testing._moments import Edge
from poolkit.testing._pipe import Ending, Line, Pipe
from poolkit.testing._traps import Hold, Trap, Traps


class Watcher(Protocol):
    """Who is told what happens on a link."""

    traps: Traps

    def told(self, link: "Link", message: Message) -> None: ...
    def encrypted(self, link: "Link") -> None: ...
    def round_trip(self, link: "Link") -> None: ...
    def carried(self, sender: Sender, size: int) -> None: ...
    def admit(self, link: "Link") -> None: ...
    def changed(self) -> None: ...
    def gone(self, link: "Link") -> None: ...


class Link:
    """One client's connection, and the one to the server that is its own.

    Args:
        number: Counted from 1.
        line: Its network.
        watcher: Who is told of it.
        refuse_encryption: Answer requests for encryption ourselves, with no.
    """

    def __init__(
        self, number: int, line: Line, watcher: Watcher, *, refuse_encryption: bool
    ) -> None:
        self.number = number
        self.line = line
        self.dialogue = Dialogue(number, refuse_encryption=refuse_encryption)
        self.pipes: dict[Sender, Pipe] = {s: Pipe(self, s) for s in ("client", "server")}
        self.opening: asyncio.Task[None] | None = None
        self.dead = False
        self.ready = False
        self.client_gone = False
        self._watcher = watcher
        self._refuse_encryption = refuse_encryption
        self._ends: dict[Sender, asyncio.Transport] = {}
        self._closed = False
        self._reset = False
        self._client_waits = False
        self._encrypted = False

    # What the ends report.

    def made(self, sender: Sender, transport: asyncio.Transport) -> None:
        self._ends[sender] = transport
        self.pipes[sender].source = transport
        self.pipes[_other(sender)].target = transport
        if self._closed:
            _close(transport, reset=self._reset)
        elif sender == "client":
            self._watcher.admit(self)
        else:
            for pipe in self.pipes.values():
                pipe.pump()

    def received(self, sender: Sender, data: bytes) -> None:
        self._watcher.carried(sender, len(data))
        self._count_round_trip(sender)
        for unit in self.dialogue.units(sender, data):
            if unit.begins is not None:
                self._watcher.told(self, unit.begins)
            if self._is_refused(unit.begins):
                self._refuse()
            else:
                self.pipes[sender].put(unit)
        if self.dialogue.encrypted and not self._encrypted:
            self._encrypted = True
            self._watcher.encrypted(self)
        self.pipes[sender].pump()

    def stopped(self, sender: Sender, ending: Ending) -> None:
        """One side sends no more."""
        if self._closed:
            return
        if sender == "client":
            self.client_gone = True
            self._watcher.changed()
            if "server" not in self._ends:
                self.end(reset=False)
                return
        self.pipes[sender].end(ending)

    def lost(self, sender: Sender, error: Exception | None) -> None:
        """One side's socket is closed."""
        self.stopped(sender, "fin" if error is None else "rst")
        del self._ends[sender]
        if not self._ends:
            for pipe in self.pipes.values():
                pipe.clear()
            self._watcher.gone(self)

    # What happens to it.

    def relay_end(self, sender: Sender, ending: Ending) -> None:
        """What one side sent has arrived, its end included."""
        target = self._ends.get(_other(sender))
        if sender == "client" and ending == "fin" and target is not None:
            if not target.is_closing() and target.can_write_eof():
                with contextlib.suppress(OSError):  # reset, and the loop has not noticed yet
                    target.write_eof()
        else:
            self.end(reset=ending == "rst")

    def end(self, *, reset: bool) -> None:
        """Close both ends: with FIN, after what was delivered, or with RST, now."""
        if not self._closed:
            self._closed, self._reset, self.client_gone = True, reset, True
            if self.opening is not None:
                self.opening.cancel()
            for pipe in self.pipes.values():
                pipe.clear()
        for transport in self._ends.values():
            _close(transport, reset=reset)
        self._watcher.changed()

    def freeze(self, *, replies_only: bool = False) -> None:
        self.pipes["server"].frozen = True
        if not replies_only:
            self.pipes["client"].frozen = True

    def thaw(self) -> None:
        if self.dead:
            return
        for pipe in self.pipes.values():
            pipe.frozen = False
            pipe.pump()

    def bury(self) -> None:
        """Freeze it for good."""
        self.dead = True
        self.freeze()

    # Traps.

    def limit(self, sender: Sender, size: int) -> tuple[Trap, int] | None:
        return self._watcher.traps.limit(self.number, sender, size)

    def meet(self, edge: Edge, message: Message, met: set[Trap], pipe: Pipe) -> None:
        for trap in self._watcher.traps.springing(edge, message, met):
            self.act(trap, pipe, message)

    def act(self, trap: Trap, pipe: Pipe, message: Message | None) -> None:
        match trap.action:
            case "close" | "reset":
                self.end(reset=trap.action == "reset")
            case "freeze" | "freeze replies":
                self.freeze(replies_only=trap.action == "freeze replies")
            case "hold":
                assert isinstance(trap, Hold)
                pipe.hold(trap)
        trap.happen(message)

    # Encryption, and counting.

    def _is_refused(self, message: Message | None) -> bool:
        return (
            self._refuse_encryption
            and message is not None
            and message.type in {"SSLRequest", "GSSENCRequest"}
        )

    def _refuse(self) -> None:
        self._count_round_trip("server")
        pipe = self.pipes["server"]
        pipe.put(Unit(b"N"))
        pipe.pump()

    def _count_round_trip(self, sender: Sender) -> None:
        if sender == "client":
            self._client_waits = True
        elif self._client_waits:
            self._client_waits = False
            self._watcher.round_trip(self)


class End(asyncio.Protocol):
    """One of a link's sockets."""

    def __init__(self, link: Link, sender: Sender) -> None:
        self._link = link
        self._sender: Sender = sender

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._link.made(self._sender, transport)

    def data_received(self, data: bytes) -> None:
        self._link.received(self._sender, data)

    def eof_received(self) -> bool:
        self._link.stopped(self._sender, "fin")
        return True  # the other direction goes on

    def connection_lost(self, error: Exception | None) -> None:
        self._link.lost(self._sender, error)

    def pause_writing(self) -> None:
        self._towards_us.full = True

    def resume_writing(self) -> None:
        self._towards_us.full = False
        self._towards_us.pump()

    @property
    def _towards_us(self) -> Pipe:
        return self._link.pipes[_other(self._sender)]


def _other(sender: Sender) -> Sender:
    return "server" if sender == "client" else "client"


def _close(transport: asyncio.Transport, *, reset: bool) -> None:
    if not reset:
        transport.close()
        return
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family != socket.AF_UNIX:
        # No lingering at all is what makes the kernel send RST.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
