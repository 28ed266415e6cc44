"""``poolkit demo``: a throwaway server, a workload, and faults that check themselves."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager

from rich.console import Console, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.text import Text
from sqlalchemy.ext.asyncio import AsyncEngine

from poolkit.cli import output, workload
from poolkit.cli.faults import FAULTS, Fault
from poolkit.cli.latency import histograms, percentile_table
from poolkit.cli.outcome import Outcome
from poolkit.cli.output import duration
from poolkit.cli.watch import Seen, Watch, picture, timeline, watching
from poolkit.cli.workload import FEW, MANY, Load
from poolkit.engine import create_async_engine
from poolkit.errors import describe
from poolkit.settings import DatabaseSettings
from poolkit.testing import PostgresServer, PostgresServerError, postgres

AS_CLAIMED, NOT_AS_CLAIMED = 0, 1

FOREIGN = ("DATABASE_", "LOGFIRE_", "OTEL_", "PG", "PROMETHEUS_")
"""What the caller's variables begin with that a demo must not see."""

NEXT = {
    "poolkit check": "what is true of your own database (DATABASE_URL)",
    "poolkit settings": "every setting, and where its value comes from",
    "create_async_engine()": "the same engine in your code: from poolkit import it",
}


def run(seconds: float) -> int:
    """Run the demo and return the exit code."""
    console = output.stdout()
    try:
        with _server(console) as server, environment(server):
            right = asyncio.run(_show(console, seconds))
    except PostgresServerError as error:
        output.print_failure(output.Failure(type(error).__name__, [str(error)]))
        return NOT_AS_CLAIMED
    _print_summary(console, right)
    return AS_CLAIMED if all(right) else NOT_AS_CLAIMED


@contextmanager
def _server(console: Console) -> Iterator[PostgresServer]:
    started = time.perf_counter()
    with ExitStack() as stack:
        with console.status("starting a throwaway PostgreSQL"):
            server = stack.enter_context(postgres())
        took = duration(time.perf_counter() - started)
        _head(console, f"A throwaway PostgreSQL {server.version_string}")
        _say(console, f"started in {took}, and gone with its data when this ends")
        yield server


@contextmanager
def environment(server: PostgresServer) -> Iterator[None]:
    """The service's environment: the server's URL, and nothing of the caller's own settings."""
    before = dict(os.environ)
    for name in before:
        if name.upper().startswith(FOREIGN):
            del os.environ[name]
    os.environ.update(server.environ)
    try:
        with tempfile.TemporaryDirectory() as empty, contextlib.chdir(empty):  # without a .env
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)


async def _show(console: Console, seconds: float) -> list[bool]:
    """Everything that needs the engine; whether each step was as claimed."""
    engine = create_async_engine()  # from DATABASE_URL, as a service does it
    try:
        load = await _survive(console, _show_load(console, engine, seconds))
        return [load] + [await _survive(console, _show_fault(console, engine, f)) for f in FAULTS]
    finally:
        await engine.dispose()


async def _survive(console: Console, step: Awaitable[bool]) -> bool:
    """Whether a step was as claimed; one that raises was not, and the next ones go on."""
    try:
        return await step
    except Exception as error:  # noqa: BLE001 (it is shown, and decides the exit code)
        first = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
        _verdict(console, describe(first), right=False)
        return False


async def _show_load(console: Console, engine: AsyncEngine, seconds: float) -> bool:
    settings = DatabaseSettings()
    pool = f"{settings.pool_size} + {settings.max_overflow} connections"
    _head(console, f"{FEW} workers, then {MANY}, on {pool} for {duration(seconds)}")
    _say(console, "each transaction inserts a row, reads it back and commits")
    load = await workload.run(engine, seconds, _watch(console))
    if load.many.transactions and load.few.transactions:
        _print_load(console, load)
    waited = f"{len(load.seen.waits)} waited, {load.seen.overtaken} were overtaken"
    verdict = f"{load.committed} transactions committed, {load.stored} rows in the table; {waited}"
    right = load.is_sound and load.is_fair
    _verdict(console, verdict, right=right)
    return right


def _watch(console: Console) -> Watch:
    """Watches an engine, with a picture of its pool on a terminal while that lasts."""
    ascii_only = console.options.ascii_only

    @asynccontextmanager
    async def watch(engine: AsyncEngine) -> AsyncIterator[Seen]:
        if not console.is_terminal or console.is_dumb_terminal:
            async with watching(engine) as seen:
                yield seen
            return
        with Live(console=console, auto_refresh=False, transient=True) as live:

            def show(seen: Seen) -> None:
                live.update(_indented(picture(seen, ascii_only=ascii_only)), refresh=True)

            async with watching(engine, show) as seen:
                yield seen

    return watch


def _print_load(console: Console, load: Load) -> None:
    rate = len(load.many.transactions) / load.many.seconds
    _say(console, f"{rate:,.0f} transactions per second by {MANY} workers")
    ascii_only = console.options.ascii_only
    few, many = load.few, load.many
    series = {
        f"checkout, {FEW} workers": few.checkouts,
        f"checkout, {MANY} workers": many.checkouts,
        f"transaction, {FEW} workers": few.transactions,
        f"transaction, {MANY} workers": many.transactions,
    }
    all_of_them = {
        "checkout": few.checkouts + many.checkouts,
        "transaction": few.transactions + many.transactions,
    }
    for table in (
        timeline(load.seen, ascii_only=ascii_only),
        percentile_table(series),
        histograms(all_of_them, ascii_only=ascii_only),
    ):
        console.print()
        console.print(_indented(table))
    console.print()
    _labelled(console, "the pool saw", load.seen.told)


async def _show_fault(console: Console, engine: AsyncEngine, fault: Fault) -> bool:
    _head(console, fault.title)
    _say(console, fault.code, "dim")
    outcome = await fault.provoke(engine, _watch(console))
    if fault.timeline and outcome.seen is not None:
        console.print(_indented(timeline(outcome.seen, ascii_only=console.options.ascii_only)))
    _print_outcome(console, outcome)
    _verdict(console, fault.claim, right=outcome.as_claimed)
    return outcome.as_claimed


def _print_outcome(console: Console, outcome: Outcome) -> None:
    _labelled(console, "what happened", outcome.happened)
    if outcome.seen is not None:
        _labelled(console, "the pool saw", outcome.seen.told)
    _labelled(console, "the caller gets", outcome.caller)
    if outcome.error is not None:
        _labelled(console, "it says", " ".join(output.failure(outcome.error).problems))


def _print_summary(console: Console, right: list[bool]) -> None:
    _head(console, "Summary")
    steps = f"{sum(right)} of {len(right)} steps behaved as claimed"
    _verdict(console, f"{steps}; the server is gone, data and all", right=all(right))
    _head(console, "What next")
    for command, about in NEXT.items():
        _labelled(console, command, about)


def _head(console: Console, title: str) -> None:
    console.print()
    console.print(Text(title, "bold"))


def _indented(what: RenderableType) -> Padding:
    return Padding(what, (0, 0, 0, 2), expand=False)


def _say(console: Console, sentence: str, style: str = "") -> None:
    console.print(_indented(Text(sentence, style)))


def _verdict(console: Console, sentence: str, *, right: bool) -> None:
    mark = Text("ok", "bold green") if right else Text("FAILED", "bold red")
    console.print(_indented(output.beside(mark, Text(sentence))))


def _labelled(console: Console, label: str, value: str) -> None:
    table = output.beside(Text(f"{label:<21}", "cyan"), Text(value))
    console.print(_indented(table))
