"""Spans and durations of statements, on every kind of engine, of a real server's."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import asyncpg
import pytest
from opentelemetry import trace
from opentelemetry.instrumentation.asyncpg import AsyncPGInstrumentor
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from readings import points
from sqlalchemy import String, event, insert, select, text
from sqlalchemy import __version__ as sqlalchemy_version
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from poolkit import StatementTimeout
from poolkit.telemetry.catalogue import SECONDS
from poolkit.telemetry.others import ASYNCPG, SQLALCHEMY, others
from poolkit.telemetry.spans import SpanOptions, install
from poolkit.testing import FaultProxy, PostgresServer

EngineMaker = Callable[..., AsyncEngine]

DURATION = "db.client.operation.duration"
OPTIONS = SpanOptions(0.1)
ONE = text("SELECT 1")


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None] = mapped_column(String(40), unique=True)


@pytest.fixture(params=["poolkit", "stock"])
async def plain(
    request: pytest.FixtureRequest, make_engine: EngineMaker, server: PostgresServer
) -> AsyncIterator[AsyncEngine]:
    """poolkit's engine and SQLAlchemy's own, with an empty table."""
    if request.param == "poolkit":
        made = make_engine(settings={"url": server.url})
    else:
        made = create_async_engine(server.url.replace("postgresql:", "postgresql+asyncpg:"))
    async with made.begin() as connection:
        await connection.run_sync(Base.metadata.drop_all)
        await connection.run_sync(Base.metadata.create_all)
    await made.dispose()  # its next connection is a new one
    yield made
    await made.dispose()


@pytest.fixture
def traced(
    plain: AsyncEngine, tracer_provider: TracerProvider, meter_provider: MeterProvider
) -> AsyncEngine:
    """With spans and durations."""
    install(plain.sync_engine, OPTIONS, tracer_provider, meter_provider, spans=True)
    return plain


Spans = Callable[[], list[ReadableSpan]]


@pytest.fixture
def statements(exporter: InMemorySpanExporter) -> Spans:
    """The spans of statements, the pool's apart."""
    pools = {"connect", "pool.checkout"}
    return lambda: [s for s in exporter.get_finished_spans() if s.name not in pools]


def names(spans: list[ReadableSpan]) -> list[str]:
    return [span.name for span in spans]


def durations(reader: InMemoryMetricReader) -> dict[tuple[Any, ...], int]:
    """How many there were, by operation and error."""
    keys = ("db.operation.name", "db.response.status_code", "error.type")
    found = points(reader).get(DURATION, [])
    return {tuple(point.attributes.get(key) for key in keys): point.count for point in found}


# -- Statements that go well -------------------------------------------------------------------


async def test_a_statement(
    traced: AsyncEngine, statements: Spans, server: PostgresServer, tracer_provider: TracerProvider
) -> None:
    """One span within the caller's, with the conventions' attributes, and nothing else."""
    with tracer_provider.get_tracer("test").start_as_current_span("request") as request:
        async with traced.connect() as connection:
            await connection.execute(select(Item).where(Item.id == 7))
            await connection.commit()
    span, above = statements()
    assert (span.name, span.kind, above.name) == ("SELECT items", SpanKind.CLIENT, "request")
    assert span.parent is not None
    assert span.parent.span_id == request.get_span_context().span_id
    attributes = dict(span.attributes)
    text_ = attributes.pop("db.query.text").replace("\n", "")
    assert text_ == "SELECT items.id, items.name FROM items WHERE items.id = $1::INTEGER"
    url = traced.url
    assert attributes.pop("db.client.connection.pool.name")
    assert attributes.pop("server.address") == (url.host or url.query.get("host") or "localhost")
    assert attributes.pop("server.port") == int(url.port or url.query.get("port") or 5432)
    assert attributes == {
        "db.system.name": "postgresql",
        "db.namespace": url.database,
        "db.operation.name": "SELECT",
        "db.query.summary": "SELECT items",
    }
    assert span.status.status_code is StatusCode.UNSET
    assert 0 < span.end_time - span.start_time < 10e9


async def test_no_noise(traced: AsyncEngine, statements: Spans, reader: Any) -> None:
    """No BEGIN, COMMIT, ROLLBACK, savepoint or ping; none of SQLAlchemy's own questions."""
    async with traced.connect() as connection:
        await connection.execute(ONE)
        async with connection.begin_nested():
            await connection.execute(ONE)
        await connection.rollback()
        await connection.execute(ONE)
        await connection.commit()
    assert names(statements()) == ["SELECT", "SELECT", "SELECT"]
    assert durations(reader) == {("SELECT", None, None): 3}


