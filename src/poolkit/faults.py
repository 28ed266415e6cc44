"""What an exception means: whether to try again, and what became of the work.

Nothing here reads an error's text: an event is known by its type, its SQLSTATE, its severity, and
by where in SQLAlchemy it was raised.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import exc as sa_exc

from poolkit import errors
from poolkit.errors import Failure, Interrupted, Outcome, causes, find_sqlstate
from poolkit.moments import Moment, commits, moment_of

__all__ = [
    "Fault",
    "FaultKind",
    "Outcome",
    "classify",
    "is_servers_answer",
    "kind_of",
    "outcome_of",
    "session_ended",
]


class FaultKind(StrEnum):
    """What went wrong."""

    POOL_TIMEOUT = "pool_timeout"
    POOL_OVERLOADED = "pool_overloaded"
    POOL_DRAINING = "pool_draining"
    CONNECT_TIMEOUT = "connect_timeout"
    CONNECT_REFUSED = "connect_refused"
    SERVER_UNREACHABLE = "server_unreachable"
    HOST_NOT_FOUND = "host_not_found"
    TLS_REFUSED = "tls_refused"
    TOO_MANY_CONNECTIONS = "too_many_connections"
    SERVER_NOT_READY = "server_not_ready"
    AUTHENTICATION_FAILED = "authentication_failed"
    DATABASE_NOT_FOUND = "database_not_found"
    STARTUP_PARAMETER_REFUSED = "startup_parameter_refused"
    CONNECT_FAILED = "connect_failed"
    STATEMENT_TIMEOUT = "statement_timeout"
    TRANSACTION_TIMEOUT = "transaction_timeout"
    LOCK_TIMEOUT = "lock_timeout"
    DEADLOCK = "deadlock"
    SERIALIZATION_FAILURE = "serialization_failure"
    CONNECTION_LOST = "connection_lost"
    READ_ONLY = "read_only"
    STALE_PLAN = "stale_plan"
    OUT_OF_RESOURCES = "out_of_resources"
    CANCELLED = "cancelled"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    CONFIGURATION = "configuration"
    INTEGRITY = "integrity"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Fault:
    """What an exception means.

    Attributes:
        kind: What went wrong.
        sqlstate: The server's own code, or None where no server answered.
        retryable: Whether the same work, done again as a whole in a fresh transaction, may well
            succeed.
        connection_lost: Whether the connection is gone.
        outcome: What became of the work: never sent, rolled back, or nobody can tell.
        http_status: What an HTTP service answers.
    """

    kind: FaultKind
    sqlstate: str | None
    retryable: bool
    connection_lost: bool
    outcome: Outcome
    http_status: int


_RETRYABLE = frozenset(
    {
        FaultKind.POOL_TIMEOUT,
        FaultKind.POOL_OVERLOADED,
        FaultKind.CONNECT_TIMEOUT,
        FaultKind.CONNECT_REFUSED,
        FaultKind.SERVER_UNREACHABLE,
        FaultKind.HOST_NOT_FOUND,
        FaultKind.TOO_MANY_CONNECTIONS,
        FaultKind.SERVER_NOT_READY,
        FaultKind.LOCK_TIMEOUT,
        FaultKind.DEADLOCK,
        FaultKind.SERIALIZATION_FAILURE,
        FaultKind.CONNECTION_LOST,
        FaultKind.READ_ONLY,
        FaultKind.STALE_PLAN,
    }
)

_HTTP_STATUS = {
    FaultKind.STATEMENT_TIMEOUT: 504,
    FaultKind.TRANSACTION_TIMEOUT: 504,
    FaultKind.LOCK_TIMEOUT: 504,
    FaultKind.DEADLINE_EXCEEDED: 504,
    FaultKind.INTEGRITY: 409,
    FaultKind.CANCELLED: 499,
    # Waiting does not help: somebody has to change something.
    FaultKind.TLS_REFUSED: 500,
    FaultKind.AUTHENTICATION_FAILED: 500,
    FaultKind.DATABASE_NOT_FOUND: 500,
    FaultKind.STARTUP_PARAMETER_REFUSED: 500,
    FaultKind.CONFIGURATION: 500,
    FaultKind.OTHER: 500,
}
_RETRY_LATER = 503

CONNECTING = frozenset(
    {
        FaultKind.CONNECT_TIMEOUT,
        FaultKind.CONNECT_REFUSED,
        FaultKind.SERVER_UNREACHABLE,
        FaultKind.HOST_NOT_FOUND,
        FaultKind.TLS_REFUSED,
        FaultKind.TOO_MANY_CONNECTIONS,
        FaultKind.SERVER_NOT_READY,
        FaultKind.AUTHENTICATION_FAILED,
        FaultKind.DATABASE_NOT_FOUND,
        FaultKind.STARTUP_PARAMETER_REFUSED,
        FaultKind.CONNECT_FAILED,
    }
)
"""What a connect may fail with."""

_NEVER_SENT = CONNECTING | {
    FaultKind.POOL_TIMEOUT,
    FaultKind.POOL_OVERLOADED,
    FaultKind.POOL_DRAINING,
    FaultKind.CONFIGURATION,
}

_OURS: tuple[tuple[type[BaseException], FaultKind], ...] = (
    (errors.PoolOverloaded, FaultKind.POOL_OVERLOADED),
    (sa_exc.TimeoutError, FaultKind.POOL_TIMEOUT),
    (errors.PoolDraining, FaultKind.POOL_DRAINING),
    (errors.ConnectTimeout, FaultKind.CONNECT_TIMEOUT),
    (errors.ConnectRefused, FaultKind.CONNECT_REFUSED),
    (errors.HostNotFound, FaultKind.HOST_NOT_FOUND),
    (errors.ServerUnreachable, FaultKind.SERVER_UNREACHABLE),
    (errors.TLSRefused, FaultKind.TLS_REFUSED),
    (errors.TooManyConnections, FaultKind.TOO_MANY_CONNECTIONS),
    (errors.ServerNotReady, FaultKind.SERVER_NOT_READY),
    (errors.AuthenticationFailed, FaultKind.AUTHENTICATION_FAILED),
    (errors.DatabaseNotFound, FaultKind.DATABASE_NOT_FOUND),
    (errors.StartupParameterRefused, FaultKind.STARTUP_PARAMETER_REFUSED),
    (errors.ConnectError, FaultKind.CONNECT_FAILED),
    (errors.DeadlineExceeded, FaultKind.DEADLINE_EXCEEDED),
    (errors.TransactionAborted, FaultKind.OTHER),
    (errors.StatementTimeout, FaultKind.STATEMENT_TIMEOUT),
    (errors.TransactionTimeout, FaultKind.TRANSACTION_TIMEOUT),
    (errors.LockTimeout, FaultKind.LOCK_TIMEOUT),
    (errors.DeadlockDetected, FaultKind.DEADLOCK),
    (errors.SerializationFailure, FaultKind.SERIALIZATION_FAILURE),
    (errors.StalePlan, FaultKind.STALE_PLAN),
    (errors.ReadOnlyServer, FaultKind.READ_ONLY),
    (errors.ConnectionLost, FaultKind.CONNECTION_LOST),
    (errors.ConfigurationError, FaultKind.CONFIGURATION),
)

_BY_SQLSTATE = {
    "25006": FaultKind.READ_ONLY,
    "25P04": FaultKind.TRANSACTION_TIMEOUT,
    "40001": FaultKind.SERIALIZATION_FAILURE,
    "40P01": FaultKind.DEADLOCK,
    "53300": FaultKind.TOO_MANY_CONNECTIONS,
    "55P03": FaultKind.LOCK_TIMEOUT,
    "57014": FaultKind.STATEMENT_TIMEOUT,
    "57P03": FaultKind.SERVER_NOT_READY,
}
_BY_CLASS = {
    "23": FaultKind.INTEGRITY,
    "28": FaultKind.AUTHENTICATION_FAILED,
    "53": FaultKind.OUT_OF_RESOURCES,
}
_AT_CONNECT = {
    "08P01": FaultKind.STARTUP_PARAMETER_REFUSED,
    "3D000": FaultKind.DATABASE_NOT_FOUND,
    "57P01": FaultKind.SERVER_NOT_READY,
    "57P02": FaultKind.SERVER_NOT_READY,
}

_SESSION_ENDED = frozenset({"25P03", "25P04", "57P01", "57P02", "57P04", "57P05"})
_NOT_EXECUTED = frozenset({"25P03", "57P05"})
"""The server ends a session that is idle, and looks at its clock before at what comes in."""
_DEAD_PEER = frozenset({errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN})
_UNRESOLVED = frozenset({"08007", "40003"})


def classify(error: BaseException) -> Fault:
    """Read any exception, ours or not.

    It is read through ``orig`` and ``__cause__`` down to the server's own SQLSTATE. An error of
    SQLAlchemy's own engines, raw or wrapped, is placed by its traceback; where that cannot be
    done, a lost connection, a timeout and a cancellation leave the outcome unknown.

    What is retryable is what passes by itself: locks, deadlocks, serialization failures, a full
    pool, a lost connection, a connect. A statement that ran into its timeout is not: run again,
    it most often takes as long again, from a server that has too much to do already.
    """
    chain = list(_chain(error))
    moment = _moment(chain)
    kind = kind_of(chain, moment)
    outcome = _outcome(chain, kind, moment)
    lost = _is_lost(chain, kind, moment)
    return Fault(
        kind=kind,
        sqlstate=_sqlstate(chain),
        retryable=_is_retryable(kind, outcome, lost=lost),
        connection_lost=lost,
        outcome=outcome,
        http_status=_http_status(kind, lost=lost),
    )


def _is_retryable(kind: FaultKind, outcome: Outcome, *, lost: bool) -> bool:
    if kind is FaultKind.READ_ONLY and not lost:
        return False  # the next attempt would meet the same server, or the same transaction's mode
    return kind in _RETRYABLE and outcome is not Outcome.UNKNOWN


def _http_status(kind: FaultKind, *, lost: bool) -> int:
    if kind is FaultKind.READ_ONLY and not lost:
        return 500
    return _HTTP_STATUS.get(kind, _RETRY_LATER)


# -- What it is --------------------------------------------------------------------------------


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes, through an ``asyncio.timeout`` too."""
    last = error
    for last in causes(error):
        yield last
    swallowed = last.__context__
    if isinstance(last, TimeoutError) and isinstance(swallowed, asyncio.CancelledError):
        yield from causes(swallowed)


