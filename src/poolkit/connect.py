"""The physical connect: bounded in total, retried, with TLS, poolers and typed failures."""

from __future__ import annotations

import asyncio
import inspect
import random
import socket
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from poolkit import errors
from poolkit.driver import DriverConnection, assignment
from poolkit.errors import Attempt, ConfigurationError, ConnectError
from poolkit.events import ConnectionOpened, ConnectionOpenFailed, Observer, notify
from poolkit.parameters import Keepalive
from poolkit.url import DEFAULT_PORT, Address

FIRST_PAUSE = 0.05
LONGEST_PAUSE = 0.5
"""Seconds: the longest pause between attempts, so that a server that is back is found soon."""

FAIR_CHANCE = 1.0
"""Seconds that an attempt needs to count as having been given a chance."""

STARTUP_SAFE = frozenset(
    {"application_name", "client_encoding", "datestyle", "timezone", "options"}
    | {"standard_conforming_strings"}
)
"""What PgBouncer takes at start-up (all but ``options`` it tracks); the rest it refuses: 08P01."""

_NOT_READY = frozenset({"57P01", "57P02", "57P03"})
_LOST = frozenset({"08000", "08001", "08003", "08004", "08006"})
_SSL_REQUEST = (8).to_bytes(4) + (80877103).to_bytes(4)


@dataclass(slots=True)
class _Progress:
    """What one call of the connector has been through."""

    started: float
    address: str = ""
    attempts: int = 0
    cause: Exception | None = None
    attempt_began: float = 0.0

    def has_just_begun(self, deadline: float | None) -> bool:
        """Whether the attempt that the deadline cut short is not what took the time.

        What the attempts before it ended with is then the better account.
        """
        return (deadline or 0.0) - self.attempt_began < FAIR_CHANCE

    def so_far(self, now: float) -> Attempt:
        return Attempt(self.address, self.attempts, now - self.started)


