"""Each statement as a span and as a value of ``db.client.operation.duration``.

Stands around the dialect's ``do_execute``, which costs a statement far less than listeners on
connections do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from time import perf_counter, time_ns
from typing import Any

from opentelemetry.context import Context, attach, detach, get_current
from opentelemetry.trace import Span, SpanKind, Tracer
from sqlalchemy import Engine, event
from sqlalchemy.engine import ExceptionContext

from poolkit.moments import Moment, moment_of
from poolkit.telemetry.catalogue import OPERATION
from poolkit.telemetry.comments import commented, unprepared
from poolkit.telemetry.failures import failed
from poolkit.telemetry.known import BATCH_SIZE, SUMMARY, Known, know, named, rows
from poolkit.telemetry.others import asyncpg_is_instrumented, has_span, is_suppressed, suppressed
from poolkit.telemetry.quick import quick
from poolkit.telemetry.recorder import Recorders
from poolkit.telemetry.sql import LONGEST
from poolkit.timeouts import come_last

_REMEMBERED = 512


class Statements:
    """An engine's statements.

    Args:
        attributes: The engine's own, for spans and metrics.
        tracer: Makes the spans; None makes none.
        durations: Takes the durations; None takes none.
        parameters: Whether spans have parameters and literals.
        sqlcommenter: Whether statements carry their span's ``traceparent``.
    """

    def __init__(
        self,
        attributes: Mapping[str, Any],
        tracer: Tracer | None,
        durations: Recorders | None,
        *,
        parameters: bool,
        sqlcommenter: bool,
    ) -> None:
        self._attributes = attributes
        self._tracer = tracer
        self._durations = durations
        self._parameters = parameters
        self._comments = sqlcommenter
        # Neither shows in a span that is made when it has ended.
        self._quick = quick(tracer) if tracer and not parameters and not sqlcommenter else None
        self._known = lru_cache(_REMEMBERED)(self._know)
        # Each is one object, for they are compared: a bound method is a new one each time.
        self._listeners: dict[str, Callable[..., Any]] = {
            "do_execute": self._do_execute if tracer else self._time_execute,
            "do_executemany": self._do_executemany,
            "do_execute_no_params": self._do_execute_no_params,
            "handle_error": self._handle_error,
        }

    def listen(self, engine: Engine) -> Callable[[], None]:
        """Watch an engine and all that share its dialect; what is returned ends that."""
        dialect = engine.dialect
        for name, listener in self._listeners.items():
            event.listen(dialect, name, listener)
        come_last(engine)  # of those that are asked, the first that executes is the last

        def end() -> None:
            for name, listener in self._listeners.items():
                if event.contains(dialect, name, listener):
                    event.remove(dialect, name, listener)

        return end

    # -- SQLAlchemy's events -------------------------------------------------------------------

    def _do_execute(self, cursor: Any, statement: str, parameters: Any, context: Any) -> bool:
        count = rows(context, parameters) if context.executemany else 1
        args = (cursor, statement, parameters, context)
        one = context.statement if count > 1 else statement
        return self._watch("do_execute", args, one, parameters, count)

    def _time_execute(self, cursor: Any, statement: str, parameters: Any, context: Any) -> bool:
        """The same without spans, in one piece and as short as can be."""
        if get_current() or context.executemany:
            return self._do_execute(cursor, statement, parameters, context)
        if not context.root_connection.in_transaction():
            return False
        known = self._known(statement[: LONGEST + 1], bool(parameters), False)
        began = perf_counter()
        try:
            self._run("do_execute", (cursor, statement, parameters, context))
        except BaseException as error:
            self._failed(known, None, perf_counter() - began, error, get_current(), None)
            raise
        if not known.quiet and known.duration is not None:
            known.duration.record(perf_counter() - began)
        return True

    def _do_executemany(self, cursor: Any, statement: str, parameters: Any, context: Any) -> bool:
        args = (cursor, statement, parameters, context)
        return self._watch("do_executemany", args, statement, parameters, len(parameters))

    def _do_execute_no_params(self, cursor: Any, statement: str, context: Any) -> bool:
        return self._watch("do_execute_no_params", (cursor, statement, context), statement, (), 1)

    def _run(self, name: str, args: tuple[Any, ...]) -> None:
        """What SQLAlchemy would have done after it had asked our listener."""
        dialect = args[-1].dialect
        own, passed = self._listeners[name], False
        for listener in getattr(dialect.dispatch, name):
            if passed:
                if listener(*args):
                    return
            elif listener is own:
                passed = True
        getattr(dialect, name)(*args)

    def _handle_error(self, context: ExceptionContext) -> None:
        """What fails outside of a statement: a COMMIT, or the fetch from a server-side cursor."""
        if context.connection is None or context.statement is not None:
            return
        execution = context.execution_context
        error = context.original_exception
        if execution is not None:
            text: str = getattr(execution, "statement", None) or ""
            parameters = getattr(execution, "parameters", None) or [()]
            known = self._known(text[: LONGEST + 1], any(parameters), False)
            self._note_failure(error, Moment.TRANSACTION, "FETCH", known)
        elif moment_of(error.__traceback__) is Moment.COMMIT:
            self._note_failure(error, Moment.COMMIT, "COMMIT", None)

    # -- A statement ---------------------------------------------------------------------------

    def _watch(
        self, name: str, args: tuple[Any, ...], one: str, parameters: Any, size: int
    ) -> bool:
        """Execute it; False leaves it to SQLAlchemy, for it is none of the program's own.

        Args:
            name: The event's.
            args: The event's, of which the last is SQLAlchemy's context.
            one: What a batch sends for each of its operations; otherwise what is sent.
            parameters: The statement's.
            size: How many operations it is.
        """
        context, current = args[-1], get_current()
        # SQLAlchemy's own questions on an engine's first connection begin no transaction.
        if not context.root_connection.in_transaction() or is_suppressed(current):
            return False
        known = self._known(one[: LONGEST + 1], bool(parameters), size > 1)
        tracer = None if has_span(context) else self._tracer
        if tracer is None or known.quiet:
            self._measure(known, name, args, current, tracer)
        elif size == 1 and self._quick is not None and self._quick.fits():
            began = time_ns()
            seconds = self._measure(known, name, args, current, tracer)
            ended = began + int(seconds * 1e9)
            self._quick.emit(known.name, known.attributes, current, began, ended)
        else:
            said = self._said(known, parameters, size)
            span = tracer.start_span(known.name, kind=SpanKind.CLIENT, attributes=said)
            self._measure(known, name, args, current, tracer, span)
            span.end()
        return True

    def _said(self, known: Known, parameters: Any, size: int) -> Mapping[str, Any]:
        if size > 1:
            return {**known.attributes, BATCH_SIZE: size}
        if self._parameters and parameters:
            return {**known.attributes, **named(parameters)}
        return known.attributes

    def _measure(
        self,
        known: Known,
        name: str,
        args: tuple[Any, ...],
        current: Context,
        tracer: Tracer | None,
        span: Span | None = None,
    ) -> float:
        """Execute it and note how many seconds it took, or what it failed with.

        Args:
            known: What is known of it.
            name: The event's.
            args: The event's.
            current: The context that it is in.
            tracer: Makes its span, then the only one; None if another one does, or nobody.
            span: Its span, if that has begun.
        """
        token = None
        if tracer is not None and asyncpg_is_instrumented():
            token = attach(suppressed(current))
        began = perf_counter()
        try:
            if span is None or not self._comments:
                self._run(name, args)
            else:
                self._run_with_comment(span, name, args)
        except BaseException as error:
            self._failed(known, span, perf_counter() - began, error, current, tracer)
            raise
        finally:
            if token is not None:
                detach(token)
        seconds = perf_counter() - began
        if known.duration is not None and not known.quiet:
            known.duration.record(seconds)
        return seconds

    def _run_with_comment(self, span: Span, name: str, args: tuple[Any, ...]) -> None:
        about = span.get_span_context()
        if not span.is_recording() or not about.trace_flags.sampled:
            self._run(name, args)
            return
        cursor, statement, *others = args
        with unprepared(args[-1].root_connection.connection.dbapi_connection):
            self._run(name, (cursor, commented(statement, about), *others))

    def _failed(
        self,
        known: Known,
        span: Span | None,
        seconds: float,
        error: BaseException,
        current: Context,
        tracer: Tracer | None,
    ) -> None:
        found = failed(error, Moment.TRANSACTION)
        if self._durations is not None:
            self._durations.record(seconds, {**known.measured, **found.attributes})
        if span is None and tracer is not None:
            span = tracer.start_span(
                known.name,
                context=current,
                kind=SpanKind.CLIENT,
                attributes=known.attributes,
                start_time=time_ns() - int(seconds * 1e9),
            )
        if span is not None:
            found.mark(span)
            span.end()

    def _note_failure(
        self, error: BaseException, moment: Moment, operation: str, of: Known | None
    ) -> None:
        """A failure, of which it is not known when what failed began."""
        if is_suppressed(get_current()):
            return
        found = failed(error, moment)
        if self._durations is not None:
            measured = {**self._attributes, OPERATION: operation, **found.attributes}
            self._durations.record(0.0, measured)
        if self._tracer is None:
            return
        name = operation if of is None else f"{operation} {of.name}"
        said = {**(self._attributes if of is None else of.attributes), OPERATION: operation}
        said[SUMMARY] = name
        span = self._tracer.start_span(name, kind=SpanKind.CLIENT, attributes=said)
        found.mark(span)
        span.end()

    def _know(self, statement: str, parameterised: bool, batch: bool) -> Known:  # noqa: FBT001 (a key)
        found = know(
            statement,
            self._attributes,
            parameterised=parameterised,
            batch=batch,
            literals=self._parameters,
        )
        if self._durations is not None:
            found = replace(found, duration=self._durations.of(found.measured))
        return found if self._quick is None else found.within(self._quick.attributes)
