"""sqlcommenter: a statement carries its span's ``traceparent`` to the server, as a comment.

Every text is then a new one, which no cache of prepared statements can know. So it is sent under
no name: it is prepared once more than a known statement (one round trip), evicts none of the known
ones, and leaves nothing behind on the server. ``unprepared`` leans on how SQLAlchemy's adapted
asyncpg connection calls its cache and its names; ``tests/telemetry/test_comments.py`` fails where
that changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from opentelemetry.trace import SpanContext

_CACHE = "_prepared_statement_cache"
_NAME = "_prepared_statement_name_func"


def commented(statement: str, span: SpanContext) -> str:
    """The statement with the span's ``traceparent``; one that has a ``traceparent`` keeps it."""
    if "traceparent=" in statement:
        return statement
    flags = span.trace_flags & 0xFF
    parent = f"/*traceparent='00-{span.trace_id:032x}-{span.span_id:016x}-{flags:02x}'*/"
    body = statement.rstrip()
    if "--" in body[body.rfind("\n") + 1 :]:  # it may be a comment, and would swallow ours
        return f"{body}\n{parent}"
    end = ";" if body.endswith(";") else ""
    return f"{body.removesuffix(';').rstrip()} {parent}{end}"


@contextmanager
def unprepared(adapted: Any) -> Iterator[None]:
    """Have SQLAlchemy's connection prepare what it executes under no name, past its cache."""
    cache, name = getattr(adapted, _CACHE, None), getattr(adapted, _NAME, None)
    if cache is None or name is None:  # it keeps no prepared statements, or is another driver's
        yield
        return
    setattr(adapted, _CACHE, None)
    setattr(adapted, _NAME, str)
    try:
        yield
    finally:
        setattr(adapted, _CACHE, cache)
        setattr(adapted, _NAME, name)
