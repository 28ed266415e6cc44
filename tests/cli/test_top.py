"""`poolkit top` of a server: its sessions, on real PostgreSQL, in a pipe and on a terminal."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from rich.console import Console
from typer.testing import Result

from poolkit import DatabaseSettings
from poolkit.cli.top.activity import Activity, Lock, Session
from poolkit.cli.top.activity_view import Sessions
from poolkit.cli.top.live import Feed, View
from poolkit.cli.top.masking import masked, plain
from poolkit.cli.top.pictures import age
from poolkit.cli.top.server import Server
from poolkit.testing import PostgresServer, PostgresServerError, postgres

Run = Callable[..., Result]
Connect = Callable[..., Awaitable[asyncpg.Connection]]

STANDING = 1.2
"""Seconds that sessions are given to become what is called long."""

BOUND = 20.0


@pytest.fixture(scope="module", params=[None, 15, 18], ids=["default", "pg15", "pg18"])
def major(request: pytest.FixtureRequest) -> Iterator[PostgresServer]:
    try:
        context = postgres(**({} if request.param is None else {"version": request.param}))
        running = context.__enter__()
    except PostgresServerError as error:
        pytest.skip(str(error))
    yield running
    context.__exit__(None, None, None)


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Plain connections under a name of their own."""
    async with AsyncExitStack() as stack:

        async def make(server: PostgresServer, name: str, url: str | None = None) -> Any:
            connection = await asyncpg.connect(
                url or server.url, server_settings={"application_name": name}
            )
            stack.callback(connection.terminate)
            return connection

        yield make


async def told(run: Run, url: str, *options: str) -> dict[str, Any]:
    done = await asyncio.to_thread(run, "top", url, "--json", *options)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@contextmanager
def running(*work: Awaitable[object]) -> Iterator[None]:
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()


async def until(connection: asyncpg.Connection, condition: str) -> None:
    """Wait for a condition at the server."""
    async with asyncio.timeout(BOUND):
        while not await connection.fetchval(f"SELECT {condition}"):
            await asyncio.sleep(0.02)


async def test_who_holds_what(major: PostgresServer, run: Run, connect: Connect) -> None:
    """A lock's holder with who waits for it, then a pause in a transaction, then a long query."""
    admin, holder, waiter, lazy, slow = [
        await connect(major, name) for name in ("admin", "holder", "waiter", "lazy", "slow")
    ]
    began = time.monotonic()
    await admin.execute("CREATE TABLE IF NOT EXISTS orders (id int PRIMARY KEY, note text)")
    await admin.execute("INSERT INTO orders VALUES (1, 'x') ON CONFLICT DO NOTHING")
    await holder.execute("BEGIN; UPDATE orders SET note = 'a secret' WHERE id = 1")
    await lazy.execute("BEGIN; SELECT 42, 'another secret'")
    work = (
        waiter.execute("UPDATE orders SET note = 'y' WHERE id = 1"),
        slow.execute("SELECT pg_sleep(30)"),
    )
    with running(*work):
        await until(admin, "EXISTS (SELECT FROM pg_locks WHERE NOT granted)")
        await until(
            admin,
            f"""count(*) = 4 FROM pg_stat_activity
            WHERE application_name IN ('holder', 'waiter', 'lazy', 'slow')
            AND clock_timestamp() - greatest(query_start, state_change) > interval '{STANDING} s'""",
        )
        said = await told(run, major.url)
        took = time.monotonic() - began

    rows = {row["application"]: row for row in said["sessions"]}
    names = [row["application"] for row in said["sessions"] if row["application"] in rows]
    assert names == ["holder", "waiter", "lazy", "slow"]
    for row in rows.values():
        assert STANDING < row["seconds"] <= took
    assert rows["holder"]["blocks"] == 1
    assert rows["holder"]["state"] == rows["lazy"]["state"] == "idle in transaction"
    assert rows["waiter"]["blocked_by"] == [rows["holder"]["pid"]]
    assert rows["waiter"]["lock"]["kind"] == "transactionid"
    assert rows["waiter"]["lock"]["relation"] == "orders"
    assert rows["waiter"]["lock"]["target"] == "a row of orders"
    assert rows["slow"]["query"] == "SELECT pg_sleep(?)"
    assert rows["slow"]["wait"] == "Timeout PgSleep"
    assert rows["slow"]["client"] == "127.0.0.1"
    assert "secret" not in json.dumps(said)
    connections = said["connections"]
    assert connections["max"] == 100
    assert connections["used"] == 6  # these, and the one that looks
    by_name = {each["name"]: each for each in said["applications"]}
    assert by_name["waiter"]["blocked"] == by_name["holder"]["in_transaction"] == 1
    assert by_name["admin"]["idle"] == 1
    assert "poolkit top" not in by_name


