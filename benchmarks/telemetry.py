"""What telemetry costs a request, beside OpenTelemetry's own instrumentation of SQLAlchemy.

That one works on SQLAlchemy 2.0 only. So each line of SQLAlchemy is measured in a process of its
own: ``python -m benchmarks.telemetry URL`` measures this environment's and prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from benchmarks.engines import AGAIN, SELECT, Sizes, poolkit_engine
from benchmarks.model import Chart, Row, Section, Spread, ratios, rotated
from poolkit.testing import PostgresServer

OFF = "off"
METRICS = "metrics"
SPANS = "metrics and spans"
LOGFIRE = "Logfire"
THEIRS = "OpenTelemetry's instrumentation"
THEIRS_IN_LOGFIRE = "logfire.instrument_sqlalchemy"
NAMES = (OFF, OFF + AGAIN, METRICS, SPANS, LOGFIRE, THEIRS, THEIRS_IN_LOGFIRE)

OLDER = Path(sys.prefix) / "sqlalchemy-2.0"
"""Where ``make bench`` puts SQLAlchemy 2.0, to stand before 2.1 on the path of a process."""

MOST_FOR_METRICS = 1.03
MOST_OF_THEIRS = 0.5


@dataclass(frozen=True, slots=True)
class Found:
    """Microseconds of a request: for each contestant, a figure for each round.

    Attributes:
        version: SQLAlchemy's.
        times: On the clock.
        cpu: Of this process.
    """

    version: str
    times: Mapping[str, Sequence[float]]
    cpu: Mapping[str, Sequence[float]]


async def run(server: PostgresServer, *, quick: bool) -> Section:
    """Measure on this environment's SQLAlchemy, and on 2.0 if ``make bench`` has put it there."""
    found = [await _in_process(server.url, None, quick=quick)]
    if OLDER.exists() and not found[0].version.startswith("2.0"):
        found.append(await _in_process(server.url, OLDER, quick=quick))
    return _section(found)


async def _in_process(url: str, first: Path | None, *, quick: bool) -> Found:
    path = os.pathsep.join(filter(None, [str(first or ""), os.environ.get("PYTHONPATH", "")]))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.telemetry", url, *["--quick"] * quick),
        env=os.environ | {"PYTHONPATH": path},
        stdout=asyncio.subprocess.PIPE,
    )
    printed, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"benchmarks.telemetry ended with {process.returncode}")
    return Found(**json.loads(printed))


# -- In the process of one line of SQLAlchemy ----------------------------------------------------


def main() -> None:
    """Measure this environment's SQLAlchemy."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.telemetry", description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    found = asyncio.run(_measure(arguments.url, rounds=7 if arguments.quick else 61))
    print(json.dumps(found))


async def _measure(url: str, *, rounds: int, requests: int = 60) -> dict[str, Any]:
    engines = {name: make(url) for name, make in _contestants().items()}
    times: dict[str, list[float]] = {name: [] for name in engines}
    cpu: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds):
        for name in rotated(list(engines), turn):
            await _requests(engines[name], 5)  # hot again
            gc.collect()
            began, cpu_began = time.perf_counter_ns(), time.process_time_ns()
            await _requests(engines[name], requests)
            cpu[name].append((time.process_time_ns() - cpu_began) / 1000 / requests)
            times[name].append((time.perf_counter_ns() - began) / 1000 / requests)
    for engine in engines.values():
        await engine.dispose()
    return {"version": sqlalchemy.__version__, "times": times, "cpu": cpu}


async def _requests(engine: AsyncEngine, times: int) -> None:
    for _ in range(times):
        async with engine.connect() as connection:
            await connection.execute(text(SELECT))
            await connection.commit()


def _contestants() -> dict[str, Callable[[str], AsyncEngine]]:
    makers = {
        OFF: _engine,
        OFF + AGAIN: _engine,
        METRICS: _with_metrics,
        SPANS: _with_spans,
        LOGFIRE: _with_logfire,
    }
    if sqlalchemy.__version__.startswith("2.0"):
        makers |= {THEIRS: _with_theirs, THEIRS_IN_LOGFIRE: _with_theirs_in_logfire}
    return makers


def _engine(url: str, **options: Any) -> AsyncEngine:
    return poolkit_engine(url, Sizes(2), **options)


def _with_metrics(url: str) -> AsyncEngine:
    return _instrumented(url, spans=False)


def _with_spans(url: str) -> AsyncEngine:
    return _instrumented(url, spans=True)


def _instrumented(url: str, *, spans: bool) -> AsyncEngine:
    from poolkit.telemetry import instrument  # noqa: PLC0415 (only this process needs it)

    engine = _engine(url)
    meters, tracers = _providers()
    instrument(engine, meter_provider=meters, tracer_provider=tracers, spans=spans)
    return engine


def _with_theirs(url: str) -> AsyncEngine:
    meters, tracers = _providers()
    return _instrumented_by_them(url, tracer_provider=tracers, meter_provider=meters)


def _with_theirs_in_logfire(url: str) -> AsyncEngine:
    config = _logfire().DEFAULT_LOGFIRE_INSTANCE.config
    return _instrumented_by_them(
        url,
        tracer_provider=config.get_tracer_provider(),
        meter_provider=config.get_meter_provider(),
    )


def _instrumented_by_them(url: str, **providers: Any) -> AsyncEngine:
    from opentelemetry.instrumentation.sqlalchemy import (  # noqa: PLC0415
        SQLAlchemyInstrumentor,
    )

    engine, instrumentor = _engine(url), SQLAlchemyInstrumentor()
    instrumentor._is_instrumented_by_opentelemetry = False  # noqa: SLF001 (it takes one engine)
    instrumentor.instrument(engine=engine.sync_engine, **providers)
    return engine


def _with_logfire(url: str) -> AsyncEngine:
    from poolkit import DatabaseSettings, create_async_engine  # noqa: PLC0415

    _logfire()
    settings = DatabaseSettings(url=url, pool_size=2, max_overflow=0, logfire_enabled=True)  # type: ignore[arg-type]
    return create_async_engine(settings=settings)


def _providers() -> tuple[Any, Any]:
    """OpenTelemetry's SDK as services have it, whose exporter throws the spans away."""
    from opentelemetry.sdk.metrics import MeterProvider  # noqa: PLC0415
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415

    tracers = TracerProvider()
    tracers.add_span_processor(_discarding())
    return MeterProvider([InMemoryMetricReader()]), tracers


