"""The metrics' endpoint."""

import asyncio
import gzip
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import StringIO
from urllib.request import Request, urlopen

import pytest
from opentelemetry.metrics import Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.view import ExponentialBucketHistogramAggregation, View
from prometheus_client import REGISTRY
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from poolkit import ConfigurationError
from poolkit.telemetry import prometheus
from poolkit.telemetry.attributes import POOL_NAME
from poolkit.telemetry.catalogue import METRICS, SECONDS, Kind, Metric
from poolkit.telemetry.prometheus import metric_reader, metrics_app, start_metrics_server

POOL = {POOL_NAME: "p"}


@pytest.fixture(autouse=True)
def _one_process(monkeypatch) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)


@pytest.fixture
def provider() -> Iterator[MeterProvider]:
    """A program's own, with our reader."""
    made = MeterProvider([metric_reader()], shutdown_on_exit=False)
    yield made
    made.shutdown()


def emit(provider: MeterProvider, metric: Metric) -> None:
    """One point of a metric, with all of its attributes."""
    meter = provider.get_meter("poolkit", "1")
    attributes = POOL | dict.fromkeys(metric.attributes, "x")
    if metric.kind is Kind.HISTOGRAM:
        meter.create_histogram(
            metric.name,
            metric.unit,
            metric.description,
            explicit_bucket_boundaries_advisory=SECONDS,
        ).record(0.2, attributes)
        return
    make = {
        Kind.COUNTER: meter.create_observable_counter,
        Kind.UP_DOWN_COUNTER: meter.create_observable_up_down_counter,
        Kind.GAUGE: meter.create_observable_gauge,
    }[metric.kind]
    make(metric.name, [lambda _: [Observation(1, attributes)]], metric.unit, metric.description)


async def ask(app, method: str = "GET", query: str = "", **headers: str):
    """Status, headers and body of what an ASGI application answers."""
    scope = {
        "type": "http",
        "method": method,
        "query_string": query.encode(),
        "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()],
    }
    sent = []

    async def send(message):
        sent.append(message)

    await app(scope, None, send)
    start, body = sent
    found = {name.decode(): value.decode() for name, value in start["headers"]}
    assert found["content-length"] == str(len(body["body"]))
    return start["status"], found, body["body"]


@pytest.mark.parametrize("name", METRICS)
async def test_the_catalogue_says_what_is_written(provider, name: str) -> None:
    """The family's name, which dashboards and alerts are made of, and its labels."""
    metric = METRICS[name]
    emit(provider, metric)

    _, _, body = await ask(metrics_app())

    lines = [
        line for line in body.decode().splitlines() if "db_client_connection_pool_name" in line
    ]
    written = {line.split("{")[0] for line in lines}
    tails = ("_bucket", "_count", "_sum") if metric.kind is Kind.HISTOGRAM else ("",)
    assert written == {metric.prometheus + tail for tail in tails}
    labels = {label for line in lines for label in labels_of(line)} - {"le"}
    assert labels == {key.replace(".", "_") for key in (POOL_NAME, *metric.attributes)}


def labels_of(line: str) -> list[str]:
    return [pair.split("=")[0] for pair in re.findall(r"\{(.*)\}", line)[0].split(",")]


async def test_one_family_of_each_name(provider) -> None:
    """Though some of its points have attributes that others lack."""
    duration = provider.get_meter("poolkit").create_histogram("db.client.operation.duration", "s")
    duration.record(0.1, POOL)
    duration.record(0.2, POOL | {"error.type": "57014"})

    _, _, body = await ask(metrics_app())

    assert body.count(b"# TYPE db_client_operation_duration_seconds histogram") == 1
    assert body.count(b"db_client_operation_duration_seconds_count{") == 2


