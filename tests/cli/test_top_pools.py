"""Pools by their metrics: canned expositions, two in succession, workers, endpoints that fail."""

from __future__ import annotations

import base64
import json
import math
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from rich.console import Console
from typer.testing import Result

from poolkit.cli.top import exposition
from poolkit.cli.top.endpoint import Metrics
from poolkit.cli.top.exposition import Endpoint, ExpositionError, parse
from poolkit.cli.top.live import Feed
from poolkit.cli.top.pools import Pool, Room, Wait, pools
from poolkit.cli.top.pools_view import Pools
from poolkit.cli.top.view import Frame
from poolkit.errors import ConfigurationError
from poolkit.testing import PostgresServer

Run = Callable[..., Result]

BOUNDS = ("0.001", "0.005", "0.01", "0.05", "0.1", "0.5", "1.0", "5.0", "10.0", "+Inf")


def written(name: str = "shop", worker: str | None = None, **numbers: float) -> str:
    """An exposition as poolkit's endpoint writes it; buckets are given as ``b0`` to ``b9``."""
    own = f'db_client_connection_pool_name="{name}",db_system_name="postgresql"'
    own += f',worker="{worker}"' if worker is not None else ""
    get = numbers.get
    waits = [sum(get(f"b{place}", 0) for place in range(end + 1)) for end in range(len(BOUNDS))]
    histogram = "db_client_connection_wait_time_seconds"
    lines = [
        f'{histogram}_bucket{{{own},le="{b}"}} {n}' for b, n in zip(BOUNDS, waits, strict=True)
    ]
    state = "db_client_connection_state"
    reason, kind = "poolkit_close_reason", "poolkit_fault_kind"
    return textwrap.dedent(
        f"""\
        # TYPE db_client_connection_count gauge
        db_client_connection_count{{{own},{state}="used"}} {get("used", 0)}
        db_client_connection_count{{{own},{state}="idle"}} {get("idle", 0)}
        # TYPE db_client_connection_max gauge
        db_client_connection_max{{{own}}} {get("max", 8)}
        # TYPE db_client_connection_pending_requests gauge
        db_client_connection_pending_requests{{{own}}} {get("waiting", 0)}
        # TYPE poolkit_connection_opening gauge
        poolkit_connection_opening{{{own}}} {get("opening", 0)}
        # TYPE poolkit_pool_overloaded gauge
        poolkit_pool_overloaded{{{own}}} {get("overloaded", 0)}
        # TYPE poolkit_connection_longest_use_seconds gauge
        poolkit_connection_longest_use_seconds{{{own}}} {get("longest", 0)}
        # TYPE db_client_connection_timeouts_total counter
        db_client_connection_timeouts_total{{{own}}} {get("timeouts", 0)}
        # TYPE poolkit_checkout_refusals_total counter
        poolkit_checkout_refusals_total{{{own}}} {get("refusals", 0)}
        # TYPE poolkit_connection_open_failures_total counter
        poolkit_connection_open_failures_total{{{own},{kind}="connect_refused"}} {get("refused", 0)}
        poolkit_connection_open_failures_total{{{own},{kind}="host_not_found"}} 0
        # TYPE poolkit_connection_closed_total counter
        poolkit_connection_closed_total{{{own},{reason}="recycled"}} {get("recycled", 0)}
        poolkit_connection_closed_total{{{own},{reason}="lost"}} {get("lost", 0)}
        # TYPE poolkit_server_connections gauge
        poolkit_server_connections{{{own}}} {get("server", 30)}
        # TYPE poolkit_server_connections_max gauge
        poolkit_server_connections_max{{{own}}} 100
        # TYPE {histogram} histogram
        """
    ) + "\n".join([*lines, f"{histogram}_count{{{own}}} {waits[-1]}", ""])


def test_one_reading() -> None:
    """How a pool stands, and its totals; nothing that needs a second reading."""
    text = written(
        used=6,
        idle=1,
        opening=1,
        waiting=3,
        overloaded=1,
        longest=2.5,
        timeouts=4,
        refused=2,
        lost=5,
        b0=10,
    )

    (pool,) = pools(parse(text, 100.0))

    assert pool == Pool(
        name="shop", worker=None, used=6, idle=1, opening=1, waiting=3, limit=8, overloaded=True,
        longest_use=2.5, checkouts=None, wait=None, timeouts=pool.timeouts, refusals=pool.refusals,
        failures=pool.failures, closed=pool.closed, retries=pool.retries,
        long_holders=pool.long_holders, server=Room(30, 100),
    )  # fmt: skip
    assert pool.utilisation == 0.75
    assert (pool.timeouts.total, pool.timeouts.growth) == (4, None)
    assert (pool.failures.total, pool.failures.by) == (2, {"connect_refused": 2})
    assert (pool.closed.total, pool.closed.by) == (5, {"lost": 5})


