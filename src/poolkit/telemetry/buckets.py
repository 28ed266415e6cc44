"""Exponential histograms as ones with explicit bounds, which is all that Prometheus' text has."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Any

from opentelemetry.sdk.metrics.export import (
    ExponentialHistogram,
    ExponentialHistogramDataPoint,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricsData,
)

from poolkit.telemetry.catalogue import SECONDS

_OTHERS = (0, 5, 10, 25, 50, 75, 100, 250, 500, 750, 1000, 2500, 5000, 7500, 10000)
"""OpenTelemetry's own bounds, for what is not in seconds."""


class ExplicitBuckets:
    """Turns the one into the other, as Logfire's provider makes exponential ones of all.

    Counts and sums stay exact. A bucket is counted where its middle is; when it is merged with its
    neighbour its middle moves, which must not make a count go down: that would be a reset.
    """

    def __init__(self) -> None:
        self._highest: dict[Any, list[int]] = {}

    def explicit(self, data: MetricsData) -> MetricsData:
        """The same data without exponential histograms."""
        return replace(
            data,
            resource_metrics=[
                replace(
                    resource,
                    scope_metrics=[
                        replace(
                            scope,
                            metrics=[self._metric(scope.scope, metric) for metric in scope.metrics],
                        )
                        for scope in resource.scope_metrics
                    ],
                )
                for resource in data.resource_metrics
            ],
        )

    def _metric(self, scope: Any, metric: Metric) -> Metric:
        if not isinstance(metric.data, ExponentialHistogram):
            return metric
        bounds = SECONDS if metric.unit == "s" else _OTHERS
        points = [
            self._point((scope, metric.name), point, bounds) for point in metric.data.data_points
        ]
        return replace(metric, data=Histogram(points, metric.data.aggregation_temporality))

    def _point(
        self, key: Any, point: ExponentialHistogramDataPoint, bounds: tuple[float, ...]
    ) -> HistogramDataPoint:
        counts = [0] * (len(bounds) + 1)
        for middle, count in _middles(point):
            counts[bisect_left(bounds, middle)] += count
        return HistogramDataPoint(
            attributes=point.attributes,
            start_time_unix_nano=point.start_time_unix_nano,
            time_unix_nano=point.time_unix_nano,
            count=point.count,
            sum=point.sum,
            bucket_counts=self._never_less(
                (*key, *sorted((point.attributes or {}).items())), counts
            ),
            explicit_bounds=bounds,
            min=point.min,
            max=point.max,
        )

    def _never_less(self, key: Any, counts: list[int]) -> list[int]:
        reached = list(accumulate(counts))
        before = self._highest.get(key, reached)
        reached = self._highest[key] = [max(pair) for pair in zip(reached, before, strict=True)]
        return [after - first for first, after in zip([0, *reached], reached, strict=False)]


def _middles(point: ExponentialHistogramDataPoint) -> Iterator[tuple[float, int]]:
    middle = _middle_of(point.scale)
    yield 0.0, point.zero_count
    for sign, buckets in ((1, point.positive), (-1, point.negative)):
        for index, count in enumerate(buckets.bucket_counts, buckets.offset):
            if count:
                yield sign * middle(index), count


def _middle_of(scale: int) -> Callable[[int], float]:
    return lambda index: 2.0 ** ((index + 0.5) * 2.0**-scale)
