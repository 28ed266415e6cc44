"""The plugin's sync fixtures serve every way of running an async test, and leave nothing behind."""

import asyncio

import asyncpg
import pytest

pytest_plugins = ["pytester"]

CONFTEST = """
import pytest
from sqlalchemy import Column, Integer, MetaData, Table, Text

metadata = MetaData()
Table("notes", metadata, Column("id", Integer, primary_key=True), Column("text", Text))

@pytest.fixture(scope="session")
def poolkit_schema():
    return metadata
"""

CONFIG = """
[pytest]
filterwarnings = error
asyncio_mode = {mode}
asyncio_default_fixture_loop_scope = function
"""

CLAIMS = """
import asyncpg, pytest, {fixtures}
from sqlalchemy import text
from poolkit import session

{mark}

ADD = text("INSERT INTO notes (text) VALUES ('a')")
COUNT = text("SELECT count(*) FROM notes")

@{fixtures}.fixture{options}
async def one(poolkit_session{needs}):
    await poolkit_session.execute(ADD)
    await poolkit_session.commit()
    yield
    assert await poolkit_session.scalar(COUNT) == 2
    await poolkit_session.execute(ADD)

@pytest.mark.parametrize("_", [1, 2])
async def test_what_a_test_commits_is_undone(one, poolkit_session, poolkit_sessionmaker, _):
    async with poolkit_sessionmaker.begin() as other:
        await other.execute(ADD)
    await poolkit_session.execute(ADD)
    await poolkit_session.rollback()
    assert await poolkit_session.scalar(COUNT) == 2

@pytest.mark.parametrize("_", [1, 2])
async def test_a_database_of_its_own(poolkit_database, poolkit_environ, poolkit_no_leaks, _):
    async with session() as own:
        assert await own.scalar(COUNT) == 0
        await own.execute(ADD)
    async with session(poolkit_database.settings) as own:
        assert await own.scalar(COUNT) == 1

async def test_nothing_is_left(poolkit_engine, poolkit_events):
    async with poolkit_engine.connect() as connection:
        assert await connection.scalar(COUNT) == 0
    assert len(poolkit_events) >= 3
    kept.append(await poolkit_engine.connect())  # what a test forgets ends with it, too

kept = []

async def test_no_session_is_left(poolkit_settings):
    connection = await asyncpg.connect(poolkit_settings.url.get_secret_value())
    others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    for _ in range(1000):
        if await connection.fetchval(others) == 1:
            break
    else:
        pytest.fail("a session is left")
    await connection.close()
"""

ASYNCIO = {"fixtures": "pytest_asyncio", "needs": ""}
ANYIO = {"fixtures": "pytest", "options": "", "needs": ", anyio_backend"}
ANYIO_MARK = "pytestmark = pytest.mark.anyio\n@pytest.fixture\ndef anyio_backend(): return "
MODULES = {
    "test_function": ASYNCIO | {"options": "", "mark": "pytestmark = pytest.mark.asyncio"},
    "test_session": ASYNCIO
    | {
        "options": "(loop_scope='session')",
        "mark": "pytestmark = pytest.mark.asyncio(loop_scope='session')",
    },
    "test_anyio": ANYIO | {"mark": ANYIO_MARK + "'asyncio'"},
    "test_uvloop": ANYIO | {"mark": ANYIO_MARK + "('asyncio', {'use_uvloop': True})"},
}
TESTS_EACH = 6


@pytest.fixture
def shared(monkeypatch, server):
    """Runs use our server, and leave neither a database nor a session there."""
    monkeypatch.setenv("POOLKIT_URL", server.url)
    yield server
    assert asyncio.run(left(server.url)) == []


async def left(url: str) -> list[str]:
    connection = await asyncpg.connect(url)
    rows = await connection.fetch("SELECT datname FROM pg_database WHERE datname LIKE 'poolkit%'")
    await connection.close()
    return [row[0] for row in rows]


def modules(pytester: pytest.Pytester, names: list[str], mode: str) -> None:
    pytester.makeconftest(CONFTEST)
    pytester.makefile(".ini", pytest=CONFIG.format(mode=mode))
    pytester.makepyfile(**{name: CLAIMS.format(**MODULES[name]) for name in names})


