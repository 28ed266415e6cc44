"""One typed error for each way to fail under way, the same on SQLAlchemy 2.0 and 2.1.

With it comes the word on what became of the work.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExceptionContext

from poolkit.errors import (
    ConnectError,
    ConnectionLost,
    DeadlockDetected,
    Failure,
    IdleInTransactionTimeout,
    Interrupted,
    LockTimeout,
    Outcome,
    ReadOnlyServer,
    SerializationFailure,
    StalePlan,
    StatementTimeout,
    TransactionTimeout,
    causes,
    describe,
    find_sqlstate,
)
from poolkit.faults import FaultKind, is_servers_answer, kind_of, outcome_of, session_ended
from poolkit.moments import Moment, commits, moment_of
from poolkit.pool import HandoffPool
from poolkit.timeouts import limit_in_force

_TYPES: Mapping[FaultKind, type[Failure]] = {
    FaultKind.STATEMENT_TIMEOUT: StatementTimeout,
    FaultKind.TRANSACTION_TIMEOUT: TransactionTimeout,
    FaultKind.LOCK_TIMEOUT: LockTimeout,
    FaultKind.DEADLOCK: DeadlockDetected,
    FaultKind.SERIALIZATION_FAILURE: SerializationFailure,
    FaultKind.STALE_PLAN: StalePlan,
    FaultKind.READ_ONLY: ReadOnlyServer,
    FaultKind.CONNECTION_LOST: ConnectionLost,
}
_IDLE_IN_TRANSACTION = "25P03"

_WHERE = {
    Moment.TRANSACTION: "inside a transaction",
    Moment.COMMIT: "at COMMIT",
    Moment.AUTOCOMMIT: "in AUTOCOMMIT",
}
_WHAT_BECAME = {
    Outcome.ROLLED_BACK: "nothing of it took effect",
    Outcome.UNKNOWN: "whether it took effect is unknown",
}
_READ_ONLY_SESSIONS = frozenset({"read-only", "standby", "prefer-standby"})


def install(engine: Engine, connect_args: Mapping[str, Any]) -> None:
    """Have the engine raise poolkit's errors.

    Args:
        engine: The engine, on asyncpg.
        connect_args: Its connect arguments, which tell whether it is meant to be read-only.
    """
    translate = partial(_translate, read_only=_asks_for_read_only(connect_args))
    event.listen(engine, "handle_error", translate)


def _asks_for_read_only(connect_args: Mapping[str, Any]) -> bool:
    settings = connect_args.get("server_settings") or {}
    default = next(
        (v for k, v in settings.items() if k.lower() == "default_transaction_read_only"), "off"
    )
    return (
        str(default).strip().lower() in ("on", "true", "yes", "1", "t", "y")
        or connect_args.get("target_session_attrs") in _READ_ONLY_SESSIONS
    )


def _translate(context: ExceptionContext, *, read_only: bool) -> Failure | None:
    error = context.original_exception
    if context.connection is None or isinstance(error, ConnectError | Failure):
        return None
    adapted = _adapted(context.connection)
    moment = _moment(context, adapted)
    if not isinstance(error, Exception):
        _mark(error, moment)
        return None
    chain = list(causes(error))
    kind = kind_of(chain, moment)
    if session_ended(chain) or _closed_under(adapted, chain, moment):
        context.is_disconnect = True
        kind = kind if kind in _TYPES else FaultKind.CONNECTION_LOST
    if kind not in _TYPES:
        return None
    if kind is FaultKind.READ_ONLY and not (read_only or _asked(context.connection, adapted)):
        _leave_server(context)
    return _failure(context, kind, moment, outcome_of(chain, moment))


def _adapted(connection: Connection) -> Any:
    """SQLAlchemy's adapted connection, or None where it is gone."""
    if connection.closed or connection.invalidated:
        return None
    return connection.connection.dbapi_connection


def _moment(context: ExceptionContext, adapted: Any) -> Moment:
    at_commit = moment_of(context.original_exception.__traceback__) is Moment.COMMIT
    if at_commit or commits(context.statement):
        return Moment.COMMIT
    return Moment.AUTOCOMMIT if getattr(adapted, "autocommit", False) else Moment.TRANSACTION


