"""What a recorder records is what the API would have."""

import threading
from typing import Any

import pytest
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

from poolkit.telemetry import recorder
from poolkit.telemetry.recorder import Recorder, Recorders

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
    assert read(reader) == []
    recorded.pass_on()

    assert by_api == VALUES[:1]
    assert read(reader) == read(expected) != []
    recorded.pass_on()
    assert read(reader) == read(expected)


def test_several_readers() -> None:
    """Each gets all."""
    other = InMemoryMetricReader()
    reader, meters = provider(others=[other])
    recorded = Recorder(histogram(meters), ATTRIBUTES)
    for value in VALUES:
        recorded.record(value)
    recorded.pass_on()

    assert [point["count"] for point in read(reader) + read(other)] == [6, 6]


def test_a_reader_that_comes_later() -> None:
    """It gets what comes after it."""
    reader, meters = provider()
    if not hasattr(meters, "add_metric_reader"):
        pytest.skip("this SDK has no such thing")
    recorded = Recorder(histogram(meters), ATTRIBUTES)
    recorded.record(1)
    recorded.record(1)
    recorded.pass_on()
    later = InMemoryMetricReader()
    meters.add_metric_reader(later)
    recorded.record(1)
    recorded.record(1)
    recorded.pass_on()

    assert [point["count"] for point in read(reader) + read(later)] == [4, 2]


def test_differences() -> None:
    """A reader of differences gets each value once."""
    reader, meters = provider(temporality={Histogram: AggregationTemporality.DELTA})
    recorded = Recorder(histogram(meters), ATTRIBUTES)
    counts = []
    for _ in range(3):
        recorded.record(1)
        recorded.record(1)
        recorded.pass_on()
        counts += [point["count"] for point in read(reader)]

    assert counts == [2, 2, 2]


def test_an_exemplar_goes_by_the_api(by_api) -> None:
    """A notable value inside a span may be one; a short one is none."""
    reader, meters = provider()
    recorded = Recorder(histogram(meters), ATTRIBUTES)
    recorded.record(0.5)
    recorded.pass_on()
    del by_api[:]
    with TracerProvider().get_tracer("x").start_as_current_span("sampled") as span:
        recorded.record(recorder.NOTABLE)
        recorded.record(recorder.NOTABLE / 2)
    assert by_api == [recorder.NOTABLE]
    recorded.pass_on()

    assert by_api == [recorder.NOTABLE]
    data = reader.get_metrics_data()
    (point,) = data.resource_metrics[0].scope_metrics[0].metrics[0].data.data_points
    assert point.count == 3
    assert [exemplar.value for exemplar in point.exemplars] == [recorder.NOTABLE]
    assert point.exemplars[0].span_id == span.get_span_context().span_id


@pytest.mark.parametrize(
    ("exemplars", "by"),
    [(AlwaysOnExemplarFilter(), {1, 2, 3}), (AlwaysOffExemplarFilter(), {1})],
)
def test_exemplars_of_everything(exemplars, by, by_api) -> None:
    """Who wants examples without spans gets them."""
    reader, meters = provider(exemplar_filter=exemplars)
    recorded = Recorder(histogram(meters), ATTRIBUTES)
    for value in (1, 2, 3):
        recorded.record(value)
    recorded.pass_on()

    assert set(by_api) == by
    assert [point["count"] for point in read(reader)] == [3]


def test_any_other_provider(monkeypatch) -> None:
    """Not the SDK's: by the API."""
    each = histogram(NoOpMeterProvider())
    seen = []
    monkeypatch.setattr(type(each), "record", lambda _, value, attributes: seen.append(value))
    recorded = Recorder(each, ATTRIBUTES)
    for value in (1, 2, 3):
        recorded.record(value)
    recorded.pass_on()

    assert sorted(seen) == [1, 2, 3]


def test_no_more_is_left_than_takes_a_moment(by_api) -> None:
    """Where nobody collects."""
    reader, meters = provider()
    recorded = Recorder(histogram(meters), ATTRIBUTES)
    for _ in range(recorder.MOST - 1):
        recorded.record(1)
    assert by_api == []
    recorded.record(1)

    assert [point["count"] for point in read(reader)] == [recorder.MOST]


def test_threads_lose_nothing() -> None:
    """One leaves values while two others pass them on."""
    reader, meters = provider()
    recorded = Recorder(histogram(meters), ATTRIBUTES)
    stop = threading.Event()

    def pass_on() -> None:
        while not stop.is_set():
            recorded.pass_on()

    others = [threading.Thread(target=pass_on) for _ in range(2)]
    for other in others:
        other.start()
    for _ in range(20_000):
        recorded.record(1)
    stop.set()
    for other in others:
        other.join()
    recorded.pass_on()

    assert [point["count"] for point in read(reader)] == [20_000]


def test_one_for_the_same_attributes() -> None:
    """However often it is asked for."""
    _, meters = provider()
    recorders = Recorders(histogram(meters))

    assert recorders.of(ATTRIBUTES) is recorders.of(dict(ATTRIBUTES))
    assert recorders.of(ATTRIBUTES) is not recorders.of({})
