"""Several worker processes, one answer."""

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from io import StringIO
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import text

from poolkit import ConfigurationError
from poolkit.telemetry import families
from poolkit.telemetry.workers import PATIENCE, Workers

SERVING = Path(__file__).with_name("serving.py")
USED = "db_client_connection_count"
ABOUT = {"poolkit_workers", "poolkit_workers_unanswered"}


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short, as a Unix socket's path has to be."""
    with tempfile.TemporaryDirectory(prefix="pk") as made:
        yield Path(made)


@pytest.fixture
def worker(directory: Path) -> Iterator[Callable[..., Workers]]:
    """Makes workers, all of them in this process."""
    made: list[Workers] = []

    def make(local=None, *, join=True, where=directory) -> Workers:
        made.append(Workers(where, local or (lambda: [gauge("up", 1)])))
        if join:
            made[-1].join()
        return made[-1]

    yield make
    for each in made:
        each.leave()


def gauge(name: str, value: float, **labels: str) -> Metric:
    family = Metric(name, "A test's.", "gauge")
    family.add_sample(name, labels, value)
    return family


def values(found: list[Metric], name: str) -> dict[str | None, float]:
    """A metric's values by worker."""
    return {
        sample.labels.get("worker"): sample.value
        for family in found
        for sample in family.samples
        if sample.name == name
    }


