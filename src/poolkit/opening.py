"""One physical connection to one address: its TLS, its password and the pooler before it."""

from __future__ import annotations

import asyncio
import inspect
import ssl
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import asyncpg

from poolkit import errors
from poolkit.addresses import Candidate, Reputation
from poolkit.connect_failures import other_transport_may_do
from poolkit.driver import DriverConnection, assignment
from poolkit.errors import Attempt, ConfigurationError
from poolkit.parameters import Keepalive
from poolkit.race import Silence
from poolkit.route import Route, RoutedConnection
from poolkit.url import Address

STARTUP_SAFE = frozenset(
    {"application_name", "client_encoding", "datestyle", "timezone", "options"}
    | {"standard_conforming_strings"}
)
"""What PgBouncer takes at start-up (all but ``options`` it tracks); the rest it refuses: 08P01."""

FAIR_CHANCE = 1.0
"""Seconds that an attempt needs to count as having been given a chance."""


@dataclass(slots=True)
class Progress:
    """What one call of the connector has been through."""

    started: float
    deadline: float | None = None
    address: str = ""
    attempts: int = 0
    cause: Exception | None = None
    attempt_began: float = 0.0

    def has_just_begun(self) -> bool:
        """Whether the attempt that the deadline cut short is not what took the time.

        What the attempts before it ended with is then the better account.
        """
        return (self.deadline or 0.0) - self.attempt_began < FAIR_CHANCE

    def so_far(self) -> Attempt:
        """For the error."""
        now = asyncio.get_running_loop().time()
        return Attempt(self.address, self.attempts, now - self.started)


@dataclass(slots=True)
class Trial:
    """One attempt at one address.

    Attributes:
        arguments: asyncpg's.
        silence: How long the address has not answered.
    """

    candidate: Candidate
    progress: Progress
    arguments: dict[str, Any]
    silence: Silence = field(default_factory=Silence)

    def anew(self) -> Trial:
        """Another attempt at the same."""
        return Trial(self.candidate, self.progress, self.arguments)


@dataclass(eq=False, slots=True)
class Opener:
    """Makes physical connections, and remembers what it found out about each host.

    Attributes:
        pooler: ``auto``, ``none``, ``session`` or ``transaction``.
        keepalive: What is set on each socket.
        tls: The context for ``ssl="prefer"`` and ``ssl="allow"``.
        session_limit: Seconds of the statement timeout among the server settings.
        caches_wanted: Whether the caller asked for statement caches, or names, of his own.
        reputation: What is known of the addresses.
    """

    pooler: str = "auto"
    keepalive: Keepalive = field(default_factory=Keepalive)
    tls: ssl.SSLContext | None = None
    session_limit: float = 0.0
    caches_wanted: bool = False
    reputation: Reputation = field(default_factory=Reputation)
    _found: dict[Address | None, str] = field(default_factory=dict, repr=False)
    _plain: dict[Address | None, bool] = field(default_factory=dict, repr=False)

    async def open(self, trial: Trial) -> DriverConnection:
        """Connect once, or with ``prefer`` and ``allow`` once with TLS and once without."""
        trial.progress.address = str(trial.candidate)
        address, mode = trial.candidate.address, trial.arguments.get("ssl")
        if mode not in ("prefer", "allow") or (address is not None and address.is_socket):
            return await self._open(trial, trial.arguments)
        plain_first = self._plain.get(address, mode == "allow")
        for plain in (plain_first, not plain_first):
            context = False if plain else self.tls
            try:
                opened = await self._open(trial, trial.arguments | {"ssl": context})
            except Exception as error:
                if plain is not plain_first or not other_transport_may_do(error, plain=plain):
                    raise
            else:
                self._plain[address] = plain
                return opened
        raise AssertionError("unreachable")

    async def _open(self, trial: Trial, arguments: dict[str, Any]) -> DriverConnection:
        address = trial.candidate.address
        found = self._found.get(address)
        if self.pooler != "auto" or found == "transaction":
            return await self._open_as(found or self.pooler, trial, arguments)
        try:
            connection = await self._open_as("none", trial, arguments)
        except asyncpg.ProtocolViolationError:  # 08P01: a pooler refuses our server settings
            connection = None
        if connection is not None:
            if found == "none" or await _is_direct(connection):
                self._found[address] = "none"
                return connection
            connection.terminate()
        connection = await self._open_as("transaction", trial, arguments)
        self._found[address] = "transaction"
        return connection

    async def _open_as(
        self, pooler: str, trial: Trial, arguments: dict[str, Any]
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
            arguments["password"] = await _ask(arguments["password"], trial.progress)
        arguments["server_settings"] = settings
        connection = await self._reach(trial, arguments)
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

    async def _reach(self, trial: Trial, arguments: dict[str, Any]) -> DriverConnection:
        """One physical connect, by way of the candidate's own address."""
        loop = asyncio.get_running_loop()
        candidate, silence = trial.candidate, trial.silence
        if candidate.address is not None:
            arguments |= {"host": candidate.address.host, "port": candidate.address.port}
        route = Route(loop, candidate.endpoint, partial(self._note_answer, silence))
        arguments |= {
            "target_session_attrs": candidate.attrs,
            "loop": route,
            "connection_class": RoutedConnection,
            "timeout": None,  # the bound stands around all of this
        }
        trial.progress.attempts += 1
        trial.progress.attempt_began = loop.time()
        if candidate.failure is not None:
            raise candidate.failure
        silence.begin()
        try:
            connection: DriverConnection = await asyncpg.connect(**arguments)
        except BaseException:
            route.abort()
            raise
        finally:
            silence.end()
        return connection

    def _note_answer(self, silence: Silence) -> None:
        if silence.seconds:
            self.reputation.note_answer(silence.seconds)
            silence.end()

    def _check_caches(self) -> None:
        if self.caches_wanted:
            raise ConfigurationError(
                "a pooler in transaction mode stands before the server, and there statement_cache_"
                "size, prepared_statement_cache_size and prepared_statement_name_func leak"
                " statements or mix up results: leave them out, or set DATABASE_POOLER=none if"
                " the pooler keeps prepared statements itself"
            )


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


async def _ask(password: Any, progress: Progress) -> str:
    try:
        answer = password()
        return str(await answer if inspect.isawaitable(answer) else answer)
    except Exception as error:
        raise errors.PasswordUnavailable(progress.so_far(), error) from error
