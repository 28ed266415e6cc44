"""What ``classify`` makes of exceptions by themselves: ours, the drivers', and a program's."""

import asyncio
import copy
import pickle
import socket
import ssl

import asyncpg
import pytest
from sqlalchemy import Connection, Engine, exc

from poolkit import (
    ConfigurationError,
    ConnectionLost,
    DeadlockDetected,
    Failure,
    Fault,
    FaultKind,
    IdleInTransactionTimeout,
    Interrupted,
    LockTimeout,
    Outcome,
    PoolDraining,
    PoolOverloaded,
    PoolTimeout,
    ReadOnlyServer,
    SerializationFailure,
    StalePlan,
    StatementTimeout,
    TransactionTimeout,
    WrongEventLoop,
    classify,
    errors,
)
from poolkit.errors import Attempt
from poolkit.moments import commits

ATTEMPT = Attempt("db:5432", 3, 1.5)


def server_error(cls: type[Exception], severity: str = "ERROR") -> Exception:
    error = cls("words that say nothing")
    error.severity_en = severity
    return error


def psycopg_error(sqlstate: str | None, severity: str | None = None, name: str = "Error"):
    """As psycopg's look, which is not installed."""
    diag = type("Diagnostic", (), {"severity_nonlocalized": severity})()
    made = type(name, (Exception,), {"__module__": "psycopg.errors", "sqlstate": sqlstate})
    error = made("words that say nothing")
    error.diag = diag
    return error


def wrapped(orig: Exception, cls=exc.DBAPIError, statement="SELECT 1", **kwargs) -> exc.DBAPIError:
    return cls(statement, {}, orig, **kwargs)


@pytest.mark.parametrize(
    ("error", "kind", "retryable", "status"),
    [
        (PoolTimeout("full"), FaultKind.POOL_TIMEOUT, True, 503),
        (exc.TimeoutError("full"), FaultKind.POOL_TIMEOUT, True, 503),
        (PoolOverloaded("full"), FaultKind.POOL_OVERLOADED, True, 503),
        (PoolDraining("over"), FaultKind.POOL_DRAINING, False, 503),
        (ConfigurationError("no"), FaultKind.CONFIGURATION, False, 500),
        *(
            (cls(ATTEMPT, OSError()), kind, retryable, status)
            for cls, kind, retryable, status in [
                (errors.ConnectTimeout, FaultKind.CONNECT_TIMEOUT, True, 503),
                (errors.ConnectRefused, FaultKind.CONNECT_REFUSED, True, 503),
                (errors.ServerUnreachable, FaultKind.SERVER_UNREACHABLE, True, 503),
                (errors.HostNotFound, FaultKind.HOST_NOT_FOUND, True, 503),
                (errors.TooManyConnections, FaultKind.TOO_MANY_CONNECTIONS, True, 503),
                (errors.ServerNotReady, FaultKind.SERVER_NOT_READY, True, 503),
                (errors.TLSRefused, FaultKind.TLS_REFUSED, False, 500),
                (errors.CertificateNotTrusted, FaultKind.TLS_REFUSED, False, 500),
                (errors.AuthenticationFailed, FaultKind.AUTHENTICATION_FAILED, False, 500),
                (errors.DatabaseNotFound, FaultKind.DATABASE_NOT_FOUND, False, 500),
                (errors.StartupParameterRefused, FaultKind.STARTUP_PARAMETER_REFUSED, False, 500),
                (errors.ConnectError, FaultKind.CONNECT_FAILED, False, 503),
            ]
        ),
        (ConnectionRefusedError(), FaultKind.CONNECT_REFUSED, True, 503),
        (socket.gaierror(), FaultKind.HOST_NOT_FOUND, True, 503),
        (ssl.SSLCertVerificationError(), FaultKind.TLS_REFUSED, False, 500),
        (asyncpg.TooManyConnectionsError("x"), FaultKind.TOO_MANY_CONNECTIONS, True, 503),
        (asyncpg.CannotConnectNowError("x"), FaultKind.SERVER_NOT_READY, True, 503),
        (asyncpg.InvalidPasswordError("x"), FaultKind.AUTHENTICATION_FAILED, False, 500),
    ],
)
def test_before_anything_was_sent(error, kind, retryable, status) -> None:
    """The pool, the connect, the configuration."""
    fault = classify(error)
    assert fault == Fault(kind, fault.sqlstate, retryable, False, Outcome.NOT_SENT, status)


