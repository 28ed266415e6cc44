"""Fixtures for pytest, there once poolkit is installed: databases, sessions, faults.

None of them is async, so they need nothing of the plugin that runs async tests, and work in tests
that are not async.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

    from poolkit import DatabaseSettings
    from poolkit.testing import EventRecorder, FaultProxy, PostgresDatabase, PostgresServer
    from poolkit.testing._databases import Databases, Schema
    from poolkit.testing._joined import TestTransaction
    from poolkit.url import DatabaseUrl

# What the fixtures need is imported in them: every test run loads this module.

_NO_LEAKS = "poolkit_no_leaks"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The command line's options, and the configuration file's."""
    group = parser.getgroup("poolkit", "poolkit: tests on a real PostgreSQL")
    url = "use this PostgreSQL server and start none; also POOLKIT_URL, or the ini option"
    group.addoption("--poolkit-url", metavar="URL", default=None, help=f"{url} poolkit_url")
    parser.addini("poolkit_url", "use this PostgreSQL server and start none", default="")
    remote = "let poolkit's fixtures use servers that are not on this machine"
    also = "also POOLKIT_ALLOW_REMOTE=1, or the ini option poolkit_allow_remote"
    group.addoption("--poolkit-allow-remote", action="store_true", help=f"{remote}; {also}")
    parser.addini("poolkit_allow_remote", remote, type="bool", default=False)
    leaks = "fail every test that leaves a connection out, as by the fixture poolkit_no_leaks"
    parser.addini(_NO_LEAKS, leaks, type="bool", default=False)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Watch for leaks where any test wants it."""
    everywhere = config.getini(_NO_LEAKS)
    if everywhere or any(_NO_LEAKS in getattr(item, "fixturenames", ()) for item in items):
        from poolkit.testing._leaks import LeakWatch  # noqa: PLC0415

        config.pluginmanager.register(LeakWatch(everywhere=everywhere), "poolkit-leaks")


# -- Servers and databases ---------------------------------------------------------------------


@pytest.fixture(scope="session")
def poolkit_postgres(pytestconfig: pytest.Config) -> Iterator[PostgresServer]:
    """A PostgreSQL server for the whole test run; see `poolkit.testing.postgres`.

    A throwaway one, unless --poolkit-url, POOLKIT_URL or the ini option poolkit_url names another.
    """
    from poolkit.testing import postgres  # noqa: PLC0415
    from poolkit.url import parse_url  # noqa: PLC0415

    url = _given_url(pytestconfig)
    if url is not None:
        _check_local(parse_url(url), "--poolkit-url (or POOLKIT_URL, poolkit_url)", pytestconfig)
    with postgres(url=url) as server:
        yield server


@pytest.fixture(scope="session")
def poolkit_schema() -> Schema:
    """Override: what lays the tables in a new database, once for each test run.

    SQLAlchemy's MetaData, or a function, sync or async, that takes a `PostgresDatabase` and may
    rely on DATABASE_URL, too. None leaves databases empty.
    """
    return None


@pytest.fixture(scope="session")
def poolkit_settings(
    poolkit_postgres: PostgresServer, _poolkit_databases: Databases
) -> Iterator[DatabaseSettings]:
    """Override: the settings that the tests' engine is made from, in any scope.

    By default a database on `poolkit_postgres` with the tables of `poolkit_schema`, made for this
    run and this worker, and dropped afterwards.
    """
    from poolkit.testing._databases import settings_of  # noqa: PLC0415

    made = _poolkit_databases.create(settings_of(poolkit_postgres))
    yield made.settings
    _poolkit_databases.drop(made)


@pytest.fixture
def poolkit_database(
    poolkit_settings: DatabaseSettings,
    _poolkit_databases: Databases,
    pytestconfig: pytest.Config,
) -> Iterator[PostgresDatabase]:
    """A database of the test's own, with the tables of `poolkit_schema`: commits are real.

    Has `.url`, `.settings` and `.environ`. Made from a template on the server of
    `poolkit_settings`, and dropped after the test with whatever is connected to it.
    """
    _check_settings(poolkit_settings, pytestconfig)
    made = _poolkit_databases.create(poolkit_settings)
    yield made
    _poolkit_databases.drop(made)


@pytest.fixture
def poolkit_environ(
    request: pytest.FixtureRequest,
    poolkit_settings: DatabaseSettings,
    monkeypatch: pytest.MonkeyPatch,
    pytestconfig: pytest.Config,
) -> dict[str, str]:
    """DATABASE_* for the application under test, until the end of the test.

    It names the test's `poolkit_database` if the test has one, or else that of
    `poolkit_settings`; other DATABASE_* variables are unset.
    """
    from poolkit.testing._databases import environ, variables  # noqa: PLC0415

    _check_settings(poolkit_settings, pytestconfig)
    settings = poolkit_settings
    if "poolkit_database" in request.fixturenames:
        settings = request.getfixturevalue("poolkit_database").settings
    for name in variables():
        monkeypatch.delenv(name, raising=False)
    values = environ(settings)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return values


@pytest.fixture(scope="session")
def _poolkit_databases(
    request: pytest.FixtureRequest, poolkit_schema: Schema
) -> Iterator[Databases]:
    from poolkit.testing._databases import Databases  # noqa: PLC0415

    worker = getattr(request.config, "workerinput", {})  # pytest-xdist's
    run = worker.get("testrunuid") or uuid.uuid4().hex
    databases = Databases(poolkit_schema, run, worker.get("workerid", "main"))
    yield databases
    databases.close()


# -- Engines and sessions ----------------------------------------------------------------------


@pytest.fixture
def poolkit_engine(
    poolkit_settings: DatabaseSettings, pytestconfig: pytest.Config
) -> Iterator[AsyncEngine]:
    """An engine on `poolkit_settings`, new for each test, on whatever event loop uses it.

    Its connections are closed with the test. What it commits stays: see `poolkit_session`.
    """
    from poolkit.testing._endings import TestEngine  # noqa: PLC0415

    _check_settings(poolkit_settings, pytestconfig)
    made = TestEngine(poolkit_settings)
    yield made.engine
    made.close()


@pytest.fixture
def poolkit_session(
    poolkit_sessionmaker: async_sessionmaker[AsyncSession],
) -> AsyncSession:
    """A session in a transaction that is rolled back after the test; its commits are savepoints.

    For FastAPI: `app.dependency_overrides[get_session] = lambda: poolkit_session`.
    """
    return poolkit_sessionmaker(takes_turns=False)


@pytest.fixture
def poolkit_sessionmaker(
    _poolkit_transaction: TestTransaction, poolkit_session_class: type[AsyncSession]
) -> async_sessionmaker[AsyncSession]:
    """Makes sessions in the test's transaction, that of `poolkit_session`, for the code under test.

    What one session commits the others see, what it rolls back is undone, and nothing of it is
    there after the test. Sessions of concurrent tasks take turns.
    """
    from poolkit.testing._joined import joined_sessionmaker  # noqa: PLC0415

    return joined_sessionmaker(_poolkit_transaction, poolkit_session_class)


@pytest.fixture
def poolkit_get_session(
    poolkit_sessionmaker: async_sessionmaker[AsyncSession],
) -> Callable[[], AsyncIterator[AsyncSession]]:
    """A dependency for FastAPI: a session for each request, in the test's transaction.

    Committed at the request's end and rolled back if it fails, as in production:
    `app.dependency_overrides[get_session] = poolkit_get_session`.
    """
    from poolkit.testing._joined import as_dependency  # noqa: PLC0415

    return as_dependency(poolkit_sessionmaker)


@pytest.fixture(scope="session")
def poolkit_session_class() -> type[AsyncSession]:
    """Override: the class of the sessions, SQLAlchemy's AsyncSession or a subclass."""
    from sqlalchemy.ext.asyncio import AsyncSession  # noqa: PLC0415

    return AsyncSession


