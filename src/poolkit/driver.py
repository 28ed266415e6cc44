"""The asyncpg connection as poolkit needs it.

What it leans on beyond asyncpg's documented interface stands here, and ``tests/test_driver.py``
fails where it changes:

- ``asyncpg.Connection.__init__`` is handed the transport;
- ``_config.command_timeout`` is what an operation without a timeout of its own waits for;
- asyncpg's ``Transaction`` sends ``BEGIN`` and ``COMMIT`` through ``Connection.execute``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import ssl
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

import asyncpg

from poolkit.errors import ConfigurationError
from poolkit.parameters import Keepalive

BACKSTOP_MARGIN = 1.0
"""Seconds that the client waits beyond the server's limit before it takes the network for dead."""

CLOSE_TIMEOUT = 2.0
"""Seconds that a peer has to acknowledge a close, before its socket is dropped."""

MET_WITHOUT_TRANSACTION = frozenset({"statement_timeout", "idle_in_transaction_session_timeout"})
"""In AUTOCOMMIT the client enforces the one, and the other has nothing to act on."""

_LISTS = frozenset({"search_path", "temp_tablespaces", "datestyle", "local_preload_libraries"})


class DriverConnection(asyncpg.Connection):
    """An asyncpg connection that knows its limits.

    Attributes:
        pooler: What stands between it and the server: ``none``, ``session`` or ``transaction``.
        session_limit: Seconds of the session's own statement timeout; 0 is off.
        limit: Seconds of the statement timeout that is in force now, in this transaction.
        needs_transaction: Settings that hold only inside a transaction.
    """

    _config: Any  # asyncpg's, with command_timeout

    def __init__(self, protocol: Any, transport: Any, *args: Any) -> None:
        super().__init__(protocol, transport, *args)
        self.pooler = "none"
        self.session_limit = self.limit = 0.0
        self._network = transport
        self.needs_transaction: frozenset[str] = frozenset()
        self._transaction_settings: dict[str, str] = {}
        self._session_backstop: float | None = self._config.command_timeout
        self._next_limit: float | None = None
        self._checks_commit = False

    @property
    def ssl_object(self) -> ssl.SSLObject | None:
        """The TLS session, or None on a plain connection."""
        found: ssl.SSLObject | None = self._network.get_extra_info("ssl_object")
        return found

    def set_up(
        self, *, pooler: str, session_limit: float, transaction_settings: Mapping[str, str]
    ) -> None:
        """Say what is in force, and what each transaction has to set for itself."""
        self.pooler = pooler
        self.session_limit = self.limit = session_limit
        self._transaction_settings = dict(transaction_settings)
        self.needs_transaction = frozenset(transaction_settings) - MET_WITHOUT_TRANSACTION

    def set_keepalive(self, keepalive: Keepalive) -> None:
        """Have the operating system notice a peer that vanished; no-op on a Unix socket."""
        own = self._network.get_extra_info("socket")
        # A duplicate descriptor, since uvloop's stand-in for a socket has no setsockopt.
        with socket.socket(fileno=os.dup(own.fileno())) as sock:
            if sock.family in (socket.AF_INET, socket.AF_INET6):
                _set_keepalive(sock, keepalive)

    def shut_socket(self) -> None:
        """End the session at once where there is no event loop any more to do it in good order."""
        found = self._network.get_extra_info("socket")
        with (
            contextlib.suppress(OSError),
            socket.fromfd(found.fileno(), found.family, found.type) as own,  # uvloop's cannot
        ):
            own.shutdown(socket.SHUT_RDWR)

    def limit_next_transaction(self, seconds: float) -> None:
        """Have the next BEGIN set this statement timeout, in the same round trip."""
        self._next_limit = seconds

    def wait_for(self, limit: float) -> None:
        """Note that the server's limit is now this, and wait a little longer than that."""
        self.limit = limit
        if limit == self.session_limit:
            self.wait_at_most(self._session_backstop)
        else:
            self.wait_at_most(limit + BACKSTOP_MARGIN if limit else None)

    def wait_at_most(self, seconds: float | None) -> None:
        """Stop waiting for a reply after that long; None waits for ever."""
        if self._config.command_timeout != seconds:
            self._config = self._config._replace(command_timeout=seconds)

    def check_next_commit(self) -> None:
        """Have this transaction's COMMIT fail where the server answers that it rolled back."""
        self._checks_commit = True

    async def close(self, *, timeout: float | None = None) -> None:
        """As asyncpg's, and always bounded.

        asyncpg 0.31 does not count in what it waits for while a cancel request is under way.

        Args:
            timeout: Seconds that the peer has; None is ``CLOSE_TIMEOUT``.
        """
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT if timeout is None else timeout):
                await super().close(timeout=timeout)
        except BaseException:
            self.terminate()
            self._network.abort()  # on asyncpg 0.31 a close under way keeps terminate() from it
            raise

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        """As asyncpg's; a BEGIN carries the transaction's settings with it.

        Raises:
            asyncpg.InFailedSQLTransactionError: COMMIT is checked, and nothing was committed.
        """
        if not args and query.startswith("BEGIN"):
            self._checks_commit = False
            query += self._settings_for_begin()
        status = await super().execute(query, *args, timeout=timeout)
        if self._checks_commit and query.startswith("COMMIT"):
            self._checks_commit = False
            if status == "ROLLBACK":
                raise _aborted()
        return status

    def _settings_for_begin(self) -> str:
        limit, self._next_limit = self._next_limit, None
        self.wait_for(self.session_limit if limit is None else limit)
        settings = self._transaction_settings
        if limit is not None:
            settings = settings | {"statement_timeout": milliseconds(limit)}
        return "".join(f" SET LOCAL {assignment(k, v)};" for k, v in settings.items())


