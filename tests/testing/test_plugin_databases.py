"""Databases from a template: made once, named after who made them, gone afterwards."""

import asyncio
import os

import asyncpg
import pytest
from sqlalchemy import Column, Integer, MetaData, Table, text

from poolkit import DatabaseSettings, create_async_engine
from poolkit.testing import PostgresServerError, postgres
from poolkit.testing._databases import Databases, settings_of

METADATA = MetaData()
Table("notes", METADATA, Column("id", Integer, primary_key=True))


@pytest.fixture
def make(server):
    """``Databases``; afterwards there is none at the server."""
    made = []

    def make(schema=METADATA, run="0123456789", worker="main") -> Databases:
        made.append(Databases(schema, run, worker))
        return made[-1]

    yield make
    for databases in made:
        databases.close()
    assert names(server.url) == []


def fetch(url: str, query: str) -> list:
    async def ask() -> list:
        connection = await asyncpg.connect(url)
        try:
            return [row[0] for row in await connection.fetch(query)]
        finally:
            await connection.close()

    return asyncio.run(ask())


def names(url: str) -> list[str]:
    return fetch(url, "SELECT datname FROM pg_database WHERE datname LIKE 'poolkit%' ORDER BY 1")


def tables(url: str) -> list[str]:
    return fetch(url, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")


def test_two_databases_of_one_template(make, server):
    """What is done to one is not in the other."""
    databases = make()
    one, two = (databases.create(settings_of(server)) for _ in range(2))

    fetch(one.url, "INSERT INTO notes VALUES (1) RETURNING id")

    assert fetch(one.url, "SELECT id FROM notes") == [1]
    assert fetch(two.url, "SELECT id FROM notes") == []
    databases.drop(one)
    assert len(names(server.url)) == 2  # the other and the template
    assert server.password not in repr(two)


def test_a_database_is_dropped_under_its_users(make, server):
    """A connection that was left open does not keep it."""
    databases = make()
    made = databases.create(settings_of(server))

    async def leave_open() -> asyncpg.Connection:
        return await asyncpg.connect(made.url)

    with asyncio.Runner() as runner:
        connection = runner.run(leave_open())
        databases.drop(made)
        runner.run(asyncio.sleep(0))
        connection.terminate()
    assert made.name not in names(server.url)


def test_settings_that_name_a_made_database_mean_its_server(make, server):
    """As those of ``poolkit_settings`` do; the template is the same."""
    databases = make()
    first = databases.create(settings_of(server))

    second = databases.create(first.settings.model_copy(update={"pool_size": 3}))

    assert second.settings.pool_size == 3
    assert second.url != first.url
    assert len(names(server.url)) == 3


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_function_lays_the_tables(make, server, kind, monkeypatch):
    """By the database that it is given, or by DATABASE_URL, as migrations do."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://live.example.com/live")
    monkeypatch.setenv("DATABASE_HOST", "live.example.com")

    def lay(database):
        assert DatabaseSettings().database_url() == database.settings.database_url()
        assert "DATABASE_HOST" not in os.environ
        asyncio.run(alay(database))

    async def alay(database):
        connection = await asyncpg.connect(os.environ["DATABASE_URL"])
        await connection.execute("CREATE TABLE of_a_migration (id int)")
        await connection.close()

    made = make(lay if kind == "sync" else alay).create(settings_of(server))

    assert tables(made.url) == ["of_a_migration"]
    assert os.environ["DATABASE_URL"] == "postgresql://live.example.com/live"
    assert os.environ["DATABASE_HOST"] == "live.example.com"


def test_tables_that_cannot_be_laid(make, server):
    """The error is the function's own; a later attempt starts anew."""
    attempts = []

    def lay(database):
        attempts.append(database.name)
        if len(attempts) == 1:
            raise RuntimeError("no such migration")

    databases = make(lay)
    with pytest.raises(RuntimeError, match="no such migration"):
        databases.create(settings_of(server))

    assert tables(databases.create(settings_of(server)).url) == []


def test_workers_of_a_run_share_its_template(make, server):
    """The last to leave drops it."""
    laid = []
    one, two = (make(lambda d: laid.append(d.name), worker=name) for name in ("gw0", "gw1"))
    made = [each.create(settings_of(server)) for each in (one, two)]

    assert len(laid) == 1
    assert ["_gw0_" in made[0].name, "_gw1_" in made[1].name] == [True, True]
    one.close()
    assert made[1].name in names(server.url)
    assert two.create(settings_of(server)).name in names(server.url)


def test_what_a_killed_run_left_is_dropped(make, server):
    """And what a run that goes on has is not."""
    living = make(run="livinglivi")
    kept = living.create(settings_of(server))
    family = "_".join(kept.name.split("_")[:2])
    server.create_database(f"{family}_deadbeef_gw0_1")

    make(run="another").create(settings_of(server))

    there = names(server.url)
    assert kept.name in there
    assert f"{family}_deadbeef_gw0_1" not in there


def test_a_server_restarted_in_between():
    """A test may restart ``poolkit_postgres``, or leave it stopped."""
    with postgres() as own:
        databases = Databases(METADATA, "run", "main")
        databases.create(settings_of(own))
        own.restart("immediate")

        made = databases.create(settings_of(own))

        assert tables(made.url) == ["notes"]
        own.stop()
        databases.close()


def test_a_role_that_may_not_create_databases(make, server):
    """The error says what to do."""
    fetch(server.url, "CREATE ROLE humble LOGIN PASSWORD 'humble'")
    settings = DatabaseSettings(
        host=server.host, port=server.port, user="humble", password="humble", name=server.database
    )

    with pytest.raises(
        PostgresServerError, match="humble may not create databases: give it CREATE"
    ):
        make().create(settings)
    fetch(server.url, "DROP ROLE humble")


async def test_settings_of_parts(make, server):
    """Host, user, password and name in place of a URL; the environment says the same."""
    settings = DatabaseSettings(
        host=server.host,
        port=server.port,
        user=server.user,
        password=server.password,
        name=server.database,
        statement_timeout=7,
    )

    made = await asyncio.to_thread(make().create, settings)

    engine = create_async_engine(settings=made.settings)
    async with engine.connect() as connection:
        assert await connection.scalar(text("SELECT current_database()")) == made.name
        assert await connection.scalar(text("SHOW statement_timeout")) == "7s"
    await engine.dispose()
    assert made.environ == {"DATABASE_URL": made.url, "DATABASE_STATEMENT_TIMEOUT": "7.0"}


def test_a_socket(make):
    """The URL of a Unix socket keeps its directory and port."""
    with postgres() as own:
        databases = Databases(METADATA, "run", "main")
        made = databases.create(DatabaseSettings(url=own.socket_url))
        try:
            assert tables(made.url) == ["notes"]
            assert DatabaseSettings(url=made.url).database_url().addresses[0].is_socket
        finally:
            databases.close()
