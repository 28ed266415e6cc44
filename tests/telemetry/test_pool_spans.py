"""Spans of connects, and of waits for a connection."""

import asyncio
from collections.abc import Callable

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from poolkit import ConnectRefused, PoolDraining, PoolTimeout, drain, warm_up
from poolkit.events import CheckedIn, CheckedOut
from poolkit.telemetry.spans import SpanOptions, install
from poolkit.testing import FaultProxy, PostgresServer

ONE = text("SELECT 1")
EngineMaker = Callable[..., AsyncEngine]
Named = Callable[[str], list[ReadableSpan]]


@pytest.fixture
def named(exporter: InMemorySpanExporter) -> Named:
    """The spans of a name."""
    return lambda name: [s for s in exporter.get_finished_spans() if s.name == name]


@pytest.fixture
def make(
    make_engine: EngineMaker, server: PostgresServer, tracer_provider: TracerProvider
) -> EngineMaker:
    """An engine with spans, whose pool has one connection."""

    def made(slow_checkout: float = 0.1, **settings: object) -> AsyncEngine:
        values = {"url": server.url, "pool_size": 1, "max_overflow": 0, **settings}
        engine = make_engine(settings=values)
        install(engine.sync_engine, SpanOptions(slow_checkout), tracer_provider, None, spans=True)
        return engine

    return made


async def test_a_connect(make: EngineMaker, named: Named, tracer_provider: TracerProvider) -> None:
    """Within the span of the caller that it is for, from its beginning to its end."""
    engine = make(pool_name="main")
    with tracer_provider.get_tracer("test").start_as_current_span("request") as request:
        async with engine.connect():
            pass
        async with engine.connect():
            pass
    (span,) = named("connect")
    assert span.kind is SpanKind.CLIENT
    assert span.parent.span_id == request.get_span_context().span_id
    assert request.start_time < span.start_time < span.end_time < request.end_time
    assert span.attributes["db.client.connection.pool.name"] == "main"
    assert span.attributes["poolkit.connection.attempts"] >= 1
    assert span.attributes["poolkit.connection.pooler"] == "none"
    assert span.attributes["server.port"] == engine.url.port
    assert span.status.status_code is StatusCode.UNSET


async def test_a_connect_in_the_background(
    make: EngineMaker, named: Named, tracer_provider: TracerProvider
) -> None:
    """One that a request started and did not wait for is linked to it once that has ended."""
    engine = make()
    with tracer_provider.get_tracer("test").start_as_current_span("request") as request:
        opening = asyncio.create_task(warm_up(engine))
    await opening
    (span,) = named("connect")
    assert span.parent is None
    assert [link.context.span_id for link in span.links] == [request.get_span_context().span_id]


async def test_a_failed_connect(make: EngineMaker, named: Named, server: PostgresServer) -> None:
    """What kept it from succeeding, and no password."""
    with FaultProxy(server) as proxy:
        proxy.refuse()
        engine = make(url=proxy.url, connection_timeout=0.3)
        with pytest.raises(ConnectRefused):
            await engine.connect()
    (span,) = named("connect")
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes["error.type"] == "connect_refused"
    assert span.status.description == "ConnectionRefusedError"


async def test_a_slow_checkout(
    make: EngineMaker, named: Named, tracer_provider: TracerProvider
) -> None:
    """A wait that was long enough is a span back in time, within the waiting caller's."""
    engine = make(0.05)
    tracer = tracer_provider.get_tracer("test")

    async def wait() -> None:
        with tracer.start_as_current_span("waits"):
            async with engine.connect() as connection:
                await connection.execute(ONE)

    async with engine.connect() as connection:
        waiting = asyncio.create_task(wait())
        await connection.execute(text("SELECT pg_sleep(0.1)"))
    await waiting
    found = [s for s in named("pool.checkout") if s.parent is not None]
    (span,) = found
    (above,) = named("waits")
    assert span.parent.span_id == above.context.span_id
    seconds = (span.end_time - span.start_time) / 1e9
    assert seconds >= 0.05
    assert seconds == pytest.approx(span.attributes["poolkit.checkout.wait"], abs=0.001)
    assert span.start_time >= above.start_time
    assert (span.kind, span.status.status_code) == (SpanKind.INTERNAL, StatusCode.UNSET)


async def test_a_quick_checkout(make: EngineMaker, named: Named) -> None:
    """No span for a connection that was there, however long its connect had taken before."""
    engine = make(5.0)
    await warm_up(engine)
    for _ in range(3):
        async with engine.connect() as connection:
            await connection.execute(ONE)
    assert named("pool.checkout") == []


async def test_a_checkout_that_timed_out(
    make: EngineMaker, named: Named, tracer_provider: TracerProvider
) -> None:
    """An error, with how the pool stood, within the caller's span."""
    engine = make(5.0, pool_timeout=0.05)
    async with engine.connect():
        tracer = tracer_provider.get_tracer("test")
        with tracer.start_as_current_span("request") as request, pytest.raises(PoolTimeout):
            await engine.connect()
    (span,) = named("pool.checkout")
    assert span.parent.span_id == request.get_span_context().span_id
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes["error.type"] == "pool_timeout"
    state = {k: v for k, v in span.attributes.items() if k.startswith("poolkit.pool.")}
    assert state == {
        "poolkit.pool.used": 1,
        "poolkit.pool.idle": 0,
        "poolkit.pool.opening": 0,
        "poolkit.pool.waiting": 1,
        "poolkit.pool.limit": 1,
    }
    assert (span.end_time - span.start_time) / 1e9 >= 0.05


async def test_a_refused_checkout(make: EngineMaker, named: Named) -> None:
    """An error, however short the wait was."""
    engine = make()
    await drain(engine)
    with pytest.raises(PoolDraining):
        await engine.connect()
    (span,) = named("pool.checkout")
    assert span.attributes["error.type"] == "pool_draining"


async def test_turned_off(
    make_engine: EngineMaker, server: PostgresServer, tracer_provider: TracerProvider, named: Named
) -> None:
    """The pool has no observer of ours left."""
    engine = make_engine(settings={"url": server.url})
    observers = engine.pool.observers
    before = [len(observers.wanting(kind)) for kind in (CheckedOut, CheckedIn)]
    end = install(engine.sync_engine, SpanOptions(0.0), tracer_provider, None, spans=True)
    assert len(observers.wanting(CheckedOut)) == before[0] + 1
    end()
    assert [len(observers.wanting(kind)) for kind in (CheckedOut, CheckedIn)] == before
    async with engine.connect():
        pass
    assert named("connect") == []