def test_two_readings() -> None:
    """Rates, growth, and the percentiles of the waits in between, as Prometheus estimates them."""
    before = parse(written(timeouts=4, lost=5, b0=1000), 100.0)
    now = parse(written(timeouts=7, lost=5, recycled=1, b0=1010, b1=6, b4=4), 102.0)

    (pool,) = pools(now, before)

    assert pool.checkouts == 10.0
    assert pool.wait is not None
    assert pool.wait.p50 == pytest.approx(0.001)
    assert pool.wait.p95 == pytest.approx(0.05 + 0.05 * 3 / 4)
    assert pool.timeouts.growth == 3
    assert pool.closed.growth == 1


def test_waits_beyond_the_last_bucket() -> None:
    """No more is known than that they are longer."""
    (pool,) = pools(parse(written(b9=5), 1.0), parse(written(), 0.0))

    assert pool.wait == Wait(math.inf, math.inf)


def test_no_checkouts_in_between() -> None:
    """No percentiles, and a rate of 0."""
    same = written(b0=7)

    (pool,) = pools(parse(same, 1.0), parse(same, 0.0))

    assert (pool.checkouts, pool.wait) == (0.0, None)


def test_a_service_that_began_anew() -> None:
    """Counters that went down count from 0."""
    (pool,) = pools(parse(written(timeouts=2, b0=3), 1.0), parse(written(timeouts=90, b0=99), 0.0))

    assert pool.timeouts.growth == 2
    assert pool.checkouts == 3.0


def test_workers_and_their_sum() -> None:
    """Of several workers the sum comes first, then each by its number."""
    texts = [written(worker=str(n), used=n, longest=n, b0=10 * n) for n in (10, 2, 1)]
    before = parse("".join(written(worker=str(n)) for n in (1, 2, 10)), 0.0)

    found = pools(parse("".join(texts), 1.0), before)

    assert [pool.worker for pool in found] == ["all", "1", "2", "10"]
    assert (found[0].used, found[0].limit, found[0].checkouts) == (13, 24, 130.0)
    assert (found[0].longest_use, found[0].server) == (10, Room(30, 100))


def test_a_pool_without_a_limit() -> None:
    """It has no utilisation."""
    text = "\n".join(x for x in written(used=3).splitlines() if "connection_max" not in x) + "\n"

    (pool,) = pools(parse(text, 0.0))

    assert (pool.limit, pool.utilisation) == (None, None)


def test_a_name_with_a_command_for_the_terminal() -> None:
    """What is printed is free of escape sequences."""
    (pool,) = pools(parse(written("shop\x1b[2J"), 0.0))

    assert pool.name == "shop?[2J"


