"""Requests as fast as they are answered, by a client that costs little."""

from __future__ import annotations

import asyncio
import re
import time

_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)\r\n", re.IGNORECASE)
_END_OF_HEAD = b"\r\n\r\n"


async def load(port: int, path: str, *, clients: int, requests: int) -> float:
    """Seconds for so many requests, by so many clients that each keep a connection.

    Raises:
        RuntimeError: An answer was not 200.
        ConnectionError: A connection was lost.
    """
    loop = asyncio.get_running_loop()
    connections = [
        (await loop.create_connection(lambda: _Client(path, requests // clients), host, port))[1]
        for host in ["127.0.0.1"] * clients
    ]
    try:
        began = time.perf_counter()
        for connection in connections:
            connection.begin()
        await asyncio.gather(*(connection.done for connection in connections))
        return time.perf_counter() - began
    finally:
        for connection in connections:
            connection.transport.close()


async def get(port: int, path: str) -> bytes:
    """The content of one answer."""
    _, client = await asyncio.get_running_loop().create_connection(
        lambda: _Client(path, 1), "127.0.0.1", port
    )
    client.begin()
    try:
        await client.done
        return client.body
    finally:
        client.transport.close()


class _Client(asyncio.Protocol):
    """One request after the other on one connection."""

    transport: asyncio.Transport

    def __init__(self, path: str, requests: int) -> None:
        self._request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
        self._left = requests
        self._received = b""
        self.body = b""
        self.done = asyncio.get_running_loop().create_future()

    def begin(self) -> None:
        self.transport.write(self._request)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, body = self._received.partition(_END_OF_HEAD)
        if not separator:
            return
        if not head.startswith(b"HTTP/1.1 200 "):
            self._fail(RuntimeError(head.decode()))
        length = _LENGTH.search(head + b"\r\n")
        if length is None or len(body) < int(length[1]):
            return
        self.body, self._received = body, b""
        self._left -= 1
        if self._left:
            self.transport.write(self._request)
        elif not self.done.done():
            self.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(exc or ConnectionResetError("the server hung up"))

    def _fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)
