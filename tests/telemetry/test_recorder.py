"""What a recorder records is what the API would have."""

from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.metrics import (
    AlwaysOffExemplarFilter,
    AlwaysOnExemplarFilter,
    Histogram,
    MeterProvider,
)
from opentelemetry.sdk.metrics.export import AggregationTemporality, InMemoryMetricReader
from opentelemetry.sdk.metrics.view import ExponentialBucketHistogramAggregation, View
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from poolkit.telemetry.recorder import Recorder

ATTRIBUTES = {"db.client.connection.pool.name": "x", "server.port": 5432}
VALUES = [0.0, 0.0005, 0.001, 0.02, 7.0, 20.0]


def read(reader: InMemoryMetricReader) -> list[Any]:
    """Each histogram's points, without their times."""
    data = reader.get_metrics_data()
    if data is None:
        return []
    return [
        {
            name: value
            for name, value in vars(point).items()
            if "time_unix" not in name and name != "exemplars"
        }
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        for point in metric.data.data_points
    ]


def provider(**options: Any) -> tuple[InMemoryMetricReader, MeterProvider]:
    reader = InMemoryMetricReader(options.pop("temporality", None))
    return reader, MeterProvider([reader, *options.pop("others", ())], **options)


def histogram(meters: Any) -> Any:
    return meters.get_meter("x").create_histogram(
        "wait", unit="s", explicit_bucket_boundaries_advisory=[0.001, 0.01, 1.0]
    )


@pytest.fixture
def by_api(monkeypatch) -> list[float]:
    """The values that were recorded through the SDK's own front door."""
    seen: list[float] = []
    sdk = type(histogram(MeterProvider()))
    record = sdk.record

    def counted(self: Any, value: float, *args: Any, **kwargs: Any) -> None:
        seen.append(value)
        record(self, value, *args, **kwargs)

    monkeypatch.setattr(sdk, "record", counted)
    return seen


VIEWS = {
    "as advised": (),
    "exponential": (
        View(instrument_type=Histogram, aggregation=ExponentialBucketHistogramAggregation()),
    ),
    "fewer attributes": (View(instrument_name="wait", attribute_keys={"server.port"}),),
    "no attributes": (View(instrument_name="wait", attribute_keys=set()),),
    "two views": (View(instrument_name="wait"), View(instrument_name="wait", name="again")),
}


@pytest.mark.parametrize("views", VIEWS.values(), ids=VIEWS)
def test_the_same_points(views, by_api) -> None:
    """Counts, sums, bounds, least and greatest are those of the API, and only the first is slow."""
    expected, meters = provider(views=views)
    for value in VALUES:
        histogram(meters).record(value, ATTRIBUTES)
    reader, meters = provider(views=views)
    recorded = Recorder(histogram(meters), ATTRIBUTES)
    del by_api[:]
    for value in VALUES:
        recorded.record(value)

    assert by_api == VALUES[:1]
    assert read(reader) == read(expected) != []


def test_several_readers() -> None:
    """Each gets all."""
    other = InMemoryMetricReader()
    reader, meters = provider(others=[other])
    recorded = Recorder(histogram(meters), ATTRIBUTES)
    for value in VALUES:
        recorded.record(value)

    assert [point["count"] for point in read(reader) + read(other)] == [6, 6]


def test_a_reader_that_comes_later() -> None:
    """It gets what comes after it."""
    reader, meters = provider()
    if not hasattr(meters, "add_metric_reader"):
        pytest.skip("this SDK has no such thing")
    recorded = Recorder(histogram(meters), ATTRIBUTES)
    recorded.record(1)
    recorded.record(1)
    later = InMemoryMetricReader()
    meters.add_metric_reader(later)
    recorded.record(1)
    recorded.record(1)

    assert [point["count"] for point in read(reader) + read(later)] == [4, 2]


def test_differences() -> None:
    """A reader of differences gets each value once."""
    reader, meters = provider(temporality={Histogram: AggregationTemporality.DELTA})
    recorded = Recorder(histogram(meters), ATTRIBUTES)
    counts = []
    for _ in range(3):
        recorded.record(1)
        recorded.record(1)
        counts += [point["count"] for point in read(reader)]

    assert counts == [2, 2, 2]


def test_an_exemplar_goes_by_the_api(by_api) -> None:
    """Inside a sampled span it may be one; inside one that is not sampled it is none."""
    reader, meters = provider()
    recorded = Recorder(histogram(meters), ATTRIBUTES)
    recorded.record(0.5)
    del by_api[:]
    with TracerProvider().get_tracer("x").start_as_current_span("sampled") as span:
        recorded.record(2)
    with TracerProvider(sampler=ALWAYS_OFF).get_tracer("x").start_as_current_span("not"):
        recorded.record(3)

    assert by_api == [2]
    data = reader.get_metrics_data()
    (point,) = data.resource_metrics[0].scope_metrics[0].metrics[0].data.data_points
    assert [exemplar.value for exemplar in point.exemplars] == [2]
    assert point.exemplars[0].span_id == span.get_span_context().span_id
    assert trace.get_current_span() is trace.INVALID_SPAN


@pytest.mark.parametrize(
    ("exemplars", "by"),
    [(AlwaysOnExemplarFilter(), [1, 2, 3]), (AlwaysOffExemplarFilter(), [1])],
)
def test_exemplars_of_everything(exemplars, by, by_api) -> None:
    """Who wants examples without spans gets them."""
    reader, meters = provider(exemplar_filter=exemplars)
    recorded = Recorder(histogram(meters), ATTRIBUTES)
    for value in (1, 2, 3):
        recorded.record(value)

    assert by_api == by
    assert [point["count"] for point in read(reader)] == [3]


def test_any_other_provider() -> None:
    """Not the SDK's: by the API."""
    recorded = Recorder(histogram(NoOpMeterProvider()), ATTRIBUTES)
    recorded.record(1)
    recorded.record(1)

    assert recorded._way is None