async def test_idle_sessions_on_request(server: PostgresServer, run: Run, connect: Connect) -> None:
    """They are listed with --all, last; without, they are counted."""
    await connect(server, "sleeper")

    plainly, all_of_them = await told(run, server.url), await told(run, server.url, "--all")

    assert "sleeper" not in {row["application"] for row in plainly["sessions"]}
    assert "sleeper" in {row["application"] for row in all_of_them["sessions"]}
    assert any(row["backend"] == "checkpointer" for row in all_of_them["sessions"])
    assert "sleeper" in {each["name"] for each in plainly["applications"]}


@pytest.mark.parametrize(
    ("hold", "wait", "target"),
    [
        ("LOCK TABLE carts", "SELECT * FROM carts", "carts"),
        (
            "SELECT pg_advisory_xact_lock(-7)",
            "SELECT pg_advisory_xact_lock(-7)",
            "advisory lock -7",
        ),
        (
            "SELECT pg_advisory_xact_lock(3, -4)",
            "SELECT pg_advisory_lock(3, -4)",
            "advisory lock 3, -4",
        ),
        ("INSERT INTO carts VALUES (1)", "INSERT INTO carts VALUES (1)", r"transaction \d+"),
    ],
)
async def test_what_is_waited_for(
    server: PostgresServer, run: Run, connect: Connect, hold: str, wait: str, target: str
) -> None:
    """Tables by their names, advisory locks by their keys, transactions by their numbers."""
    holder, waiter = await connect(server, "holder"), await connect(server, "waiter")
    await holder.execute("CREATE TABLE IF NOT EXISTS carts (id int PRIMARY KEY)")
    await holder.execute(f"BEGIN; {hold}")
    with running(waiter.execute(f"BEGIN; {wait}")):
        await until(holder, "EXISTS (SELECT FROM pg_locks WHERE NOT granted)")
        said = await told(run, server.url)

    (row,) = [row for row in said["sessions"] if row["application"] == "waiter"]
    assert re.fullmatch(target, row["lock"]["target"])
    assert row["blocked_by"] == [holder.get_server_pid()]


async def test_a_role_that_may_not_see(server: PostgresServer, run: Run, connect: Connect) -> None:
    """Other users' sessions are told as hidden, with the remedy; lock queues are seen even so."""
    holder, waiter = await connect(server, "holder"), await connect(server, "waiter")
    with suppress(asyncpg.DuplicateObjectError):
        await holder.execute("CREATE ROLE guest LOGIN PASSWORD 'guess'")
    url = server.url.replace(f"{server.user}:{server.password}@", "guest:guess@")
    await holder.execute("BEGIN; SELECT pg_advisory_xact_lock(1)")
    with running(waiter.execute("SELECT pg_advisory_lock(1), 'secret'")):
        await until(holder, "EXISTS (SELECT FROM pg_locks WHERE NOT granted)")
        said = await told(run, url)
        shown = (await asyncio.to_thread(run, "top", url)).stdout

    rows = [row for row in said["sessions"] if row["hidden"]]
    assert [(row["application"], row["blocks"]) for row in rows] == [("holder", 1), ("waiter", 0)]
    assert rows[0]["state"] is None
    assert rows[0]["query"] == ""
    assert said["connections"]["hidden"] >= 2
    assert "GRANT pg_monitor TO guest" in shown
    assert "guess" not in shown


async def test_it_only_looks(server: PostgresServer) -> None:
    """One connection under its own name, in a read-only transaction with a short limit."""
    async with own_connection(server, statement_timeout=0, pool_size=7, pool_min_idle=5) as engine:
        async with engine.connect() as connection:
            row = await connection.exec_driver_sql(
                """SELECT current_setting('application_name'), current_setting('statement_timeout'),
                          current_setting('transaction_read_only')"""
            )
            assert tuple(row.one()) == ("poolkit top", "2s", "on")
        assert (engine.pool.size(), engine.pool.limit()) == (1, 1)


