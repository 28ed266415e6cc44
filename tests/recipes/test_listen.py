"""The listener of docs/how-to/listen-notify.md, on connections that end in every way."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from uuid import uuid4

import asyncpg
import pytest
from sqlalchemy import make_url

from poolkit.testing import FaultProxy, ProxiedConnection, postgres

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "listen_notify.py"
TABLE = "CREATE TABLE jobs (id serial, what text, done boolean DEFAULT false)"
ANNOUNCED = "INSERT INTO jobs (what) VALUES ($1) RETURNING pg_notify('jobs', id::text)"
BOUND = 15.0


@pytest.fixture
def recipe(monkeypatch) -> ModuleType:
    """The example as a module, in a hurry."""
    spec = spec_from_file_location("listen_notify", EXAMPLE)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "HEARTBEAT", 0.3)
    monkeypatch.setattr(module, "PATIENCE", 0.3)
    monkeypatch.setattr(module, "LONGEST_PAUSE", 0.2)
    return module


@pytest.fixture
async def url(server, monkeypatch) -> str:
    """A database with the table."""
    made = server.create_database(f"jobs_{uuid4().hex}")
    admin = await asyncpg.connect(made)
    await admin.execute(TABLE)
    await admin.close()
    monkeypatch.setenv("DATABASE_URL", made)
    return made


@pytest.fixture
async def admin(url) -> AsyncIterator[asyncpg.Connection]:
    """A connection past every fault."""
    connection = await asyncpg.connect(url)
    yield connection
    await connection.close()


@asynccontextmanager
async def working(recipe: ModuleType) -> AsyncIterator[asyncio.Task[None]]:
    """The worker, as its process runs it."""
    task = asyncio.create_task(recipe.main())
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def eventually(true: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(BOUND):
        while not await true():
            await asyncio.sleep(0.02)


async def all_done(admin: asyncpg.Connection) -> bool:
    return await admin.fetchval("SELECT coalesce(bool_and(done), false) FROM jobs")


async def announce_and_wait(admin: asyncpg.Connection, what: str) -> None:
    await admin.execute(ANNOUNCED.replace("$1", f"'{what}'"))
    await eventually(lambda: all_done(admin))


def listeners(proxy: FaultProxy) -> list[ProxiedConnection]:
    return [c for c in proxy.connections if any("LISTEN" in said for said in c.statements)]


@pytest.fixture
def proxy(url, monkeypatch):
    with FaultProxy(url, refuse_encryption=True) as running:
        monkeypatch.setenv("DATABASE_URL", f"{running.url}?sslmode=disable")
        yield running


async def test_what_is_announced_is_done_at_once(recipe, admin, monkeypatch) -> None:
    """And what was there before, without being announced."""
    monkeypatch.setattr(recipe, "HEARTBEAT", 3600.0)
    await admin.execute("INSERT INTO jobs (what) VALUES ('before')")

    async with working(recipe):
        await eventually(lambda: all_done(admin))
        for number in range(20):
            await announce_and_wait(admin, str(number))


@pytest.mark.parametrize("fault", ["close", "reset", "freeze"])
async def test_the_listening_connection_fails(recipe, admin, proxy, fault) -> None:
    """Ended, reset or half-open: what was announced meanwhile is done, and what comes then."""
    async with working(recipe):
        await announce_and_wait(admin, "before")
        [listener] = listeners(proxy)

        getattr(listener, fault)()
        await announce_and_wait(admin, "meanwhile")

        await announce_and_wait(admin, "afterwards")
        assert {listener.number} < {c.number for c in [listener, *listeners(proxy)]}


async def test_every_connection_is_half_open(recipe, admin, proxy, monkeypatch) -> None:
    """The listener's and the pool's; nothing says so but the heartbeat and the ping."""
    monkeypatch.setenv("DATABASE_POOL_PING_IDLE", "0")
    async with working(recipe):
        await announce_and_wait(admin, "before")

        proxy.freeze()
        await announce_and_wait(admin, "meanwhile")

        await announce_and_wait(admin, "afterwards")


async def test_the_heartbeat_keeps_a_healthy_connection(recipe, admin, proxy) -> None:
    """It is asked, answers, and stays."""
    async with working(recipe):
        await announce_and_wait(admin, "before")
        [listener] = listeners(proxy)

        async def asked_thrice() -> bool:
            return listener.statements.count("SELECT 1") >= 3

        await eventually(asked_thrice)
        await announce_and_wait(admin, "afterwards")
        assert [each.number for each in listeners(proxy)] == [listener.number]


async def test_the_server_is_away(recipe, admin, proxy) -> None:
    """Attempts go on, with pauses, until it is back; what came in between is done then."""
    async with working(recipe):
        await announce_and_wait(admin, "before")
        proxy.refuse()
        proxy.reset()
        await admin.execute(ANNOUNCED.replace("$1", "'meanwhile'"))
        await asyncio.sleep(1)

        proxy.accept()

        await eventually(lambda: all_done(admin))


async def test_the_server_restarts(recipe, monkeypatch) -> None:
    """A job from between is done, and one from afterwards."""
    async with postgres() as own:
        monkeypatch.setenv("DATABASE_URL", own.url)
        admin = await asyncpg.connect(own.url)
        await admin.execute(TABLE)
        async with working(recipe):
            await announce_and_wait(admin, "before")
            await admin.close()

            await asyncio.to_thread(own.restart, "immediate")

            admin = await asyncpg.connect(own.url)
            await announce_and_wait(admin, "meanwhile")
            await announce_and_wait(admin, "afterwards")
        await admin.close()


async def test_more_than_may_wait(recipe, admin, proxy, monkeypatch) -> None:
    """The queue is bounded; the table has what it did not take."""
    monkeypatch.setattr(recipe, "MOST_WAITING", 3)
    go_on = asyncio.Event()
    do_job = recipe.do_job

    async def do_later(number: str) -> None:
        await go_on.wait()
        await do_job(number)

    monkeypatch.setattr(recipe, "do_job", do_later)
    async with working(recipe):
        await eventually(lambda: admin.fetchval(LISTENING))
        for number in range(50):
            await admin.execute(ANNOUNCED.replace("$1", f"'{number}'"))
        await eventually(lambda: asyncio.sleep(0, not listeners(proxy)))
        go_on.set()

        await eventually(lambda: all_done(admin))


LISTENING = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND query LIKE 'LISTEN%'
"""


