"""Spans that are made in one step when they have ended, at a third of what the SDK takes for one.

The SDK copies and checks a span's attributes one by one under a lock, for a span that anybody may
still change. A statement's are known beforehand, and nobody sees its span before it has ended: so
what exporters get can be made directly, with attributes that are checked once per statement. Only
where no processor looks at spans as they start, and no sampler adds to them; otherwise there is
none of this, and spans are made by the API.

Leans on how the SDK's tracer and its processor are put together; ``tests/telemetry/test_quick.py``
fails where that changes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from opentelemetry.attributes import BoundedAttributes
from opentelemetry.context import Context
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags, Tracer, get_current_span

_SDK = "opentelemetry.sdk.trace"


class Quick:
    """Makes finished spans for one tracer of the SDK's.

    Args:
        tracer: The SDK's.
    """

    def __init__(self, tracer: Any) -> None:
        self._tracer = tracer
        self._sdk = sys.modules[_SDK]
        self._checked: object = None
        self._fits = False

    def fits(self) -> bool:
        """Whether it may be used now: processors can be added at any time."""
        processors = self._tracer.span_processor._span_processors  # noqa: SLF001
        if processors is not self._checked:
            self._checked = processors
            self._fits = all(_ignores_the_start(each) for each in processors)
        return self._fits

    def attributes(self, attributes: Mapping[str, Any]) -> Mapping[str, Any]:
        """Attributes within the tracer's limits, for any number of spans."""
        limits = self._tracer._span_limits  # noqa: SLF001
        return BoundedAttributes(
            limits.max_span_attributes,
            dict(attributes),
            immutable=True,
            max_value_len=limits.max_span_attribute_length,
        )

    def emit(
        self, name: str, attributes: Mapping[str, Any], parent: Context, began: int, ended: int
    ) -> None:
        """A span that went well.

        Args:
            name: Its name.
            attributes: As ``attributes()`` gives them.
            parent: The context that it is in.
            began: In nanoseconds since the epoch.
            ended: The same.
        """
        tracer = self._tracer
        above: SpanContext | None = get_current_span(parent).get_span_context()
        if above is None or not above.is_valid:
            above = None
            trace, flags = tracer.id_generator.generate_trace_id(), _flags(tracer.id_generator)
        else:
            trace, flags = above.trace_id, above.trace_flags
        result = tracer.sampler.should_sample(parent, trace, name, SpanKind.CLIENT, attributes, ())
        if not result.decision.is_sampled():
            return
        span_id = tracer.id_generator.generate_span_id()
        flags = TraceFlags(flags | TraceFlags.SAMPLED)
        span = self._sdk.ReadableSpan(
            name,
            SpanContext(trace, span_id, False, flags, result.trace_state),
            above,
            tracer.resource,
            attributes,
            kind=SpanKind.CLIENT,
            instrumentation_info=tracer.instrumentation_info,
            start_time=began,
            end_time=ended,
            instrumentation_scope=tracer._instrumentation_scope,  # noqa: SLF001
        )
        tracer.span_processor.on_end(span)


def quick(tracer: Tracer) -> Quick | None:
    """For a tracer whose spans can be made so; otherwise None."""
    sdk = sys.modules.get(_SDK)
    if sdk is None or type(tracer) is not sdk.Tracer:
        return None
    found: Any = tracer
    plain = type(found.span_processor) is sdk.SynchronousMultiSpanProcessor
    disabled = not getattr(found, "_is_enabled", lambda: True)()
    counts = type(getattr(found, "_tracer_metrics", None)).__name__ == "TracerMetrics"
    if not plain or disabled or counts or not _adds_nothing(found.sampler):
        return None
    return Quick(tracer)


def _adds_nothing(sampler: Any) -> bool:
    """Whether a sampler decides by the parent and the trace alone."""
    sampling = sys.modules[_SDK].sampling
    if type(sampler) is sampling.ParentBased:
        return all(_adds_nothing(each) for each in vars(sampler).values())
    return type(sampler) in (sampling.StaticSampler, sampling.TraceIdRatioBased)


def _ignores_the_start(processor: Any) -> bool:
    export = sys.modules[f"{_SDK}.export"]
    known = (sys.modules[_SDK].SpanProcessor, export.BatchSpanProcessor, export.SimpleSpanProcessor)
    return all(
        getattr(type(processor), method, None) in [getattr(cls, method, None) for cls in known]
        for method in ("on_start", "_on_ending")
    )


def _flags(id_generator: Any) -> int:
    is_random = getattr(id_generator, "is_trace_id_random", None)
    return TraceFlags.RANDOM_TRACE_ID if is_random is not None and is_random() else 0