async def test_the_format_is_chosen_by_the_one_who_asks(provider) -> None:
    """Prometheus' text, OpenMetrics, either of them compressed."""
    emit(provider, METRICS["db.client.connection.wait_time"])
    app = metrics_app()

    status, headers, body = await ask(app)
    assert (status, headers["content-type"][:10]) == (200, "text/plain")
    assert "db_client_connection_wait_time_seconds" in {
        family.name for family in text_string_to_metric_families(body.decode())
    }
    _, headers, body = await ask(app, accept="application/openmetrics-text; version=1.0.0")
    assert headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert list(openmetrics.text_fd_to_metric_families(StringIO(body.decode())))
    _, headers, packed = await ask(app, accept_encoding="gzip")
    assert headers["content-encoding"] == "gzip"
    assert b"db_client_connection_wait_time_seconds_sum" in gzip.decompress(packed)


async def test_some_names_alone(provider) -> None:
    """``?name[]=``, as ``prometheus_client`` has it."""
    for metric in METRICS.values():
        emit(provider, metric)

    _, _, body = await ask(metrics_app(), query="name[]=db_client_connection_max")

    assert [line.split("{")[0] for line in body.decode().splitlines() if line[0] != "#"] == [
        "db_client_connection_max"
    ]


async def test_what_is_no_get_is_refused(provider) -> None:
    """405; a websocket is no question at all."""
    assert (await ask(metrics_app(), "POST"))[0] == 405
    with pytest.raises(RuntimeError, match="not by websocket"):
        await metrics_app()({"type": "websocket"}, None, None)


async def test_the_event_loop_goes_on_meanwhile(provider) -> None:
    """Collecting, and asking other workers, is a thread's work."""
    asked, answer = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def slow(_):
        loop.call_soon_threadsafe(asked.set)
        assert answer.wait(20)
        return [Observation(1)]

    provider.get_meter("x").create_observable_gauge("slow", [slow])

    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        asking = tasks.create_task(ask(metrics_app()))
        await asked.wait()
        assert not asking.done()
        answer.set()

    assert b"slow 1.0" in asking.result()[2]


def test_two_that_ask_at_once_each_get_everything_once(provider, monkeypatch) -> None:
    """OpenTelemetry's collector would give one of them both answers, and the other none."""
    provider.get_meter("x").create_observable_gauge("once", [lambda _: [Observation(1)]])
    both, receive = threading.Barrier(2), prometheus._Reader._receive_metrics

    def wait_for_the_other(self, *args, **kwargs):
        receive(self, *args, **kwargs)
        with suppress(threading.BrokenBarrierError):
            both.wait(0.5)

    monkeypatch.setattr(prometheus._Reader, "_receive_metrics", wait_for_the_other)

    def samples(_):
        found = prometheus._Exposition().collect()
        return [len(family.samples) for family in found if family.name == "once"]

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(samples, range(2))) == [[1], [1]]


def test_there_is_one_reader(provider) -> None:
    """Until it is shut down; the registry has none left then."""
    first = metric_reader()
    assert metric_reader() is first

    provider.shutdown()

    assert metric_reader() is not first
    with pytest.raises(KeyError):
        REGISTRY.unregister(first._collector)
    metric_reader().shutdown()


@pytest.fixture
def exponential() -> Iterator[MeterProvider]:
    """A provider such as Logfire's, which makes all histograms exponential."""
    views = [
        View(instrument_name="*", aggregation=ExponentialBucketHistogramAggregation(max_size=8))
    ]
    made = MeterProvider([metric_reader()], views=views, shutdown_on_exit=False)
    yield made
    made.shutdown()


def test_exponential_histograms_are_written_with_bounds(exponential) -> None:
    """The exporter alone would fail on them, and the whole endpoint with it."""
    waits = exponential.get_meter("x").create_histogram("db.client.connection.wait_time", "s")

    assert buckets_after(waits, [0.002, 0.003, 0.2]) == ([0, 2, 2, 2, 2, 3, 3, 3, 3, 3], 3)
    assert buckets_after(waits, [0.0, 30.0]) == ([1, 3, 3, 3, 3, 4, 4, 4, 4, 5], 5)


