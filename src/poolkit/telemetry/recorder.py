"""Values of a histogram whose attributes never change, recorded at a fraction of the cost.

A caller leaves its value, and goes on; what has been left is passed on when the metrics are
collected, or when it has become much. Then the SDK's sums are found once for all values, where for
each of them it would copy and hash the attributes. A notable value inside a span, which may become
an exemplar, goes by the API at once.

Leans on the SDK asking its observable instruments before it collects the others, and on how it
finds a value's sums, without which values go by the API; ``tests/telemetry/test_recorder.py`` fails
where that changes.
"""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from opentelemetry.context import get_current
from opentelemetry.metrics import Histogram

MOST = 1000
"""Values that are left at most: passing them on takes about a millisecond."""

NOTABLE = 0.01
"""Seconds from which a value may be an exemplar: nobody looks for the trace of a shorter one."""

_INSTRUMENTS = "opentelemetry.sdk.metrics._internal.instrument"
_EXEMPLARS = "opentelemetry.sdk.metrics._internal.exemplar"


class _Measured:
    """All that a sum asks of a measurement that is no exemplar."""

    __slots__ = ("value",)


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
        """Whether it can still be gone."""
        return self.consumer._reader_storages is self.readers and self.is_enabled()  # noqa: SLF001


class Recorder:
    """Records values of a histogram.

    Args:
        histogram: The API's.
        attributes: What each value has; not to be changed.
    """

    __slots__ = ("_attributes", "_histogram", "_left", "_way")

    def __init__(self, histogram: Histogram, attributes: Mapping[str, Any]) -> None:
        self._histogram = histogram
        self._attributes = attributes
        self._left: deque[float] = deque()
        self._way: _Way | None = None

    def record(self, value: float) -> None:
        """Record a value, 0 or more, in the histogram's unit."""
        if value >= NOTABLE and get_current():
            self._histogram.record(value, self._attributes)
            return
        left = self._left
        left.append(value)
        if len(left) >= MOST:
            self.pass_on()

    def pass_on(self) -> None:
        """Have the histogram have what was left."""
        values = list(self._taken())
        if values and (self._way is None or not self._way.is_open()):
            self._histogram.record(values.pop(0), self._attributes)
            self._way = _way(self._histogram, self._attributes)
        if self._way is None:
            for value in values:
                self._histogram.record(value, self._attributes)
            return
        measured: Any = _Measured()
        for sums, ours in self._way.sums:
            aggregate = sums[ours].aggregate
            for measured.value in values:
                aggregate(measured, False)

    def _taken(self) -> Iterator[float]:
        """What was left, taken away one by one: another thread may do it too."""
        with contextlib.suppress(IndexError):
            while True:
                yield self._left.popleft()


class Recorders:
    """The recorders of a histogram.

    Args:
        histogram: The API's.
    """

    def __init__(self, histogram: Histogram) -> None:
        self._histogram = histogram
        self._made: dict[frozenset[Any], Recorder] = {}

    def of(self, attributes: Mapping[str, Any]) -> Recorder:
        """The one for these attributes."""
        key = frozenset(attributes.items())
        return self._made.setdefault(key, Recorder(self._histogram, attributes))

    def record(self, value: float, attributes: Mapping[str, Any]) -> None:
        """Record a value whose attributes are seldom the same."""
        self._histogram.record(value, attributes)

    def pass_on(self) -> None:
        """Have the histogram have what was left; to be called before it is collected."""
        for recorder in list(self._made.values()):
            recorder.pass_on()


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