class Process:
    """A worker process."""

    def __init__(self, environment: dict[str, str], kind: str = "app") -> None:
        self.popen = subprocess.Popen(
            [sys.executable, str(SERVING), kind],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        told = json.loads(self.popen.stdout.readline())
        self.port, self.number = told["port"], told["number"]

    def get(self, path: str, **headers: str) -> str:
        request = Request(f"http://127.0.0.1:{self.port}{path}", headers=headers)
        with urlopen(request, timeout=20) as response:  # noqa: S310 (ours)
            return response.read().decode()

    def metrics(self) -> list[Metric]:
        return list(text_string_to_metric_families(self.get("/metrics")))

    def all_answer(self) -> None:
        if values(self.metrics(), "poolkit_workers_unanswered") != {None: 0}:
            raise TimeoutError

    def signal(self, which: signal.Signals) -> None:
        self.popen.send_signal(which)

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()
        self.popen.stdout.close()


@pytest.fixture
def start(directory, server) -> Iterator[Callable[..., Process]]:
    """Starts worker processes of one service on a database."""
    with ExitStack() as stack:

        def start_one(kind: str = "app", **more: str) -> Process:
            environment = {
                "DATABASE_URL": f"{server.url}?application_name=workers",
                "PROMETHEUS_MULTIPROC_DIR": str(directory),
            }
            process = Process(environment | more, kind)
            stack.callback(process.kill)
            return process

        yield start_one


async def backends(engine) -> int:
    asked = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'workers'"
    async with engine.connect() as connection:
        return await connection.scalar(text(asked))


async def test_the_sum_over_the_workers_is_the_truth(start, engine) -> None:
    """Whichever is asked reports all, and the server sees as many connections."""
    one, two = start(), start()
    one.get("/hold?n=2")
    two.get("/hold?n=3")

    for asked in (one, two):
        found = [
            (sample.labels["worker"], sample.labels["db_client_connection_state"], sample.value)
            for family in asked.metrics()
            for sample in family.samples
            if sample.name == USED
        ]
        assert sorted(found) == [
            ("0", "idle", 0),
            ("0", "used", 2),
            ("1", "idle", 0),
            ("1", "used", 3),
        ]
    assert await backends(engine) == 5


def test_the_exposition_is_valid(start) -> None:
    """Each family once, each sample of one worker, in both formats; promtool agrees."""
    one, _ = start(), start()

    plain = one.get("/metrics")
    found = list(text_string_to_metric_families(plain))
    names = [family.name for family in found]
    assert sorted(set(names)) == sorted(names)
    assert {s.labels.get("worker") for f in found if f.name not in ABOUT for s in f.samples} == {
        "0",
        "1",
    }
    accepted = one.get("/metrics", Accept="application/openmetrics-text; version=1.0.0")
    again = list(openmetrics.text_fd_to_metric_families(StringIO(accepted)))
    assert {s.name for f in again for s in f.samples} == {s.name for f in found for s in f.samples}
    if promtool := shutil.which("promtool"):
        done = subprocess.run(
            [promtool, "check", "metrics"], input=plain, capture_output=True, text=True, check=False
        )
        complaints = [line for line in done.stderr.splitlines() if not line.startswith(USED)]
        assert complaints == []


def test_a_dead_worker_leaves_nothing_behind(start, directory) -> None:
    """The others go on without it, and the next one gets its number."""
    one, two = start(), start()
    assert (one.number, two.number) == (0, 1)
    one.kill()

    found = two.metrics()

    assert values(found, "poolkit_workers") == {None: 1}
    assert values(found, "poolkit_workers_unanswered") == {None: 0}
    assert not (directory / "worker-0.sock").exists()
    assert start().number == 0
    assert values(two.metrics(), "poolkit_workers") == {None: 2}


def test_a_hanging_worker_costs_no_more_than_the_bound(start) -> None:
    """It is left out and counted, and comes back."""
    one, two = start(), start()
    two.signal(signal.SIGSTOP)
    try:
        started = time.monotonic()
        found = one.metrics()
        took = time.monotonic() - started
    finally:
        two.signal(signal.SIGCONT)

    assert values(found, "poolkit_workers_unanswered") == {None: 1}
    assert PATIENCE <= took < PATIENCE + 2
    eventually(one.all_answer)


def test_a_blocked_event_loop_does_not_hide_a_worker(start) -> None:
    """The thread answers for it."""
    one, two = start(), start()
    two.get("/block?s=5")

    assert values(one.metrics(), "poolkit_workers") == {None: 2}


def test_one_of_the_workers_serves_the_port(start, unused_port) -> None:
    """The first that comes; when it is gone, the next."""
    one, two = (start("server", METRICS_PORT=str(unused_port)) for _ in range(2))
    assert values(scrape(unused_port), "poolkit_workers") == {None: 2}

    one.kill()

    assert values(eventually(lambda: scrape(unused_port)), "poolkit_workers") == {None: 1}
    two.kill()
    with pytest.raises(OSError, match="refused"):
        scrape(unused_port)


@pytest.fixture
def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def scrape(port: int) -> list[Metric]:
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as response:
        return list(text_string_to_metric_families(response.read().decode()))


def eventually(what, patience: float = 20):
    end = time.monotonic() + patience
    while True:
        try:
            return what()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


PRELOADED = """
import json, os, threading
threads = []
os.register_at_fork(before=lambda: threads.append(threading.active_count()))
from prometheus_client import REGISTRY
from poolkit.telemetry import prometheus
prometheus.metrics_app()
members = prometheus._members()
made = members.number
down, up = os.pipe(), os.pipe()
for _ in range(2):
    if not os.fork():
        os.write(up[1], b"%d" % members.number)
        os.read(down[0], 1)
        os._exit(0)
numbers = sorted(os.read(up[0], 1).decode() for _ in range(2))
found = {s.name: s.value for f in members.collect() for s in f.samples if not s.labels}
print(json.dumps([made, members.number, numbers, threads, found]))
os.write(down[1], b"..")
for _ in range(2):
    os.wait()
"""


def test_forked_workers_each_have_their_own_number(directory) -> None:
    """As under gunicorn --preload: the one that forks is none itself, and forks with no thread."""
    done = run(PRELOADED, PROMETHEUS_MULTIPROC_DIR=str(directory))

    before, after, numbers, threads, found = json.loads(done.stdout)
    assert (before, after) == (0, None)
    assert numbers in (["0", "1"], ["1", "2"])  # the parent gives 0 back while the first starts
    assert threads == [1, 1]
    assert found == {"poolkit_workers": 2, "poolkit_workers_unanswered": 0}


FORKS_WHILE_SERVING = """
import asyncio, os
from poolkit.telemetry import prometheus
prometheus.metrics_app()
members = prometheus._members()
async def main():
    pid = os.fork()
    if not pid:
        os._exit(0 if members.number == 1 else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert members.number == 0
asyncio.run(main())
"""


def test_a_worker_that_forks_stays_one(directory) -> None:
    """Whoever has an event loop serves; its child is another worker."""
    run(FORKS_WHILE_SERVING, PROMETHEUS_MULTIPROC_DIR=str(directory))


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another")
def test_started_as_root_the_workers_answer_as_the_directorys_owner(directory) -> None:
    """What root made before it gave its rights up belongs to the user of the workers."""
    os.chown(directory, 65534, 65534)
    members = Workers(directory, lambda: [gauge("up", 1)])
    members.join()

    owners = {path.name: path.stat().st_uid for path in directory.iterdir()}

    members.leave()
    assert owners == {"worker-0.lock": 65534, "worker-0.sock": 65534}


def test_nobody_else_may_ask(worker, directory) -> None:
    """The socket is its owner's alone, from before it listens."""
    worker()

    assert (directory / "worker-0.sock").stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_another_users_socket_is_not_asked(worker, directory) -> None:
    """Whoever may write to the directory cannot put numbers into our mouth."""
    one, _ = worker(), worker(lambda: [gauge("up", 99)])
    os.chown(directory / "worker-1.sock", 65534, 65534)

    found = one.collect()

    assert values(found, "up") == {"0": 1}
    assert values(found, "poolkit_workers_unanswered") == {None: 1}


def test_numbers_are_the_lowest_that_are_free(worker) -> None:
    """A number that was given back is taken first."""
    first, second, third = worker(), worker(), worker()
    assert [first.number, second.number, third.number] == [0, 1, 2]

    second.leave()

    assert second.number is None
    assert worker().number == 1


def test_a_number_is_not_given_twice_though_its_lock_was_removed(worker, directory) -> None:
    """As by something that tidies up temporary directories."""
    worker()
    (directory / "worker-0.lock").unlink()

    assert worker().number == 1


def test_each_sample_says_whose_it_is(worker) -> None:
    """A label of that name that it had already is kept under another, as Prometheus does it."""
    one = worker(lambda: [gauge("jobs", 1, worker="mine")])
    worker(lambda: [gauge("jobs", 2)])

    [jobs] = [family for family in one.collect() if family.name == "jobs"]

    assert [sample.labels for sample in jobs.samples] == [
        {"worker": "0", "exported_worker": "mine"},
        {"worker": "1"},
    ]


def test_a_worker_whose_collector_fails_is_counted(worker, caplog) -> None:
    """Its own log says why."""

    def fail():
        raise KeyError("x")

    one, _ = worker(), worker(fail)

    found = one.collect()

    assert values(found, "up") == {"0": 1}
    assert values(found, "poolkit_workers_unanswered") == {None: 1}
    assert "could not be collected" in caplog.text


def test_one_that_stops_listening_does_not_stop_the_answers(worker, directory) -> None:
    """Whoever asks and does not read costs a second, once."""
    big = Metric("up", "A mebibyte of help." + "!" * 2**20, "gauge")
    big.add_sample("up", {}, 1)
    one, _ = worker(), worker(lambda: [big])
    with socket.socket(socket.AF_UNIX) as rude:
        rude.connect(str(directory / "worker-1.sock"))
        one.collect()  # may come to nothing, as the other is at it

        assert values(one.collect(), "up") == {"0": 1, "1": 1}


def test_they_are_asked_at_the_same_time(worker) -> None:
    """Three that take most of the bound take it once."""
    together = threading.Barrier(3, timeout=PATIENCE)

    def slow():
        together.wait()
        return [gauge("up", 1)]

    one = worker()
    for _ in range(3):
        worker(slow)

    assert values(one.collect(), "up") == {"0": 1, "1": 1, "2": 1, "3": 1}


def test_a_directory_that_is_too_long_is_refused(worker, directory) -> None:
    """The kernel's limit, said before it says it."""
    with pytest.raises(ConfigurationError, match=r"PROMETHEUS_MULTIPROC_DIR=.* bytes too long"):
        worker(where=directory / ("x" * 100))


def test_a_directory_that_cannot_be_is_refused(worker, directory) -> None:
    """One below a file."""
    (directory / "file").touch()
    with pytest.raises(ConfigurationError, match="is no directory"):
        worker(where=directory / "file" / "metrics")


def test_the_directory_is_made_for_us_alone(worker, directory) -> None:
    """One that is not there yet."""
    worker(where=directory / "metrics")

    assert (directory / "metrics").stat().st_mode & 0o777 == 0o700


def test_what_a_worker_sends_arrives_whole() -> None:
    """Types, units, help, exemplars; and a part of it is no answer."""
    registry = CollectorRegistry()
    Counter("jobs", "Jobs.", ["kind"], registry=registry).labels('a "b"\n').inc(3, {"trace": "1"})
    Histogram("took", "Time.", unit="seconds", registry=registry).observe(0.2)
    Gauge("odd", "Odd.", registry=registry).set(float("inf"))
    sent = families.encode(registry.collect())

    assert families.decode(sent) == list(registry.collect())
    for bad in (sent[:-9], b"", b"[1]", b'[["a"]]', b"{}x"):
        with pytest.raises(ValueError):
            families.decode(bad)


def test_a_name_of_two_types_is_one_family(caplog) -> None:
    """The first is kept, and the log names the other."""
    counter = Metric("jobs", "Jobs.", "counter")

    with caplog.at_level(logging.WARNING):
        [jobs] = families.merge([({}, [gauge("jobs", 1), counter])])

    assert jobs.type == "gauge"
    assert "jobs is both a gauge and a counter" in caplog.text