@pytest.fixture
def _poolkit_transaction(poolkit_engine: AsyncEngine) -> Iterator[TestTransaction]:
    from poolkit.testing._joined import TestTransaction  # noqa: PLC0415

    transaction = TestTransaction(poolkit_engine)
    yield transaction
    transaction.roll_back()


# -- What happened -----------------------------------------------------------------------------


@pytest.fixture
def poolkit_events(poolkit_engine: AsyncEngine) -> Iterator[EventRecorder]:
    """The events of `poolkit_engine`: a list, with `.of(CheckedOut)` for those of one kind."""
    from poolkit import observe  # noqa: PLC0415
    from poolkit.testing import EventRecorder  # noqa: PLC0415

    recorder = EventRecorder()
    stop = observe(poolkit_engine, recorder)
    yield recorder
    stop()


@pytest.fixture
def poolkit_no_leaks() -> None:
    """Fails a test that leaves a connection of any engine out, and says who took it where.

    An argument, `pytest.mark.usefixtures("poolkit_no_leaks")`, or for all tests the ini option
    `poolkit_no_leaks = true`.
    """


@pytest.fixture
def poolkit_faults(poolkit_postgres: PostgresServer) -> Iterator[FaultProxy]:
    """A `poolkit.testing.FaultProxy` before `poolkit_postgres`, new for each test."""
    from poolkit.testing import FaultProxy  # noqa: PLC0415

    with FaultProxy(poolkit_postgres) as proxy:
        yield proxy


# -- Where tests may write ---------------------------------------------------------------------


def _given_url(config: pytest.Config) -> str | None:
    option: str | None = config.getoption("--poolkit-url")
    return option or os.environ.get("POOLKIT_URL") or config.getini("poolkit_url") or None


def _check_settings(settings: DatabaseSettings, config: pytest.Config) -> None:
    _check_local(settings.database_url(), "poolkit_settings", config)


def _check_local(url: DatabaseUrl, source: str, config: pytest.Config) -> None:
    from poolkit.testing._local import REMEDY, remote_host  # noqa: PLC0415

    host = remote_host(url)
    if host is not None and not _allows_remote(config):
        # Without a traceback, which may show the variables of its frames.
        pytest.fail(f"{source} names the host {host}, which is not this machine. {REMEDY}", False)


def _allows_remote(config: pytest.Config) -> bool:
    given = os.environ.get("POOLKIT_ALLOW_REMOTE", "").lower() not in {"", "0", "false", "no"}
    return bool(
        given or config.getoption("--poolkit-allow-remote") or config.getini("poolkit_allow_remote")
    )
