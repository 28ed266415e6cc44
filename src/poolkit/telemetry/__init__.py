"""Metrics and spans of an engine, through OpenTelemetry's API; needs ``poolkit[telemetry]``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from poolkit.errors import ConfigurationError

if TYPE_CHECKING:
    from poolkit.telemetry.instrumentation import install, instrument

__all__ = ["install", "instrument"]


def __getattr__(name: str) -> Any:
    """Loads OpenTelemetry when it is asked for: the catalogue is of use without."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module("poolkit.telemetry.instrumentation")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "opentelemetry":
            raise
        raise ConfigurationError(
            "DATABASE_TELEMETRY and poolkit.telemetry need the package opentelemetry-api: pip"
            " install 'poolkit[telemetry]' (for LOGFIRE_ENABLED: 'poolkit[logfire]'), or leave"
            " DATABASE_TELEMETRY out"
        ) from error
    return getattr(module, name)
