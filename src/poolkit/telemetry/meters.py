"""One set of instruments for each meter provider: one that reads state may be there only once."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

from opentelemetry.metrics import (
    CallbackT,
    Histogram,
    Meter,
    MeterProvider,
    get_meter_provider,
)

from poolkit._version import __version__
from poolkit.telemetry.catalogue import METRICS, SECONDS, Kind

SCOPE = "poolkit"
"""The name of the meter, and of the tracer."""

T = TypeVar("T")


class PerProvider(Generic[T]):
    """What is made once for each meter provider, and is kept as long as that lives.

    Args:
        make: Makes it, on a meter that it has to keep: Logfire's providers do not.
    """

    def __init__(self, make: Callable[[Meter], T]) -> None:
        self._make = make
        self._made: list[tuple[weakref.ref[MeterProvider], T]] = []
        self._lock = threading.Lock()

    def of(self, provider: MeterProvider | None) -> T:
        """The one of this provider; None is OpenTelemetry's global one."""
        with self._lock:
            wanted = get_meter_provider() if provider is None else provider
            self._made = [entry for entry in self._made if entry[0]() is not None]
            for reference, one in self._made:
                if _is(reference(), wanted):
                    return one
            one = self._make(wanted.get_meter(SCOPE, __version__))
            self._made.append((weakref.ref(wanted), one))
            return one


def _is(known: MeterProvider | None, wanted: MeterProvider) -> bool:
    """Not by equality: Logfire's are dataclasses.

    OpenTelemetry's stand-in for a global provider that is not set yet passes on to it what was
    made on itself, once it is.
    """
    is_stand_in = hasattr(known, "on_set_meter_provider")
    return known is wanted or (is_stand_in and wanted is get_meter_provider())


def observable(meter: Meter, name: str, callback: CallbackT) -> object:
    """An instrument of the catalogue that reads its value when it is collected; to be kept."""
    metric = METRICS[name]
    make = {
        Kind.COUNTER: meter.create_observable_counter,
        Kind.UP_DOWN_COUNTER: meter.create_observable_up_down_counter,
        Kind.GAUGE: meter.create_observable_gauge,
    }[metric.kind]
    return make(name, callbacks=[callback], unit=metric.unit, description=metric.description)


def histogram(meter: Meter, name: str) -> Histogram:
    """A histogram of the catalogue."""
    metric = METRICS[name]
    return meter.create_histogram(
        name,
        unit=metric.unit,
        description=metric.description,
        explicit_bucket_boundaries_advisory=SECONDS,
    )