@pytest.mark.parametrize("stock", [True, False])
async def test_the_first_connection(
    make_engine: EngineMaker,
    server: PostgresServer,
    statements: Spans,
    tracer_provider: TracerProvider,
    meter_provider: MeterProvider,
    reader: InMemoryMetricReader,
    *,
    stock: bool,
) -> None:
    """What SQLAlchemy asks on it is none of the program's."""
    if stock:
        engine = create_async_engine(server.url.replace("postgresql:", "postgresql+asyncpg:"))
    else:
        engine = make_engine(settings={"url": server.url})
    install(engine.sync_engine, OPTIONS, tracer_provider, meter_provider, spans=True)
    async with engine.connect() as connection:
        await connection.execute(text("VALUES (1)"))
    await engine.dispose()
    assert names(statements()) == ["VALUES"]
    assert durations(reader) == {("VALUES", None, None): 1}


async def test_every_way_to_execute(traced: AsyncEngine, statements: Spans) -> None:
    """text(), Core, driver SQL with and without parameters, views of the engine, AUTOCOMMIT."""
    autocommit = traced.execution_options(isolation_level="AUTOCOMMIT")
    async with autocommit.connect() as connection:
        await connection.execute(ONE)
        await connection.exec_driver_sql("SELECT $1::int", (2,))
        await connection.exec_driver_sql("SELECT 3", execution_options={"no_parameters": True})
        await connection.execute(insert(Item).values(id=4))
        rows = await connection.execute(text("TABLE items"))
        assert rows.one() == (4, None)
    found = [(s.name, s.attributes["db.query.text"]) for s in statements()]
    assert found == [
        ("SELECT", "SELECT ?"),
        ("SELECT", "SELECT $1::int"),
        ("SELECT", "SELECT ?"),
        ("INSERT items", "INSERT INTO items (id) VALUES ($1::INTEGER)"),
        ("TABLE items", "TABLE items"),
    ]


async def test_the_orm(traced: AsyncEngine, statements: Spans) -> None:
    """What a session sends, with its own text for each."""
    async with async_sessionmaker(traced)() as session:
        session.add(Item(id=1, name="one"))
        await session.flush()
        await session.get(Item, 1, populate_existing=True)
        await session.commit()
    assert names(statements()) == ["INSERT items", "SELECT items"]


async def test_a_stream(traced: AsyncEngine, statements: Spans) -> None:
    """A server-side cursor is one span, which ends before its rows are fetched."""
    async with traced.connect() as connection:
        rows = await connection.stream(text("SELECT n FROM generate_series(1, 2000) AS n"))
        assert names(statements()) == ["SELECT generate_series"]
        assert len(await rows.all()) == 2000
    assert len(statements()) == 1


@pytest.mark.parametrize(("sets", "batch"), [(1, False), (2, True), (3, True)])
async def test_executemany(
    traced: AsyncEngine,
    statements: Spans,
    reader: InMemoryMetricReader,
    sets: int,
    batch: bool,  # noqa: FBT001
) -> None:
    """A batch says so and how large it is; one set of parameters is no batch."""
    async with traced.begin() as connection:
        await connection.execute(
            text("INSERT INTO items VALUES (:id)"), [{"id": n} for n in range(sets)]
        )
    (span,) = statements()
    operation = "BATCH INSERT" if batch else "INSERT"
    assert span.name == span.attributes["db.query.summary"] == f"{operation} items"
    assert span.attributes["db.operation.name"] == operation
    assert span.attributes.get("db.operation.batch.size") == (sets if batch else None)
    assert durations(reader) == {(operation, None, None): 1}


async def test_inserts_of_many_rows(traced: AsyncEngine, statements: Spans) -> None:
    """Each batch that SQLAlchemy makes counts its rows, and has the text of a single row."""
    async with traced.begin() as connection:
        await connection.execute(
            insert(Item).returning(Item.id),
            [{"id": n, "name": str(n)} for n in range(5)],
            execution_options={"insertmanyvalues_page_size": 3},
        )
    spans = statements()
    assert [s.attributes["db.operation.batch.size"] for s in spans] == [3, 2]
    assert names(spans) == ["BATCH INSERT items"] * 2
    (text_,) = {s.attributes["db.query.text"] for s in spans}
    assert text_ == (
        "INSERT INTO items (id, name) VALUES ($1::INTEGER, $2::VARCHAR) RETURNING items.id"
    )


