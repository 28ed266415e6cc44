"""One direction of a connection: what is sent is delayed, held back, cut."""

import asyncio
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from poolkit.testing._dialogue import Dialogue, Message, Sender, Unit
from poolkit.testing._moments import Edge
from poolkit.testing._traps import Hold, Trap

Ending = Literal["fin", "rst"]

# Bytes kept for a side that takes none, before the other side is made to wait.
_HIGH_WATER = 1 << 20

# At a limited bandwidth bytes go out in pieces, of what passes in this time.
_PIECE_SECONDS = 0.005


@dataclass(slots=True)
class Line:
    """The network of a connection: seconds of a round trip, and bytes per second each way."""

    latency: float = 0.0
    bandwidth: float | None = None


class Owner(Protocol):
    """The connection that a pipe belongs to."""

    line: Line
    dialogue: Dialogue

    def meet(self, edge: Edge, message: Message, met: set[Trap], pipe: "Pipe") -> None: ...
    def limit(self, sender: Sender, size: int) -> tuple[Trap, int] | None: ...
    def act(self, trap: Trap, pipe: "Pipe", message: Message | None) -> None: ...
    def relay_end(self, sender: Sender, ending: Ending) -> None: ...


@dataclass(slots=True)
class _Parcel:
    due: float
    unit: Unit
    ending: Ending | None = None
    met: set[Trap] = field(default_factory=set)


class Pipe:
    """What one side sends, on its way to the other: delayed, held back, cut.

    Args:
        link: The connection.
        sender: The side.
    """

    def __init__(self, link: Owner, sender: Sender) -> None:
        self.source: asyncio.Transport | None = None
        self.target: asyncio.Transport | None = None
        self.frozen = False
        self.full = False
        self.ended = False
        self._link = link
        self._sender: Sender = sender
        self._loop = asyncio.get_running_loop()
        self._queue: deque[_Parcel] = deque()
        self._size = 0
        self._holds: set[Trap] = set()
        self._line_free_at = 0.0
        self._last_due = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def flows(self) -> bool:
        return not (self.target is None or self.frozen or self.full or self._holds)

    def put(self, unit: Unit, ending: Ending | None = None) -> None:
        """Send something on its way."""
        line = self._link.line
        pieces = _pieces(unit, line.bandwidth)
        for piece in pieces:
            now = self._loop.time()
            if line.bandwidth is not None:
                now = max(now, self._line_free_at) + len(piece.data) / line.bandwidth
                self._line_free_at = now
            self._last_due = max(now + line.latency / 2, self._last_due)
            last = ending if piece is pieces[-1] else None
            self._queue.append(_Parcel(self._last_due, piece, last))
            self._size += len(piece.data)

    def end(self, ending: Ending) -> None:
        """The sender sends no more."""
        if not self.ended:
            self.ended = True
            self.put(Unit(self._link.dialogue.rest(self._sender)), ending)
            self.pump()

    def pump(self) -> None:
        """Deliver what may go now, and come back when more may."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._queue and self.flows:
            parcel = self._queue[0]
            if parcel.due > self._loop.time():
                self._timer = self._loop.call_at(parcel.due, self.pump)
                break
            self._deliver(parcel)
        self._regulate()

    def hold(self, trap: Hold) -> None:
        self._holds.add(trap)
        trap.holders.append(self)

    def release(self, trap: Trap) -> None:
        self._holds.discard(trap)
        self.pump()

    def clear(self) -> None:
        """Lose what is on its way."""
        self.ended = True
        self._queue.clear()
        self._size = 0
        if self._timer is not None:
            self._timer.cancel()

    def _deliver(self, parcel: _Parcel) -> None:
        unit = parcel.unit
        if unit.begins is not None:
            self._link.meet("before", unit.begins, parcel.met, self)
            if not self._queue or not self.flows:
                return
        self._queue.popleft()
        self._size -= len(unit.data)
        if unit.data and not self._write(unit.data):
            return
        if parcel.ending is not None:
            self._link.relay_end(self._sender, parcel.ending)
        if unit.ends is not None:
            self._link.meet("after", unit.ends, parcel.met, self)

    def _write(self, data: bytes) -> bool:
        assert self.target is not None
        limit = self._link.limit(self._sender, len(data))
        if not self.target.is_closing():
            self.target.write(data if limit is None else data[: limit[1]])
        if limit is not None:
            self._link.act(limit[0], self, None)
        return limit is None

    def _regulate(self) -> None:
        if self.source is None or self.ended:
            return
        if self._size > _HIGH_WATER or self.full:
            self.source.pause_reading()
        else:
            self.source.resume_reading()


def _pieces(unit: Unit, bandwidth: float | None) -> list[Unit]:
    size = len(unit.data) if bandwidth is None else max(1, int(bandwidth * _PIECE_SECONDS))
    if len(unit.data) <= size:
        return [unit]
    pieces = [Unit(unit.data[at : at + size]) for at in range(0, len(unit.data), size)]
    pieces[0] = replace(pieces[0], begins=unit.begins)
    pieces[-1] = replace(pieces[-1], ends=unit.ends)
    return pieces
