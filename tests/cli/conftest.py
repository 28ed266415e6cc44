"""One throwaway server for all, an environment of nobody's, and the command itself."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from poolkit.cli.app import app
from poolkit.testing import PostgresServer, postgres

FOREIGN = ("DATABASE_", "REPORTS_", "LOGFIRE_", "PG")
TERMINAL = ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "NO_COLOR", "TTY_COMPATIBLE", "LINES")

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def server() -> Iterator[PostgresServer]:
    pytest.importorskip("trustme")
    with postgres(tls=True) as running:
        yield running


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of the caller's, no .env, a pipe of 80 columns, short waits."""
    for name in list(os.environ):
        if name.upper().startswith(FOREIGN) or name in TERMINAL:
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("DATABASE_CONNECTION_TIMEOUT", "2")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run() -> Run:
    """The command, in this process; what it raises is a failure of the test."""

    def invoke(*arguments: str, **environment: str) -> Result:
        return CliRunner().invoke(app, arguments, env=environment, catch_exceptions=False)

    return invoke


@contextmanager
def _listener(answer: bytes | None) -> Iterator[int]:
    """The port of a server that answers everything alike, or never."""
    kept: list[socket.socket] = []

    def serve(listening: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listening.accept()
                kept.append(client)
                if answer is not None and client.recv(8):
                    client.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, args=(listening,), daemon=True).start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)
    for client in kept:
        client.close()


@pytest.fixture
def silent_port() -> Iterator[int]:
    with _listener(None) as port:
        yield port


@pytest.fixture
def port_without_tls() -> Iterator[int]:
    with _listener(b"N") as port:
        yield port


@pytest.fixture
def closed_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listens
        yield taken.getsockname()[1]