async def test_upserts_of_many_rows(traced: AsyncEngine, statements: Spans) -> None:
    """Parameters outside of the rows are not taken for rows."""
    upsert = postgresql_insert(Item).on_conflict_do_update(
        index_elements=["id"], set_={"name": "again"}, where=Item.name != "kept"
    )
    async with traced.begin() as connection:
        await connection.execute(
            upsert.returning(Item.id), [{"id": n, "name": str(n)} for n in range(4)]
        )
    assert [s.attributes["db.operation.batch.size"] for s in statements()] == [4]


# -- Failures ----------------------------------------------------------------------------------


async def test_an_error_of_the_servers(
    traced: AsyncEngine, statements: Spans, reader: InMemoryMetricReader
) -> None:
    """Its SQLSTATE and what of the schema it is about; neither parameters nor rows."""
    async with traced.connect() as connection:
        await connection.execute(insert(Item), {"id": 1, "name": "hunter2"})
        with pytest.raises(IntegrityError, match="hunter2"):
            await connection.execute(insert(Item), {"id": 2, "name": "hunter2"})
    good, bad = statements()
    assert good.status.status_code is StatusCode.UNSET
    assert bad.status.status_code is StatusCode.ERROR
    assert bad.status.description == (
        "UniqueViolationError (23505): constraint items_name_key table items"
    )
    assert bad.attributes["db.response.status_code"] == bad.attributes["error.type"] == "23505"
    assert "hunter2" not in bad.to_json()
    assert durations(reader) == {("INSERT", None, None): 1, ("INSERT", "23505", "23505"): 1}


async def test_literals_of_a_failed_statement(traced: AsyncEngine, statements: Spans) -> None:
    """The server's message quotes them; the span does not."""
    with pytest.raises(DBAPIError, match="hunter2"):
        async with traced.connect() as connection:
            await connection.execute(text("SELECT 'hunter2'::uuid"))
    (span,) = statements()
    assert span.status.description == "InvalidTextRepresentationError (22P02)"
    assert "hunter2" not in span.to_json()


async def test_a_statement_the_driver_refuses(
    traced: AsyncEngine, statements: Spans, reader: InMemoryMetricReader
) -> None:
    """No server answered: the exception's class."""
    with pytest.raises(DBAPIError):
        async with traced.connect() as connection:
            await connection.exec_driver_sql("SELECT 1", ("hunter2",))
    (span,) = statements()
    assert "db.response.status_code" not in span.attributes
    assert span.attributes["error.type"] == span.status.description == "InterfaceError"
    assert "hunter2" not in span.to_json()
    assert durations(reader) == {("SELECT", None, "InterfaceError"): 1}


async def test_a_failed_savepoint(traced: AsyncEngine, statements: Spans, reader: Any) -> None:
    """What is quiet otherwise is seen where it fails."""
    async with traced.connect() as connection:
        with pytest.raises(DBAPIError):
            await connection.execute(text("ROLLBACK TO SAVEPOINT nowhere"))
    (span,) = statements()
    assert (span.name, span.attributes["error.type"]) == ("ROLLBACK", "3B001")
    assert durations(reader) == {("ROLLBACK", "3B001", "3B001"): 1}


async def test_a_failed_commit(traced: AsyncEngine, statements: Spans, reader: Any) -> None:
    """A COMMIT is no span, unless it fails."""
    async with traced.begin() as connection:
        await connection.execute(
            text("ALTER TABLE items ADD parent int REFERENCES items INITIALLY DEFERRED")
        )
    with pytest.raises(IntegrityError):
        async with traced.begin() as connection:
            await connection.execute(text("INSERT INTO items (id, parent) VALUES (1, 99)"))
    span = statements()[-1]
    assert (span.name, span.status.status_code) == ("COMMIT", StatusCode.ERROR)
    assert span.attributes["db.operation.name"] == span.attributes["db.query.summary"] == "COMMIT"
    assert span.attributes["error.type"] == "23503"
    assert durations(reader)["COMMIT", "23503", "23503"] == 1


