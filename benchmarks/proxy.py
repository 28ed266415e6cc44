"""A TCP proxy in a process of its own that counts round trips, adds latency, and can go silent.

A round trip is a flush of the client's that the server answers: the number of times that the
direction of a connection turns from client to server and back. Half the latency is added in each
direction; nothing waits for anything else, so that throughput is not limited. The TCP handshake
is the kernel's and is not delayed.
"""

from __future__ import annotations

import asyncio
import json
import selectors
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
_PROTOCOL_3 = (3 << 16).to_bytes(4)


class Proxy:
    """The parent's hold on a proxy process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.port: int = self._answer()

    def set_rtt(self, seconds: float) -> None:
        """Add this much to each round trip from now on."""
        self._ask(f"rtt {seconds}")

    def freeze(self) -> None:
        """Forward nothing from now on, neither data nor ends: a peer that vanished."""
        self._ask("freeze")

    def round_trips(self) -> int:
        """Round trips so far."""
        return int(self._ask("round_trips"))

    def connects(self) -> int:
        """Sessions asked for so far; requests to cancel, or for TLS, on their own are none."""
        return int(self._ask("connects"))

    def _ask(self, command: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


@contextmanager
def proxy(port: int, *, rtt: float = 0.0) -> Iterator[Proxy]:
    """A proxy before the server at that port; it ends with the block, or with this process."""
    command = [sys.executable, "-m", "benchmarks.proxy", str(port)]
    root = Path(__file__).parent.parent
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root
    ) as process:
        try:
            running = Proxy(process)
            running.set_rtt(rtt)
            yield running
        finally:
            process.kill()


class _State:
    """What all connections share."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.rtt = 0.0
        self.frozen = False
        self.round_trips = 0
        self.connects = 0

    def obey(self, command: str) -> float:
        """Do what the parent says; the answer is a number."""
        name, *arguments = command.split()
        if name == "rtt":
            self.rtt = float(arguments[0])
        elif name == "freeze":
            self.frozen = True
        return {"round_trips": self.round_trips, "connects": self.connects}.get(name, 0)


class _Side(asyncio.Protocol):
    """One side of a connection; what it receives goes to its peer, half a round trip later."""

    def __init__(self, state: _State, peer: _Side | None = None) -> None:
        self.state = state
        self.peer = _Side(state, self) if peer is None else peer
        self.is_client = peer is None
        self.unanswered = self.started = False
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._due: deque[tuple[float, bytes | None]] = deque()
        self._connecting: asyncio.Task[Any] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connect to the server as soon as a client has connected."""
        self._transport = transport  # type: ignore[assignment]
        if self.is_client:
            self._connecting = self._loop.create_task(self._connect())
        else:
            self._send_due()

    async def _connect(self) -> None:
        try:
            await self._loop.create_connection(lambda: self.peer, HOST, self.state.port)
        except OSError:
            assert self._transport is not None
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        """Count, and pass on."""
        if self.is_client:
            self.unanswered = True
            if not self.started and data[4:8] == _PROTOCOL_3:
                self.started = True
                self.state.connects += 1
        elif self.peer.unanswered:
            self.peer.unanswered = False
            self.state.round_trips += 1
        self.peer.send_later(data)

    def connection_lost(self, _: Exception | None) -> None:
        """The end travels as data does."""
        self.peer.send_later(None)

    def send_later(self, data: bytes | None) -> None:
        """Send the data, or for None the end, after half a round trip."""
        self._due.append((self._loop.time() + self.state.rtt / 2, data))
        if len(self._due) == 1:
            self._send_due()

    def _send_due(self) -> None:
        if self._transport is None or self.state.frozen:
            return
        now = self._loop.time()
        while self._due and self._due[0][0] <= now:
            data = self._due.popleft()[1]
            if data is None:
                self._transport.close()
            else:
                self._transport.write(data)
        if self._due:
            self._loop.call_at(self._due[0][0], self._send_due)


async def _serve(port: int) -> None:
    loop = asyncio.get_running_loop()
    state = _State(port)
    server = await loop.create_server(lambda: _Side(state), HOST, 0)
    commands = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    _tell(server.sockets[0].getsockname()[1])
    while command := await commands.readline():  # none: the parent has gone
        _tell(state.obey(command.decode()))


def _tell(answer: float) -> None:
    print(json.dumps(answer), flush=True)


def _precise_loop() -> asyncio.AbstractEventLoop:
    # epoll rounds timeouts up to whole milliseconds, which would double a latency of 2 ms.
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=_precise_loop) as runner:
        runner.run(_serve(int(sys.argv[1])))
