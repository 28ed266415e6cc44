"""What is told of events to those who read: the logger, the level, the words and the values.

Nothing here holds a password or a statement's parameter: an error's text is told only where it can
hold neither, otherwise its type and its SQLSTATE.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from poolkit import events
from poolkit.errors import (
    ConnectError,
    PoolDraining,
    PoolTimeout,
    causes,
    describe,
    find_sqlstate,
)
from poolkit.events import CloseReason, Event
from poolkit.faults import FaultKind, classify

POOL = "poolkit.pool"
CONNECT = "poolkit.connect"
CONNECTIONS = "poolkit.connections"
TRANSACTIONS = "poolkit.transactions"

PREFIX = "poolkit_"
"""Begins the names of a log record's attributes."""

_LOST = frozenset(
    {
        CloseReason.LOST,
        CloseReason.PING_FAILED,
        CloseReason.INVALIDATED,
        CloseReason.GARBAGE_COLLECTED,
    }
)
_ON_PURPOSE = frozenset({CloseReason.INVALIDATED, CloseReason.PING_FAILED})
"""Where no error came first: the program wanted it, or a check was cut short."""

_SESSION_OVER = frozenset({"08", "57"})
_TRANSACTION_OVER = frozenset({"25P03", "25P04"})


@dataclass(frozen=True, slots=True)
class Report:
    """One line.

    Attributes:
        event: What happened, in a word that does not change.
        logger: Whose line it is.
        level: As in ``logging``.
        message: For the operator ``%``, with names of values in it.
        values: What it says, by names that do not change.
        headline: A shorter message, where there is one.
        limited: Whether its like are held back for a while.
    """

    event: str
    logger: str
    level: int
    message: str
    values: Mapping[str, Any]
    headline: str = ""
    limited: bool = True

    @property
    def key(self) -> tuple[str, Any]:
        """The same for its like."""
        return self.event, self.values.get("kind")

    def write(self) -> None:
        """Log it; the record has the values as attributes, ``poolkit_`` before their names."""
        extra = {PREFIX + name: value for name, value in self.values.items()}
        extra[f"{PREFIX}event"] = self.event
        logging.getLogger(self.logger).log(self.level, self.message, self.values, extra=extra)


# -- The pool ------------------------------------------------------------------------------


def of_pool(event: Event, pool: str | None, state: Mapping[str, Any]) -> Report | None:
    """What is told of an event of the pool's line, with the pool's state; None of others."""
    match event:
        case events.CheckoutTimedOut(waited=waited, error=error):
            values = {"waited": waited, **_error(error)}
            made = ("checkout_timed_out", logging.ERROR, "checkout timed out after %(waited).1f s")
        case events.CheckoutRefused(error=error):
            values = {"kind": str(classify(error).kind), **_error(error)}
            why = "draining" if isinstance(error, PoolDraining) else "too many wait already"
            made = ("checkout_refused", logging.WARNING, f"checkout refused, {why}")
        case events.OverloadBegan():
            values = {}
            text = "overload, the newest in line are served first"
            made = ("overload_began", logging.WARNING, text)
        case events.OverloadEnded(lasted=lasted):
            values = {"lasted": lasted}
            made = ("overload_ended", logging.INFO, "overload ended after %(lasted).1f s")
        case _:
            return None
    name, level, text = made
    of_limit = "" if state["limit"] is None else " of %(limit)d"
    text += (
        f": used %(used)d{of_limit}, idle %(idle)d, opening %(opening)d, waiting %(waiting)d,"
        " longest use %(longest_use).1f s"
    )
    return Report(name, POOL, level, text, {"pool": pool, **values, **state})


def long_holder(event: events.LongHolder, pool: str | None) -> Report:
    """A connection is in use for too long."""
    text = "connection held for %(held).1f s by task %(task)s"
    return Report(
        "long_holder",
        POOL,
        logging.WARNING,
        text + ", which stands at:\n%(stack)s",
        {"pool": pool, "held": event.held, "task": event.task, "stack": event.stack},
        headline=text,
        limited=False,  # each may stand elsewhere; there are no more than the threshold lets be
    )