async def test_a_failed_fetch(traced: AsyncEngine, statements: Spans, reader: Any) -> None:
    """A server-side cursor that fails later is seen, too."""
    async with traced.connect() as connection:
        rows = await connection.stream(text("SELECT 1 / (600 - n) FROM generate_series(1, 900) n"))
        with pytest.raises(asyncpg.DivisionByZeroError):  # SQLAlchemy does not wrap it
            await rows.all()
    first, then = statements()
    assert first.status.status_code is StatusCode.UNSET
    assert (then.name, then.attributes["error.type"]) == ("FETCH SELECT generate_series", "22012")
    assert then.attributes["db.operation.name"] == "FETCH"
    assert durations(reader)["FETCH", "22012", "22012"] == 1


async def test_a_cancelled_statement(
    traced: AsyncEngine, statements: Spans, reader: InMemoryMetricReader
) -> None:
    """Its span ends and says so, and the cancellation goes on."""
    async with traced.connect() as connection:
        began = asyncio.Event()
        event.listen(connection.sync_connection, "before_cursor_execute", lambda *_: began.set())
        task = asyncio.create_task(connection.execute(text("SELECT pg_sleep(60)")))
        await began.wait()
        await asyncio.sleep(0.1)  # until it has been sent
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await connection.invalidate()
    (span,) = statements()
    assert span.status.status_code is StatusCode.ERROR
    assert (span.status.description, span.attributes["error.type"]) == (
        "CancelledError",
        "cancelled",
    )
    assert durations(reader) == {("SELECT", None, "cancelled"): 1}


async def test_a_statement_timeout(
    make_engine: EngineMaker,
    server: PostgresServer,
    statements: Spans,
    reader: InMemoryMetricReader,
    tracer_provider: TracerProvider,
    meter_provider: MeterProvider,
) -> None:
    """The server's has its code; poolkit's own SET and set_config are no spans."""
    engine = make_engine(settings={"url": server.url, "statement_timeout": 5})
    install(engine.sync_engine, OPTIONS, tracer_provider, meter_provider, spans=True)
    limited = {"execution_options": {"statement_timeout": 0.05}}
    async with engine.connect() as connection:
        await connection.execute(ONE)
        with pytest.raises(StatementTimeout):
            await connection.execute(text("SELECT pg_sleep(60)"), **limited)
        await connection.rollback()
        shown = await connection.scalar(text("SHOW statement_timeout"), **limited)
        assert shown == "50ms"
    assert [s.attributes.get("error.type") for s in statements()] == [None, "57014", None]
    assert durations(reader)["SELECT", "57014", "57014"] == 1


async def test_the_clients_backstop(
    make_engine: EngineMaker,
    server: PostgresServer,
    statements: Spans,
    reader: InMemoryMetricReader,
    tracer_provider: TracerProvider,
    meter_provider: MeterProvider,
) -> None:
    """A server that does not answer: a statement timeout without a code."""
    async with FaultProxy(server) as proxy:
        engine = make_engine(settings={"url": proxy.url, "statement_timeout": 0.1})
        install(engine.sync_engine, OPTIONS, tracer_provider, meter_provider, spans=True)
        async with engine.connect() as connection:
            await connection.execute(ONE)
            proxy.freeze()
            with pytest.raises(StatementTimeout):
                await connection.execute(ONE)
        span = statements()[-1]
        assert span.attributes["error.type"] == "statement_timeout"
        assert "db.response.status_code" not in span.attributes
        assert durations(reader)["SELECT", None, "statement_timeout"] == 1


# -- What is recorded, and what is not ---------------------------------------------------------


