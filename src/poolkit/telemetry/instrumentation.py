"""Turning telemetry on and off for one engine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module

from opentelemetry.metrics import MeterProvider
from opentelemetry.trace import TracerProvider
from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from poolkit.settings import DatabaseSettings
from poolkit.telemetry import metrics, server
from poolkit.telemetry.spans import SpanOptions
from poolkit.telemetry.spans import install as install_spans


def instrument(
    engine: AsyncEngine | Engine,
    *,
    meter_provider: MeterProvider | None = None,
    tracer_provider: TracerProvider | None = None,
    spans: bool = True,
    slow_checkout: float = 0.1,
    parameters: bool = False,
    sqlcommenter: bool = False,
    server_interval: float = 0.0,
) -> Callable[[], None]:
    """Emit an engine's metrics and spans.

    Turning it on twice is turning it on once: what is on for a provider stays as it is, with
    whoever turned it on.

    Args:
        engine: Any engine; one whose pool is not poolkit's has no metrics of its pool.
        meter_provider: Where metrics go; None is OpenTelemetry's global one.
        tracer_provider: Where spans go; None is OpenTelemetry's global one.
        spans: Whether statements and connects become spans; False is metrics alone.
        slow_checkout: Seconds of waiting for a connection that make it a span; 0 is every one.
        parameters: Whether spans have statements' parameters and literals, which may be secrets.
        sqlcommenter: Whether statements carry their span's ``traceparent`` as a comment.
        server_interval: Seconds between looks at the server's connections; 0 is off.

    Returns:
        What turns off what this call has turned on.
    """
    ends = ExitStack()
    sync_engine = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
    ends.callback(metrics.install(sync_engine, meter_provider))
    ends.callback(
        install_spans(
            sync_engine,
            SpanOptions(slow_checkout, parameters=parameters, sqlcommenter=sqlcommenter),
            tracer_provider,
            meter_provider,
            spans=spans,
        )
    )
    if server_interval:
        ends.callback(server.install(sync_engine, server_interval, meter_provider))
    return ends.close


def install(engine: AsyncEngine, settings: DatabaseSettings) -> None:
    """Do what the settings say; called by ``poolkit.create_async_engine``.

    With ``LOGFIRE_ENABLED`` everything goes through Logfire, whatever ``DATABASE_TELEMETRY`` says.
    """
    if settings.logfire_enabled:
        import_module("poolkit.telemetry.logfire").install(engine, settings)
    elif settings.telemetry != "off":
        instrument(
            engine,
            spans=settings.telemetry == "full",
            slow_checkout=settings.telemetry_slow_checkout,
            parameters=settings.telemetry_parameters,
            sqlcommenter=settings.telemetry_sqlcommenter,
            server_interval=settings.telemetry_server_interval,
        )
