"""Behind a real PgBouncer, in both pool modes, with what it refuses and with what it takes."""

import asyncio
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import text

from poolkit import ConfigurationError, ConnectionOpened, StartupParameterRefused, StatementTimeout

SLACK = 5.0
LIMIT = text("SHOW statement_timeout")


def pgbouncer() -> str:
    found = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("pgbouncer is not installed, and CI must have it")
        pytest.skip("pgbouncer is not installed")
    return found


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextmanager
def running(server, directory: Path, mode: str, *, takes_all: bool) -> Iterator[str]:
    """A PgBouncer in front of the server; gives the URL through it."""
    directory.chmod(0o755)
    port = free_port()
    (directory / "users.txt").write_text(f'"{server.user}" "{server.password}"\n')
    ignored = "statement_timeout,lock_timeout,search_path,options" if takes_all else ""
    (directory / "pgbouncer.ini").write_text(
        f"""[databases]
* = host=127.0.0.1 port={server.port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = plain
auth_file = {directory}/users.txt
pool_mode = {mode}
default_pool_size = {3 if mode == "transaction" else 20}
ignore_startup_parameters = {ignored}
"""
    )
    log = directory / "log"
    as_nobody = ["-u", "nobody"] if os.geteuid() == 0 else []
    with log.open("w") as output:
        process = subprocess.Popen(
            [pgbouncer(), *as_nobody, str(directory / "pgbouncer.ini")],
            stdout=output,
            stderr=output,
        )
    try:
        wait_for(port, process, log)
        yield server.url.replace(f":{server.port}/", f":{port}/")
    finally:
        process.terminate()
        process.wait(10)


def wait_for(port: int, process: subprocess.Popen, log: Path) -> None:
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if process.poll() is not None:
            break
        time.sleep(0.05)
    pytest.fail(f"pgbouncer did not start: {log.read_text()}")


@pytest.fixture(scope="module")
def open_directory(tmp_path_factory) -> Path:
    """A directory that PgBouncer, not being root, can reach."""
    path = tmp_path_factory.mktemp("pgbouncer")
    for parent in (path, *path.parents):
        if parent.stat().st_uid == os.geteuid() and parent.stat().st_mode & 0o077 == 0:
            parent.chmod(0o711)
    return path


@pytest.fixture(scope="module", params=["refusing", "ignoring"])
def transaction_pooler(request, server, open_directory) -> Iterator[str]:
    """PgBouncer in transaction mode, refusing our start-up parameters or ignoring them."""
    directory = open_directory / request.param
    directory.mkdir()
    with running(server, directory, "transaction", takes_all=request.param == "ignoring") as url:
        yield url


@pytest.fixture(scope="module")
def session_pooler(server, open_directory) -> Iterator[str]:
    """PgBouncer in session mode."""
    directory = open_directory / "session"
    directory.mkdir()
    with running(server, directory, "session", takes_all=False) as url:
        yield url


@pytest.fixture(params=["auto", "transaction"])
def engine(request, make_engine, transaction_pooler):
    """An engine behind the transaction pooler, told so or not."""
    return make_engine(
        settings={"url": transaction_pooler, "pooler": request.param, "lock_timeout": 2},
        server_settings={"search_path": '"$user", app, public'},
    )


