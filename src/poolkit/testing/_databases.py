"""Databases made from a template for tests, and dropped after them.

A run holds a shared advisory lock at the server for as long as it lasts. What is left of a run
whose lock nobody holds is dropped by the next run; the last of pytest-xdist's workers drops the
template that they share.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import asyncpg
from sqlalchemy import MetaData
from sqlalchemy.pool import NullPool

from poolkit import DatabaseSettings, connect_kwargs, create_async_engine
from poolkit.settings import SecretUrl
from poolkit.testing._errors import PostgresServerError
from poolkit.testing._server import PostgresServer
from poolkit.testing._thread import LoopThread
from poolkit.url import Address, DatabaseUrl

_T = TypeVar("_T")

_GONE = (OSError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError)
_PREFIX = "DATABASE_"
_PARTS = ("host", "port", "user", "password", "name")


@dataclass(frozen=True, slots=True, repr=False)
class PostgresDatabase:
    """A database for tests, there until the end of the test.

    Attributes:
        name: Its name.
        settings: For `create_async_engine(settings=...)`, `get_engine(...)` or `session(...)`.
    """

    name: str
    settings: DatabaseSettings

    def __repr__(self) -> str:
        return f"<PostgresDatabase {self.settings.database_url()}>"

    @property
    def url(self) -> str:
        """`postgresql://` URL, password included."""
        return _text(self.settings.database_url(), self.name)

    @property
    def environ(self) -> dict[str, str]:
        """The environment variables of a service that is to use this database."""
        return environ(self.settings)


Schema = MetaData | Callable[[PostgresDatabase], Any] | None
"""What lays the tables: SQLAlchemy's metadata, or a function, sync or async, of a database."""


def settings_of(server: PostgresServer) -> DatabaseSettings:
    """For a server, every default; not from DATABASE_* nor .env, which may name a live one."""
    arguments: dict[str, Any] = {"url": server.url, "logfire_enabled": False}
    arguments |= {"_env_prefix": "POOLKIT_", "_env_file": None}
    return DatabaseSettings(**arguments)


def environ(settings: DatabaseSettings) -> dict[str, str]:
    """The `DATABASE_*` variables that give these settings, but for what is the default."""
    found: dict[str, str] = {}
    for name in settings.model_fields_set:
        value = getattr(settings, name)
        if value is not None:
            secret = getattr(value, "get_secret_value", None)
            found[settings.variable(name, _PREFIX)] = str(value if secret is None else secret())
    return found


def variables() -> set[str]:
    """The names of all variables that settings are read from."""
    names = {DatabaseSettings.variable(name, _PREFIX) for name in DatabaseSettings.model_fields}
    return names | {f"{name}_FILE" for name in names}


class Databases:
    """Makes databases on whatever server settings name, and leaves none behind.

    Args:
        schema: Lays the tables, once for each server and run, in a template.
        run: What the workers of one test run have in common.
        worker: What they do not.
    """

    def __init__(self, schema: Schema, run: str, worker: str) -> None:
        self._schema = schema
        self._run, self._worker = run, worker
        self._servers: dict[object, _Server] = {}
        self._origin: dict[str | None, _Server] = {}

    def create(self, settings: DatabaseSettings) -> PostgresDatabase:
        """A new database, with its tables, on the server that the settings name.

        Raises:
            PostgresServerError: The server does not let the role create databases.
        """
        url = settings.database_url()
        # Settings with a database that was made here mean the server that it was made on.
        server = self._origin.get(url.database) or self._server(settings, url)
        made = server.create(settings)
        self._origin[made.name] = server
        return made

    def drop(self, database: PostgresDatabase) -> None:
        """End the sessions of a database, and the database."""
        self._origin.pop(database.name).drop(database.name)

    def close(self) -> None:
        """Drop what is left."""
        while self._servers:
            self._servers.popitem()[1].close()

    def _server(self, settings: DatabaseSettings, url: DatabaseUrl) -> _Server:
        key = (url.addresses, url.database)
        if key not in self._servers:
            self._servers[key] = _Server(settings, self._schema, self._run, self._worker)
        return self._servers[key]


