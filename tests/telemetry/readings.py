"""What a metric reader has, in a form to compare with."""

from __future__ import annotations

from typing import Any

from opentelemetry.sdk.metrics.export import InMemoryMetricReader

OWN = {
    "db.client.connection.pool.name",
    "db.system.name",
    "db.namespace",
    "server.address",
    "server.port",
}
"""The attributes that every metric has."""


def points(reader: InMemoryMetricReader) -> dict[str, list[Any]]:
    """Every data point, by its metric's name; one metric of a name, or it fails."""
    found: dict[str, list[Any]] = {}
    data = reader.get_metrics_data()
    for resource in data.resource_metrics if data else ():
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                assert metric.name not in found, f"{metric.name} is there twice"
                found[metric.name] = list(metric.data.data_points)
    return found


def read(reader: InMemoryMetricReader, *, pool: str | None = None) -> dict[str, Any]:
    """Values by metric; of one that has attributes besides the pool's, values by those.

    Of a histogram the count. Two points with the same attributes fail.

    Args:
        reader: Where the metrics are.
        pool: Only those of the pool with this name; None is every pool.
    """
    return values(points(reader), pool=pool)


def values(found: dict[str, list[Any]], *, pool: str | None = None) -> dict[str, Any]:
    """The same of points that have been read."""
    mine = {name: [p for p in each if pool in (None, _pool(p))] for name, each in found.items()}
    return {name: _values(each) for name, each in mine.items() if each}


def _pool(point: Any) -> Any:
    return dict(point.attributes.items()).get("db.client.connection.pool.name")


def _values(points: list[Any]) -> Any:
    found: dict[Any, Any] = {}
    for point in points:
        value = point.value if hasattr(point, "value") else point.count
        own = tuple(v for k, v in sorted(point.attributes.items()) if k not in OWN)
        assert own not in found, f"{own} is there twice"
        found[own] = value
    if list(found) == [()]:
        return found[()]
    return {key[0] if len(key) == 1 else key: value for key, value in found.items()}
