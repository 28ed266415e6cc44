"""A server for the metrics alone, in threads of its own."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import start_http_server
from prometheus_client.registry import Collector

from poolkit.errors import ConfigurationError
from poolkit.telemetry.workers import hold, prepare

TURN = 1.0
"""Seconds between looks whether the worker that listens is gone."""

_log = logging.getLogger("poolkit.telemetry")


def serve(port: int, host: str, registry: Collector, directory: Path | None) -> Callable[[], None]:
    """Listen, or in a directory that workers share: take turns at it.

    Returns:
        What stops it.

    Raises:
        ConfigurationError: It cannot listen there.
    """
    server = Server(port, host, registry, directory)
    if directory is not None:
        prepare(directory)
    if not server.try_turn():
        server.wait_for_turn()
    return server.stop


class Server:
    """The server, listening or waiting for its turn."""

    def __init__(self, port: int, host: str, registry: Collector, directory: Path | None) -> None:
        self._address = (port, host)
        self._registry = registry
        self._directory = directory
        self._lock: int | None = None
        self._http: tuple[WSGIServer, threading.Thread] | None = None
        self._stopped = threading.Event()
        self._waiting: threading.Thread | None = None
        _servers.add(self)

    def try_turn(self) -> bool:
        """Whether we listen now; only one of the workers that share a directory does."""
        if self._directory is not None:
            self._lock = hold(self._directory / f"port-{self._address[0]}.lock")
            if self._lock is None:
                return False
        try:
            self._http = _listen(*self._address, self._registry)
        except BaseException:
            self._release()
            raise
        return True

    def wait_for_turn(self) -> None:
        """Look again and again, in a thread, until the one that listens is gone."""
        self._waiting = threading.Thread(target=self._wait, name="poolkit-metrics", daemon=True)
        self._waiting.start()

    def stop(self) -> None:
        """Stop listening or waiting; a second call does nothing."""
        self._stopped.set()
        if self._waiting is not None:
            self._waiting.join()
        http, self._http = self._http, None
        if http is not None:
            http[0].shutdown()
            http[0].server_close()
            http[1].join()
        self._release()

    def forget(self) -> None:
        """Close what a forked child has inherited, which has no thread to serve it."""
        http, self._http, self._waiting = self._http, None, None
        if http is not None:
            http[0].socket.close()
        self._release()

    def _wait(self) -> None:
        while not self._stopped.wait(TURN):
            try:
                if self.try_turn():
                    return
            except (ConfigurationError, OSError) as error:
                _log.error("the metrics are not served: %s", error)

    def _release(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)


def _listen(port: int, host: str, registry: Any) -> tuple[WSGIServer, threading.Thread]:
    try:
        return start_http_server(port, host, registry=registry)
    except OSError as error:
        raise ConfigurationError(
            f"the metrics cannot be served on {host}:{port} ({error.strerror}): give"
            " start_metrics_server another port or host, or stop what listens there"
        ) from error


_servers: weakref.WeakSet[Server] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for server in list(_servers):
        server.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
