"""An engine's spans, metrics and events to Logfire; needs ``poolkit[logfire]``."""

from __future__ import annotations

import logging
import re
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import lru_cache
from typing import Any, Literal

import sqlalchemy
from sqlalchemy import Engine, event
from sqlalchemy.ext.asyncio import AsyncEngine

from poolkit import reports
from poolkit.errors import ConfigurationError
from poolkit.lifecycle import observe
from poolkit.logs import TOLD_ELSEWHERE, WANTED, Reporter
from poolkit.pool import HandoffPool
from poolkit.reports import Report
from poolkit.settings import DatabaseSettings
from poolkit.telemetry import others
from poolkit.telemetry.attributes import POOL_NAME
from poolkit.telemetry.catalogue import CLOSE_REASON, FAULT_KIND, STATUS_CODE
from poolkit.telemetry.instrumentation import instrument as instrument_plainly

try:
    import logfire
    from logfire import Logfire, ScrubbingOptions, ScrubMatch
except ModuleNotFoundError as error:
    raise ConfigurationError(
        f"LOGFIRE_ENABLED needs the package {error.name}: pip install 'poolkit[logfire]', or leave"
        " LOGFIRE_ENABLED out"
    ) from error

SCOPE = "poolkit"
"""Ends the name of the events' instrumentation scope, ``logfire.poolkit``."""

_log = logging.getLogger("poolkit.telemetry")

_LEVELS: Mapping[int, Literal["debug", "info", "warn", "error"]] = {
    logging.DEBUG: "debug",
    logging.INFO: "info",
    logging.WARNING: "warn",
    logging.ERROR: "error",
}

# Those of exceptions are not redacted, whatever words their values have in them.
_NAMES = {
    "pool": POOL_NAME,
    "error": "exception.message",
    "error_type": "exception.type",
    "stack": "exception.stacktrace",
    "sqlstate": STATUS_CODE,
}
_CLOSES = frozenset({"connection_lost", "connection_closed"})

_NOT_SECRET = ("db.", "server.", "poolkit.")
"""Begin the names of attributes that hold names and numbers, never values of the program's."""

_CALLED = "logfire._internal.integrations.sqlalchemy"
"""Loaded when the program calls ``logfire.instrument_sqlalchemy()``, and by nothing else."""

_configuring = threading.Lock()


def install(engine: AsyncEngine, settings: DatabaseSettings) -> None:
    """Do what ``LOGFIRE_ENABLED`` asks; called by ``poolkit.create_async_engine``."""
    for name in (reports.POOL, reports.CONNECT, reports.CONNECTIONS, reports.TRANSACTIONS):
        logging.getLogger(name).addFilter(_has_reader)
    instrument(
        engine,
        slow_checkout=settings.telemetry_slow_checkout,
        parameters=settings.telemetry_parameters,
        sqlcommenter=settings.telemetry_sqlcommenter,
        server_interval=settings.telemetry_server_interval,
    )


def _has_reader(record: logging.LogRecord) -> bool:
    """What Logfire shows need not be printed besides, as logging does where none has a handler."""
    shown = hasattr(record, f"{reports.PREFIX}event") and _is_configured(
        logfire.DEFAULT_LOGFIRE_INSTANCE
    )
    return not shown or logging.getLogger(record.name).hasHandlers()


def instrument(
    engine: AsyncEngine | Engine, instance: Logfire | None = None, **options: Any
) -> Callable[[], None]:
    """Send an engine's spans, metrics and events to Logfire.

    Args:
        engine: Any engine; one whose pool is not poolkit's has no events, nor metrics of its pool.
        instance: What ``logfire.configure(local=True)`` returned; None is the default instance,
            which is configured at the first connect if the program has not done so by then.
        options: ``poolkit.telemetry.instrument``'s own.

    Returns:
        What turns it off.
    """
    sync_engine = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
    target = logfire.DEFAULT_LOGFIRE_INSTANCE if instance is None else instance
    ends = ExitStack()
    ends.callback(_listen(sync_engine, target))
    ends.callback(
        instrument_plainly(
            engine,
            meter_provider=target.config.get_meter_provider(),
            tracer_provider=target.config.get_tracer_provider(),
            **options,
        )
    )
    if isinstance(sync_engine.pool, HandoffPool):
        sender = Sender(target)
        ends.callback(observe(engine, Reporter(sync_engine, sender), WANTED + TOLD_ELSEWHERE))
    return ends.close


# -- At the connect ------------------------------------------------------------------------


def _listen(engine: Engine, target: Logfire) -> Callable[[], None]:
    told: set[str] = set()
    first = True

    def before_connect(*_: Any) -> None:
        nonlocal first
        if first:
            first = False
            configure_if_nobody_has(target)
        for line in _advice(engine) - told:
            told.add(line)
            _tell(target, line)

    event.listen(engine, "do_connect", before_connect)
    return lambda: event.remove(engine, "do_connect", before_connect)


