"""What went through the proxy: the messages, the counts, and who waits for them."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from poolkit.testing._dialogue import EXECUTING, Message
from poolkit.testing._moments import FaultProxyError, Signal

# A run of rows is one message: this is a long test.
_KEPT = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxyStats:
    """How a `FaultProxy` stands.

    Attributes:
        open: Connections whose client has not closed and that were not cut (current).
        connecting: Those of them that have not seen ReadyForQuery; an encrypted one counts until
            its encryption begins (current).
        max_open: The most that were open at once.
        max_connecting: The most that were connecting at once.
        accepted: Connections accepted (cumulative), requests to cancel included.
        ready: Those of them that saw ReadyForQuery (cumulative).
        cancel_requests: Those of them that were requests to cancel (cumulative).
        round_trips: Times that the server answered what a client had sent (cumulative).
        client_bytes: Bytes that came from clients (cumulative).
        server_bytes: Bytes that came from the server (cumulative).
    """

    open: int
    connecting: int
    max_open: int
    max_connecting: int
    accepted: int
    ready: int
    cancel_requests: int
    round_trips: int
    client_bytes: int
    server_bytes: int


class _Seen(Signal[Message]):
    def __init__(self, fits: Callable[[Message], bool], connection: int | None, told: str) -> None:
        super().__init__(told)
        self._fits = fits
        self.connection = connection

    def is_of(self, connection: int) -> bool:
        return self.connection in {None, connection}

    def look(self, message: Message) -> bool:
        if self.is_of(message.connection) and self._fits(message):
            self.happen(message)
        return self.happened


class Record:
    """The messages, oldest first, and the signals that wait for one; used in one thread."""

    def __init__(self) -> None:
        self.messages: deque[Message] = deque(maxlen=_KEPT)
        self._awaited: list[_Seen] = []

    def add(self, message: Message) -> None:
        self.messages.append(message)
        self._awaited = [seen for seen in self._awaited if not seen.look(message)]

    def seen(
        self, fits: Callable[[Message], bool], connection: int | None, told: str
    ) -> Signal[Message]:
        """The first message that fits, now or later."""
        seen = _Seen(fits, connection, f"{told} was seen")
        if not any(seen.look(message) for message in self.messages):
            self._awaited.append(seen)
        return seen

    def fail(self, connection: int, error: FaultProxyError) -> bool:
        """Give up what waits for a message of a connection; whether there was any."""
        concerned = [seen for seen in self._awaited if seen.is_of(connection)]
        for seen in concerned:
            self._awaited.remove(seen)
            seen.fail(error)
        return bool(concerned)

    def stop(self, error: FaultProxyError) -> None:
        for seen in self._awaited:
            seen.fail(error)

    def statements(self, connection: int | None) -> list[str]:
        """The SQL that clients had executed."""
        return [
            message.text
            for message in self.of(connection)
            if message.sender == "client" and message.type in EXECUTING and message.text is not None
        ]

    def of(self, connection: int | None) -> list[Message]:
        return [m for m in self.messages if connection in {None, m.connection}]
