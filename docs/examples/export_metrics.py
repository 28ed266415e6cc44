"""Export a pool's metrics by OpenTelemetry; the reader in memory stands for an exporter."""

import asyncio

from opentelemetry.metrics import set_meter_provider
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from poolkit import create_async_engine
from poolkit.telemetry import instrument

# In a service: PeriodicExportingMetricReader(OTLPMetricExporter()).
reader = InMemoryMetricReader()


async def main() -> None:
    """Use a connection, and look at what is exported."""
    set_meter_provider(MeterProvider([reader]))
    engine = create_async_engine()
    instrument(engine, spans=False)  # or DATABASE_TELEMETRY=metrics, for every engine
    async with engine.connect():
        show("db.client.connection.count")
    show("db.client.connection.count")
    show("db.client.connection.use_time")
    await engine.dispose()


def show(name: str) -> None:
    data = reader.get_metrics_data()
    assert data is not None
    (scope,) = data.resource_metrics[0].scope_metrics
    (metric,) = (metric for metric in scope.metrics if metric.name == name)
    for point in metric.data.data_points:
        state = (point.attributes or {}).get("db.client.connection.state")
        value = getattr(point, "value", None)
        print(name, f"{point.count} times" if value is None else f"{state}: {value}")


asyncio.run(main())
