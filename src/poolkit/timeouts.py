"""Statement timeouts: limits for single statements, at both ends.

The server's ``statement_timeout`` comes first and keeps the connection; the client's stands
``BACKSTOP_MARGIN`` above it, for the case that the server can no longer be heard.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine, event
from sqlalchemy.engine import ExceptionContext

from poolkit.driver import DriverConnection, autocommit_refused, is_ours, milliseconds
from poolkit.errors import ConfigurationError

OPTION = "statement_timeout"
"""The execution option: seconds, of a statement, a connection or an engine; 0 or None is off."""

_UNKNOWN = math.nan  # differs from every limit, so that the next statement sets its own
_SET = "SELECT set_config('statement_timeout', $1, $2)"


def install(engine: Engine) -> None:
    """Have the engine honour the option."""
    for name, listener in _listeners().items():
        event.listen(engine.dialect, name, listener)


def come_last(engine: Engine) -> None:
    """Be asked after the listeners that were added since, where the engine honours the option.

    The first that executes a statement is the last that is asked, and SQLAlchemy puts none of
    these before another.
    """
    for name, listener in _listeners().items():
        if event.contains(engine.dialect, name, listener):
            event.remove(engine.dialect, name, listener)
            event.listen(engine.dialect, name, listener)


def _listeners() -> dict[str, Callable[..., bool]]:
    return {
        "do_execute": _do_execute,
        "do_executemany": _do_executemany,
        "do_execute_no_params": _do_execute_no_params,
    }


def _do_execute(cursor: Any, statement: str, parameters: Any, context: Any) -> bool:
    if _has_nothing_to_do(context):  # asked at every statement: nothing else is made before it
        return False
    return _limited(
        cursor,
        statement,
        context,
        lambda: context.dialect.do_execute(cursor, statement, parameters, context),
    )


def _do_executemany(cursor: Any, statement: str, parameters: Any, context: Any) -> bool:
    if _has_nothing_to_do(context):
        return False
    return _limited(
        cursor,
        statement,
        context,
        lambda: context.dialect.do_executemany(cursor, statement, parameters, context),
    )


def _do_execute_no_params(cursor: Any, statement: str, context: Any) -> bool:
    if _has_nothing_to_do(context):
        return False
    return _limited(
        cursor,
        statement,
        context,
        lambda: context.dialect.do_execute_no_params(cursor, statement, context),
    )


def _has_nothing_to_do(context: Any) -> bool:
    driver = context.root_connection.connection.driver_connection
    return not is_ours(driver) or (
        driver.limit == driver.session_limit
        and OPTION not in context.execution_options
        and not driver.needs_transaction
    )


def _limited(cursor: Any, statement: str, context: Any, run: Callable[[], None]) -> bool:
    """Execute under the statement's own limit; False leaves it to SQLAlchemy: nothing to do."""
    options = context.execution_options
    fairy = context.root_connection.connection
    driver: DriverConnection = fairy.driver_connection
    if driver.needs_transaction and fairy.dbapi_connection.autocommit:
        raise autocommit_refused(driver.needs_transaction)
    if OPTION not in options and driver.limit == driver.session_limit:
        return False
    if statement.lstrip()[:11].upper() == "ROLLBACK TO":
        # Sent alone, for the transaction may be aborted; and with it the server takes back what
        # was set since the savepoint.
        run()
        driver.limit = _UNKNOWN
        return True
    limit = _seconds(options, driver)
    if fairy.dbapi_connection.autocommit:
        _run_in_autocommit(fairy.dbapi_connection, driver, limit, run)
    else:
        _run_in_transaction(fairy.dbapi_connection, driver, limit, run)
        _restore(cursor, context, fairy.dbapi_connection, driver)
    return True


def _run_in_transaction(
    adapted: Any, driver: DriverConnection, limit: float, run: Callable[[], None]
) -> None:
    if not driver.is_in_transaction():
        driver.limit_next_transaction(limit)
    elif driver.limit != limit:
        _set_limit(adapted, driver, limit, local=True)
    run()


def _restore(cursor: Any, context: Any, adapted: Any, driver: DriverConnection) -> None:
    """Take a single statement's limit back, so that COMMIT does not run under it.

    Not while a server-side cursor still fetches: the next statement sets its own.
    """
    standing = _seconds(context.root_connection.get_execution_options(), driver)
    if driver.limit != standing and not getattr(cursor, "server_side", False):
        _set_limit(adapted, driver, standing, local=True)


def _run_in_autocommit(
    adapted: Any, driver: DriverConnection, limit: float, run: Callable[[], None]
) -> None:
    if limit == driver.session_limit:
        run()
    elif driver.pooler == "transaction":
        # A SET would reach whichever client is next on that server connection.
        driver.wait_at_most(limit or None)
        try:
            run()
        finally:
            driver.wait_for(driver.session_limit)
    else:
        _set_limit(adapted, driver, limit, local=False)
        try:
            run()
        except TimeoutError:
            raise  # nobody answers; SQLAlchemy discards the connection, as after a cancellation
        except Exception:
            if not driver.is_closed():
                _set_limit(adapted, driver, driver.session_limit, local=False)
            raise
        _set_limit(adapted, driver, driver.session_limit, local=False)


def _set_limit(adapted: Any, driver: DriverConnection, limit: float, *, local: bool) -> None:
    # By the dialect's own cursor, so that a failure is wrapped like any statement's.
    adapted.cursor().execute(_SET, (milliseconds(limit), local))
    driver.wait_for(limit)


def _seconds(options: Any, driver: DriverConnection) -> float:
    if OPTION not in options:
        return driver.session_limit
    value = options[OPTION]
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ConfigurationError(
            f"execution option {OPTION}={value!r}: give seconds from 0 up; 0 or None is off"
        )
    return float(value)


def limit_in_force(context: ExceptionContext) -> str:
    """For a timeout's message: the limit that was exceeded, or nothing where none is known."""
    connection = context.connection
    if connection is None or connection.closed or connection.invalidated:
        return ""
    driver = connection.connection.driver_connection
    if not is_ours(driver):
        return ""
    execution = context.execution_context
    limit = _seconds(execution.execution_options, driver) if execution else driver.limit
    return f"; its limit was {limit:g} s" if limit else ""