async def test_through_a_pooler(
    run: Run, connect: Connect, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any
) -> None:
    """In transaction mode, too: read-only, with its limit, look after look on one connection."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    from test_pooler import running as pgbouncer  # noqa: PLC0415 (found by the path above)

    directory = tmp_path_factory.mktemp("pgbouncer")
    for parent in (directory, *directory.parents):  # for PgBouncer, which is not root
        if parent.stat().st_uid == os.geteuid() and parent.stat().st_mode & 0o077 == 0:
            parent.chmod(0o711)
    with postgres() as own, pgbouncer(own, directory, "transaction", takes_all=False) as url:
        holder = await connect(own, "holder")
        await holder.execute("BEGIN; SELECT 1")
        said = await told(run, url)
        source = Server(DatabaseSettings(url=url))
        for _ in range(3):
            look = await source.look()
        async with source._engine.connect() as connection:
            limits = await connection.exec_driver_sql(
                "SELECT current_setting('statement_timeout'), current_setting('transaction_read_only')"
            )
            assert tuple(limits.one()) == ("2s", "on")
        await source.close()

    assert said["server"]["pooler"] == "transaction"
    assert [row["application"] for row in said["sessions"]] == ["holder"]
    assert "through a pooler in transaction mode" in look.title
    assert [s.application for s in look.activity.clients] == ["holder"]


def own_connection(server: PostgresServer, **settings: Any) -> Any:
    class Context:
        async def __aenter__(self) -> Any:
            self.source = Server(DatabaseSettings(url=server.url, **settings))
            await self.source.look()
            return self.source._engine

        async def __aexit__(self, *_: object) -> None:
            await self.source.close()

    return Context()


async def test_a_server_that_goes_and_comes_back() -> None:
    """What was seen last is kept and said to be old; then it goes on."""
    with postgres() as own:
        source = Server(DatabaseSettings(url=own.url, connection_timeout=0.5))
        feed = Feed(source)
        view = View([feed], 1.0, everything=False)
        await feed.look()
        last = feed.last
        await asyncio.to_thread(own.stop)
        await feed.look()

        assert feed.error is not None
        assert feed.last is last
        text = screen(view, 80, 24)
        assert "last seen 0." in text[1]
        assert own.password not in "".join(text)

        await asyncio.to_thread(own.start)
        async with asyncio.timeout(BOUND):
            while feed.error is not None:
                await feed.look()
        assert feed.last is not last
        assert "last seen" not in screen(view, 80, 24)[1]
        await source.close()


def test_no_server(run: Run, closed_port: int) -> None:
    """One sentence, exit code 1, no password."""
    done = run("top", f"postgresql://me:secret@127.0.0.1:{closed_port}/app?connect_timeout=1")

    assert done.exit_code == 1
    assert "cannot connect to 127.0.0.1" in done.stderr
    assert "secret" not in done.output


def test_logs_stay_out_of_the_picture() -> None:
    """Nor do other libraries' warnings, which Python prints where nobody handles them."""
    code = """
import logging, sys
from poolkit.cli.top import Options, run
run(sys.argv[1], Options(1.0, True, False, False), prefix="DATABASE_", demo=False)
for name in ("asyncio", "poolkit", "sqlalchemy.pool"):
    logging.getLogger(name).error("noise")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "mysql://h/app"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.stderr.startswith("error:")
    assert "noise" not in done.stderr


def test_bad_settings(run: Run) -> None:
    """As for `check`: exit code 2, in JSON too."""
    done = run("top", "--json", DATABASE_URL="mysql://me:secret@h/app")

    assert done.exit_code == 2
    assert json.loads(done.stdout)["ok"] is False
    assert "secret" not in done.output


def test_a_source_and_the_demo(run: Run) -> None:
    """One or the other."""
    assert run("top", "--demo", "postgresql://h/app").exit_code == 2


def test_statements_are_masked() -> None:
    """Literals and comments go, cut off ones too, and nothing commands the terminal."""
    assert masked("SELECT  'a',\n 42 /* secret */ FROM t WHERE x = 'cut o") == (
        "SELECT ?, ? FROM t WHERE x = ?"
    )
    assert masked("ALTER ROLE me PASSWORD 'secret") == "ALTER ROLE me PASSWORD ?"
    assert plain("a\x1b[2J\r\nb") == "a?[2J b"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, ""),
        (0.04, "0.0 s"),
        (9.9, "9.9 s"),
        (61.2, "61 s"),
        (180.0, "3 min"),
        (7300.0, "2 h"),
        (200000.0, "2 d"),
    ],
)
def test_ages_are_short(seconds: float | None, text: str) -> None:
    """At most six characters."""
    assert age(seconds) == text


@dataclass
class Still:
    """A source whose look is always the same."""

    last: Sessions

    async def look(self) -> Sessions:
        return self.last

    async def close(self) -> None:
        pass


def crowd(number: int) -> Sessions:
    """A server full of sessions: half of them wait for the first."""
    one = Session(
        pid=1_000_000, database="app", user="app", application="a service with a very long name",
        client="2001:db8::1234:5678", backend="client backend", state="idle in transaction",
        wait="Client ClientRead", query="UPDATE orders SET note = ? WHERE id = ? " * 20,
        connected_for=1e6, transaction_for=1e5, query_for=1e5, state_for=1e5,
    )  # fmt: skip
    lock = Lock("relation", "AccessExclusiveLock", "orders", "orders", 12.0)
    others = [
        replace(one, pid=1_000_000 + n, application=f"service {n}", state="active")
        if n % 2
        else replace(one, pid=1_000_000 + n, lock=lock, blocked_by=(1_000_000,))
        for n in range(1, number)
    ]
    found = Activity("18.1", "app", "app", "none", number + 1, 100, 3, [one, *others][:number])
    return Sessions("db.internal:5432", found)


def screen(view: View, width: int, height: int, **more: Any) -> list[str]:
    console = Console(width=width, height=height, color_system=None, **more)
    options = console.options.update(height=None)
    lines = console.render_lines(view.draw(console), options, pad=False)
    return ["".join(segment.text for segment in line) for line in lines]


@pytest.mark.parametrize("size", [(80, 24), (140, 40), (40, 10), (20, 4), (300, 100)])
@pytest.mark.parametrize("number", [0, 1, 7, 200])
@pytest.mark.parametrize("feeds", [1, 2])
async def test_it_fits_the_terminal(size: tuple[int, int], number: int, feeds: int) -> None:
    """Exactly as many lines as there are, none longer; the keys last."""
    shown = [Feed(Still(crowd(number))) for _ in range(feeds)]
    for feed in shown:
        await feed.look()

    lines = screen(View(shown, 1.0, everything=False), *size)

    assert max(map(len, lines)) <= size[0]
    assert lines[-1].startswith("q quit"[: size[0]])
    assert len(lines) == size[1] or size[1] < 6


async def test_what_is_left_out_is_counted() -> None:
    """The last line says how many sessions have no room."""
    feed = Feed(Still(crowd(200)))
    await feed.look()

    lines = screen(View([feed], 1.0, everything=False), 80, 24)

    shown = sum(bool(re.match(r"(└─)?1000\d\d\d ", line)) for line in lines)
    assert f"and {200 - shown} sessions more" in lines


async def test_a_terminal_without_unicode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bars and branches are of ASCII characters."""
    feed = Feed(Still(crowd(10)))
    await feed.look()
    view = View([feed], 1.0, everything=False)
    monkeypatch.setattr(Console, "encoding", "ascii")

    assert "".join(screen(view, 140, 40)).replace("…", "").isascii()