@dataclass(eq=False, slots=True)
class Connector:
    """``asyncpg.connect`` as an engine needs it; the dialect's ``async_creator_fn``.

    Called with asyncpg's own arguments. Transient failures (refused, name not found, reset, too
    many connections, server starting) are retried with fully jittered exponential pauses until
    ``timeout`` seconds have gone in total; the others fail at once.

    Attributes:
        pooler: ``auto``, ``none``, ``session`` or ``transaction``.
        keepalive: What is set on each socket.
        tls: The context for ``ssl="prefer"`` and ``ssl="allow"``.
        shuffle_hosts: Try several hosts in random order.
        session_limit: Seconds of the statement timeout among the server settings.
        caches_wanted: Whether the caller asked for statement caches, or names, of his own.
        observers: Told of every connect and every failure.
    """

    pooler: str = "auto"
    keepalive: Keepalive = field(default_factory=Keepalive)
    tls: ssl.SSLContext | None = None
    shuffle_hosts: bool = False
    session_limit: float = 0.0
    caches_wanted: bool = False
    observers: Sequence[Observer] = ()
    _found: dict[Address | None, str] = field(default_factory=dict, repr=False)
    _plain: dict[Address | None, bool] = field(default_factory=dict, repr=False)

    async def __call__(self, *, timeout: float | None, **arguments: Any) -> DriverConnection:
        """Make one connection.

        Args:
            timeout: Seconds for everything; None or 0 is no limit.
            arguments: ``asyncpg.connect``'s; ``password`` may be a callable, sync or async.

        Raises:
            ConnectError: A subclass that says what went wrong; ``orig`` is the last cause.
            ConfigurationError: The arguments cannot work with the pooler that was found.
        """
        loop = asyncio.get_running_loop()
        progress = _Progress(loop.time())
        try:
            connection = await self._within(timeout or None, progress, arguments)
        except ConnectError as error:
            failed = ConnectionOpenFailed(error.address, error.elapsed, error.attempts, error)
            notify(self.observers, failed)
            raise
        notify(
            self.observers,
            ConnectionOpened(
                progress.address,
                loop.time() - progress.started,
                progress.attempts,
                connection.pooler,
            ),
        )
        return connection

    async def _within(
        self, timeout: float | None, progress: _Progress, arguments: dict[str, Any]
    ) -> DriverConnection:
        try:
            async with asyncio.timeout(timeout) as bound:
                return await self._persist(bound.when(), progress, arguments)
        except ConnectError:
            raise
        except TimeoutError as error:
            cause = progress.cause or error
            if progress.cause is not None and progress.has_just_begun(bound.when()):
                raise failure(_now(progress), progress.cause) from cause
            raise errors.ConnectTimeout(_now(progress), cause) from cause

    async def _persist(
        self, deadline: float | None, progress: _Progress, arguments: dict[str, Any]
    ) -> DriverConnection:
        loop = asyncio.get_running_loop()
        pause = FIRST_PAUSE
        while True:
            try:
                return await self._try_all(deadline, progress, arguments)
            except Exception as error:
                await self._give_up_unless_transient(error, progress, arguments)
                wait = random.uniform(0, pause)  # noqa: S311 (spreads load; not a secret)
                if deadline is not None and loop.time() + wait >= deadline:
                    raise failure(_now(progress), error) from error
            await asyncio.sleep(wait)
            pause = min(pause * 2, LONGEST_PAUSE)

    async def _give_up_unless_transient(
        self, error: Exception, progress: _Progress, arguments: dict[str, Any]
    ) -> None:
        if isinstance(error, ConfigurationError | ConnectError):
            raise error
        progress.cause = error
        if type(error) is ConnectionError and await _refuses_tls(progress, arguments):
            raise errors.TLSRefused(_now(progress), error) from error
        if not is_transient(error):
            raise failure(_now(progress), error) from error

    async def _try_all(
        self, deadline: float | None, progress: _Progress, arguments: dict[str, Any]
    ) -> DriverConnection:
        """One round over all addresses; raises the last transient error of the round."""
        last: Exception | None = None
        for share, address, attrs in self._round(arguments):
            progress.address = _shown(address)
            try:
                async with asyncio.timeout(_part(deadline, share)):
                    return await self._try_tls(
                        address, progress, arguments | {"target_session_attrs": attrs}
                    )
            except Exception as error:
                if share == 1 or not is_transient(error):
                    raise
                last = progress.cause = error
        raise last or ConfigurationError("no address to connect to")

    def _round(self, arguments: dict[str, Any]) -> Iterator[tuple[int, Address | None, Any]]:
        """Addresses in turn, each with the number of those left: it may use that share of time."""
        addresses = _addresses(arguments)
        if self.shuffle_hosts:
            random.shuffle(addresses)
        attrs = arguments.get("target_session_attrs")
        wanted = ["standby", "any"] if attrs == "prefer-standby" else [attrs]
        turns = [(address, attr) for attr in wanted for address in addresses]
        for index, (address, attr) in enumerate(turns):
            yield len(turns) - index, address, attr

    async def _try_tls(
        self, address: Address | None, progress: _Progress, arguments: dict[str, Any]
    ) -> DriverConnection:
        """Connect once, or with ``prefer`` and ``allow`` once with TLS and once without."""
        mode = arguments.get("ssl")
        if mode not in ("prefer", "allow") or (address is not None and address.is_socket):
            return await self._open(address, progress, arguments)
        plain_first = self._plain.get(address, mode == "allow")
        for plain in (plain_first, not plain_first):
            context = False if plain else self.tls
            try:
                opened = await self._open(address, progress, arguments | {"ssl": context})
            except Exception as error:
                if plain is not plain_first or not _other_transport_may_do(error, plain=plain):
                    raise
            else:
                self._plain[address] = plain
                return opened
        raise AssertionError("unreachable")

    async def _open(
        self, address: Address | None, progress: _Progress, arguments: dict[str, Any]
    ) -> DriverConnection:
        found = self._found.get(address)
        if self.pooler != "auto" or found == "transaction":
            return await self._open_as(found or self.pooler, address, progress, arguments)
        try:
            connection = await self._open_as("none", address, progress, arguments)
        except asyncpg.ProtocolViolationError:  # 08P01: a pooler refuses our server settings
            connection = None
        if connection is not None:
            if found == "none" or await _is_direct(connection):
                self._found[address] = "none"
                return connection
            connection.terminate()
        connection = await self._open_as("transaction", address, progress, arguments)
        self._found[address] = "transaction"
        return connection

    async def _open_as(
        self, pooler: str, address: Address | None, progress: _Progress, arguments: dict[str, Any]
    ) -> DriverConnection:
        arguments = dict(arguments)
        settings: dict[str, str] = arguments.pop("server_settings", None) or {}
        later: dict[str, str] = {}
        if pooler != "none":
            later = {k: v for k, v in settings.items() if k.lower() not in STARTUP_SAFE}
            settings = {k: v for k, v in settings.items() if k not in later}
        if pooler == "transaction":
            self._check_caches()
            arguments["statement_cache_size"] = 0
        if callable(arguments.get("password")):
            arguments["password"] = await _ask(arguments["password"], progress)
        if address is not None:
            arguments |= {"host": address.host, "port": address.port}
        progress.attempts += 1
        progress.attempt_began = asyncio.get_running_loop().time()
        arguments |= {"server_settings": settings, "connection_class": DriverConnection}
        arguments["timeout"] = None  # the bound stands around all of this
        connection: DriverConnection = await asyncpg.connect(**arguments)
        try:
            connection.set_keepalive(self.keepalive)
            if pooler == "session" and later:
                await connection.execute("".join(f"SET {assignment(*i)};" for i in later.items()))
        except BaseException:
            connection.terminate()
            raise
        connection.set_up(
            pooler=pooler,
            session_limit=self.session_limit,
            transaction_settings=later if pooler == "transaction" else {},
        )
        return connection

    def _check_caches(self) -> None:
        if self.caches_wanted:
            raise ConfigurationError(
                "a pooler in transaction mode stands before the server, and there statement_cache_"
                "size, prepared_statement_cache_size and prepared_statement_name_func leak"
                " statements or mix up results: leave them out, or set DATABASE_POOLER=none if"
                " the pooler keeps prepared statements itself"
            )


