"""Other instrumentations of the same statements, so that a statement is one span.

OpenTelemetry's own of SQLAlchemy has made its span before ours could begin, so ours gives way. Its
own of asyncpg stands below: what it makes of our statement is suppressed. It does not ask whether
it should be, so it is given a parent that is not sampled, which samplers follow by default. This
leans on where the one keeps its span and on how the other replaces asyncpg's methods;
``tests/telemetry/test_spans.py`` fails where that changes.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import asyncpg
from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY, Context, get_value, set_value
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    TraceFlags,
    get_current_span,
    set_span_in_context,
)
from sqlalchemy import Engine

SQLALCHEMY = "opentelemetry.instrumentation.sqlalchemy"
ASYNCPG = "opentelemetry.instrumentation.asyncpg"

_METHODS = vars(asyncpg.Connection)
_ONE = 1  # any that is valid


def others(engine: Engine) -> frozenset[str]:
    """Modules of the other instrumentations that are on now, for this engine or for all."""
    found = {ASYNCPG} if asyncpg_is_instrumented() else set()
    listeners = engine.dispatch.before_cursor_execute
    if any(str(getattr(fn, "__module__", "")).startswith(SQLALCHEMY) for fn in listeners):
        found.add(SQLALCHEMY)
    return frozenset(found)


def asyncpg_is_instrumented() -> bool:
    """Whether something has put its own in the place of asyncpg's methods."""
    # A wrapt proxy gives the class of what it wraps; type() does not ask it.
    return type(_METHODS["execute"]) is not FunctionType


def has_span(execution: Any) -> bool:
    """Whether OpenTelemetry's instrumentation of SQLAlchemy has made a span of an execution."""
    return getattr(execution, "_otel_span", None) is not None


def is_suppressed(context: Context) -> bool:
    """Whether no telemetry is wanted in a context, as while telemetry itself is exported."""
    return _SUPPRESS_INSTRUMENTATION_KEY in context and bool(
        get_value(_SUPPRESS_INSTRUMENTATION_KEY, context)
    )


def suppressed(context: Context) -> Context:
    """The context, and nothing in it becomes a span."""
    parent = get_current_span(context).get_span_context()
    unsampled = SpanContext(
        parent.trace_id or _ONE,
        parent.span_id or _ONE,
        is_remote=False,
        trace_flags=TraceFlags(TraceFlags.DEFAULT),
    )
    quiet = set_value(_SUPPRESS_INSTRUMENTATION_KEY, True, context)
    return set_span_in_context(NonRecordingSpan(unsampled), quiet)