def long_holder_returned(event: events.LongHolderReturned, pool: str | None) -> Report:
    """It is back."""
    return Report(
        "long_holder_returned",
        POOL,
        logging.WARNING,
        "connection returned after %(held).1f s by task %(task)s",
        {"pool": pool, "held": event.held, "task": event.task},
        limited=False,
    )


# -- Connects ------------------------------------------------------------------------------


def opened(event: events.ConnectionOpened, pool: str | None) -> Report:
    """A connection was made."""
    return Report(
        "connection_opened",
        CONNECT,
        logging.DEBUG,
        "connected to %(address)s in %(duration).3f s",
        {
            "pool": pool,
            "address": event.address,
            "duration": event.duration,
            "attempts": event.attempts,
            "pooler": event.pooler,
        },
        limited=False,
    )


def open_failed(event: events.ConnectionOpenFailed, pool: str | None) -> Report:
    """None could be made."""
    return Report(
        "connect_failed",
        CONNECT,
        logging.ERROR,
        "%(error)s",
        {
            "pool": pool,
            "kind": str(classify(event.error).kind),
            "address": event.address,
            "duration": event.duration,
            "attempts": event.attempts,
            **_error(event.error),
        },
        headline="cannot connect to %(address)s (%(attempts)d attempts in %(duration).1f s):"
        " %(error_type)s",
    )


def recovered(
    event: events.ConnectionOpened, pool: str | None, failures: int, lasted: float
) -> Report:
    """One was made after others could not."""
    return Report(
        "connect_recovered",
        CONNECT,
        logging.INFO,
        "connected to %(address)s again, %(lasted).1f s after the first of %(failures)d failures",
        {"pool": pool, "address": event.address, "failures": failures, "lasted": lasted},
    )


# -- Connections ---------------------------------------------------------------------------


def closed(event: events.ConnectionClosed, pool: str | None, error: BaseException | None) -> Report:
    """A connection left the pool, because of that error if there was one."""
    values = {"pool": pool, "kind": str(event.reason), "age": event.age, **_error(error)}
    if event.reason not in _LOST:
        text = "connection closed after %(age).1f s: %(kind)s"
        return Report("connection_closed", CONNECTIONS, logging.DEBUG, text, values, limited=False)
    meant = event.reason in _ON_PURPOSE and (error is None or _is_cancelled(error))
    text = "connection lost after %(age).1f s: %(kind)s"
    return Report(
        "connection_lost",
        CONNECTIONS,
        logging.INFO if meant else logging.WARNING,
        text if error is None else text + ", %(error)s",
        values,
    )


# -- Transactions --------------------------------------------------------------------------


def retried(
    *, attempt: int, pause: float, kind: FaultKind, error: Exception, pool: str | None
) -> Report:
    """``run_in_transaction`` does the work again."""
    return Report(
        "transaction_retried",
        TRANSACTIONS,
        logging.INFO,
        "attempt %(attempt)d ended by %(kind)s; again in %(pause).3f s",
        {
            "pool": pool,
            "attempt": attempt,
            "pause": pause,
            "kind": str(kind),
            **_error(error),
        },
        limited=False,
    )


# -- Errors --------------------------------------------------------------------------------


def _error(error: BaseException | None) -> dict[str, Any]:
    if error is None:
        return {"error": None, "error_type": None, "sqlstate": None}
    return {
        "error": _text(error),
        "error_type": type(error).__name__,
        "sqlstate": find_sqlstate(error),
    }


def _text(error: BaseException) -> str:
    """What it says, if that is ours, the network's, or the server's on a session that it ended."""
    if isinstance(error, ConnectError | PoolTimeout | PoolDraining):
        return str(error.args[0])
    innermost = list(causes(error))[-1]
    state = find_sqlstate(error)
    if state is None and isinstance(innermost, OSError):
        return describe(error)
    if state is not None and (state[:2] in _SESSION_OVER or state in _TRANSACTION_OVER):
        return describe(error)
    name = type(innermost).__name__
    return name if state is None else f"{name} (SQLSTATE {state})"


def _is_cancelled(error: BaseException) -> bool:
    return any(isinstance(cause, asyncio.CancelledError) for cause in causes(error))
