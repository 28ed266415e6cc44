"""An engine's spans: its statements, its connects, and waits for a connection that were long."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from time import time_ns
from typing import Any

from opentelemetry.context import Context, get_current
from opentelemetry.metrics import MeterProvider
from opentelemetry.trace import (
    INVALID_SPAN,
    Link,
    ProxyTracerProvider,
    SpanKind,
    Tracer,
    TracerProvider,
    get_current_span,
    get_tracer_provider,
    set_span_in_context,
)
from sqlalchemy import Dialect, Engine

from poolkit._version import __version__
from poolkit.events import (
    CheckedOut,
    CheckoutRefused,
    CheckoutTimedOut,
    ConnectionOpened,
    ConnectionOpenFailed,
    Event,
)
from poolkit.lifecycle import observe, pool_stats
from poolkit.moments import Moment
from poolkit.pool import HandoffPool
from poolkit.telemetry.attributes import POOL_NAME, database_attributes, pool_name
from poolkit.telemetry.failures import failed
from poolkit.telemetry.meters import SCOPE
from poolkit.telemetry.metrics import instruments
from poolkit.telemetry.recorder import Recorders
from poolkit.telemetry.statements import Statements

CONNECT = "connect"
CHECKOUT = "pool.checkout"

WAIT = "poolkit.checkout.wait"
PING = "poolkit.checkout.ping"
ADDRESS = "poolkit.connection.address"
ATTEMPTS = "poolkit.connection.attempts"
POOLER = "poolkit.connection.pooler"
STATE = "poolkit.pool"
_STATE = ("used", "idle", "opening", "waiting")

_taken: weakref.WeakKeyDictionary[Dialect, list[object]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class SpanOptions:
    """What becomes a span, and what it says.

    Attributes:
        slow_checkout: Seconds of waiting for a connection that make it a span.
        parameters: Whether spans have statements' parameters and literals.
        sqlcommenter: Whether statements carry their span's ``traceparent`` as a comment.
    """

    slow_checkout: float
    parameters: bool = False
    sqlcommenter: bool = False


def install(
    engine: Engine,
    options: SpanOptions,
    tracer_provider: TracerProvider | None,
    meter_provider: MeterProvider | None,
    *,
    spans: bool,
) -> Callable[[], None]:
    """Emit an engine's spans, and how long its statements take; what is returned ends that.

    For one engine and one provider once: what is on already is left to whoever turned it on.
    """
    ends = ExitStack()
    durations: Recorders | None = instruments.of(meter_provider).durations
    if not _take(engine, durations, ends):
        durations = None
    tracer = None
    provider = get_tracer_provider() if tracer_provider is None else tracer_provider
    if spans and _take(engine, provider, ends):
        tracer = provider.get_tracer(SCOPE, __version__)
    if tracer is None and durations is None:
        return ends.close
    attributes = {POOL_NAME: pool_name(engine), **database_attributes(engine)}
    statements = Statements(
        attributes,
        tracer,
        durations,
        parameters=options.parameters,
        sqlcommenter=options.sqlcommenter,
    )
    ends.callback(statements.listen(engine))
    if tracer is not None and isinstance(engine.pool, HandoffPool):
        waits = PoolSpans(engine, tracer, attributes, options.slow_checkout)
        ends.callback(observe(engine, waits, waits.events))
    return ends.close


def _take(engine: Engine, what: object, ends: ExitStack) -> bool:
    """Whether nobody has it for this engine, which is kept for every view of the engine."""
    taken = _taken.setdefault(engine.dialect, [])
    if any(_is(one, what) for one in taken):
        return False
    taken.append(what)

    def give_back() -> None:
        taken[:] = [one for one in taken if one is not what]

    ends.callback(give_back)
    return True


def _is(known: object, wanted: object) -> bool:
    """Not by equality: some are dataclasses. OpenTelemetry's stand-in becomes the global one."""
    is_stand_in = isinstance(known, ProxyTracerProvider)
    return known is wanted or (is_stand_in and wanted is get_tracer_provider())


class PoolSpans:
    """An observer that makes spans of connects and of long waits, when they have ended.

    Args:
        engine: The engine, with poolkit's pool.
        tracer: Makes the spans.
        attributes: The engine's own.
        slow_checkout: Seconds of waiting that make a span.
    """

    events = (CheckedOut, CheckoutTimedOut, CheckoutRefused, ConnectionOpened, ConnectionOpenFailed)

    def __init__(
        self, engine: Engine, tracer: Tracer, attributes: Mapping[str, Any], slow_checkout: float
    ) -> None:
        self._engine = weakref.ref(engine)  # its pool knows its observers
        self._tracer = tracer
        self._attributes = attributes
        self._slow = slow_checkout

    def __call__(self, event: Event) -> None:
        """Take note of an event."""
        match event:
            case CheckedOut(wait=wait, ping=ping):
                if wait + ping >= self._slow:  # a connect is counted in what was waited
                    self._span(CHECKOUT, wait + ping, {WAIT: wait, PING: ping, **self._state()})
            case CheckoutTimedOut(waited=waited, error=error):
                self._span(CHECKOUT, waited, {WAIT: waited, **self._state()}, error)
            case CheckoutRefused(error=error):
                self._span(CHECKOUT, 0.0, self._state(), error)
            case ConnectionOpened(duration=duration, address=address, attempts=attempts):
                said = {ADDRESS: address, ATTEMPTS: attempts, POOLER: event.pooler}
                self._span(CONNECT, duration, said, kind=SpanKind.CLIENT)
            case ConnectionOpenFailed(duration=duration, address=address, error=error):
                said = {ADDRESS: address, ATTEMPTS: event.attempts}
                self._span(CONNECT, duration, said, error, kind=SpanKind.CLIENT)

    def _state(self) -> dict[str, Any]:
        engine = self._engine()
        if engine is None or not isinstance(engine.pool, HandoffPool):
            return {}
        now = pool_stats(engine)
        found = {f"{STATE}.{name}": getattr(now, name) for name in _STATE}
        return found if now.limit is None else {**found, f"{STATE}.limit": now.limit}

    def _span(
        self,
        name: str,
        seconds: float,
        said: Mapping[str, Any],
        error: Exception | None = None,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
    ) -> None:
        now = time_ns()
        parent, links = _parent()
        span = self._tracer.start_span(
            name,
            context=parent,
            kind=kind,
            attributes={**self._attributes, **said},
            links=links,
            start_time=now - int(seconds * 1e9),
        )
        if error is not None:
            failed(error, Moment.CONNECT).mark(span)
        span.end(now)


def _parent() -> tuple[Context, Sequence[Link]]:
    """The caller's span; one that has ended is linked to, as of a connect in the background."""
    current = get_current()
    span = get_current_span(current)
    context = span.get_span_context()
    has_ended = context.is_valid and context.trace_flags.sampled and not context.is_remote
    if span.is_recording() or not has_ended:
        return current, ()
    return set_span_in_context(INVALID_SPAN, current), (Link(context),)
