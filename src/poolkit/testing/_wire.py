"""PostgreSQL's protocol as a stream: where each message begins and ends."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

_LONGEST_STARTUP = 10_000
_HEADER = 5


class Mode(Enum):
    """How the next bytes of one side are to be read."""

    STARTUP = "packets without a type, as a client begins"
    ANSWER = "one byte, the answer to a request for encryption"
    TYPED = "messages"
    OPAQUE = "nothing that could be read"


@dataclass(frozen=True, slots=True)
class Frame:
    """The beginning of a message: its type (empty for a startup packet) and its first bytes."""

    kind: bytes
    body: bytes


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes that belong together, and whether a message begins and ends with them."""

    data: bytes
    begins: Frame | None = None
    ends: bool = False


class Framer:
    """Cuts what one side sends into messages; a huge one is not kept, it streams through.

    The mode may be changed between two parts. Of rows and of COPY's data, only the first message
    of a run begins a part of its own.

    Args:
        mode: How that side begins.
        peek: How many bytes of a message of a type are needed to tell what it is.
        bulk: The types of messages that come in runs.
    """

    def __init__(self, mode: Mode, peek: Mapping[bytes, int], bulk: bytes) -> None:
        self.mode = mode
        self._peek = peek
        self._bulk = bulk
        self._buffer = bytearray()
        self._left = 0
        self._run = b""

    def feed(self, data: bytes) -> Iterator[Part]:
        self._buffer += data
        while (part := self._next()) is not None:
            yield part

    def rest(self) -> bytes:
        """What is left of a message that will never be whole."""
        return self._take(len(self._buffer))

    def _next(self) -> Part | None:
        if not self._buffer:
            return None
        if self._left:
            return self._go_on()
        match self.mode:
            case Mode.OPAQUE:
                return Part(self._take(len(self._buffer)))
            case Mode.ANSWER:
                return self._answer()
            case Mode.STARTUP:
                return self._startup()
            case Mode.TYPED:
                return self._message()

    def _answer(self) -> Part | None:
        self.mode = Mode.TYPED
        if self._buffer[0] not in b"SNG":  # an error, from a very old server
            return self._message()
        answer = self._take(1)
        return Part(answer, Frame(b"", answer), ends=True)

    def _startup(self) -> Part | None:
        if self._buffer[0] != 0:  # TLS from the first byte
            self.mode = Mode.OPAQUE
            return self._next()
        if len(self._buffer) < 8:
            return None
        length = int.from_bytes(self._buffer[:4], "big")
        if not 8 <= length <= _LONGEST_STARTUP:
            return self._not_understood()
        return self._begin(Frame(b"", bytes(self._buffer[4:8])), length)

    def _message(self) -> Part | None:
        buffer = self._buffer
        if len(buffer) < _HEADER:
            return None
        kind = bytes(buffer[:1])
        length = 1 + int.from_bytes(buffer[1:5], "big")
        if length < _HEADER:
            return self._not_understood()
        if kind == self._run:
            return self._bulk_part(kind)
        peek = min(length, _HEADER + self._peek.get(kind, 0))
        if len(buffer) < peek:
            return None
        self._run = kind if kind in self._bulk else b""
        return self._begin(Frame(kind, bytes(buffer[_HEADER:peek])), length)

    def _begin(self, frame: Frame, length: int) -> Part:
        data = self._take(min(length, len(self._buffer)))
        self._left = length - len(data)
        return Part(data, frame, ends=not self._left)

    def _go_on(self) -> Part:
        data = self._take(min(self._left, len(self._buffer)))
        self._left -= len(data)
        return Part(data, ends=not self._left)

    def _bulk_part(self, kind: bytes) -> Part:
        buffer, end = self._buffer, 0
        while end + _HEADER <= len(buffer) and buffer[end] == kind[0]:
            end += 1 + int.from_bytes(buffer[end + 1 : end + 5], "big")
        data = self._take(min(end, len(buffer)))
        self._left = end - len(data)
        return Part(data)

    def _not_understood(self) -> Part | None:
        self.mode = Mode.OPAQUE
        return self._next()

    def _take(self, size: int) -> bytes:
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data