def _sqlstate(chain: list[BaseException]) -> str | None:
    # A copy of ours has lost its causes, and kept what they said.
    ours = (error.sqlstate for error in chain if isinstance(error, Failure))
    return next(ours, None) or find_sqlstate(chain[0])


def kind_of(chain: list[BaseException], moment: Moment | None) -> FaultKind:
    """What went wrong, from an error with its causes and what was under way."""
    for error in chain:
        for ours, kind in _OURS:
            if isinstance(error, ours):
                return kind
    state = find_sqlstate(chain[0])
    if state is not None:
        return _kind_by_sqlstate(state, chain, moment)
    if moment is None and _is_from_elsewhere(chain):
        return FaultKind.OTHER
    return _kind_by_type(chain, moment)


def _is_from_elsewhere(chain: list[BaseException]) -> bool:
    """An OSError whose traceback shows no database's code, as of another client."""
    raised = isinstance(chain[0], OSError) and chain[0].__traceback__ is not None
    return raised and all(isinstance(error, OSError) for error in chain)


def _kind_by_sqlstate(state: str, chain: list[BaseException], moment: Moment | None) -> FaultKind:
    if any(_is_a(error, "asyncpg", "InvalidCachedStatementError") for error in chain):
        return FaultKind.STALE_PLAN
    if moment is Moment.CONNECT and state in _AT_CONNECT:
        return _AT_CONNECT[state]
    if state == "3D000" and session_ended(chain):
        return FaultKind.DATABASE_NOT_FOUND
    found = _BY_SQLSTATE.get(state) or _BY_CLASS.get(state[:2])
    if found is not None:
        return found
    if moment is Moment.CONNECT:
        unheard = state.startswith("08")
        return FaultKind.SERVER_UNREACHABLE if unheard else FaultKind.CONNECT_FAILED
    return FaultKind.CONNECTION_LOST if session_ended(chain) else FaultKind.OTHER