@pytest.mark.parametrize(
    ("driver_error", "state", "kind", "retryable", "status"),
    [
        (asyncpg.LockNotAvailableError, "55P03", FaultKind.LOCK_TIMEOUT, True, 504),
        (asyncpg.DeadlockDetectedError, "40P01", FaultKind.DEADLOCK, True, 503),
        (asyncpg.SerializationError, "40001", FaultKind.SERIALIZATION_FAILURE, True, 503),
        (asyncpg.QueryCanceledError, "57014", FaultKind.STATEMENT_TIMEOUT, False, 504),
        (asyncpg.UniqueViolationError, "23505", FaultKind.INTEGRITY, False, 409),
        (asyncpg.ReadOnlySQLTransactionError, "25006", FaultKind.READ_ONLY, False, 500),
        (asyncpg.InvalidCachedStatementError, "0A000", FaultKind.STALE_PLAN, True, 503),
        (asyncpg.DiskFullError, "53100", FaultKind.OUT_OF_RESOURCES, False, 503),
        (asyncpg.PostgresSyntaxError, "42601", FaultKind.OTHER, False, 500),
        (asyncpg.FeatureNotSupportedError, "0A000", FaultKind.OTHER, False, 500),
    ],
)
def test_what_the_server_refuses(driver_error, state, kind, retryable, status) -> None:
    """Raw, wrapped, as a cause of a program's own error, and as psycopg says it."""
    raw = server_error(driver_error)
    program = RuntimeError("sorry")
    program.__cause__ = wrapped(raw)
    expected = Fault(kind, state, retryable, False, Outcome.ROLLED_BACK, status)
    assert [classify(error) for error in (raw, wrapped(raw), program)] == [expected] * 3
    if kind is not FaultKind.STALE_PLAN:  # its code alone does not tell it from other refusals
        assert classify(wrapped(psycopg_error(state, "ERROR"))) == expected


@pytest.mark.parametrize(
    "error",
    [
        asyncpg.ConnectionDoesNotExistError("x"),
        asyncpg.InternalClientError("x"),
        server_error(asyncpg.AdminShutdownError, "FATAL"),
        server_error(asyncpg.InternalServerError, "PANIC"),
        psycopg_error("57P01", "FATAL"),
        ConnectionResetError(),
        TimeoutError(110, "the operating system's"),
    ],
)
def test_lost_and_not_placed(error) -> None:
    """Nobody can tell what became of the work, so that it is not retried."""
    for found in (classify(error), classify(wrapped(error))):
        assert (found.kind, found.connection_lost) == (FaultKind.CONNECTION_LOST, True)
        assert (found.outcome, found.retryable) == (Outcome.UNKNOWN, False)
        assert found.http_status == 503


def test_invalidated_without_a_code() -> None:
    """psycopg gives none for a connection that broke; SQLAlchemy's flag tells."""
    fault = classify(wrapped(psycopg_error(None), connection_invalidated=True))
    assert (fault.kind, fault.outcome) == (FaultKind.CONNECTION_LOST, Outcome.UNKNOWN)


@pytest.mark.parametrize("state", ["08001", "08006", "08P01", "57P01", "3D000"])
def test_an_error_with_a_connections_code(state) -> None:
    """An ERROR, as of a foreign server or of DROP DATABASE, leaves the session as it is."""
    fault = classify(wrapped(psycopg_error(state, "ERROR")))
    assert (fault.kind, fault.connection_lost) == (FaultKind.OTHER, False)
    assert (fault.outcome, fault.retryable) == (Outcome.ROLLED_BACK, False)


@pytest.mark.parametrize("state", ["25P03", "57P05"])
def test_sessions_that_were_idle(state) -> None:
    """What came after the server's end of it was not executed, at COMMIT and anywhere."""
    error = wrapped(psycopg_error(state, "FATAL"), statement="COMMIT")
    assert classify(error).outcome is Outcome.ROLLED_BACK


@pytest.mark.parametrize("state", ["08007", "40003"])
def test_the_server_does_not_know_either(state) -> None:
    """It says so, and is believed."""
    fault = classify(wrapped(psycopg_error(state, "ERROR")))
    assert (fault.outcome, fault.retryable) == (Outcome.UNKNOWN, False)


def test_a_serialization_failure_that_ends_the_session() -> None:
    """A conflict with recovery at a standby is FATAL; placed nowhere, the outcome is unknown."""
    fault = classify(server_error(asyncpg.SerializationError, "FATAL"))
    assert (fault.kind, fault.connection_lost) == (FaultKind.SERIALIZATION_FAILURE, True)
    assert (fault.outcome, fault.retryable) == (Outcome.UNKNOWN, False)


def raised(error: BaseException) -> BaseException:
    try:
        raise error  # noqa: TRY301
    except BaseException as caught:  # noqa: BLE001
        return caught


@pytest.mark.parametrize(
    "error",
    [ValueError("x"), KeyError("x"), WrongEventLoop("x"), exc.InvalidRequestError("x")],
)
def test_a_programs_own_error(error) -> None:
    """Not retryable, whatever it says."""
    expected = Fault(FaultKind.OTHER, None, False, False, Outcome.ROLLED_BACK, 500)
    assert classify(raised(error)) == expected


@pytest.mark.parametrize("error", [FileNotFoundError(2, "x"), PermissionError(13, "x")])
def test_files_are_not_servers(error) -> None:
    """An OSError is a lost connection only where its number or type says so."""
    fault = classify(error)
    assert (fault.kind, fault.connection_lost) == (FaultKind.OTHER, False)