async def test_two_listeners_share_the_work(recipe, admin, capsys) -> None:
    """Both hear of every job, and each job is done once."""
    async with working(recipe), working(recipe):
        await eventually(lambda: admin.fetchval(LISTENING + "HAVING count(*) = 2"))
        for number in range(30):
            await admin.execute(ANNOUNCED.replace("$1", f"'{number}'"))

        await eventually(lambda: all_done(admin))

    said = capsys.readouterr().out.split("\n")[:-1]
    assert sorted(said) == sorted(f"doing {number}" for number in range(30))


async def test_what_does_not_pass_is_raised(recipe, url, monkeypatch) -> None:
    """A wrong password is not tried for ever."""
    wrong = make_url(url).set(password="wrong")
    monkeypatch.setenv("DATABASE_URL", wrong.render_as_string(hide_password=False))
    with pytest.raises(asyncpg.PostgresError) as caught:
        await asyncio.wait_for(recipe.main(), BOUND)

    assert caught.value.sqlstate.startswith("28")


async def test_the_pauses_grow_and_are_at_random(recipe, proxy, monkeypatch) -> None:
    """Full jitter: any time up to a limit, which doubles up to the longest."""
    limits = []
    enough = asyncio.Event()

    def uniform(lowest: float, limit: float) -> float:
        assert lowest == 0
        limits.append(limit)
        if len(limits) == 6:
            enough.set()
        return 0.0

    monkeypatch.setattr(recipe, "LONGEST_PAUSE", 1.0)
    monkeypatch.setattr(recipe, "random", SimpleNamespace(uniform=uniform))
    proxy.refuse()
    async with working(recipe):
        await asyncio.wait_for(enough.wait(), BOUND)

    assert limits[:6] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]


async def test_a_sigterm_ends_it_in_good_order(url, admin) -> None:
    """No session is left, the exit code is 0, and nothing is warned about."""
    code = "import asyncio, listen_notify; asyncio.run(listen_notify.main())"
    process = subprocess.Popen(  # noqa: ASYNC220 (returns at once)
        [sys.executable, "-W", "error", "-c", code],
        cwd=EXAMPLE.parent,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        await announce_and_wait(admin, "before")
        process.send_signal(signal.SIGTERM)
        told = await asyncio.to_thread(process.communicate, timeout=BOUND)
    finally:
        process.kill()
        process.wait()

    assert (process.returncode, told[1]) == (0, "")
    others = "SELECT count(*) = 1 FROM pg_stat_activity WHERE datname = current_database()"
    await eventually(lambda: admin.fetchval(others))