def _kind_by_type(chain: list[BaseException], moment: Moment | None) -> FaultKind:
    if isinstance(chain[0], asyncio.CancelledError):
        return FaultKind.CANCELLED
    if _is_callers_deadline(chain):
        return FaultKind.DEADLINE_EXCEEDED
    if moment is Moment.CONNECT or _refusal(chain) is not None:
        return _kind_of_connect(chain)
    if any(isinstance(error, sa_exc.IntegrityError) for error in chain):
        return FaultKind.INTEGRITY
    if any(_is_timeout(error) for error in chain):
        return FaultKind.OTHER if moment is None else FaultKind.STATEMENT_TIMEOUT
    return FaultKind.CONNECTION_LOST if session_ended(chain) else FaultKind.OTHER


def _is_callers_deadline(chain: list[BaseException]) -> bool:
    """Whether a clock outside of the database's code made a timeout of a cancellation."""
    timeout = next((error for error in chain if _is_timeout(error)), None)
    cancelled = any(isinstance(error, asyncio.CancelledError) for error in chain)
    return cancelled and (timeout is None or moment_of(timeout.__traceback__) is None)


def _kind_of_connect(chain: list[BaseException]) -> FaultKind:
    refusal = _refusal(chain)
    if refusal is not None:
        return refusal
    if any(_is_timeout(e) or _is_a(e, "psycopg", "ConnectionTimeout") for e in chain):
        return FaultKind.CONNECT_TIMEOUT
    if any(isinstance(error, OSError) for error in chain):
        return FaultKind.SERVER_UNREACHABLE
    if any(isinstance(error, sa_exc.DBAPIError) for error in chain) or session_ended(chain):
        return FaultKind.CONNECT_FAILED
    return FaultKind.OTHER


