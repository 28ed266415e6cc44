"""Exceptions: each is a subclass of what SQLAlchemy and asyncpg raise today for the same event.

Nothing here reads an error's text: an event is known by its type and its SQLSTATE.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

from sqlalchemy import exc as sa_exc

__all__ = [
    "AuthenticationFailed",
    "CertificateNotTrusted",
    "ConfigurationError",
    "ConnectError",
    "ConnectRefused",
    "ConnectTimeout",
    "ConnectionLost",
    "DatabaseNotFound",
    "DeadlineExceeded",
    "DeadlockDetected",
    "Failure",
    "HostNotFound",
    "IdleInTransactionTimeout",
    "Interrupted",
    "LockTimeout",
    "PasswordUnavailable",
    "PoolDraining",
    "PoolOverloaded",
    "PoolTimeout",
    "ReadOnlyServer",
    "SerializationFailure",
    "ServerNotReady",
    "ServerUnreachable",
    "StalePlan",
    "StartupParameterRefused",
    "StatementTimeout",
    "TLSRefused",
    "TooManyConnections",
    "TransactionAborted",
    "TransactionTimeout",
    "WrongEventLoop",
]


class ConfigurationError(sa_exc.ArgumentError, ValueError):
    """A setting, URL or argument cannot be honoured; the message names it and the remedy."""


class Outcome(StrEnum):
    """What became of the work."""

    NOT_SENT = "not_sent"
    """Nothing reached the server."""
    ROLLED_BACK = "rolled_back"
    """Nothing of it is left."""
    UNKNOWN = "unknown"
    """It may have taken effect or not: only a look at the data tells."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """What was tried before a connect was given up.

    Attributes:
        address: Whom we tried to reach, e.g. ``db.example.com:5432``; never holds a password.
        attempts: How many physical connects were started.
        elapsed: Seconds from the first attempt to giving up.
    """

    address: str
    attempts: int
    elapsed: float


class ConnectError(sa_exc.OperationalError):
    """No connection could be made. The base of all connect failures.

    Attributes:
        address: The server's address, without credentials.
        attempts: Physical connects started.
        elapsed: Seconds spent in total.
        orig: The last cause, as the driver or the operating system raised it.
    """

    code = ""  # the message says it all: no link to SQLAlchemy's page on generic errors
    hint = ""
    errno: int | None  # some subclasses are OSErrors too

    def __init__(self, attempt: Attempt, orig: BaseException) -> None:
        super().__init__(None, None, orig, connection_invalidated=False)
        self.attempt = attempt
        self.address = attempt.address
        self.attempts = attempt.attempts
        self.elapsed = attempt.elapsed
        self.args = (self._text(orig),)
        self.errno = getattr(orig, "errno", None)

    @property
    def sqlstate(self) -> str | None:
        """The server's SQLSTATE, or None where no server answered."""
        return find_sqlstate(self.orig)

    def _text(self, orig: BaseException) -> str:
        tried = f"{self.attempts} attempt{'s' * (self.attempts != 1)} in {self.elapsed:.1f} s"
        text = f"cannot connect to {self.address} ({tried}): {self._cause(orig)}"
        return f"{text}. {self.hint}" if self.hint else text

    def _cause(self, orig: BaseException) -> str:
        return describe(orig)

    def __reduce__(self) -> Any:
        return (type(self), (self.attempt, self.orig))


class ConnectTimeout(ConnectError, TimeoutError):
    """``connection_timeout`` ran out before any address gave a usable connection."""

    hint = (
        "The limit is DATABASE_CONNECTION_TIMEOUT (all addresses and retries together): raise it"
        " if the server needs longer to wake up, otherwise check the address and the firewall"
    )


class ServerUnreachable(ConnectError, ConnectionError):
    """The network or the operating system would not let us through, or hung up on us."""

    hint = "Check DATABASE_URL's host and port, that the server runs, and the way to it"


class ConnectRefused(ServerUnreachable, ConnectionRefusedError):
    """Nothing listens at the address."""


class HostNotFound(ServerUnreachable, socket.gaierror):
    """The host's name has no address."""

    hint = "Check the host name in DATABASE_URL"