def buckets_after(histogram, recorded: list[float]) -> tuple[list[float], float]:
    """The cumulative counts, and the count of all."""
    for value in recorded:
        histogram.record(value, POOL)
    name = "db_client_connection_wait_time_seconds"
    [family] = [f for f in prometheus._Exposition().collect() if f.name == name]
    assert sum(s.value for s in family.samples if s.name.endswith("_sum")) >= sum(recorded)
    counts = [s.value for s in family.samples if s.name.endswith("_bucket")]
    return counts, *[s.value for s in family.samples if s.name.endswith("_count")]


def test_no_bucket_ever_goes_down(exponential) -> None:
    """Not when exponential buckets are merged either: Prometheus would take it for a restart."""
    took = exponential.get_meter("x").create_histogram("db.client.connection.wait_time", "s")
    before = [0.0] * (len(SECONDS) + 1)
    recorded = (0.0011, 0.0009, 0.004, 0.012, 0.0006, 0.3, 0.09, 7.0, 1e-6, 40.0, 0.06)
    for value in recorded:
        now, total = buckets_after(took, [value])
        assert all(after >= was for after, was in zip(now, before, strict=True))
        assert now == sorted(now)
        before = now
    assert before[-1] == total == len(recorded)


# The global provider can be set once in a process.


def run(code: str, *, stderr: str = "", **environment: str) -> list:
    """What a program prints, as JSON, one line each."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", COMMON + code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(stderr) == 1 if stderr else not done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


COMMON = """
import asyncio, json
from opentelemetry.metrics import get_meter, set_meter_provider
from opentelemetry.sdk.metrics import MeterProvider
from sqlalchemy import text
from poolkit import ConfigurationError, create_async_engine
from poolkit.telemetry import prometheus
from poolkit.telemetry.prometheus import metric_reader, metrics_app, start_metrics_server

def used():
    return [
        sample.value
        for family in prometheus._Exposition().collect()
        for sample in family.samples
        if sample.name == "db_client_connection_count"
        and sample.labels["db_client_connection_state"] == "used"
    ]

async def use(engine):
    async with engine.connect():
        print(json.dumps(used()))
    await engine.dispose()
"""


@pytest.mark.parametrize(
    "code",
    [
        "engine = create_async_engine(); metrics_app()",
        "metrics_app(); engine = create_async_engine()",
        "set_meter_provider(MeterProvider([metric_reader()])); engine = create_async_engine(); metrics_app()",
        "engine = create_async_engine(); set_meter_provider(MeterProvider([metric_reader()])); metrics_app()",
        "engine = create_async_engine(); metrics_app(); metrics_app()",
    ],
)
def test_the_metrics_arrive(server, code: str) -> None:
    """Whatever is made first; the API's stand-ins become real when the provider is set."""
    told = run(
        f"{code}; asyncio.run(use(engine))", DATABASE_URL=server.url, DATABASE_TELEMETRY="metrics"
    )

    assert told == [[1]]


@pytest.mark.parametrize("make", ["metrics_app", "start_metrics_server"])
def test_a_provider_without_the_reader_is_refused(make: str) -> None:
    """The message says what to add, for OpenTelemetry and for Logfire."""
    [said] = run(
        "set_meter_provider(MeterProvider())\n"
        f"try:\n    {make}()\nexcept ConfigurationError as error:\n    print(json.dumps(str(error)))"
    )

    assert "MeterProvider(metric_readers=[metric_reader(), ...])" in said
    assert "MetricsOptions(additional_readers=[metric_reader()])" in said


def test_logfire_has_to_be_given_the_reader_first() -> None:
    """Otherwise the metrics would all go to Logfire, and the endpoint be empty."""
    [said] = run(
        "try:\n    metrics_app()\nexcept ConfigurationError as error:\n    print(json.dumps(str(error)))",
        LOGFIRE_ENABLED="true",
    )

    assert said.startswith("LOGFIRE_ENABLED sends metrics to Logfire's MeterProvider alone")
    assert "MetricsOptions(additional_readers=[metric_reader()])" in said


def test_an_engine_that_reports_nothing_is_said_in_the_log(server) -> None:
    """The endpoint is there, and the setting was forgotten: once, however often it is asked."""
    code = "metrics_app(); used(); engine = create_async_engine(); used(); used()"
    at_once = "prometheus._silence.patience = 0;"

    run(at_once + code, DATABASE_URL=server.url, stderr="set DATABASE_TELEMETRY=metrics")
    run(at_once + "metrics_app(); used()", DATABASE_URL=server.url)
    run(code, DATABASE_URL=server.url)