class _Server:
    """A server, by one connection of its own in a thread of its own."""

    def __init__(self, settings: DatabaseSettings, schema: Schema, run: str, worker: str) -> None:
        # An advisory lock is its database's: runs that come by another do not see each other's.
        origin = hashlib.sha256((settings.database_url().database or "").encode()).hexdigest()[:6]
        self._settings = settings.model_copy(update={"statement_timeout": 0.0, "lock_timeout": 0.0})
        self._schema = schema
        self._family = f"poolkit_{origin}_"
        self._prefix = f"{self._family}{run[:8]}_"
        self._worker = worker
        self._made = 0
        self._template: str | None = None
        self._connection: asyncpg.Connection | None = None
        self._thread = LoopThread("poolkit-databases")
        self._thread.start()

    def create(self, settings: DatabaseSettings) -> PostgresDatabase:
        try:
            template = self._template = self._template or self._run(self._make_template)
            self._made += 1
            name = f"{self._prefix}{self._worker}_{self._made}"
            self._run(lambda c: c.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"'))
        except asyncpg.InsufficientPrivilegeError as error:
            raise PostgresServerError(
                f"the role {self._settings.database_url().user} may not create databases: give it"
                " CREATEDB, or override poolkit_settings to name a database of your own"
            ) from error
        return PostgresDatabase(name, _with_database(settings, name))

    def drop(self, name: str) -> None:
        self._run(lambda c: c.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'))

    def close(self) -> None:
        try:
            with contextlib.suppress(*_GONE):  # the server is no more, and its databases with it
                self._thread.run(self._leave())
        finally:
            self._thread.stop()

    # -- In the thread ---------------------------------------------------------------------

    def _run(self, work: Callable[[asyncpg.Connection], Awaitable[_T]]) -> _T:
        try:
            return self._thread.run(self._do(work))
        except _GONE:
            return self._thread.run(self._do(work))  # a test has restarted the server

    async def _do(self, work: Callable[[asyncpg.Connection], Awaitable[_T]]) -> _T:
        if self._connection is None or self._connection.is_closed():
            self._connection = await asyncpg.connect(**connect_kwargs(self._settings))
            await self._connection.execute(f"SELECT pg_advisory_lock_shared({_key(self._prefix)})")
            await self._drop_remains(self._connection)
        return await work(self._connection)

    async def _drop_remains(self, connection: asyncpg.Connection) -> None:
        """Drop what runs that were killed have left."""
        names = await self._names(connection, self._family)
        runs = {"_".join(name.split("_")[:3]) + "_" for name in names} - {self._prefix}
        for run in runs:
            if await connection.fetchval(f"SELECT pg_try_advisory_lock({_key(run)})"):
                await self._drop_all(connection, run)
                await connection.execute(f"SELECT pg_advisory_unlock({_key(run)})")

    async def _make_template(self, connection: asyncpg.Connection) -> str:
        """The run's template; one worker makes it, and the others wait."""
        name, lock = f"{self._prefix}template", _key(f"{self._prefix}template")
        await connection.execute(f"SELECT pg_advisory_lock({lock})")
        try:
            if name not in await self._names(connection, self._prefix):
                draft = f"{self._prefix}draft"
                await connection.execute(f'DROP DATABASE IF EXISTS "{draft}" WITH (FORCE)')
                await connection.execute(f'CREATE DATABASE "{draft}"')
                await asyncio.to_thread(self._lay, draft)
                await connection.execute(f'ALTER DATABASE "{draft}" RENAME TO "{name}"')
        finally:
            await connection.execute(f"SELECT pg_advisory_unlock({lock})")
        return name

    def _lay(self, name: str) -> None:
        database = PostgresDatabase(name, _with_database(self._settings, name))
        with ThreadPoolExecutor(max_workers=1) as own, _environment(database.environ):
            own.submit(_lay, self._schema, database).result()

    async def _leave(self) -> None:
        connection = self._connection
        if connection is None:
            return
        await connection.execute(f"SELECT pg_advisory_unlock_shared({_key(self._prefix)})")
        if await connection.fetchval(f"SELECT pg_try_advisory_lock({_key(self._prefix)})"):
            await self._drop_all(connection, self._prefix)
        await connection.close(timeout=10)

    async def _drop_all(self, connection: asyncpg.Connection, prefix: str) -> None:
        for name in await self._names(connection, prefix):
            await connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    async def _names(self, connection: asyncpg.Connection, prefix: str) -> list[str]:
        rows = await connection.fetch(
            "SELECT datname FROM pg_database WHERE starts_with(datname::text, $1)", prefix
        )
        return [row[0] for row in rows]


def _lay(schema: Schema, database: PostgresDatabase) -> None:
    if isinstance(schema, MetaData):
        asyncio.run(_create_all(schema, database))
    elif schema is not None:
        outcome = schema(database)
        if isinstance(outcome, Awaitable):
            asyncio.run(_awaited(outcome))


async def _create_all(metadata: MetaData, database: PostgresDatabase) -> None:
    engine = create_async_engine(settings=database.settings, poolclass=NullPool)
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)


async def _awaited(work: Awaitable[_T]) -> _T:
    return await work


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Have whatever lays the tables by `DATABASE_*` find this database."""
    concerned = variables() | values.keys()
    before = {name: os.environ.pop(name) for name in concerned if name in os.environ}
    os.environ.update(values)
    try:
        yield
    finally:
        for name in concerned:
            os.environ.pop(name, None)
        os.environ.update(before)


def _key(text: str) -> int:
    """A key for an advisory lock."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], signed=True)


def _with_database(settings: DatabaseSettings, name: str) -> DatabaseSettings:
    """The same server and settings, and another database."""
    url = SecretUrl(_text(settings.database_url(), name))
    parts = dict.fromkeys(_PARTS)
    changed = settings.model_copy(update={"url": url, **parts})
    changed.__pydantic_fields_set__.difference_update(_PARTS)
    return changed


def _text(url: DatabaseUrl, database: str) -> str:
    """The URL, with its secrets and that database."""
    login = quote(url.user or "", safe="")
    if url.password is not None:
        login += f":{quote(url.password, safe='')}"
    hosts = ",".join(_place(address) for address in url.addresses)
    query = urlencode(dict(url.query), safe="/")
    return (
        f"postgresql://{login}{'@' if login else ''}{hosts}/{quote(database, safe='')}"
        f"{'?' if query else ''}{query}"
    )


def _place(address: Address) -> str:
    if not address.is_socket:
        return str(address)
    return quote(address.host, safe="") + (f":{address.port}" if address.port else "")