def _closed_under(adapted: Any, chain: list[BaseException], moment: Moment) -> bool:
    """Whether the driver refuses to go on, or did not bring a transaction to its end."""
    if adapted is None or is_servers_answer(chain):
        return False
    return bool(adapted.driver_connection.is_closed()) or moment is Moment.COMMIT


def _mark(error: BaseException, moment: Moment) -> None:
    """Say what became of the work to whoever asks a cancellation, which stays what it is."""
    chain = list(causes(error))
    if any(isinstance(cause, Interrupted) for cause in chain):
        return
    outcome = outcome_of(chain, moment)
    text = f"interrupted {_WHERE[moment]}: {_WHAT_BECAME[outcome]}"
    chain[-1].__cause__ = Interrupted(text, outcome)


# -- Read-only servers -------------------------------------------------------------------------


def _asked(connection: Connection, adapted: Any) -> bool:
    """Whether the program wants this transaction to be read-only."""
    if connection.get_execution_options().get("postgresql_readonly"):
        return True
    reported = adapted.driver_connection.get_settings() if adapted is not None else None
    in_hot_standby = getattr(reported, "in_hot_standby", None)
    by_default = getattr(reported, "default_transaction_read_only", None)
    return (in_hot_standby, by_default) == ("off", "off")  # then it was SET TRANSACTION READ ONLY


def _leave_server(context: ExceptionContext) -> None:
    """Discard the connection, and the others: a check before use would not tell."""
    context.is_disconnect = True
    pool = context.engine.pool if context.engine is not None else None
    if isinstance(pool, HandoffPool):
        pool.leave_server()


# -- The error ---------------------------------------------------------------------------------


def _failure(
    context: ExceptionContext, kind: FaultKind, moment: Moment, outcome: Outcome
) -> Failure:
    error = context.original_exception
    cls = _TYPES[kind]
    if cls is ConnectionLost and find_sqlstate(error) == _IDLE_IN_TRANSACTION:
        cls = IdleInTransactionTimeout
    statement, parameters = _statement(context)
    wrapped = context.sqlalchemy_exception
    made = cls(
        statement,
        parameters,
        error,
        hide_parameters=getattr(context.engine, "hide_parameters", False),
        connection_invalidated=context.is_disconnect,
        ismulti=wrapped.ismulti if wrapped is not None else None,
    )
    return made.explained(_text(context, kind, moment, outcome), outcome)


def _statement(context: ExceptionContext) -> tuple[str | None, Any]:
    """While rows are fetched, SQLAlchemy gives the execution only."""
    execution: Any = context.execution_context
    if context.statement is not None or execution is None:
        return context.statement, context.parameters
    parameters = execution.parameters
    return execution.statement, parameters if execution.executemany else parameters[0]


def _text(context: ExceptionContext, kind: FaultKind, moment: Moment, outcome: Outcome) -> str:
    cause = describe(context.original_exception)
    became = f"{_WHERE[moment]}: {_WHAT_BECAME[outcome]}"
    match kind:
        case FaultKind.STATEMENT_TIMEOUT if find_sqlstate(context.original_exception):
            text = f"the server ended the statement: {cause}{limit_in_force(context)}"
        case FaultKind.STATEMENT_TIMEOUT:
            text = "the server did not answer in time, and the connection was discarded"
        case FaultKind.CONNECTION_LOST:
            text = f"the connection was lost {became} ({cause})"
        case FaultKind.TRANSACTION_TIMEOUT:
            text = f"the server ended the session {became} ({cause})"
        case FaultKind.READ_ONLY if context.is_disconnect:
            text = (
                f"the server is read-only, as after a failover: {cause}. Its connections are"
                " discarded; target_session_attrs=read-write in the URL looks for the primary"
            )
        case FaultKind.READ_ONLY:
            text = f"the transaction was asked to be read-only: {cause}"
        case _:
            text = cause
    return text
