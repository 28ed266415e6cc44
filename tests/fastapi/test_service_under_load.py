"""A service under load and under faults: statuses, rows and the server's sessions agree."""

import asyncio
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest

from poolkit.testing import FaultProxy, PostgresServer, postgres

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from load import LEFT, LOST, REFUSED, Answer, Clients, Request, outcomes  # noqa: E402

RUNNING = re.compile(r"Uvicorn running on http://127\.0\.0\.1:(\d+)")
BOUND = 15.0
"""Seconds in which everything is over that should take one or two."""
PIECES, STREAMS = 8, 20  # the service's


class Database:
    """The service's, looked at past the service."""

    def __init__(self, server: PostgresServer) -> None:
        name = f"service_{uuid4().hex[:12]}"
        self.server = server
        self.application = name
        self.url = server.create_database(name)

    async def fetch(self, query: str, *arguments: object, url: str | None = None) -> list[tuple]:
        connection = await asyncpg.connect(url or self.url, timeout=BOUND)
        try:
            return [tuple(row) for row in await connection.fetch(query, *arguments)]
        finally:
            await connection.close(timeout=BOUND)

    async def rows(self, part: str = "request") -> Counter[int]:
        """How often each row is there."""
        query = "SELECT id, count(*) FROM written WHERE part = $1 GROUP BY id"
        return Counter(dict(await self.fetch(query, part)))

    async def sessions(self) -> Counter[str]:
        """The service's sessions, by state."""
        query = "SELECT state FROM pg_stat_activity WHERE application_name = $1"
        found = await self.fetch(query, self.application, url=self.server.url)
        return Counter(state for (state,) in found)


