"""A port that can stop listening and listen again without being lost to another process."""

import asyncio
import secrets
import socket
from collections.abc import Callable

# Below every system's usual ephemeral range: no outgoing connection takes a port of these while
# nothing listens on it.
_PORTS = range(15_000, 32_000)
_ATTEMPTS = 100
_BACKLOG = 1024


class Listener:
    """Binds an address at once, and listens from `open()` on.

    Args:
        host: The address.
        port: The port; None picks a free one.
        accepted: Is given each connection's socket.
    """

    def __init__(
        self, host: str, port: int | None, accepted: Callable[[socket.socket], None]
    ) -> None:
        self._accepted = accepted
        self._loop = asyncio.get_running_loop()
        self._socket = _bound(host, port)
        self._listens = False
        self.host: str = host
        self.port: int = self._socket.getsockname()[1]

    def open(self) -> None:
        if not self._listens:
            self._listens = True
            self._socket.listen(_BACKLOG)
            self._loop.add_reader(self._socket.fileno(), self.take)

    def refuse(self) -> None:
        """Stop listening, and keep the port: a socket that is bound only refuses."""
        if self._listens:
            self.close()
            self._socket = _bound(self.host, self.port)

    def take(self) -> None:
        """Accept what has connected so far."""
        while self._listens:
            try:
                sock, _ = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            sock.setblocking(False)
            self._accepted(sock)

    def close(self) -> None:
        if self._listens:
            self._listens = False
            self._loop.remove_reader(self._socket.fileno())
        self._socket.close()


def _bound(host: str, port: int | None) -> socket.socket:
    if port is not None:
        return _bind(host, port)
    for _ in range(_ATTEMPTS):
        try:
            # Not `random`: test runs seed it, and parallel ones would all draw the same ports.
            return _bind(host, secrets.choice(_PORTS))
        except OSError as error:
            refused = error
    raise refused


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named, and inherited by what is accepted: asyncio sets TCP_NODELAY only where it sees TCP.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setblocking(False)
        sock.bind((host, port))
    except BaseException:
        sock.close()
        raise
    return sock