async def test_parameters_where_they_are_asked_for(
    plain: AsyncEngine, statements: Spans, tracer_provider: TracerProvider
) -> None:
    """By their index, and literals stay; never those of a batch."""
    options = SpanOptions(0.1, parameters=True)
    install(plain.sync_engine, options, tracer_provider, None, spans=True)
    async with plain.connect() as connection:
        await connection.execute(text("SELECT CAST(:a AS int), 'literal', :b"), {"a": 1, "b": "x"})
        await connection.execute(text("INSERT INTO items VALUES (:id)"), [{"id": 1}, {"id": 2}])
    one, batch = statements()
    assert one.attributes["db.query.parameter.0"] == "1"
    assert one.attributes["db.query.parameter.1"] == "x"
    assert "'literal'" in one.attributes["db.query.text"]
    assert not [key for key in batch.attributes if key.startswith("db.query.parameter")]


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE ROLE somebody PASSWORD 'hunter2'",
        "DO $$ BEGIN PERFORM 'hunter2'; END $$",
        "SELECT dblink('password=hunter2')",
        "COPY items FROM PROGRAM 'echo hunter2'",
        "CREATE USER MAPPING FOR CURRENT_USER SERVER s OPTIONS (password 'hunter2')",
        "SELECT 'hunter2",
    ],
)
async def test_never_a_password(
    traced: AsyncEngine, statements: Spans, reader: InMemoryMetricReader, statement: str
) -> None:
    """Whether the statement works or not."""
    async with traced.connect() as connection:
        with suppress(DBAPIError):
            await connection.exec_driver_sql(statement)
        await connection.rollback()
    (span,) = statements()
    assert "hunter2" not in span.to_json()
    assert "hunter2" not in str(points(reader))


async def test_an_unknown_statement_is_named_after_the_database(
    traced: AsyncEngine, statements: Spans
) -> None:
    """No operation, no summary: the target is the database."""
    with pytest.raises(DBAPIError):
        async with traced.connect() as connection:
            await connection.exec_driver_sql("gibberish")
    (span,) = statements()
    assert span.name == traced.url.database
    assert "db.operation.name" not in span.attributes


async def test_metrics_alone(
    plain: AsyncEngine,
    statements: Spans,
    reader: InMemoryMetricReader,
    tracer_provider: TracerProvider,
    meter_provider: MeterProvider,
) -> None:
    """Durations in seconds, in the conventions' buckets, and no span."""
    install(plain.sync_engine, OPTIONS, tracer_provider, meter_provider, spans=False)
    async with plain.connect() as connection:
        await connection.execute(text("SELECT pg_sleep(0.06)"))
    assert statements() == []
    (point,) = points(reader)[DURATION]
    assert (point.count, tuple(point.explicit_bounds)) == (1, SECONDS)
    assert 0.06 <= point.sum < 5
    assert set(point.attributes) == {
        "db.client.connection.pool.name",
        "db.system.name",
        "db.namespace",
        "server.address",
        "server.port",
        "db.operation.name",
    }


async def test_suppressed(traced: AsyncEngine, statements: Spans, reader: Any) -> None:
    """OpenTelemetry's own way to keep telemetry from watching itself is respected."""
    async with traced.connect() as connection:
        with suppress_instrumentation():
            await connection.execute(ONE)
    assert statements() == []
    assert durations(reader) == {}


# -- On and off --------------------------------------------------------------------------------


def listeners(engine: AsyncEngine) -> int:
    """How many stand around statements and errors."""
    dispatch = engine.dialect.dispatch
    events = ("do_execute", "do_executemany", "do_execute_no_params", "handle_error")
    return sum(len(getattr(dispatch, name)) for name in events)


async def test_turned_off(
    plain: AsyncEngine,
    statements: Spans,
    tracer_provider: TracerProvider,
    meter_provider: MeterProvider,
) -> None:
    """Nothing is left, whatever was on and however often it is turned off."""
    before = listeners(plain)
    for spans in (True, False, True):
        end = install(plain.sync_engine, OPTIONS, tracer_provider, meter_provider, spans=spans)
        assert listeners(plain) == before + 4
        end()
        end()
        assert listeners(plain) == before
    async with plain.connect() as connection:
        await connection.execute(ONE)
    assert statements() == []


async def test_twice_is_once(
    plain: AsyncEngine,
    statements: Spans,
    reader: InMemoryMetricReader,
    tracer_provider: TracerProvider,
    meter_provider: MeterProvider,
) -> None:
    """For each provider, through a view of the engine too; the first one's end ends it."""
    view = plain.execution_options(logging_token="view")
    end = install(plain.sync_engine, OPTIONS, tracer_provider, meter_provider, spans=True)
    again = install(view.sync_engine, OPTIONS, tracer_provider, meter_provider, spans=True)
    again()
    async with view.connect() as connection:
        await connection.execute(ONE)
    assert names(statements()) == ["SELECT"]
    assert durations(reader) == {("SELECT", None, None): 1}
    end()
    install(plain.sync_engine, OPTIONS, tracer_provider, meter_provider, spans=True)
    async with plain.connect() as connection:
        await connection.execute(ONE)
    assert names(statements()) == ["SELECT", "SELECT"]