class TLSRefused(ConnectError, ConnectionError):
    """TLS was demanded and the server does not offer it, or the handshake failed."""

    hint = (
        "The URL demands TLS: turn it on at the server, or, on a network you trust,"
        " say sslmode=prefer or sslmode=disable"
    )


class CertificateNotTrusted(TLSRefused, ssl.SSLCertVerificationError):
    """The server's certificate is not signed by a trusted authority, or is for another host."""

    hint = (
        "Name the authority's certificate with sslrootcert=<file> (sslrootcert=system for the"
        " system's own), and the host as the certificate spells it"
    )


class TooManyConnections(ConnectError):
    """The server's ``max_connections``, or the role's or database's limit, is reached (53300)."""

    hint = (
        "Lower DATABASE_POOL_SIZE + DATABASE_MAX_OVERFLOW times the number of processes, or raise"
        " the server's max_connections; `poolkit check` shows both"
    )


class ServerNotReady(ConnectError):
    """The server is starting, stopping or recovering (57P01 to 57P03)."""


class AuthenticationFailed(ConnectError):
    """The server does not accept the user, the password or the way of connecting (28xxx)."""

    hint = "Check the user and the password (DATABASE_USER, DATABASE_PASSWORD, DATABASE_URL)"


class PasswordUnavailable(ConnectError):
    """The callable that gives the password failed."""

    hint = "`password=` is asked at every physical connect"

    def _cause(self, orig: BaseException) -> str:
        # Its text may hold what must not be logged.
        return f"the password callable raised {type(orig).__name__}"


class DatabaseNotFound(ConnectError):
    """The database does not exist (3D000)."""

    hint = "Check the database's name (DATABASE_NAME, or the end of DATABASE_URL's path)"


class StartupParameterRefused(ConnectError):
    """A pooler refuses one of the parameters sent at start-up (08P01)."""

    hint = (
        "Behind PgBouncer or its like, set DATABASE_POOLER to `transaction` or `session`"
        " (`auto` finds out by itself), and take what it refuses out of the URL's `options`"
    )


class Failure(sa_exc.DBAPIError):
    """What was under way failed. The base of all below that have a statement, or a COMMIT.

    Attributes:
        outcome: What became of the work.
        connection_invalidated: Whether the connection was discarded.
        orig: The last cause, as the driver or the operating system raised it.
    """

    code = ""  # the message says it all: no link to SQLAlchemy's page on generic errors
    hint = ""
    outcome: Outcome = Outcome.UNKNOWN

    def explained(self, text: str, outcome: Outcome | None = None) -> Self:
        """The same error, saying ``text`` instead of the driver's words."""
        self.args = (f"{text}. {self.hint}" if self.hint else text,)
        if outcome is not None:
            self.outcome = outcome
        return self

    @property
    def sqlstate(self) -> str | None:
        """The server's SQLSTATE, or None where no server answered."""
        kept: str | None = vars(self).get("_sqlstate")
        return kept or find_sqlstate(self.orig)

    def __reduce__(self) -> Any:
        reduced: Any = super().__reduce__()
        rebuild, arguments, state = reduced
        kept = {"args": self.args, "outcome": self.outcome, "_sqlstate": self.sqlstate}
        return rebuild, arguments, state | kept


class StatementTimeout(Failure, sa_exc.OperationalError, TimeoutError):
    """A statement ran longer than it may: the server ended it, or we stopped waiting.

    ``connection_invalidated`` tells which: False, the server ended it in time (57014) and the
    connection is kept; True, the server never answered and the connection was discarded.
    """

    hint = (
        "The limit is DATABASE_STATEMENT_TIMEOUT, or"
        " execution_options(statement_timeout=...) for this one"
    )


class LockTimeout(Failure, sa_exc.OperationalError):
    """A lock was not to be had in ``lock_timeout``, or at once with NOWAIT (55P03)."""

    hint = "Roll back and run the transaction again; the limit is DATABASE_LOCK_TIMEOUT"


class DeadlockDetected(Failure, sa_exc.OperationalError):
    """Two transactions waited for each other, and the server ended this one (40P01)."""

    hint = "Roll back and run the transaction again; lock rows in the same order everywhere"


