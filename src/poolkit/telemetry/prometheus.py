"""Metrics for Prometheus: as a route of the application, or from a server of their own."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from inspect import signature
from pathlib import Path
from typing import Any

from poolkit.errors import ConfigurationError
from poolkit.pool.base import pools
from poolkit.settings import DatabaseSettings

try:
    from opentelemetry.exporter.prometheus import PrometheusMetricReader
    from opentelemetry.metrics import get_meter_provider, set_meter_provider
    from opentelemetry.metrics._internal import _ProxyMeterProvider
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import MetricsData
    from prometheus_client import Metric, make_wsgi_app

    from poolkit.telemetry import families
    from poolkit.telemetry.buckets import ExplicitBuckets
    from poolkit.telemetry.standalone import serve
    from poolkit.telemetry.workers import VARIABLE, Workers
except ModuleNotFoundError as error:
    raise ConfigurationError(
        f"metrics for Prometheus need the package {error.name}: pip install 'poolkit[prometheus]'"
    ) from error

__all__ = ["metric_reader", "metrics_app", "start_metrics_server"]

PORT = 9464
"""OpenTelemetry's default for a Prometheus exporter."""

_log = logging.getLogger("poolkit.telemetry")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Response = tuple[int, list[tuple[bytes, bytes]], bytes]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def metric_reader() -> PrometheusMetricReader:
    """OpenTelemetry's reader for Prometheus, one for the process, for a provider of your own.

    ``MeterProvider(metric_readers=[metric_reader()])``, or with Logfire
    ``logfire.configure(metrics=MetricsOptions(additional_readers=[metric_reader()]))``. What it
    reads is in ``prometheus_client``'s global registry.
    """
    return _reader()


def metrics_app() -> MetricsApp:
    """The metrics as an ASGI application.

    ``app.add_route("/metrics", metrics_app())`` in FastAPI and Starlette; ``app.mount`` does too,
    but redirects ``/metrics`` to ``/metrics/`` first.

    Where no program has set a global ``MeterProvider``, this sets one.

    Raises:
        ConfigurationError: The program's own ``MeterProvider`` lacks ``metric_reader()``, or
            ``PROMETHEUS_MULTIPROC_DIR`` cannot be used.
    """
    _make_sure_of_a_provider()
    _join()
    return MetricsApp()


def start_metrics_server(port: int = PORT, host: str = "127.0.0.1") -> Callable[[], None]:
    """Serve the metrics over HTTP from a thread, whatever the event loop does.

    Of several workers (``PROMETHEUS_MULTIPROC_DIR``) one listens, for all of them; when it ends,
    another takes over.

    Args:
        port: Where to listen.
        host: The address to listen on; the default is for this machine alone.

    Returns:
        What stops it.

    Raises:
        ConfigurationError: It cannot listen there, or as for ``metrics_app``.
    """
    _make_sure_of_a_provider()
    _join()
    return serve(port, host, _Exposition(), _directory())


class MetricsApp:
    """An ASGI application that answers every ``GET`` with the metrics.

    It is a class because Starlette takes a function for an endpoint of another kind.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Answer in the format and the encoding that are asked for."""
        if scope["type"] != "http":
            raise RuntimeError(f"the metrics are had by HTTP, not by {scope['type']}")
        status, headers, body = await _in_a_thread(partial(_respond, scope))
        length = (b"content-length", str(len(body)).encode())
        await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
        await send({"type": "http.response.body", "body": body})


class _Exposition:
    """What stands in for a registry of ``prometheus_client``'s: the metrics of all workers."""

    def collect(self) -> list[Metric]:
        """One family for each name."""
        if members := _members():
            return members.collect()
        return families.merge([({}, _local())])

    def restricted_registry(self, names: Iterable[str]) -> _Restricted:
        """Only samples of these names, for ``?name[]=...``."""
        return _Restricted(self, names)


class _Restricted:
    def __init__(self, whole: _Exposition, names: Iterable[str]) -> None:
        self._whole, self._names = whole, names

    def collect(self) -> list[Metric]:
        return families.restrict(self._whole.collect(), self._names)


class _Reader(PrometheusMetricReader):
    """The reader, which knows whether a provider has it and takes any histogram."""

    def __init__(self) -> None:
        if "scope_info_enabled" in signature(PrometheusMetricReader).parameters:
            # As earlier versions, whose samples are not labelled with the library they are from.
            super().__init__(scope_info_enabled=False)
        else:
            super().__init__()
        self.is_shut_down = False
        self._buckets = ExplicitBuckets()

    @property
    def is_in_use(self) -> bool:
        """Whether a provider has it, which the SDK tells nobody."""
        return self._collect is not None

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: Any) -> None:
        """End it; the next ``metric_reader()`` is another."""
        self.is_shut_down = True
        super().shutdown(timeout_millis, **kwargs)

    def _receive_metrics(
        self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any
    ) -> None:
        if metrics_data is not None:
            metrics_data = self._buckets.explicit(metrics_data)
        super()._receive_metrics(metrics_data, timeout_millis, **kwargs)