class TestTransactionMode:
    """Each transaction may run on another server connection."""

    async def test_every_transaction_has_its_limits(self, engine) -> None:
        """400 transactions of 20 tasks on 3 server connections: own results, own settings."""
        query = text(
            "SELECT CAST(:n AS int), current_setting('statement_timeout'),"
            " current_setting('lock_timeout'), current_setting('search_path')"
        )

        async def work(number: int) -> set[tuple]:
            seen = set()
            for _ in range(20):
                async with engine.connect() as connection:
                    seen.add(tuple((await connection.execute(query, {"n": number})).one()))
                    await connection.commit()
            return seen

        found = await asyncio.gather(*(work(number) for number in range(20)))
        expected = ("10s", "2s", '"$user", app, public')
        assert [{(row[0], *row[1:]) for row in rows} for rows in found] == [
            {(number, *expected)} for number in range(20)
        ]

    async def test_no_statement_is_left_behind(self, engine) -> None:
        """Statements are unnamed: none stays prepared at the server."""
        async with engine.connect() as connection:
            for number in range(20):
                await connection.execute(text(f"SELECT {number}, CAST(:x AS int)"), {"x": number})
            count = "SELECT count(*) FROM pg_prepared_statements"
            assert (await connection.execute(text(count))).scalar() == 0

    async def test_nothing_leaks_to_other_clients(self, engine, server, make_engine) -> None:
        """SET LOCAL ends with the transaction: a server connection is given back as it was."""
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
            pid = (await connection.execute(text("SELECT pg_backend_pid()"))).scalar()
            raw = (await connection.get_raw_connection()).driver_connection
            await connection.commit()
            after = [await raw.fetchrow("SELECT pg_backend_pid(), current_setting('lock_timeout')")]
        assert pid is not None
        assert {row[1] for row in after} == {"0"}

    async def test_own_limits(self, engine) -> None:
        """execution_options(statement_timeout=...) works as on a direct connection."""
        async with engine.connect() as connection:
            for limit, shown in ((3, "3s"), (30, "30s"), (0, "0")):
                options = {"statement_timeout": limit}
                found = await connection.execute(LIMIT, execution_options=options)
                assert found.scalar() == shown
            assert (await connection.execute(LIMIT)).scalar() == "10s"
            with pytest.raises(StatementTimeout) as caught:
                await connection.execute(
                    text("SELECT pg_sleep(60)"), execution_options={"statement_timeout": 0.2}
                )
        assert caught.value.sqlstate == "57014"

    async def test_the_pooler_is_found(self, make_engine, transaction_pooler) -> None:
        """`auto` says what it found, and the second connect does not look again."""
        events: list[ConnectionOpened] = []
        engine = make_engine(settings={"url": transaction_pooler}, observers=[events.append])
        async with engine.connect() as one, engine.connect() as two:
            await one.execute(text("SELECT 1"))
            await two.execute(text("SELECT 1"))
        opened = [event for event in events if isinstance(event, ConnectionOpened)]
        assert [event.pooler for event in opened] == ["transaction"] * 2
        assert opened[0].attempts > opened[1].attempts

    async def test_autocommit(self, make_engine, transaction_pooler) -> None:
        """AUTOCOMMIT works; the client enforces the limit, for a SET would reach strangers."""
        engine = make_engine(settings={"url": transaction_pooler})
        async with engine.connect() as plain:
            connection = await plain.execution_options(isolation_level="AUTOCOMMIT")
            for number in range(20):
                query = text("SELECT CAST(:n AS int)")
                assert (await connection.execute(query, {"n": number})).scalar() == number
            started = time.perf_counter()
            with pytest.raises(StatementTimeout):
                await connection.execute(
                    text("SELECT pg_sleep(60)"), execution_options={"statement_timeout": 0.2}
                )
            assert time.perf_counter() - started < SLACK

    async def test_autocommit_refuses_what_it_would_drop(self, engine) -> None:
        """A lock timeout or a search path cannot hold outside a transaction: an error, not silence."""
        async with engine.connect() as plain:
            connection = await plain.execution_options(isolation_level="AUTOCOMMIT")
            with pytest.raises(ConfigurationError, match="lock_timeout, search_path"):
                await connection.execute(text("SELECT 1"))

    async def test_wanted_caches_are_refused_once_it_is_found(
        self, make_engine, transaction_pooler
    ) -> None:
        """Caches that the caller asked for are not switched off in silence."""
        for wish in ({"statement_cache_size": 50}, {"prepared_statement_name_func": lambda: "x"}):
            engine = make_engine(settings={"url": transaction_pooler}, connect_args=wish)
            with pytest.raises(ConfigurationError, match="pooler in transaction mode"):
                await engine.connect()


class TestSessionMode:
    """One server connection for the session: caches on, settings by SET."""

    async def test_settings_and_caches(self, make_engine, session_pooler) -> None:
        """The timeouts hold for the session, AUTOCOMMIT included, and statements are kept."""
        engine = make_engine(
            settings={"url": session_pooler, "pooler": "session", "lock_timeout": 2}
        )
        async with engine.connect() as plain:
            connection = await plain.execution_options(isolation_level="AUTOCOMMIT")
            assert (await connection.execute(LIMIT)).scalar() == "10s"
            assert (await connection.execute(text("SHOW lock_timeout"))).scalar() == "2s"
            kept = "SELECT count(*) FROM pg_prepared_statements"
            assert (await connection.execute(text(kept))).scalar() > 0

    async def test_auto_takes_it_for_transaction_mode(self, make_engine, session_pooler) -> None:
        """From outside they look alike; the careful profile works on both."""
        events: list[ConnectionOpened] = []
        engine = make_engine(settings={"url": session_pooler}, observers=[events.append])
        async with engine.connect() as connection:
            assert (await connection.execute(LIMIT)).scalar() == "10s"
        assert events[0].pooler == "transaction"


async def test_told_that_there_is_none(make_engine, server, open_directory) -> None:
    """pooler=none behind a pooler that refuses: a typed error that names the variable."""
    directory = open_directory / "none"
    directory.mkdir()
    with running(server, directory, "transaction", takes_all=False) as url:
        engine = make_engine(settings={"url": url, "pooler": "none"})
        with pytest.raises(StartupParameterRefused, match="DATABASE_POOLER") as caught:
            await engine.connect()
    assert caught.value.sqlstate == "08P01"