needs_terminal = pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals there")

IN_SESSION = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "poolkit.cli", "top", *sys.argv[1:]])
"""
LEAVE, SHOW_CURSOR = b"\x1b[?1049l", b"\x1b[?25h"


class Terminal:
    """A pseudo-terminal with the command in it, as a shell starts it."""

    def __init__(self, url: str, *arguments: str, **environment: str) -> None:
        import pty  # noqa: PLC0415 (not on Windows)

        self.master, self._slave = pty.openpty()
        self.resize(80, 24)
        self.before = self.modes()
        self.seen = b""
        kept = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", IN_SESSION, *arguments],
            env=kept | {"TERM": "xterm-256color", "DATABASE_URL": url} | environment,
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            start_new_session=True,
        )

    def modes(self) -> list[Any]:
        import termios  # noqa: PLC0415

        return termios.tcgetattr(self._slave)

    def resize(self, columns: int, lines: int) -> None:
        import fcntl  # noqa: PLC0415
        import struct  # noqa: PLC0415
        import termios  # noqa: PLC0415

        size = struct.pack("HHHH", lines, columns, 0, 0)
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, size)

    def press(self, key: bytes) -> None:
        os.write(self.master, key)

    def wait_for(self, *words: bytes) -> bytes:
        """Read until all of them have been printed, in this order; what was read."""
        pattern = re.compile(b".*?".join(map(re.escape, words)), re.DOTALL)
        read = b""
        end = time.monotonic() + BOUND
        os.set_blocking(self.master, False)
        while not pattern.search(read):
            assert time.monotonic() < end, read
            with suppress(BlockingIOError):
                read += os.read(self.master, 65536)
            time.sleep(0.01)
        self.seen += read
        return read

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(BOUND)
        os.close(self.master)
        os.close(self._slave)


@pytest.fixture
def terminal(server: PostgresServer) -> Iterator[Terminal]:
    opened = Terminal(f"{server.url}?sslmode=disable", "--interval", "0.1")
    yield opened
    opened.close()


@needs_terminal
@pytest.mark.parametrize("key", [b"q", b"\x03"], ids=["q", "Ctrl-C"])
def test_quitting_leaves_the_terminal_as_it_was(terminal: Terminal, key: bytes) -> None:
    """Modes, screen and cursor are put back; exit code 0; no traceback."""
    terminal.wait_for(b"\x1b[?1049h", b"PostgreSQL", b"q quit")
    assert terminal.modes() != terminal.before
    terminal.press(key)
    terminal.wait_for(SHOW_CURSOR, LEAVE)

    assert terminal.process.wait(BOUND) == 0
    assert terminal.modes() == terminal.before
    assert b"Traceback" not in terminal.seen


@needs_terminal
def test_a_signal_leaves_the_terminal_as_it_was(terminal: Terminal) -> None:
    """So does SIGTERM."""
    terminal.wait_for(b"q quit")
    terminal.process.terminate()
    terminal.wait_for(SHOW_CURSOR, LEAVE)

    assert terminal.process.wait(BOUND) == 0
    assert terminal.modes() == terminal.before


@needs_terminal
def test_suspending(terminal: Terminal) -> None:
    """Ctrl-Z gives the terminal back until the process goes on."""
    terminal.wait_for(b"q quit")
    terminal.press(b"\x1a")
    terminal.wait_for(SHOW_CURSOR, LEAVE)
    _, status = os.waitpid(terminal.process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    assert terminal.modes() == terminal.before

    os.kill(terminal.process.pid, 18)  # SIGCONT
    terminal.wait_for(b"\x1b[?1049h", b"q quit")
    terminal.press(b"q")
    assert terminal.process.wait(BOUND) == 0


@needs_terminal
def test_keys_and_a_new_size(terminal: Terminal) -> None:
    """It pauses, ignores what is no character, shows what is idle, and fills a larger terminal."""
    terminal.wait_for(b"q quit")
    terminal.press(b"\x1b[A\x1bOq")  # an arrow, and a 1 of the keypad
    terminal.press(b"p")
    terminal.wait_for(b"paused")
    terminal.press(b"pa")
    terminal.wait_for(b"checkpointer")
    terminal.resize(160, 50)
    terminal.wait_for(b"waits for")  # a column for wide terminals
    terminal.press(b"q")
    assert terminal.process.wait(BOUND) == 0


@needs_terminal
@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": "xterm", "NO_COLOR": "1"}])
def test_terminals_that_can_do_less(server: PostgresServer, environment: dict[str, str]) -> None:
    """A dumb one gets one snapshot; without colours there is none."""
    opened = Terminal(server.url, **environment)
    try:
        dumb = environment["TERM"] == "dumb"
        text = opened.wait_for(b"sessions" if dumb else b"q quit")
        assert (b"\x1b[?1049h" in text) is not dumb
        assert not re.search(rb"\x1b\[[0-9;]*3[0-7]", text)
        if not dumb:
            opened.press(b"q")
        assert opened.process.wait(BOUND) == 0
    finally:
        opened.close()


@pytest.mark.parametrize("options", [["--json"], ["--once"]])
def test_the_demo(options: list[str]) -> None:
    """Both views of a throwaway server and service, which are gone afterwards."""
    pytest.importorskip("opentelemetry.exporter.prometheus")
    done = subprocess.run(
        [sys.executable, "-m", "poolkit.cli", "top", "--demo", *options],
        env=os.environ | {"no_proxy": "127.0.0.1", "DATABASE_POOL_SIZE": "nonsense"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    if options == ["--json"]:
        said = json.loads(done.stdout)
        assert [pool["name"] for pool in said["pools"]] == ["shop"]
        assert said["pools"][0]["checkouts"] > 0
        assert {"shop", "reports", "billing"} <= {each["name"] for each in said["applications"]}
    else:
        assert "127.0.0.1" in done.stdout
        assert "idle in tx" in done.stdout
        assert not re.search(r"[\x00-\x09\x0b-\x1f]", done.stdout)