def configure_if_nobody_has(target: Logfire) -> None:
    """Configure Logfire's default instance, unless the program has; what it does later wins.

    Nothing is asked for and nothing raised: without a token nothing is sent.
    """
    with _configuring:
        if target.config is not logfire.DEFAULT_LOGFIRE_INSTANCE.config or _is_configured(target):
            return
        wanted = target.config.send_to_logfire is not False
        try:
            logfire.configure(
                send_to_logfire="if-token-present" if wanted else False,
                scrubbing=ScrubbingOptions(callback=keep_names),
            )
        except Exception as error:  # noqa: BLE001 (logged; a connect must not break on it)
            _log.warning("Logfire could not be configured: %s: %s", type(error).__name__, error)
            return
    _log.info("logfire.configure() had not been called by the first connect: poolkit called it")


def _is_configured(target: Logfire) -> bool:
    # Logfire has no public name for it; tests/telemetry/test_logfire.py fails where it changes.
    return target.config._initialized  # noqa: SLF001


def keep_names(match: ScrubMatch) -> Any:
    """For ``logfire.ScrubbingOptions(callback=...)``: spares the attributes that poolkit writes.

    Otherwise Logfire redacts a summary or a pool's name that has ``session`` or ``auth`` in it.
    """
    spared = any(str(part).startswith(_NOT_SECRET) for part in match.path[1:2])
    return match.value if spared else None


# -- Other instrumentations ----------------------------------------------------------------


def _advice(engine: Engine) -> set[str]:
    """What is said of the other instrumentations that the program has turned on."""
    on = others.others(engine)
    found = set()
    if others.SQLALCHEMY in on:
        found.add(
            "logfire.instrument_sqlalchemy() makes the spans of this engine's statements; leave it"
            " out to have poolkit's"
        )
    elif _CALLED in sys.modules and _sqlalchemy_is_refused():
        found.add(
            "logfire.instrument_sqlalchemy() does nothing with SQLAlchemy"
            f" {sqlalchemy.__version__}, which its OpenTelemetry instrumentation does not support:"
            " leave it out, poolkit makes the spans"
        )
    if others.ASYNCPG in on:
        found.add(
            "logfire.instrument_asyncpg() makes no spans of this engine's statements, for poolkit"
            " makes them: leave it out, unless there are connections of asyncpg's own"
        )
    return found


def _sqlalchemy_is_refused() -> bool:
    """Whether OpenTelemetry's instrumentation would not start."""
    from opentelemetry.instrumentation.dependencies import (  # noqa: PLC0415 (loaded with it)
        get_dependency_conflicts,
    )
    from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor  # noqa: PLC0415

    theirs = SQLAlchemyInstrumentor()
    if theirs.is_instrumented_by_opentelemetry:
        return False
    return get_dependency_conflicts(theirs.instrumentation_dependencies()) is not None


def _tell(target: Logfire, line: str) -> None:
    _log.warning(line)
    if _is_configured(target) and not _logging_goes_to_logfire(_log.name, logging.WARNING):
        _events(target).log("warn", line)


# -- Events --------------------------------------------------------------------------------


class Sender:
    """Sends reports to a Logfire instance.

    Where ``logging`` sends the same line there already, it is left to that.
    """

    def __init__(self, target: Logfire) -> None:
        self._target = target
        self._events = _events(target)

    def __call__(self, report: Report) -> None:
        """Send it."""
        if not _is_configured(self._target):
            return  # Logfire would warn of each
        if _logging_goes_to_logfire(report.logger, report.level):
            return
        reason = report.event in _CLOSES
        values = {_name(name, reason): value for name, value in report.values.items()}
        values["poolkit.event"] = report.event
        template = _template(report.headline or report.message, reason)
        self._events.log(_LEVELS[report.level], template, values)


def _events(target: Logfire) -> Logfire:
    return target.with_settings(custom_scope_suffix=SCOPE)


def _name(name: str, reason: bool) -> str:  # noqa: FBT001 (one of two)
    if name == "kind":
        return CLOSE_REASON if reason else FAULT_KIND
    return _NAMES.get(name) or f"poolkit.{name}"


@lru_cache
def _template(message: str, reason: bool) -> str:  # noqa: FBT001
    """A message for ``%`` as a template of Logfire's."""

    def field(match: re.Match[str]) -> str:
        precision = match["precision"]
        return f"{{{_name(match['name'], reason)}{':' + precision + 'f' if precision else ''}}}"

    return re.sub(r"%\((?P<name>\w+)\)(?P<precision>\.\d)?[sdf]", field, message)


def _logging_goes_to_logfire(name: str, level: int) -> bool:
    logger: logging.Logger | None = logging.getLogger(name)
    if logger is None or not logger.isEnabledFor(level):
        return False
    while logger is not None:
        for handler in logger.handlers:
            if isinstance(handler, logfire.LogfireLoggingHandler) and level >= handler.level:
                return True
        logger = logger.parent if logger.propagate else None
    return False