def run(pytester: pytest.Pytester, *options: str) -> pytest.RunResult:
    return pytester.runpytest_subprocess(
        "-q", "-W", "error", "-p", "no:cacheprovider", "-p", "no:looptime_plugin", *options
    )


def test_strict_mode_and_anyio(pytester, shared):
    """pytest-asyncio with loops of two scopes, anyio's plugin, and uvloop, in one run."""
    names = list(MODULES)
    modules(pytester, names, "strict")

    run(pytester).assert_outcomes(passed=TESTS_EACH * len(names))


def test_auto_mode(pytester, shared):
    """pytest-asyncio takes every async test."""
    modules(pytester, ["test_function"], "auto")

    run(pytester).assert_outcomes(passed=TESTS_EACH)


def test_xdist_workers_share_one_template(pytester, shared):
    """The tables are laid once; each worker has databases of its own."""
    modules(pytester, ["test_function", "test_session"], "strict")
    pytester.makeconftest(
        """
        import asyncpg, pytest

        @pytest.fixture(scope="session")
        def poolkit_schema():
            return lay

        async def lay(database):
            with open("laid", "a") as file:
                print(database.name, file=file)
            connection = await asyncpg.connect(database.url)
            await connection.execute("CREATE TABLE notes (id serial PRIMARY KEY, text text)")
            await connection.close()

        @pytest.fixture(autouse=True)
        def _told(poolkit_settings, worker_id):
            assert worker_id in poolkit_settings.database_url().database
        """
    )

    run(pytester, "-n2", "--dist=loadfile").assert_outcomes(passed=TESTS_EACH * 2)

    assert len((pytester.path / "laid").read_text().splitlines()) == 1


def test_sync_tests(pytester, shared):
    """Loops that the test starts, one after the other, and what cannot span two of them."""
    pytester.makeconftest(CONFTEST)
    pytester.makefile(".ini", pytest=CONFIG.format(mode="strict"))
    pytester.makepyfile(
        """
        import asyncio, pytest
        from sqlalchemy import text
        from poolkit import WrongEventLoop

        COUNT = text("SELECT count(*) FROM notes")

        def test_an_engine_serves_one_loop_after_the_other(poolkit_engine):
            async def count():
                async with poolkit_engine.connect() as connection:
                    return await connection.scalar(COUNT)
            assert asyncio.run(count()) == asyncio.run(count()) == 0

        def test_a_transaction_is_of_one_loop(poolkit_session):
            async def add():
                await poolkit_session.execute(text("INSERT INTO notes (text) VALUES ('a')"))
                await poolkit_session.commit()
                return await poolkit_session.scalar(COUNT)
            assert asyncio.run(add()) == 1
            with pytest.raises(WrongEventLoop, match="TestClient"):
                asyncio.run(add())

        def test_nothing_is_opened_unasked(poolkit_engine, poolkit_session, poolkit_events):
            assert poolkit_events == []

        @pytest.fixture
        def loop():
            loop = asyncio.new_event_loop()
            yield loop
            loop.close()

        def test_a_loop_that_is_closed_after_the_engine(loop, poolkit_engine, poolkit_session):
            assert loop.run_until_complete(poolkit_session.scalar(COUNT)) == 0
            kept.append(loop.run_until_complete(open_one(poolkit_engine)))

        kept = []

        async def open_one(engine):
            return await engine.connect()
        """
    )

    run(pytester).assert_outcomes(passed=4)


def test_failures_in_set_up_leave_nothing(pytester, shared):
    """Tables that cannot be laid, a fixture that fails, a test that fails."""
    pytester.makefile(".ini", pytest=CONFIG.format(mode="auto"))
    pytester.makeconftest(
        """
        import pytest

        @pytest.fixture(scope="session")
        def poolkit_schema(request):
            return lay

        def lay(database):
            raise RuntimeError("no such migration")
        """
    )
    pytester.makepyfile(
        """
        import pytest

        async def test_one(poolkit_session): ...
        async def test_two(poolkit_engine): ...
        async def test_three(poolkit_database): ...

        @pytest.fixture
        async def failing(poolkit_faults):
            raise OSError("in between")

        async def test_four(failing): ...
        """
    )

    done = run(pytester, "--tb=short")

    done.assert_outcomes(errors=4)
    done.stdout.fnmatch_lines(["*RuntimeError: no such migration", "*OSError: in between"])