@pytest.mark.parametrize("error", [ConnectionRefusedError(), ConnectionResetError()])
def test_another_clients_network(error) -> None:
    """Raised elsewhere, as by a call of another service: not the database's, not retried."""
    fault = classify(raised(error))
    assert (fault.kind, fault.retryable) == (FaultKind.OTHER, False)
    assert not fault.connection_lost


def test_cancelled_and_not_placed() -> None:
    """Outside of the database's code nobody can tell what a cancellation has hit."""
    cancelled = asyncio.CancelledError()
    swallowed = TimeoutError()
    swallowed.__context__ = cancelled
    chained = TimeoutError()
    chained.__cause__ = cancelled
    assert classify(cancelled).kind is FaultKind.CANCELLED
    assert classify(swallowed).kind is classify(chained).kind is FaultKind.DEADLINE_EXCEEDED
    for error in (cancelled, swallowed, chained, TimeoutError()):
        assert (classify(error).outcome, classify(error).retryable) == (Outcome.UNKNOWN, False)


@pytest.mark.parametrize("outcome", list(Outcome))
def test_what_an_interruption_says(outcome) -> None:
    """The note that poolkit chains to a cancellation is believed, through a timeout too."""
    cancelled = asyncio.CancelledError()
    cancelled.__cause__ = Interrupted("at COMMIT", outcome)
    timeout = TimeoutError()
    timeout.__cause__ = cancelled
    assert classify(cancelled).outcome is classify(timeout).outcome is outcome


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("COMMIT", True),
        ("  commit;", True),
        ("/* app */ COMMIT PREPARED 'x'", True),
        ("-- why\nEND", True),
        ("PREPARE TRANSACTION 'x'", True),
        ("PREPARE plan AS SELECT 1", False),
        ("COMMITTED", False),
        ("SELECT 'COMMIT'", False),
        ("ENDPOINT", False),
        (None, False),
    ],
)
def test_commits_of_the_programs_own(statement, expected) -> None:
    """Known by how the statement begins; lost in one, the outcome is unknown."""
    assert commits(statement) is expected
    if expected:
        error = wrapped(asyncpg.ConnectionDoesNotExistError("x"), statement=statement)
        assert classify(error).outcome is Outcome.UNKNOWN


OURS = (
    StatementTimeout,
    LockTimeout,
    DeadlockDetected,
    SerializationFailure,
    StalePlan,
    ReadOnlyServer,
    ConnectionLost,
    IdleInTransactionTimeout,
    TransactionTimeout,
)


@pytest.mark.parametrize("cls", OURS)
@pytest.mark.parametrize("keep", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
def test_ours_can_be_kept(cls, keep) -> None:
    """Copied and pickled they mean the same, and hide what was hidden."""
    error = cls(
        "SELECT $1",
        ("s3cret",),
        asyncpg.DeadlockDetectedError("x"),
        hide_parameters=True,
        connection_invalidated=True,
    ).explained("what happened", Outcome.ROLLED_BACK)
    kept = keep(error)
    assert type(kept) is cls
    assert isinstance(kept, Failure)
    assert (str(kept), classify(kept)) == (str(error), classify(error))
    assert (kept.params, kept.sqlstate, kept.outcome) == (("s3cret",), "40P01", error.outcome)
    assert str(kept).startswith("what happened")
    assert "s3cret" not in str(kept)


def test_not_placed_ours_is_unknown() -> None:
    """An error of ours that nobody placed promises nothing."""
    assert classify(ConnectionLost(None, None, OSError())).outcome is Outcome.UNKNOWN


@pytest.mark.parametrize(
    ("cls", "orig", "kind", "status"),
    [
        (errors.DeadlineExceeded, TimeoutError(), FaultKind.DEADLINE_EXCEEDED, 504),
        (
            errors.TransactionAborted,
            server_error(asyncpg.InFailedSQLTransactionError),
            FaultKind.OTHER,
            500,
        ),
    ],
)
def test_what_running_transactions_raises(cls, orig, kind, status) -> None:
    """Known by its type, not by what lies beneath; neither is worth another attempt."""
    fault = classify(cls(None, None, orig))
    assert (fault.kind, fault.http_status) == (kind, status)
    assert (fault.retryable, fault.outcome) == (False, Outcome.ROLLED_BACK)


def test_an_interruption_can_be_pickled() -> None:
    """With its outcome."""
    kept = pickle.loads(pickle.dumps(Interrupted("at COMMIT", Outcome.UNKNOWN)))
    assert (str(kept), kept.outcome) == ("at COMMIT", Outcome.UNKNOWN)


def test_what_it_leans_on() -> None:
    """SQLAlchemy's names, by which an error of any engine is placed."""
    assert Engine.raw_connection.__code__.co_name == "raw_connection"
    assert Connection._commit_impl.__code__.co_name == "_commit_impl"
    assert callable(Connection._is_autocommit_isolation)
