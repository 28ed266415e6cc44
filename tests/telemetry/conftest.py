"""OpenTelemetry in memory: metrics and spans that a test reads back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "pool"))  # the fake driver


@pytest.fixture
def reader() -> InMemoryMetricReader:
    """What ``meter_provider`` has collected."""
    return InMemoryMetricReader()


@pytest.fixture
def meter_provider(reader: InMemoryMetricReader) -> Iterator[MeterProvider]:
    """Metrics go to ``reader``."""
    provider = MeterProvider([reader], shutdown_on_exit=False)
    yield provider
    provider.shutdown()


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    """The spans of ``tracer_provider`` that have ended."""
    return InMemorySpanExporter()


@pytest.fixture
def tracer_provider(exporter: InMemorySpanExporter) -> Iterator[TracerProvider]:
    """Spans go to ``exporter``."""
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield provider
    provider.shutdown()


@pytest.fixture
def measured(
    meter_provider: MeterProvider, reader: InMemoryMetricReader
) -> Callable[..., dict[str, Any]]:
    """Collects the metrics, by name; ``readings.read`` says in which form."""
    from readings import read  # noqa: PLC0415 (found by the path above)

    return lambda **only: read(reader, **only)