def failure(attempt: Attempt, cause: Exception) -> ConnectError:
    """The typed error for what the driver or the operating system raised at a connect."""
    return _failure_type(cause)(attempt, cause)


def is_transient(error: BaseException) -> bool:
    """Whether the same connect may well succeed a little later."""
    state = errors.find_sqlstate(error)
    if state is not None:
        return state[:2] == "53" or state in _NOT_READY or state in _LOST
    if isinstance(error, asyncpg.exceptions.TargetServerAttributeNotMatched):
        return True
    return isinstance(error, OSError) and not isinstance(error, ssl.SSLError | PermissionError)


_BY_SQLSTATE = {
    "53300": errors.TooManyConnections,
    "3D000": errors.DatabaseNotFound,
    "08P01": errors.StartupParameterRefused,
    **dict.fromkeys(_NOT_READY, errors.ServerNotReady),
    **dict.fromkeys(_LOST, errors.ServerUnreachable),
}
_BY_TYPE: tuple[tuple[type[BaseException], type[ConnectError]], ...] = (
    (ssl.SSLCertVerificationError, errors.CertificateNotTrusted),
    (ssl.SSLError, errors.TLSRefused),
    (socket.gaierror, errors.HostNotFound),
    (TimeoutError, errors.ConnectTimeout),
    (ConnectionRefusedError, errors.ConnectRefused),
    (OSError, errors.ServerUnreachable),
    (asyncpg.exceptions.TargetServerAttributeNotMatched, errors.ServerNotReady),
)


def _failure_type(cause: Exception) -> type[ConnectError]:
    state = errors.find_sqlstate(cause)
    if state is not None:
        if state[:2] == "28":
            return errors.AuthenticationFailed
        return _BY_SQLSTATE.get(state, ConnectError)
    return next((ours for theirs, ours in _BY_TYPE if isinstance(cause, theirs)), ConnectError)


def _other_transport_may_do(error: Exception, *, plain: bool) -> bool:
    """As in libpq: a refusal by pg_hba.conf (28000), and with TLS also a failed negotiation."""
    if errors.find_sqlstate(error) == "28000":
        return True
    return not plain and (type(error) is ConnectionError or isinstance(error, ssl.SSLError))


async def _refuses_tls(progress: _Progress, arguments: dict[str, Any]) -> bool:
    """Ask whether the server offers TLS.

    asyncpg raises a bare ConnectionError both for a server without TLS and for one that hung up
    while it was asked; only the second is worth another attempt.
    """
    for address in _addresses(arguments):
        if address is None or address.is_socket or _shown(address) != progress.address:
            continue
        try:
            reader, writer = await asyncio.open_connection(
                address.host, address.port or DEFAULT_PORT
            )
        except OSError:
            return False
        try:
            writer.write(_SSL_REQUEST)
            return await reader.read(1) == b"N"
        except OSError:
            return False
        finally:
            writer.close()
    return False


async def _is_direct(connection: DriverConnection) -> bool:
    """Whether the server process that answers is the one announced at start-up.

    Behind a pooler they differ, direct they are equal (measured). Asked by the command tag, for
    the simple protocol returns no rows here and anything else would take two round trips.
    """
    told = connection.get_server_pid()
    try:
        tag = await connection.execute(f"SELECT 1 WHERE pg_backend_pid() = {told}")
    except BaseException:
        connection.terminate()
        raise
    return tag == "SELECT 1"


async def _ask(password: Any, progress: _Progress) -> str:
    try:
        answer = password()
        return str(await answer if inspect.isawaitable(answer) else answer)
    except Exception as error:
        raise errors.PasswordUnavailable(_now(progress), error) from error


def _addresses(arguments: dict[str, Any]) -> list[Address | None]:
    """The addresses among asyncpg's arguments; None is asyncpg's own default."""
    hosts, ports = arguments.get("host"), arguments.get("port")
    if not hosts:
        return [None]
    hosts = [hosts] if isinstance(hosts, str) else list(hosts)
    ports = list(ports) if isinstance(ports, list | tuple) else [ports] * len(hosts)
    return [Address(h, int(p) if p else None) for h, p in zip(hosts, ports, strict=True)]


def _shown(address: Address | None) -> str:
    return str(address) if address else "the local server"


def _part(deadline: float | None, share: int) -> float | None:
    if deadline is None or share == 1:
        return None
    return (deadline - asyncio.get_running_loop().time()) / share


def _now(progress: _Progress) -> Attempt:
    return progress.so_far(asyncio.get_running_loop().time())