class SerializationFailure(Failure, sa_exc.OperationalError):
    """A concurrent transaction is in the way of REPEATABLE READ or SERIALIZABLE (40001)."""

    hint = "Roll back and run the transaction again, with the reads that it rests on"


class StalePlan(Failure, sa_exc.NotSupportedError):
    """A table changed under a prepared statement, as by a migration; the next time it is new."""

    hint = "Roll back and run the transaction again: its statements are then prepared anew"


class ReadOnlyServer(Failure, sa_exc.OperationalError):
    """The server or the transaction is read-only (25006).

    ``connection_invalidated`` tells which: True, nobody asked for that, so that a failover has
    left the pool at a standby, and no connection from before is used any more; False, the
    transaction was asked to be read-only.
    """


class ConnectionLost(
    Failure,
    sa_exc.OperationalError,
    sa_exc.InternalError,
    sa_exc.InterfaceError,
    ConnectionError,
):
    """The connection was closed, reset or ended by the server while it was in use."""

    hint = "The connection was discarded; the pool checks the others before it uses them"


class IdleInTransactionTimeout(ConnectionLost):
    """A transaction stood idle for too long, and the server ended the session (25P03)."""

    hint = (
        "Do slow work outside of the transaction; the limit is DATABASE_IDLE_IN_TRANSACTION_TIMEOUT"
    )


class TransactionTimeout(ConnectionLost, TimeoutError):
    """A transaction took longer than it may, and the server ended the session (25P04)."""

    hint = "The limit is the server's transaction_timeout"


class TransactionAborted(Failure, sa_exc.InternalError):
    """The work returned, but the server had aborted its transaction: nothing is committed.

    A statement failed and the work went on. SQLAlchemy and asyncpg report such a COMMIT as done.
    """

    hint = "Let the error out, or run the statement that may fail in begin_nested()"
    outcome = Outcome.ROLLED_BACK


class DeadlineExceeded(Failure, sa_exc.OperationalError, TimeoutError):
    """The deadline of ``run_in_transaction`` struck before COMMIT: nothing is committed."""

    hint = "Give a longer deadline=, or None for no limit"
    outcome = Outcome.ROLLED_BACK


class Interrupted(sa_exc.SQLAlchemyError):
    """The cause of a cancellation that hit the database: what became of the work.

    A cancellation must stay what it is; this is chained to it as its ``__cause__``.
    """

    def __init__(self, message: str, outcome: Outcome) -> None:
        super().__init__(message)
        self.outcome = outcome

    def __reduce__(self) -> Any:
        return (type(self), (self.args[0], self.outcome))


class PoolTimeout(sa_exc.TimeoutError):
    """No connection became free within ``pool_timeout``; the message has the pool's state."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="3o7r")

    def __reduce__(self) -> Any:
        return (type(self), (self.args[0],))


class PoolOverloaded(PoolTimeout):
    """Too many callers wait already (``pool_max_waiting``): refused without waiting."""


class PoolDraining(sa_exc.InvalidRequestError):
    """The engine was drained for a shutdown and gives out no connection any more."""


class WrongEventLoop(sa_exc.InvalidRequestError):
    """An engine was used from a second event loop; its connections belong to the first."""


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, then what it wraps (``orig``) or was raised from, outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = getattr(error, "orig", None) or error.__cause__


def find_sqlstate(error: BaseException | None) -> str | None:
    """The deepest SQLSTATE in the chain: the server's own, not a wrapper's."""
    found = None
    for cause in causes(error):
        state = vars(type(cause)).get("sqlstate") or getattr(cause, "sqlstate", None)
        if isinstance(state, str):
            found = state
    return found


def describe(error: BaseException) -> str:
    """The innermost error in one line, with its type where its text alone says too little."""
    chain = list(causes(error))
    secretive = next((cause for cause in chain if isinstance(cause, PasswordUnavailable)), None)
    if secretive is not None:
        return secretive._cause(chain[-1])  # noqa: SLF001 (of this module)
    innermost = chain[-1]
    text = " ".join(str(innermost).split())
    if find_sqlstate(innermost):
        return f"{text} (SQLSTATE {find_sqlstate(innermost)})"
    return f"{type(innermost).__name__}: {text}" if text else "no answer"
