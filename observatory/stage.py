"""A throwaway server, a service on it, and a Prometheus that scrapes it, for one block."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg

from observatory.prometheus import Prometheus, free_port, running
from observatory.rules import scaled
from poolkit.cli.dashboard import Dashboard, text
from poolkit.testing import PostgresServer, postgres

INTERVAL = 30.0
"""Seconds between scrapes, before they are made shorter."""

_LOOKBACK = 300.0
"""Seconds for which Prometheus lets a value stand by itself."""

_LONGEST_START = 30.0

_SETTINGS = {
    "DATABASE_TELEMETRY": "metrics",
    "DATABASE_TELEMETRY_SERVER_INTERVAL": "0.25",
    "DATABASE_POOL_NAME": "orders",
    "DATABASE_POOL_SIZE": "8",
    "DATABASE_MAX_OVERFLOW": "2",
    "DATABASE_POOL_TIMEOUT": "0.5",
    "DATABASE_POOL_MAX_WAITING": "30",
    "DATABASE_POOL_OVERLOAD_AFTER": "0.2",
    "DATABASE_POOL_PING_IDLE": "0",
    "DATABASE_CONNECTION_TIMEOUT": "1",
    "DATABASE_STATEMENT_TIMEOUT": "0.6",
    "DATABASE_LEAK_THRESHOLD": "2",
}
_MAX_CONNECTIONS = 40


@dataclass(slots=True)
class Stage:
    """What the phases act on.

    Attributes:
        server: The database.
        service: The process that uses it.
        prometheus: What watches the process.
        factor: By how much everything is faster.
    """

    server: PostgresServer
    service: subprocess.Popen[str]
    prometheus: Prometheus
    factor: float
    _runner: asyncio.Runner = field(default_factory=asyncio.Runner)
    _others: list[asyncpg.Connection] = field(default_factory=list)

    def tell(self, what: str) -> None:
        """Have the service do something else."""
        assert self.service.stdin is not None
        self.service.stdin.write(f"{what}\n")
        self.service.stdin.flush()

    def fill_server(self) -> None:
        """Connect from elsewhere until there is hardly any room left."""
        self._runner.run(self._connect_others())

    def empty_server(self) -> None:
        """Close these connections."""
        self._runner.run(self._close_others())

    def close(self) -> None:
        """End what is under way."""
        self.empty_server()
        self._runner.close()

    async def _connect_others(self) -> None:
        count = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
        self._others.append(await asyncpg.connect(self.server.url))
        while await self._others[0].fetchval(count) < _MAX_CONNECTIONS - 2:
            self._others.append(await asyncpg.connect(self.server.url))

    async def _close_others(self) -> None:
        for connection in self._others:
            await connection.close()
        self._others.clear()


@contextmanager
def staged(factor: float) -> Iterator[Stage]:
    """Start everything; the rules' durations are made shorter by the factor."""
    with ExitStack() as stack:
        settings = {"max_connections": _MAX_CONNECTIONS}
        server = stack.enter_context(postgres(server_settings=settings))
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        port = free_port()
        service = stack.enter_context(_service(server, port, directory))
        prometheus = stack.enter_context(
            running(
                directory,
                scaled(text(Dashboard.ALERTS), factor),
                port,
                interval=INTERVAL / factor,
                lookback=_LOOKBACK / factor,
            )
        )
        stage = Stage(server, service, prometheus, factor)
        stack.callback(stage.close)
        yield stage


@contextmanager
def _service(server: PostgresServer, port: int, directory: Path) -> Iterator[subprocess.Popen[str]]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DATABASE_", "PG", "OTEL_"))}
    root = str(Path(__file__).parent.parent)
    process = subprocess.Popen(
        [sys.executable, "-m", "observatory.service"],
        env=kept
        | {"PYTHONPATH": os.pathsep.join(filter(None, [root, kept.get("PYTHONPATH", "")]))}
        | {"DATABASE_URL": server.url, "METRICS_PORT": str(port)}
        | _SETTINGS,
        cwd=directory,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if process.stdout.readline() != "ready\n":
            raise RuntimeError("the service did not start")
        yield process
    finally:
        process.stdin.close()  # which it takes for the end
        try:
            process.wait(_LONGEST_START)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
