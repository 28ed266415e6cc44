"""What an engine's events are to those who have no telemetry: lines of ``logging``.

On for every engine of ``create_async_engine``. It wants only events that are rare, so that a hot
checkout pays nothing for it. Faults that repeat are held back: the first is told at once, then one
line at most in ``INTERVAL`` stands for all of its kind, and says for how many.

Two kinds of lines are not written here, because they are due without such an engine too: long
holders', by the pool that watches for them, and repeated transactions', by those who repeat them.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from sqlalchemy import Engine

from poolkit import events, reports
from poolkit.events import Event, Observers
from poolkit.pool import HandoffPool
from poolkit.reports import Report
from poolkit.url import DEFAULT_PORT

INTERVAL = 10.0
"""Seconds that must pass between two lines of the same kind."""

WANTED = (
    events.CheckoutTimedOut,
    events.CheckoutRefused,
    events.OverloadBegan,
    events.OverloadEnded,
    events.ConnectionOpened,
    events.ConnectionOpenFailed,
    events.ConnectionInvalidated,
    events.ConnectionClosed,
)
"""What is told here."""

TOLD_ELSEWHERE = (events.LongHolder, events.LongHolderReturned, events.TransactionRetried)


def install(engine: Engine, creator: Any) -> None:
    """Have an engine's events logged.

    Args:
        engine: The engine.
        creator: What makes its connections; has the observers, if the pool is not poolkit's.
    """
    if isinstance(engine.pool, HandoffPool):
        engine.pool.name = pool_name(engine)  # for the lines that the pool itself writes
    found = (getattr(each, "observers", None) for each in (engine.pool, creator))
    observers = next((each for each in found if isinstance(each, Observers)), None)
    if observers is not None:
        observers.add(Reporter(engine, Report.write), WANTED)


def place(engine: Engine) -> tuple[str, int, str]:
    """Host, port and database that an engine is for; of several hosts, the first."""
    arguments = engine.dialect.create_connect_args(engine.url)[1]
    host, port = _first(arguments.get("host")), _first(arguments.get("port"))
    database = arguments.get("database") or arguments.get("user") or ""
    return host or "localhost", int(port or DEFAULT_PORT), database


def pool_name(engine: Engine) -> str:
    """The pool's own name, or the semantic conventions' default for one that has none."""
    if name := getattr(engine.pool, "name", None):
        return str(name)
    host, port, database = place(engine)
    return f"{host}:{port}/{database}"


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list | tuple) and value else value


class Reporter:
    """An observer that makes reports of an engine's events.

    Args:
        engine: The engine; not kept alive.
        write: Told of each report that is not held back.
        interval: Seconds for which the like of a report are held back.
    """

    def __init__(
        self, engine: Engine, write: Callable[[Report], None], interval: float = INTERVAL
    ) -> None:
        self._engine = weakref.ref(engine)
        self._pool = pool_name(engine)
        self._limiter = Limiter(write, interval)
        self._failures = 0
        self._failing_since = 0.0
        self._cause: BaseException | None = None

    def __call__(self, event: Event) -> None:
        """Report it."""
        for report in self._reports(event):
            self._limiter.take(report)

    def _reports(self, event: Event) -> Iterator[Report]:
        match event:
            case events.ConnectionOpened():
                yield reports.opened(event, self._pool)
                if self._failures:
                    lasted = _now() - self._failing_since
                    yield reports.recovered(event, self._pool, self._failures, lasted)
                self._failures = 0
            case events.ConnectionOpenFailed():
                if not self._failures:
                    self._failing_since = _now()
                self._failures += 1
                yield reports.open_failed(event, self._pool)
            case events.ConnectionInvalidated(error=error):
                self._cause = error  # told with the close that follows
            case events.ConnectionClosed():
                cause, self._cause = self._cause, None
                yield reports.closed(event, self._pool, cause)
            case events.LongHolder():
                yield reports.long_holder(event, self._pool)
            case events.LongHolderReturned():
                yield reports.long_holder_returned(event, self._pool)
            case events.TransactionRetried():
                yield reports.retried(
                    attempt=event.attempt,
                    pause=event.pause,
                    kind=event.kind,
                    error=event.error,
                    pool=self._pool,
                )
            case _:
                yield from self._of_pool(event)

    def _of_pool(self, event: Event) -> Iterator[Report]:
        engine = self._engine()
        if engine is None or not isinstance(engine.pool, HandoffPool):
            return
        report = reports.of_pool(event, self._pool, _state(engine.pool))
        if report is not None:
            yield report


def _state(pool: HandoffPool) -> dict[str, Any]:
    stats = pool.stats()
    longest = max((pool.now() - record.taken_at for record in pool.held()), default=0.0)
    state = {name: getattr(stats, name) for name in ("used", "idle", "opening", "waiting")}
    return {**state, "limit": stats.limit, "longest_use": longest}


@dataclass(slots=True)
class _Window:
    """The time after a line in which its like are held back.

    Attributes:
        ends: When it is over.
        held_back: How many were.
        last: The last of them.
    """

    ends: float
    held_back: int = 0
    last: Report | None = None


class Limiter:
    """Passes on the first report of its kind, and then one at most in each interval.

    The line at an interval's end stands for all that were held back, so that no count is lost.
    """

    def __init__(self, write: Callable[[Report], None], interval: float) -> None:
        self._write = write
        self._interval = interval
        self._windows: dict[object, _Window] = {}

    def take(self, report: Report) -> None:
        """Pass it on, or hold it back."""
        if not report.limited:
            self._write(report)
            return
        now, window = _now(), self._windows.get(report.key)
        if window is not None and now < window.ends:
            window.held_back += 1
            window.last = report
            return
        self._open(report.key, now)
        # A window that is over and still there had no event loop to end it.
        self._pass_on(report, 0 if window is None else window.held_back)

    def close(self, key: object, window: _Window) -> None:
        """The interval is over."""
        if self._windows.get(key) is not window:
            return
        del self._windows[key]
        if window.last is not None:
            self._open(key, _now())
            self._pass_on(window.last, window.held_back - 1)

    def _open(self, key: object, now: float) -> None:
        self._windows[key] = window = _Window(now + self._interval)
        loop = _running_loop()
        if loop is not None:
            loop.call_later(
                self._interval,
                partial(_close, weakref.ref(self), key, window),
                context=contextvars.Context(),  # it belongs to no caller's trace
            )

    def _pass_on(self, report: Report, held_back: int) -> None:
        if held_back:
            report = replace(
                report,
                message=f"{report.message}{_MORE}",
                headline=report.headline and f"{report.headline}{_MORE}",
            )
        self._write(replace(report, values={**report.values, "held_back": held_back}))


_MORE = " (and %(held_back)d more since the last such line)"


def _close(limiter: weakref.ref[Limiter], key: object, window: _Window) -> None:
    alive = limiter()
    if alive is not None:
        alive.close(key, window)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:  # in another thread, as the garbage collector may be
        return None


def _now() -> float:
    loop = _running_loop()
    return time.monotonic() if loop is None else loop.time()