class Service:
    """``uvicorn service:app``, in a process of its own."""

    def __init__(self, database: Database, url: str, *options: str, **settings: object) -> None:
        self.database = database
        self._popen = subprocess.Popen(
            [
                *(sys.executable, "-m", "uvicorn", "service:app", "--app-dir", str(HERE)),
                *("--host", "127.0.0.1", "--port", "0", "--no-access-log", *options),
            ],
            env=os.environ
            | {"DATABASE_URL": url, "DATABASE_APPLICATION_NAME": database.application}
            | {f"DATABASE_{name.upper()}": str(value) for name, value in settings.items()},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log: list[str] = []
        self.clients = Clients(self._wait_until_it_runs())
        self._reader = threading.Thread(target=self._read_on)
        self._reader.start()

    def terminate(self) -> None:
        self._popen.send_signal(signal.SIGTERM)

    async def ended(self) -> int:
        """Its exit status, once all of its log is there."""
        status = await asyncio.to_thread(self._popen.wait, BOUND)
        await asyncio.to_thread(self._reader.join)
        return status

    def kill(self) -> None:
        self.clients.close()
        self._popen.kill()
        self._popen.wait()
        self._reader.join()

    async def stats(self) -> dict[str, int]:
        return (await self.clients.get("/stats")).json()

    async def leaves_nothing_behind(self) -> None:
        """All connections are back, and the server agrees: as many sessions, each of them idle."""
        async with asyncio.timeout(BOUND):
            while not await self._is_at_rest():
                await asyncio.sleep(0.02)

    async def _is_at_rest(self) -> bool:
        stats = await self.stats()
        idle = stats.pop("idle")
        return not any(stats.values()) and await self.database.sessions() == Counter(idle=idle)

    def _wait_until_it_runs(self) -> int:
        for line in self._popen.stderr:
            self.log.append(line)
            if found := RUNNING.search(line):
                return int(found[1])
        raise RuntimeError("".join(self.log))

    def _read_on(self) -> None:
        with self._popen.stderr:
            self.log.extend(self._popen.stderr)


Start = Callable[..., Awaitable[Service]]


@pytest.fixture
async def start(server: PostgresServer) -> AsyncIterator[Start]:
    """Starts services, each on a database of its own."""
    async with AsyncExitStack() as stack:

        async def start_one(
            *options: str,
            on: PostgresServer = server,
            through: FaultProxy | None = None,
            **settings,
        ) -> Service:
            database = await asyncio.to_thread(Database, on)
            await _create(database)
            url = database.url
            if through is not None:
                url = url.replace(f":{on.port}/", f":{through.port}/")
            service = await asyncio.to_thread(Service, database, url, *options, **settings)
            stack.push_async_callback(asyncio.to_thread, service.kill)
            return service

        yield start_one


async def _create(database: Database) -> None:
    connection = await asyncpg.connect(database.url, timeout=BOUND)
    await connection.execute(SCHEMA)
    await connection.close()


SCHEMA = """
CREATE TABLE written (id bigint NOT NULL, part text NOT NULL DEFAULT 'request');
CREATE TABLE parents (id bigint PRIMARY KEY);
CREATE TABLE children (
    id bigint NOT NULL, parent bigint REFERENCES parents DEFERRABLE INITIALLY DEFERRED
);
"""

numbers = itertools.count(1)


def writing(path: str = "/rows/{row}", **more) -> Request:
    """A request that writes a new row."""
    row = next(numbers)
    return Request(method="POST", path=path.format(row=row), row=row, **more)


def disagreements(answers: Iterable[Answer], rows: Counter[int]) -> dict[str, list[int]]:
    """Rows that contradict what the clients were told; a lost connection tells them nothing."""
    found: dict[str, list[int]] = {"lost": [], "undead": [], "unknown": []}
    for answer in answers:
        row = answer.request.row
        if answer.status == 200 and rows[row] != 1:
            found["lost"].append(row)
        elif answer.status not in {200, None} and rows[row]:
            found["unknown" if is_unknown(answer) else "undead"].append(row)
    return found


def is_unknown(answer: Answer) -> bool:
    """Whether the service says that nobody can tell."""
    return answer.json().get("outcome") == "unknown"


AGREED = {"lost": [], "undead": [], "unknown": []}


async def test_an_exhausted_pool_is_503_for_those_who_waited_in_vain(start: Start) -> None:
    """Two connections, thirty clients: as many as there is time for are served, and then all."""
    service = await start(pool_size=2, max_overflow=0, pool_timeout=0.5)

    answers = await service.clients.at_once(writing("/rows/{row}?work=0.2") for _ in range(30))

    found = outcomes(answers)
    assert found.keys() == {200, 503}
    assert 2 <= found[200] <= 12
    for late in (answer for answer in answers if answer.status == 503):
        assert late.headers["content-type"] == "application/problem+json"
        assert int(late.headers["retry-after"]) >= 1
        assert late.json()["status"] == 503
        assert 0.4 <= late.took < 5
    again = await service.clients.at_once(writing() for _ in range(4))
    assert outcomes(again) == {200: 4}
    assert disagreements([*answers, *again], await service.database.rows()) == AGREED
    await service.leaves_nothing_behind()


async def test_streams_and_background_tasks_hold_no_connection(start: Start) -> None:
    """Twenty answers are under way at once on a pool of two, and each writes its two rows."""
    service = await start(pool_size=2, max_overflow=0, pool_timeout=5)

    answers = await service.clients.at_once(
        writing("/streams/{row}", pause=0.02) for _ in range(STREAMS)
    )

    assert outcomes(answers) == {200: STREAMS}
    assert {len(answer.body) for answer in answers} == {PIECES * 4096}
    assert disagreements(answers, await service.database.rows()) == AGREED
    await service.leaves_nothing_behind()
    assert await service.database.rows("background") == await service.database.rows()


@pytest.mark.parametrize("path", ["/rows/{row}?work=0.5", "/core/{row}?work=0.5"])
async def test_what_a_client_that_left_asked_for_is_not_committed(start: Start, path: str) -> None:
    """Half of them leave, at the database or in line; the others are served."""
    service = await start(pool_size=4, max_overflow=0, pool_timeout=10, statement_timeout=5)

    answers = await service.clients.at_once(
        writing(path, leave_after=0.2 if turn % 2 else None) for turn in range(16)
    )

    assert outcomes(answers) == {200: 8, LEFT: 8}
    await service.leaves_nothing_behind()
    rows = await service.database.rows()
    assert disagreements(answers, rows) == AGREED
    assert [a.request.row for a in answers if a.outcome == LEFT and rows[a.request.row]] == []


async def test_an_abandoned_statement_ends_with_its_timeout(start: Start) -> None:
    """A client that waits is told 504; nothing goes on for one that left."""
    service = await start(pool_size=4, max_overflow=0, statement_timeout=1)

    answers = await service.clients.at_once(
        writing("/rows/{row}?work=60", leave_after=0.2 if turn % 2 else None) for turn in range(4)
    )

    assert outcomes(answers) == {504: 2, LEFT: 2}
    await service.leaves_nothing_behind()
    assert await service.database.rows() == {}


FAILING = ("/orphans/{row}", "/swallowed/{row}", "/swallowed-core/{row}")


async def test_a_failed_commit_is_never_a_200(start: Start) -> None:
    """Neither a deferred constraint nor a transaction that the program went on with."""
    service = await start(pool_size=3, max_overflow=0)

    answers = await service.clients.at_once(
        writing(path) for path in (*FAILING, "/rows/{row}") for _ in range(10)
    )

    assert {a.status // 100 for a in answers if "/rows/" not in a.request.path} == {5}
    assert outcomes(answers)[200] == 10
    assert disagreements(answers, await service.database.rows()) == AGREED
    assert await service.database.fetch("SELECT id FROM children") == []
    await service.leaves_nothing_behind()


async def test_an_exception_after_a_write_undoes_it(start: Start) -> None:
    """An answer by exception is given as it is, a bug is a 500."""
    service = await start(pool_size=3, max_overflow=0)

    answers = await service.clients.at_once(
        writing(path)
        for path in ("/refused/{row}", "/broken/{row}", "/rows/{row}")
        for _ in range(10)
    )

    assert outcomes(answers) == {409: 10, 500: 10, 200: 10}
    assert disagreements(answers, await service.database.rows()) == AGREED
    await service.leaves_nothing_behind()


@pytest.fixture(scope="module")
def own_server() -> Iterator[PostgresServer]:
    """One that may be stopped."""
    with postgres() as running:
        yield running


@contextmanager
def until_told() -> Iterator[tuple[Iterator[Request], list[bool]]]:
    """Requests without end, until something stands in the list."""
    told: list[bool] = []

    def requests() -> Iterator[Request]:
        while not told:
            yield writing("/rows/{row}?work=0.01")

    try:
        yield requests(), told
    finally:
        told.append(True)


async def enough(database: Database, more: int) -> None:
    """Until so many more rows are there."""
    before = len(await database.rows())
    async with asyncio.timeout(BOUND):
        while len(await database.rows()) < before + more:
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_a_restart_of_the_server_is_5xx_and_over(
    start: Start, own_server: PostgresServer, mode: str
) -> None:
    """What was served has its row, what was not has none, or nobody can tell and it says so."""
    service = await start(on=own_server, pool_size=5, max_overflow=0, pool_timeout=1)
    database = service.database

    with until_told() as (requests, told):
        load = asyncio.create_task(service.clients.steadily(requests, clients=10))
        await enough(database, 50)
        await asyncio.to_thread(own_server.restart, mode)
        await enough(database, 50)  # bounded: it is back
        told.append(True)
        answers = await load

    assert outcomes(answers).keys() <= {200, 500, 503}
    found = disagreements(answers, await database.rows())
    assert found == AGREED | {"unknown": found["unknown"]}
    assert len(found["unknown"]) <= 5  # no more than there were connections
    last = sorted(answers, key=lambda answer: answer.ended)[-20:]
    assert outcomes(last) == {200: 20}
    await service.leaves_nothing_behind()


@pytest.mark.parametrize(("when", "there"), [("before", 0), ("after", 1)])
async def test_a_commit_whose_answer_is_lost_is_no_200(
    start: Start, server: PostgresServer, when: str, there: int
) -> None:
    """Whether it was done or not, and the answer says that nobody knows."""
    async with FaultProxy(server) as proxy:
        service = await start(through=proxy, pool_size=2, max_overflow=0)
        cut = proxy.cut(**{when: "COMMIT"})

        lost = await service.clients.one(writing())

        assert cut.happened
        assert lost.status >= 500
        assert is_unknown(lost)
        assert (await service.database.rows())[lost.request.row] == there
        again = await service.clients.at_once(writing() for _ in range(4))
        assert outcomes(again) == {200: 4}
        await service.leaves_nothing_behind()


async def test_sigterm_finishes_what_is_under_way(start: Start) -> None:
    """Those are served, the others find nobody, and no session is left at the server."""
    service = await start(pool_size=5, max_overflow=0)
    database = service.database

    with until_told() as (requests, told):
        load = asyncio.create_task(service.clients.steadily(requests, clients=10))
        await enough(database, 50)
        long = asyncio.create_task(service.clients.one(writing("/rows/{row}?work=1")))
        await at_the_database(database)
        service.terminate()
        status = await service.ended()
        told.append(True)
        answers = [*await load, await long]

    assert_ended_in_order(service, status)
    assert answers[-1].status == 200
    assert outcomes(answers).keys() <= {200, REFUSED, LOST}
    rows = await database.rows()
    assert disagreements(answers, rows) == AGREED
    # Sent into a connection that was just being closed: nobody read it.
    assert [a.request.row for a in answers if a.outcome == LOST and rows[a.request.row]] == []
    await has_no_session(database)


async def test_sigterm_does_not_wait_longer_than_it_was_told(start: Start) -> None:
    """A request that takes too long is given up and undone."""
    service = await start("--timeout-graceful-shutdown", "1", pool_size=2, statement_timeout=60)
    long = asyncio.create_task(service.clients.one(writing("/rows/{row}?work=50")))
    await at_the_database(service.database)

    service.terminate()
    status = await service.ended()

    assert_ended_in_order(service, status)
    assert (await long).status != 200
    await has_no_session(service.database)
    assert await service.database.rows() == {}


async def at_the_database(database: Database) -> None:
    """Until a statement of the service is one that takes long."""
    query = (
        "SELECT 1 FROM pg_stat_activity WHERE application_name = $1 AND state = 'active'"
        " AND clock_timestamp() - query_start > interval '0.2 s'"
    )
    async with asyncio.timeout(BOUND):
        while not await database.fetch(query, database.application, url=database.server.url):
            await asyncio.sleep(0.02)


def assert_ended_in_order(service: Service, status: int) -> None:
    assert status in {0, -signal.SIGTERM}  # uvicorn ends by the signal that it was sent
    assert any("Application shutdown complete" in line for line in service.log)
    assert not any("Warning" in line for line in service.log)


async def has_no_session(database: Database) -> None:
    async with asyncio.timeout(BOUND):
        while await database.sessions():
            await asyncio.sleep(0.02)


async def test_health_does_not_stand_in_line(start: Start) -> None:
    """With every connection taken for long it answers at once, and that it is ready."""
    service = await start(pool_size=2, max_overflow=0, pool_timeout=10)
    async with asyncio.TaskGroup() as group:
        sleep = Request(path="/sleep?seconds=1")
        sleepers = group.create_task(service.clients.at_once([sleep] * 6))
        async with asyncio.timeout(BOUND):
            while (await service.stats())["waiting"] < 4:
                await asyncio.sleep(0.01)

        ready = [await service.clients.get("/health/ready") for _ in range(10)]
        live = await service.clients.get("/health/live")

        assert (await service.stats())["waiting"] >= 2
    assert outcomes([*ready, live]) == {200: 11}
    assert max(answer.took for answer in ready) < 1
    assert outcomes(await sleepers) == {200: 6}
    await service.leaves_nothing_behind()


async def test_health_says_when_the_database_is_down(
    start: Start, own_server: PostgresServer
) -> None:
    """Not ready within a bound, alive all the while, ready again when it is back."""
    service = await start(on=own_server, pool_size=2, max_overflow=0)
    assert (await service.clients.get("/health/ready")).status == 200

    await asyncio.to_thread(own_server.stop)
    try:
        await until_ready_is(503, service)
        live = await service.clients.get("/health/live")
    finally:
        await asyncio.to_thread(own_server.start)

    assert live.status == 200
    await until_ready_is(200, service)
    await service.leaves_nothing_behind()


async def until_ready_is(status: int, service: Service) -> None:
    """An answer may be a quarter of a second old."""
    async with asyncio.timeout(BOUND):
        while (await service.clients.get("/health/ready")).status != status:
            await asyncio.sleep(0.05)