async def test_spans_after_metrics(
    plain: AsyncEngine,
    statements: Spans,
    reader: InMemoryMetricReader,
    tracer_provider: TracerProvider,
    meter_provider: MeterProvider,
) -> None:
    """What is missing is added; what is on is not doubled."""
    install(plain.sync_engine, OPTIONS, tracer_provider, meter_provider, spans=False)
    install(plain.sync_engine, OPTIONS, tracer_provider, meter_provider, spans=True)
    async with plain.connect() as connection:
        await connection.execute(ONE)
    assert names(statements()) == ["SELECT"]
    assert durations(reader) == {("SELECT", None, None): 1}


async def test_two_providers(plain: AsyncEngine, tracer_provider: TracerProvider) -> None:
    """Each has a span, and the statement is executed once."""
    other, exporter = TracerProvider(shutdown_on_exit=False), InMemorySpanExporter()
    other.add_span_processor(SimpleSpanProcessor(exporter))
    for provider in (tracer_provider, other):
        install(plain.sync_engine, OPTIONS, provider, None, spans=True)
    async with plain.connect() as connection:
        await connection.execute(insert(Item), {"id": 1})
    assert names([s for s in exporter.get_finished_spans() if "INSERT" in s.name]) == [
        "INSERT items"
    ]


async def test_other_listeners_still_execute(traced: AsyncEngine, statements: Spans) -> None:
    """One that executes the statement itself is asked, and it is not executed again."""
    seen = []

    def execute(cursor: Any, statement: str, parameters: Any, context: Any) -> bool:
        seen.append(statement)
        context.dialect.do_execute(cursor, statement, parameters, context)
        return True

    event.listen(traced.sync_engine, "do_execute", execute)
    async with traced.connect() as connection:
        await connection.execute(insert(Item), {"id": 1})
    event.remove(traced.sync_engine, "do_execute", execute)
    assert len(seen) == len([s for s in statements() if s.name == "INSERT items"]) == 1


# -- Other instrumentations --------------------------------------------------------------------


async def test_with_the_instrumentation_of_asyncpg(
    traced: AsyncEngine, exporter: InMemorySpanExporter, tracer_provider: TracerProvider
) -> None:
    """A statement is one span, ours; what does not go through the engine is theirs."""
    assert others(traced.sync_engine) == set()
    AsyncPGInstrumentor().instrument(tracer_provider=tracer_provider)
    try:
        assert others(traced.sync_engine) == {ASYNCPG}
        tracer = tracer_provider.get_tracer("test")
        with tracer.start_as_current_span("request"):
            async with traced.connect() as connection:
                await connection.execute(select(Item))
                assert trace.get_current_span().is_recording()
                with pytest.raises(DBAPIError):
                    await connection.execute(text("SELECT 1 / 0"))
                raw = (await connection.get_raw_connection()).driver_connection
                await connection.rollback()
                await raw.fetch("VALUES (1)")
    finally:
        AsyncPGInstrumentor().uninstrument()
    found = [
        s.name for s in exporter.get_finished_spans() if "SELECT" in s.name or "VALUES" in s.name
    ]
    assert found == ["SELECT items", "SELECT", "VALUES"]


@pytest.mark.skipif(not sqlalchemy_version.startswith("2.0"), reason="it refuses SQLAlchemy 2.1")
async def test_with_the_instrumentation_of_sqlalchemy(
    traced: AsyncEngine, statements: Spans, reader: Any, tracer_provider: TracerProvider
) -> None:
    """Its span is made before ours could begin: ours gives way, the durations do not."""
    from opentelemetry.instrumentation.sqlalchemy import (  # noqa: PLC0415 (not on 2.1)
        SQLAlchemyInstrumentor,
    )

    SQLAlchemyInstrumentor().instrument(engine=traced.sync_engine, tracer_provider=tracer_provider)
    try:
        assert others(traced.sync_engine) == {SQLALCHEMY}
        async with traced.connect() as connection:
            await connection.execute(select(Item))
            with pytest.raises(DBAPIError):
                await connection.execute(text("SELECT 1 / 0"))
    finally:
        SQLAlchemyInstrumentor().uninstrument()
    spans = statements()
    assert {s.instrumentation_scope.name for s in spans} == {SQLALCHEMY}
    assert len(spans) == 2
    assert durations(reader) == {("SELECT", None, None): 1, ("SELECT", "22012", "22012"): 1}