class Answers:
    """An endpoint that gives these answers in turn, the last one for ever."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.status = 200
        self.location: str | None = None
        self.asked: list[tuple[str, str | None]] = []


@contextmanager
def serving() -> Iterator[tuple[Answers, str]]:
    answers = Answers()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answers.asked.append((self.path, self.headers["Authorization"]))
            texts = answers.texts
            body = (texts.pop(0) if len(texts) > 1 else texts[0] if texts else "").encode()
            self.send_response(answers.status)
            if answers.location:
                self.send_header("Location", answers.location)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield answers, f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Answers, str]]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as served:
        yield served


def test_once_as_json(run: Run, endpoint: tuple[Answers, str]) -> None:
    """Two looks an interval apart, and what happened in between."""
    answers, place = endpoint
    answers.texts = [written(used=1), written(used=2, timeouts=1, b0=50)]

    done = run("top", f"http://{place}", "--json", "--interval", "0.2")

    assert done.exit_code == 0
    said = json.loads(done.stdout)
    (pool,) = said["pools"]
    assert said["endpoint"] == f"http://{place}/metrics"
    assert pool["used"] == 2
    assert pool["timeouts"] == {"total": 1, "growth": 1, "by": {}}
    assert pool["checkouts"] == pytest.approx(50 / said["seconds"], rel=0.05)
    assert 0.2 <= said["seconds"] < 5
    assert {path for path, _ in answers.asked} == {"/metrics"}


def test_once_as_text(run: Run, endpoint: tuple[Answers, str]) -> None:
    """Into a pipe it prints once, in 80 columns."""
    answers, place = endpoint
    answers.texts = [
        written(used=8, waiting=3, overloaded=1),
        written(used=8, waiting=3, overloaded=1, timeouts=2, lost=1, b1=9),
    ]

    done = run("top", f"http://{place}/metrics", "--interval", "0.1")

    assert done.exit_code == 0, done.stderr
    for words in ("100%", "used 8, idle 0", "of 8", "2 timeouts (+2)", "1 (+1): lost 1"):
        assert words in done.stdout
    for words in ("newest in line", "p95", "30 of 100 connections"):
        assert words in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_workers_as_text(run: Run, endpoint: tuple[Answers, str]) -> None:
    """The sum, and below it a line for each worker, the worst first; nothing is cut."""
    answers, place = endpoint
    answers.texts = ["".join(written(worker=str(n), used=n, waiting=int(n == 2)) for n in range(4))]

    done = run("top", f"http://{place}/metrics", "--interval", "0.1")

    lines = done.stdout.splitlines()
    (titles,) = [n for n, line in enumerate(lines) if line.startswith("worker")]
    assert [line.split()[0] for line in lines[titles + 1 :]] == ["2", "3", "1", "0"]
    assert lines[titles].split()[1:] == [
        "used", "idle", "waiting", "per", "s", "wait", "p95", "timeouts", "failures",
    ]  # fmt: skip
    assert "used 6, idle 0, opening 0 of 32" in done.stdout


def test_more_pools_than_lines() -> None:
    """A line for each, as many as fit, and how many do not; never more lines than there are."""
    found = pools(parse("".join(written(f"pool {n}") for n in range(30)), 0.0))
    console = Console(width=80, color_system=None)
    for height in range(1, 40):
        drawn = Pools("h", 1.0, found).draw(Frame(80, height, ascii_only=False, everything=False))
        lines = console.render_lines(drawn, pad=False)
        assert len(lines) <= max(height, 2)
    assert "pool 29" in "".join(segment.text for line in lines for segment in line)


def test_a_login_is_sent_and_not_shown(run: Run, endpoint: tuple[Answers, str]) -> None:
    """Nor is a query, which may have a token; the login does not follow a redirect."""
    answers, place = endpoint
    answers.texts = [written()]
    with serving() as (other, elsewhere):
        answers.status, answers.location = 302, f"http://{elsewhere}/metrics"
        other.texts = [written()]

        done = run("top", f"http://me:s%2Fecret@{place}/m?token=abc", "--interval", "0.1")

    assert done.exit_code == 0, done.stderr
    assert "secret" not in done.output
    assert "abc" not in done.output
    assert answers.asked[0] == ("/m?token=abc", f"Basic {base64.b64encode(b'me:s/ecret').decode()}")
    assert {login for _, login in other.asked} == {None}


@pytest.mark.parametrize(
    ("status", "text", "words"),
    [
        (200, "# TYPE up gauge\nup 1\n", "DATABASE_TELEMETRY=metrics"),
        (200, "<html>Hello</html>", "no page of Prometheus metrics"),
        (200, "\x00\xff", "no page of Prometheus metrics"),
        (403, "", "answers 403"),
    ],
)
def test_an_endpoint_without_our_metrics(
    run: Run, endpoint: tuple[Answers, str], status: int, text: str, words: str
) -> None:
    """One sentence that says what to set; exit code 1."""
    answers, place = endpoint
    answers.status, answers.texts = status, [text]

    done = run("top", f"http://me:secret@{place}/metrics")

    assert done.exit_code == 1
    assert words in " ".join(done.stderr.split())
    assert "secret" not in done.output


def test_an_endpoint_that_is_not_there(run: Run, closed_port: int) -> None:
    """The error is told, as JSON too; exit code 1."""
    done = run("top", f"http://127.0.0.1:{closed_port}/metrics", "--json", no_proxy="127.0.0.1")

    assert done.exit_code == 1
    error = json.loads(done.stdout)["error"]
    assert error["type"] == "ExpositionError"
    assert "refused" in error["message"]
    assert "ExpositionError" not in error["message"]


@pytest.mark.parametrize("url", ["http://", "http://h:port/", "https://[::1/", "http://h:99999"])
def test_no_url_of_an_endpoint(run: Run, url: str) -> None:
    """It says how one is given; exit code 2."""
    done = run("top", url)

    assert done.exit_code == 2
    assert "http://host:port/metrics" in done.stderr


def test_no_other_scheme() -> None:
    """A file is none."""
    with pytest.raises(ConfigurationError):
        Endpoint("file:///etc/passwd")


def test_an_endpoint_that_never_ends(
    endpoint: tuple[Answers, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is larger than any exposition is given up."""
    answers, place = endpoint
    answers.texts = [written() * 10]
    monkeypatch.setattr(exposition, "LARGEST", 1000)

    with pytest.raises(ExpositionError, match="too much or too slow"):
        Endpoint(f"http://{place}").read()