def is_ours(connection: Any) -> TypeGuard[DriverConnection]:
    """Whether poolkit made a driver's connection.

    Not by ``isinstance``: asyncpg takes each of its connections for one of any class of its own.
    """
    return issubclass(type(connection), DriverConnection)


def _aborted() -> asyncpg.InFailedSQLTransactionError:
    error = asyncpg.InFailedSQLTransactionError("the server answered ROLLBACK to COMMIT")
    error.severity_en = "ERROR"  # as of an error that it sent: its session goes on
    return error


def autocommit_refused(names: Iterable[str]) -> ConfigurationError:
    """The error for AUTOCOMMIT where a transaction pooler would drop settings in silence."""
    return ConfigurationError(
        f"AUTOCOMMIT cannot honour {', '.join(sorted(names))}: behind a pooler in transaction mode"
        " settings hold only inside a transaction. Use a transaction, leave the setting out, or"
        " set it for the role (ALTER ROLE ... SET ...)"
    )


def milliseconds(seconds: float) -> str:
    """A duration as PostgreSQL's settings want it; what is not 0 does not become 0."""
    return str(max(1, round(seconds * 1000)) if seconds else 0)


def assignment(name: str, value: str) -> str:
    """``name = 'value'`` for SET, safely quoted.

    Raises:
        ConfigurationError: The name is no setting's name.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_$]*(\.[A-Za-z_][A-Za-z0-9_$]*)?", name):
        raise ConfigurationError(f"{name!r} is not the name of a PostgreSQL setting")
    if name.lower() in _LISTS:
        items = re.findall(r'"((?:[^"]|"")*)"|([^\s,"]+)', value)
        texts = [quoted.replace('""', '"') if quoted else bare for quoted, bare in items] or [""]
    else:
        texts = [value]
    return f"{name} = " + ", ".join(_literal(text) for text in texts)


def _literal(text: str) -> str:
    doubled = text.replace("'", "''")
    return "E'" + doubled.replace("\\", "\\\\") + "'" if "\\" in text else f"'{doubled}'"


def _set_keepalive(sock: socket.socket, keepalive: Keepalive) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, int(keepalive.enabled))
    options = {
        # macOS calls the idle time TCP_KEEPALIVE and has no user timeout.
        "TCP_KEEPIDLE": keepalive.idle,
        "TCP_KEEPALIVE": keepalive.idle,
        "TCP_KEEPINTVL": keepalive.interval,
        "TCP_KEEPCNT": keepalive.count,
        "TCP_USER_TIMEOUT": round(keepalive.user_timeout * 1000),
    }
    for name, value in options.items():
        option = getattr(socket, name, None)
        if option is not None and value:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