def _logfire() -> Any:
    import logfire  # noqa: PLC0415

    with _quiet():
        logfire.configure(
            send_to_logfire=False, console=False, additional_span_processors=[_discarding()]
        )
    return logfire


def _discarding() -> Any:
    from opentelemetry.sdk.trace.export import (  # noqa: PLC0415
        BatchSpanProcessor,
        SpanExporter,
        SpanExportResult,
    )

    class Discard(SpanExporter):
        def export(self, spans: Any) -> SpanExportResult:
            del spans
            return SpanExportResult.SUCCESS

    return BatchSpanProcessor(Discard())


@contextmanager
def _quiet() -> Iterator[None]:
    """What is printed goes to the terminal, not into the JSON."""
    kept = sys.stdout
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        sys.stdout = kept


# -- What was found ------------------------------------------------------------------------------


def _section(found: Sequence[Found]) -> Section:
    return Section(
        title="Telemetry",
        method=(
            "Checkout, `SELECT 1`, commit and check-in on a hot connection at 0 ms, by one task;"
            " OpenTelemetry's SDK with a reader for metrics and a batching processor whose"
            " exporter throws the spans away. The contestants take turns in every round; ratios"
            " are of neighbours in a round. OpenTelemetry's own instrumentation refuses SQLAlchemy"
            " 2.1; it was put on poolkit's engine, as everything else. Logfire sends nothing."
        ),
        rows=[row for one in found for row in _rows(one)],
        header=["SQLAlchemy", "contestant", "time", "CPU", "time / off", "CPU / off"],
        figures=[line for one in found for line in _lines(one)],
        charts=[
            Chart(
                "Time of a request with telemetry, as a ratio to telemetry off",
                "ratio",
                [f"SQLAlchemy {one.version}" for one in found],
                {name: _bars(found, name) for name in NAMES if name != OFF},
                line=1.0,
            )
        ],
    )


def _bars(found: Sequence[Found], name: str) -> list[Spread | None]:
    return [ratios(f.times[name], f.times[OFF]) if name in f.times else None for f in found]


def _lines(one: Found) -> Iterator[list[str]]:
    for name, times in one.times.items():
        yield [
            one.version,
            name,
            Spread.of(times).show(0, "us"),
            Spread.of(one.cpu[name]).show(0, "us"),
            ratios(times, one.times[OFF]).show(3),
            ratios(one.cpu[name], one.cpu[OFF]).show(3),
        ]


def _rows(one: Found) -> Iterator[Row]:
    where = f"SQLAlchemy {one.version}"
    ratio = ratios(one.times[METRICS], one.times[OFF])
    yield Row(
        f"request with metrics / telemetry off, {where}",
        ratio.show(3),
        f"{ratios(one.times[OFF + AGAIN], one.times[OFF]).show(3)} (off again)",
        f"at most {MOST_FOR_METRICS}",
        ratio.median <= MOST_FOR_METRICS,
    )
    yield _against(one, SPANS, THEIRS, MOST_OF_THEIRS)
    yield _against(one, LOGFIRE, THEIRS_IN_LOGFIRE, None)  # most of both is Logfire's own span


def _against(one: Found, ours: str, theirs: str, most: float | None) -> Row:
    """What ours adds to a request's CPU, beside what theirs adds."""
    mine = _added(one, ours)
    what = f"CPU that telemetry adds to a request: {ours}, SQLAlchemy {one.version}"
    if theirs not in one.cpu:
        return Row(what, mine.show(0, "us"), f"{theirs}: does nothing here", "", None)
    others = _added(one, theirs)
    share = mine.median / others.median
    return Row(
        what,
        f"{mine.show(0, 'us')}; {share:.2f} of theirs",
        f"{theirs}: {others.show(0, 'us')}",
        "" if most is None else f"at most {most} of theirs",
        None if most is None else share <= most,
    )


def _added(one: Found, name: str) -> Spread:
    pairs = zip(one.cpu[name], one.cpu[OFF], strict=True)
    return Spread.of([with_it - without for with_it, without in pairs])


if __name__ == "__main__":
    main()
