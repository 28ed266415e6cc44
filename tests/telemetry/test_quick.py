"""Spans that are made in one step are those that the SDK makes."""

import json

import pytest
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import (
    ALWAYS_OFF,
    ALWAYS_ON,
    DEFAULT_ON,
    ParentBased,
    Sampler,
    TraceIdRatioBased,
)
from opentelemetry.trace import SpanKind, Tracer

from poolkit.telemetry.quick import quick

SAID = {"db.system.name": "postgresql", "server.port": 5432, "db.query.text": "SELECT 1"}


class Watches(SpanProcessor):
    """Adds to spans as they start."""

    def on_start(self, span, parent_context=None) -> None:
        span.set_attribute("tenant", 1)


class Adds(Sampler):
    """A sampler of one's own."""

    def should_sample(self, *args, **kwargs):
        return ALWAYS_ON.should_sample(*args, **kwargs)

    def get_description(self) -> str:
        return "adds"


def made_both_ways(tracer: Tracer, exporter: InMemorySpanExporter, parent: Context) -> list[dict]:
    exporter.clear()
    span = tracer.start_span(
        "SELECT", context=parent, kind=SpanKind.CLIENT, attributes=SAID, start_time=10
    )
    span.end(20)
    made = quick(tracer)
    assert made is not None
    assert made.fits()
    made.emit("SELECT", made.attributes(SAID), parent, 10, 20)
    return [json.loads(each.to_json()) for each in exporter.get_finished_spans()]


@pytest.mark.parametrize("sampler", [DEFAULT_ON, ALWAYS_ON, ParentBased(TraceIdRatioBased(1.0))])
@pytest.mark.parametrize("limits", [SpanLimits(), SpanLimits(max_span_attributes=2)])
@pytest.mark.parametrize("has_parent", [True, False])
def test_it_is_the_same_span(sampler, limits, *, has_parent: bool) -> None:
    """All that exporters see but its id; without a parent, the trace's id too."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(sampler, span_limits=limits, shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("poolkit", "1")
    above = tracer.start_span("above") if has_parent else trace.INVALID_SPAN
    slow, fast = made_both_ways(tracer, exporter, trace.set_span_in_context(above, Context()))
    ids = ("span_id",) if has_parent else ("span_id", "trace_id")
    assert {slow["context"].pop(key) != fast["context"].pop(key) for key in ids} == {True}
    assert fast == slow
    slow_span, fast_span = exporter.get_finished_spans()
    assert fast_span.dropped_attributes == slow_span.dropped_attributes
    assert fast_span.instrumentation_scope == slow_span.instrumentation_scope
    assert fast_span.context.trace_flags == slow_span.context.trace_flags


@pytest.mark.parametrize("sampler", [ALWAYS_OFF, DEFAULT_ON])
def test_what_is_not_sampled_is_not_made(sampler: Sampler) -> None:
    """By the sampler, or because the parent is not."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(sampler, shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    unsampled = trace.SpanContext(1, 1, is_remote=False, trace_flags=trace.TraceFlags(0))
    parent = trace.set_span_in_context(trace.NonRecordingSpan(unsampled), Context())
    assert made_both_ways(provider.get_tracer("x"), exporter, parent) == []


def test_a_processor_that_looks_at_starts_is_respected() -> None:
    """Whenever it is added."""
    provider = TracerProvider(shutdown_on_exit=False)
    made = quick(provider.get_tracer("x"))
    assert made is not None
    provider.add_span_processor(batch := BatchSpanProcessor(InMemorySpanExporter()))
    assert made.fits()
    provider.add_span_processor(Watches())
    assert not made.fits()
    batch.shutdown()


def test_only_for_the_sdks_own() -> None:
    """Neither another tracer nor a sampler that might add attributes."""
    assert quick(trace.NoOpTracer()) is None
    assert quick(TracerProvider(Adds(), shutdown_on_exit=False).get_tracer("x")) is None