def _refusal(chain: Iterable[BaseException]) -> FaultKind | None:
    """What can happen at a connect only."""
    for error in chain:
        if isinstance(error, ConnectionRefusedError):
            return FaultKind.CONNECT_REFUSED
        if isinstance(error, socket.gaierror):
            return FaultKind.HOST_NOT_FOUND
        if isinstance(error, ssl.SSLCertVerificationError):
            return FaultKind.TLS_REFUSED
    return None


def _is_dead_peer(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in _DEAD_PEER


def _is_timeout(error: BaseException) -> bool:
    """A clock of the client's ran out; one of the operating system's has a number."""
    bare = isinstance(error, TimeoutError) and error.errno is None
    return bare and not isinstance(error, sa_exc.SQLAlchemyError)


def _is_a(error: BaseException, package: str, name: str) -> bool:
    """Whether it is of a class of a driver's, which need not be installed."""
    return any(
        cls.__name__ == name and cls.__module__.partition(".")[0] == package
        for cls in type(error).__mro__
    )


def _severity(chain: Iterable[BaseException]) -> str | None:
    """As the server said it; only ERROR leaves the session as it was."""
    found = None
    for error in chain:
        diagnosis = getattr(error, "diag", None)
        found = (
            getattr(error, "severity_en", None)
            or getattr(diagnosis, "severity_nonlocalized", None)
            or getattr(error, "severity", None)
            or found
        )
    return found if isinstance(found, str) else None


def is_servers_answer(chain: list[BaseException]) -> bool:
    """Whether the server itself refused, and its session goes on."""
    return _severity(chain) == "ERROR"


def session_ended(chain: list[BaseException]) -> bool:
    """Whether the server's session is over, or the driver has lost track of it."""
    severity = _severity(chain)
    if severity is not None:
        return severity in ("FATAL", "PANIC")
    if any(_is_a(error, "asyncpg", "InternalClientError") for error in chain):
        return True
    if any(isinstance(error, ConnectionError) or _is_dead_peer(error) for error in chain):
        return True
    if any(getattr(error, "connection_invalidated", False) for error in chain):
        return True
    state = find_sqlstate(chain[0])
    return state is not None and (state in _SESSION_ENDED or state.startswith("08"))


# -- What became of the work -------------------------------------------------------------------


def _moment(chain: list[BaseException]) -> Moment | None:
    for error in chain:
        if commits(getattr(error, "statement", None)):
            return Moment.COMMIT
    return next((m for e in chain if (m := moment_of(e.__traceback__)) is not None), None)


def _outcome(chain: list[BaseException], kind: FaultKind, moment: Moment | None) -> Outcome:
    for error in chain:
        if isinstance(error, Failure | Interrupted):
            return error.outcome
    if kind in _NEVER_SENT:
        return Outcome.NOT_SENT
    return outcome_of(chain, moment)


def outcome_of(chain: list[BaseException], moment: Moment | None) -> Outcome:
    """What became of the work that an error interrupted at that moment."""
    state = find_sqlstate(chain[0])
    if moment is Moment.CONNECT:
        return Outcome.NOT_SENT
    if state in _UNRESOLVED:
        return Outcome.UNKNOWN
    if state in _NOT_EXECUTED or is_servers_answer(chain) or moment is Moment.TRANSACTION:
        return Outcome.ROLLED_BACK
    if not _leaves_doubt(chain):
        return Outcome.ROLLED_BACK
    return Outcome.UNKNOWN


def _leaves_doubt(chain: list[BaseException]) -> bool:
    """Whether the server may have got further than we heard."""
    if any(_is_a(error, "asyncpg", "InterfaceError") for error in chain):
        return False  # the driver would not even send it
    if any(isinstance(e, asyncio.CancelledError) or _is_timeout(e) for e in chain):
        return True
    return session_ended(chain)


def _is_lost(chain: list[BaseException], kind: FaultKind, moment: Moment | None) -> bool:
    if kind in _NEVER_SENT:
        return False
    if any(getattr(error, "connection_invalidated", False) for error in chain):
        return True
    if moment in (Moment.TRANSACTION, Moment.COMMIT, Moment.AUTOCOMMIT) and any(
        isinstance(e, asyncio.CancelledError) or _is_timeout(e) for e in chain
    ):
        return True
    return kind is not FaultKind.OTHER and session_ended(chain)
