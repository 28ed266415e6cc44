"""Values of a histogram whose attributes never change, recorded at a fraction of the cost.

For every value the SDK copies and hashes the attributes, to find the sums that it belongs to. Here
they are found once. Only for the SDK's own histograms, and only where the value is no exemplar,
which it is inside a sampled span; otherwise, and where anything is not as expected, it goes by the
API.

Leans on how the SDK finds a value's sums; ``tests/telemetry/test_recorder.py`` fails where that
changes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from opentelemetry.metrics import Histogram
from opentelemetry.trace import INVALID_SPAN, get_current_span

_INSTRUMENTS = "opentelemetry.sdk.metrics._internal.instrument"
_EXEMPLARS = "opentelemetry.sdk.metrics._internal.exemplar"


class _Measured(NamedTuple):
    """All that a sum asks of a measurement that is no exemplar."""

    value: float


class _Way(NamedTuple):
    """Where values go.

    Attributes:
        consumer: The SDK's, which passes values on to its readers.
        readers: Its readers when the way was found: it replaces them as a whole.
        is_enabled: Whether the meter is.
        sums: For each view of each reader, its sums and which of them is ours.
    """

    consumer: Any
    readers: object
    is_enabled: Callable[[], bool]
    sums: tuple[tuple[dict[Any, Any], frozenset[Any]], ...]

    def is_open(self) -> bool:
        """Whether it can be gone for this value."""
        span = get_current_span()
        no_exemplar = span is INVALID_SPAN or not span.get_span_context().trace_flags.sampled
        return no_exemplar and self.is_enabled()


class Recorder:
    """Records values of a histogram.

    Args:
        histogram: The API's.
        attributes: What each value has; not to be changed.
    """

    __slots__ = ("_attributes", "_histogram", "_way")

    def __init__(self, histogram: Histogram, attributes: Mapping[str, Any]) -> None:
        self._histogram = histogram
        self._attributes = attributes
        self._way: _Way | None = None

    def record(self, value: float) -> None:
        """Record a value, 0 or more, in the histogram's unit."""
        way = self._way
        if way is None or way.consumer._reader_storages is not way.readers:  # noqa: SLF001
            self._histogram.record(value, self._attributes)
            self._way = _way(self._histogram, self._attributes)
        elif way.is_open():
            measured = _Measured(value)
            for sums, ours in way.sums:
                sums[ours].aggregate(measured, False)
        else:
            self._histogram.record(value, self._attributes)


def _way(histogram: Histogram, attributes: Mapping[str, Any]) -> _Way | None:
    """The way that the value went which was recorded last; None if it is not known."""
    real: Any = getattr(histogram, "_real_instrument", None) or histogram
    sdk = sys.modules.get(_INSTRUMENTS)
    if sdk is None or not isinstance(real, sdk.Histogram):
        return None
    try:
        consumer = real._measurement_consumer  # noqa: SLF001
        readers = consumer._reader_storages  # noqa: SLF001
        if not _follows_spans(consumer._sdk_config.exemplar_filter):  # noqa: SLF001
            return None
        is_enabled = getattr(real, "_is_enabled", _yes)
        return _Way(consumer, readers, is_enabled, tuple(_sums(readers, real, attributes)))
    except (AttributeError, KeyError):
        return None


def _follows_spans(exemplar_filter: object) -> bool:
    exemplars = sys.modules[_EXEMPLARS]
    known = (exemplars.TraceBasedExemplarFilter, exemplars.AlwaysOffExemplarFilter)
    return type(exemplar_filter) in known


def _sums(
    readers: Mapping[Any, Any], real: Any, attributes: Mapping[str, Any]
) -> Iterator[tuple[dict[Any, Any], frozenset[Any]]]:
    for reader in readers.values():
        for match in reader._instrument_view_instrument_matches[real]:  # noqa: SLF001
            kept = match._view._attribute_keys  # noqa: SLF001
            ours = frozenset(
                (name, value) for name, value in attributes.items() if kept is None or name in kept
            )
            sums = match._attributes_aggregation  # noqa: SLF001
            if ours not in sums:
                raise KeyError(ours)
            yield sums, ours


def _yes() -> bool:
    return True