def test_an_endpoint_that_is_silent(silent_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for in bounded time."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(exposition, "TIMEOUT", 0.2)

    with pytest.raises(ExpositionError, match="timed out"):
        Endpoint(f"http://127.0.0.1:{silent_port}").read()


async def test_an_endpoint_that_goes_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was seen last is kept with the error; then it goes on."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as (answers, place):
        answers.texts = [written(used=3)]
        feed = Feed(Metrics(Endpoint(f"http://{place}"), 0.01))
        await feed.look()
        answers.status = 503
        await feed.look()
        assert isinstance(feed.error, ExpositionError)
        assert feed.last is not None
        assert feed.last.as_json(everything=False)["pools"][0]["used"] == 3
        answers.status, answers.texts = 200, [written(used=5)]
        await feed.look()

    assert feed.error is None
    assert feed.last.as_json(everything=False)["pools"][0]["used"] == 5


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        env=os.environ | {"no_proxy": "127.0.0.1"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_without_the_parser() -> None:
    """Without prometheus_client: one line with what to install, exit code 2."""
    code = """
import sys
sys.modules["prometheus_client"] = None
from poolkit.cli import main
main()
"""
    done = python(code, "top", "http://127.0.0.1:1/metrics")

    assert done.returncode == 2
    assert "package prometheus_client: pip install" in done.stderr
    assert "'poolkit[prometheus]'" in done.stderr


def test_without_opentelemetry(endpoint: tuple[Answers, str]) -> None:
    """Who watches needs no OpenTelemetry, whatever the service has."""
    answers, place = endpoint
    answers.texts = [written(used=3)]
    code = """
import sys
sys.modules["opentelemetry"] = None
from poolkit.cli import main
main()
"""
    done = python(code, "top", f"http://{place}", "--interval", "0.1")

    assert done.returncode == 0, done.stderr
    assert "used 3" in done.stdout


SERVICE = """
import asyncio, socket, sys
from sqlalchemy import text
from poolkit import ConfigurationError, DatabaseSettings, create_async_engine
from poolkit.errors import PoolTimeout
from poolkit.telemetry.prometheus import start_metrics_server

def serve():
    while True:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        try:
            return port, start_metrics_server(port)
        except ConfigurationError:
            pass  # somebody else was quicker

async def main():
    port, stop = serve()
    engine = create_async_engine(pool_size=2, max_overflow=0, pool_timeout=0.1)
    async with engine.connect() as first, engine.connect():
        try:
            await engine.connect()
        except PoolTimeout:
            print(port, flush=True)
        await asyncio.to_thread(sys.stdin.readline)
    await engine.dispose()
    stop()

asyncio.run(main())
"""


def test_a_real_service(run: Run, server: PostgresServer) -> None:
    """The names are those that the exporter writes: every number is found."""
    pytest.importorskip("opentelemetry.exporter.prometheus")
    environment = {
        "DATABASE_URL": server.url,
        "DATABASE_TELEMETRY": "metrics",
        "DATABASE_POOL_NAME": "shop",
    }
    with subprocess.Popen(
        [sys.executable, "-c", SERVICE],
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as service:
        assert service.stdin is not None
        assert service.stdout is not None
        try:
            port = int(service.stdout.readline())
            done = run("top", f"http://127.0.0.1:{port}", "--json", "--interval", "0.1")
        finally:
            service.stdin.close()

    assert done.exit_code == 0, done.output
    (pool,) = json.loads(done.stdout)["pools"]
    assert (pool["name"], pool["used"], pool["limit"], pool["utilisation"]) == ("shop", 2, 2, 1.0)
    assert pool["timeouts"]["total"] == 1
    assert pool["longest_use"] > 0.1
    assert pool["checkouts"] == 0