def test_logfire_and_prometheus_together(server) -> None:
    """Logfire's provider feeds both, its exponential histograms included."""
    pytest.importorskip("logfire")
    told = run(
        """
import logfire
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
other = InMemoryMetricReader()
logfire.configure(
    send_to_logfire=False,
    console=False,
    metrics=logfire.MetricsOptions(additional_readers=[metric_reader(), other]),
)
metrics_app()
engine = create_async_engine()
asyncio.run(use(engine))
names = {
    metric.name
    for resource in other.get_metrics_data().resource_metrics
    for scope in resource.scope_metrics
    for metric in scope.metrics
}
written = {sample.name for family in prometheus._Exposition().collect() for sample in family.samples}
print(json.dumps("db.client.connection.wait_time" in names))
print(json.dumps("db_client_connection_wait_time_seconds_bucket" in written))
""",
        DATABASE_URL=server.url,
        DATABASE_TELEMETRY="metrics",
        LOGFIRE_ENABLED="true",
    )

    assert told == [[1], True, True]


def test_without_the_packages_the_error_names_the_extra() -> None:
    """And no traceback of a missing module alone."""
    code = """
import sys
sys.modules["prometheus_client"] = None
try:
    import poolkit.telemetry.prometheus
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.startswith("ConfigurationError metrics for Prometheus need the package")
    assert "pip install 'poolkit[prometheus]'" in done.stdout


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def get(port: int, **headers: str) -> bytes:
    request = Request(f"http://127.0.0.1:{port}/metrics", headers=headers)
    with urlopen(request, timeout=20) as response:  # noqa: S310 (ours)
        return response.read()


def test_a_server_of_its_own(provider, port: int) -> None:
    """It serves until it is stopped, and can be started again on the same port."""
    emit(provider, METRICS["db.client.connection.max"])
    for _ in range(2):
        stop = start_metrics_server(port)
        try:
            assert b"db_client_connection_max{" in get(port)
        finally:
            stop()
            stop()
        with pytest.raises(OSError, match="refused"):
            get(port)


async def test_a_blocked_event_loop_does_not_hide_it(provider, port: int) -> None:
    """This test blocks the loop while it asks."""
    stop = start_metrics_server(port)
    assert b"python_info" in get(port)
    stop()


def test_a_port_in_use_is_refused(provider, port: int) -> None:
    """The message names it."""
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(ConfigurationError, match=rf"on 127.0.0.1:{port} \(.*\): give start_metrics"),
    ):
        start_metrics_server(port)


FORKED = """
import os, socket, sys
port = int(sys.argv[1]) if len(sys.argv) > 1 else int(os.environ["METRICS_PORT"])
stop = start_metrics_server(port)
ready, done = os.pipe(), os.pipe()
if not os.fork():
    os.write(ready[1], b".")
    os.read(done[0], 1)
    os._exit(0)
os.read(ready[0], 1)
stop()
socket.create_server(("127.0.0.1", port)).close()
os.write(done[1], b".")
os.wait()
"""


def test_a_forked_child_does_not_keep_the_port(port: int) -> None:
    """It could answer nobody there."""
    run(FORKED, METRICS_PORT=str(port))


async def test_fastapi_answers_as_prometheus_asks(provider) -> None:
    """``GET /metrics`` exactly; a mount redirects first, and answers then."""
    fastapi = pytest.importorskip("fastapi")
    httpx = pytest.importorskip("httpx")
    app = fastapi.FastAPI()
    app.add_route("/metrics", metrics_app())
    app.mount("/mounted", metrics_app())

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as http:
        assert (await http.get("/metrics")).status_code == 200
        assert (await http.post("/metrics")).status_code == 405
        assert (await http.get("/mounted")).status_code == 307
        followed = await http.get("/mounted", follow_redirects=True)
        assert (followed.status_code, "python_info" in followed.text) == (200, True)