_REMEDY = (
    "make it with MeterProvider(metric_readers=[metric_reader(), ...]) or"
    " logfire.configure(metrics=logfire.MetricsOptions(additional_readers=[metric_reader()])),"
    " metric_reader being poolkit.telemetry.prometheus's, and no other reader for Prometheus"
)

_making = threading.Lock()
_readers: list[_Reader] = []


def _reader() -> _Reader:
    with _making:
        if not _readers or _readers[-1].is_shut_down:
            _readers[:] = [_Reader()]
        return _readers[-1]


def _make_sure_of_a_provider() -> None:
    reader = _reader()
    if reader.is_in_use:
        return
    if not isinstance(get_meter_provider(), _ProxyMeterProvider):
        raise ConfigurationError(
            f"the program's own MeterProvider lacks metric_reader(): {_REMEDY}"
        )
    if _logfire_is_wanted():
        raise ConfigurationError(
            "LOGFIRE_ENABLED sends metrics to Logfire's MeterProvider alone: before this,"
            f" {_REMEDY}"
        )
    set_meter_provider(MeterProvider(metric_readers=[reader]))


def _logfire_is_wanted() -> bool:
    """As the engines' settings say, whatever database they are for."""
    try:
        return DatabaseSettings(url="postgresql://").logfire_enabled  # type: ignore[arg-type]
    except (ValueError, OSError):
        return False  # who makes the engine is told


def _directory() -> Path | None:
    named = os.environ.get(VARIABLE)
    return Path(named).absolute() if named else None


@cache
def _members_in(directory: Path) -> Workers:
    return Workers(directory, _local)


def _members() -> Workers | None:
    directory = _directory()
    return None if directory is None else _members_in(directory)


def _join(*, serving: bool = False) -> None:
    if members := _members():
        members.join(serving=serving)


def _local() -> list[Metric]:
    found = families.collect()
    _silence.listen(found)
    return found


class _Silence:
    """Says once that there are engines and no metrics of any, if that stays so."""

    patience = 5.0  # while a program starts, its engine may be there before its metrics are

    def __init__(self) -> None:
        self._since: float | None = None
        self._was_told = False

    def listen(self, found: Iterable[Metric]) -> None:
        if not pools or any(family.name.startswith("db_client_connection") for family in found):
            self._since = None
            return
        if self._since is None:
            self._since = time.monotonic()
        if not self._was_told and time.monotonic() - self._since >= self.patience:
            self._was_told = True
            _log.warning(
                "the metrics are asked for, and no engine of this process sends any there: set"
                " DATABASE_TELEMETRY=metrics, or call poolkit.telemetry.instrument(engine)"
            )


_silence = _Silence()


async def _in_a_thread(work: Callable[[], Response]) -> Response:
    """Not in the loop's own threads, which may all be busy when metrics are wanted most."""
    with_one = ThreadPoolExecutor(1, "poolkit-metrics")
    try:
        return await asyncio.get_running_loop().run_in_executor(with_one, work)
    finally:
        with_one.shutdown(wait=False)


def _respond(scope: Scope) -> Response:
    """Let ``prometheus_client`` choose format and encoding, and refuse other methods."""
    _join(serving=True)
    started: list[tuple[int, list[tuple[bytes, bytes]]]] = []

    def start_response(status: str, headers: list[tuple[str, str]]) -> None:
        pairs = [(name.lower().encode(), value.encode()) for name, value in headers]
        started.append((int(status.split(maxsplit=1)[0]), pairs))

    body = b"".join(make_wsgi_app(_Exposition())(_environ(scope), start_response))
    return (*started[0], body)


def _environ(scope: Scope) -> dict[str, str]:
    def header(wanted: bytes) -> str:
        return ",".join(
            value.decode("latin-1") for name, value in scope["headers"] if name == wanted
        )

    return {
        "REQUEST_METHOD": scope["method"],
        "PATH_INFO": "/metrics",
        "QUERY_STRING": scope["query_string"].decode("latin-1"),
        "HTTP_ACCEPT": header(b"accept"),
        "HTTP_ACCEPT_ENCODING": header(b"accept-encoding"),
    }
