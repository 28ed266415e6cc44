"""Statements that carry their span's ``traceparent``."""

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanContext, TraceFlags
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from poolkit.telemetry.comments import commented, unprepared
from poolkit.telemetry.spans import SpanOptions, install

SPAN = SpanContext(0xABC, 0xDEF, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))
PARENT = f"/*traceparent='00-{0xABC:032x}-{0xDEF:016x}-01'*/"
COMMENTING = SpanOptions(0.1, sqlcommenter=True)
OWN_TEXT = "SELECT query FROM pg_stat_activity WHERE pid = pg_backend_pid()"
PREPARED = text("SELECT count(*) FROM pg_prepared_statements")


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("SELECT 1", f"SELECT 1 {PARENT}"),
        ("SELECT 1 ;  \n", f"SELECT 1 {PARENT};"),
        ("SELECT 1 -- one", f"SELECT 1 -- one\n{PARENT}"),
        ("SELECT 1; -- one", f"SELECT 1; -- one\n{PARENT}"),
        ("SELECT 1 -- one\n", f"SELECT 1 -- one\n{PARENT}"),
        ("-- one\nSELECT 1;", f"-- one\nSELECT 1 {PARENT};"),
        ("SELECT 1 /* one */", f"SELECT 1 /* one */ {PARENT}"),
        ("SELECT '--'", f"SELECT '--'\n{PARENT}"),
        ("SELECT 1 /*traceparent='x'*/", "SELECT 1 /*traceparent='x'*/"),
    ],
)
def test_the_comment_is_appended(statement: str, expected: str) -> None:
    """Before a semicolon, and never within another comment."""
    assert commented(statement, SPAN) == expected


@pytest.mark.parametrize("ending", ["", ";", " -- one", "; -- one", " /* one */"])
async def test_the_server_sees_the_span(
    engine: AsyncEngine,
    tracer_provider: TracerProvider,
    exporter: InMemorySpanExporter,
    ending: str,
) -> None:
    """The text in pg_stat_activity leads to the span, and the span's own text has no comment."""
    install(engine.sync_engine, COMMENTING, tracer_provider, None, spans=True)
    async with engine.connect() as connection:
        seen = await connection.scalar(text(OWN_TEXT + ending))
    span = exporter.get_finished_spans()[-1]
    context = span.get_span_context()
    ids = f"{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
    assert f"/*traceparent='00-{ids}'*/" in seen
    assert "traceparent" not in span.attributes["db.query.text"]


async def test_no_comment_without_a_sampled_span(engine: AsyncEngine) -> None:
    """Such a statement stays as it is, and prepared."""
    provider = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)
    install(engine.sync_engine, COMMENTING, provider, None, spans=True)
    async with engine.connect() as connection:
        assert await connection.scalar(text(OWN_TEXT)) == OWN_TEXT


async def test_commented_statements_leave_nothing_prepared(
    engine: AsyncEngine, tracer_provider: TracerProvider
) -> None:
    """They evict no prepared statement, and the server keeps none of them."""
    async with engine.connect() as connection:
        before = await connection.scalar(PREPARED)
        adapted = (await connection.get_raw_connection()).dbapi_connection
        known = set(adapted._prepared_statement_cache)
        end = install(engine.sync_engine, COMMENTING, tracer_provider, None, spans=True)
        for n in range(120):  # more than SQLAlchemy keeps
            assert await connection.scalar(text("SELECT CAST(:n AS int)"), {"n": n}) == n
        rows = await connection.stream(text("SELECT generate_series(1, 200)"))
        assert len(await rows.scalars().all()) == 200
        end()
        assert set(adapted._prepared_statement_cache) == known
        assert await connection.scalar(PREPARED) == before


async def test_what_is_leant_on_is_there(engine: AsyncEngine) -> None:
    """SQLAlchemy's adapted connection calls its cache and its names so, and gets them back."""
    async with engine.connect() as connection:
        adapted = (await connection.get_raw_connection()).dbapi_connection
        cache, name = adapted._prepared_statement_cache, adapted._prepared_statement_name_func
        assert cache is not None
        with unprepared(adapted):
            assert adapted._prepared_statement_cache is None
            assert adapted._prepared_statement_name_func() == ""
        assert adapted._prepared_statement_cache is cache
        assert adapted._prepared_statement_name_func is name
