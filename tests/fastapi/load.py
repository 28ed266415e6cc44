"""Clients of an HTTP service: many at once, on kept connections, rude if they are told to be.

What became of each request is kept: an answer, none because the client left, or none because the
service did.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

LEFT = "the client left"
REFUSED = "not sent: no connection"
LOST = "sent, and the connection was lost"
ABRUPT = "the answer broke off"
SILENT = "no answer in time"

PATIENCE = 30.0
"""Seconds that a client waits for an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a client is to do.

    Attributes:
        path: The path and the query.
        method: The HTTP method.
        row: The row that it writes if it succeeds.
        leave_after: Seconds until the client closes the connection without waiting.
        pause: Seconds before each piece of the answer is read.
    """

    path: str
    method: str = "GET"
    row: int | None = None
    leave_after: float | None = None
    pause: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What became of a request.

    Attributes:
        request: The request.
        began: When it began, on the loop's clock.
        took: Seconds until its end.
        status: The HTTP status; None where no whole answer came.
        headers: Their names in small letters.
        body: The content.
        why: Why there is no answer.
    """

    request: Request
    began: float
    took: float
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    why: str = ""

    @property
    def outcome(self) -> int | str:
        """The status, or why there is none."""
        return self.status or self.why

    @property
    def ended(self) -> float:
        """When it ended, on the loop's clock."""
        return self.began + self.took

    def json(self) -> Any:
        """The content."""
        return json.loads(self.body)


class Client:
    """One client on one connection, which it keeps for its next request and opens again if lost."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def request(self, request: Request) -> Answer:
        """Send it and wait for what becomes of it; never raises because of the service."""
        clock = asyncio.get_running_loop().time
        began = clock()
        try:
            status, headers, body = await self._exchange(request)
        except _Unanswered as unanswered:
            self.close()
            return Answer(request=request, began=began, took=clock() - began, why=str(unanswered))
        return Answer(
            request=request,
            began=began,
            took=clock() - began,
            status=status,
            headers=headers,
            body=body,
        )

    def close(self) -> None:
        """Hang up at once."""
        if self._writer is not None:
            self._writer.transport.abort()
        self._reader = self._writer = None

    async def _exchange(self, request: Request) -> tuple[int, dict[str, str], bytes]:
        reader, writer = await self._connection()
        writer.write(_head(request))
        limit = PATIENCE if request.leave_after is None else request.leave_after
        began = False
        try:
            async with asyncio.timeout(limit):
                status, headers = await _status_and_headers(reader)
                began = True
                body = await _body(reader, headers, request.pause)
        except TimeoutError:
            raise _Unanswered(SILENT if request.leave_after is None else LEFT) from None
        except (OSError, EOFError):
            raise _Unanswered(ABRUPT if began else LOST) from None
        if headers.get("connection") == "close":
            self.close()
        return status, headers, body

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._reader is None or self._writer is None or self._reader.at_eof():
            self.close()
            try:
                self._reader, self._writer = await asyncio.open_connection(
                    "127.0.0.1", self._port, limit=2**14
                )
            except OSError:
                raise _Unanswered(REFUSED) from None
        return self._reader, self._writer


class Clients:
    """As many at once as there are requests under way; connections are kept for the next."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[Client] = []

    async def at_once(self, requests: Iterable[Request]) -> list[Answer]:
        """All of them side by side."""
        return await asyncio.gather(*map(self.one, requests))

    async def one(self, request: Request) -> Answer:
        """By the client whose connection was used last."""
        client = self._idle.pop() if self._idle else Client(self._port)
        try:
            return await client.request(request)
        finally:
            self._idle.append(client)

    async def get(self, path: str) -> Answer:
        """The same, in short."""
        return await self.one(Request(path=path))

    async def steadily(
        self, requests: Iterable[Request], *, clients: int, pause: float = 0.0
    ) -> list[Answer]:
        """So many clients, each with one request after the other, until there are no more."""
        source, answers = iter(requests), list[Answer]()

        async def client() -> None:
            for request in source:
                answers.append(await self.one(request))
                await asyncio.sleep(pause if answers[-1].status else max(pause, 0.02))

        await asyncio.gather(*(client() for _ in range(clients)))
        return answers

    def close(self) -> None:
        """Hang up."""
        for client in self._idle:
            client.close()


def outcomes(answers: Iterable[Answer]) -> Counter[int | str]:
    """How many ended how."""
    return Counter(answer.outcome for answer in answers)


class _Unanswered(Exception):
    """No whole answer came; the text says why."""


def _head(request: Request) -> bytes:
    length = "Content-Length: 0\r\n" if request.method == "POST" else ""
    return f"{request.method} {request.path} HTTP/1.1\r\nHost: service\r\n{length}\r\n".encode()


async def _status_and_headers(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    pairs = (line.split(":", 1) for line in head[1:] if line)
    return int(head[0].split()[1]), {name.lower(): value.strip() for name, value in pairs}


async def _body(reader: asyncio.StreamReader, headers: Mapping[str, str], pause: float) -> bytes:
    if headers.get("transfer-encoding") != "chunked":
        return await reader.readexactly(int(headers.get("content-length", 0)))
    pieces = []
    while size := int(await reader.readuntil(b"\r\n"), 16):
        await asyncio.sleep(pause)
        pieces.append((await reader.readexactly(size + 2))[:-2])
    await reader.readexactly(2)
    return b"".join(pieces)
