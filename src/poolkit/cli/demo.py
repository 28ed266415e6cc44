"""``poolkit demo``: a throwaway server, a workload, and faults that check themselves."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager

from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from sqlalchemy.ext.asyncio import AsyncEngine

from poolkit.cli import output, workload
from poolkit.cli.faults import FAULTS, Fault, Outcome
from poolkit.cli.latency import histograms, percentile_table
from poolkit.cli.output import duration
from poolkit.cli.workload import WORKERS, Load
from poolkit.engine import create_async_engine
from poolkit.errors import describe
from poolkit.settings import DatabaseSettings
from poolkit.testing import PostgresServer, PostgresServerError, postgres

AS_CLAIMED, NOT_AS_CLAIMED = 0, 1

NEXT = {
    "poolkit check": "what is true of your own database (DATABASE_URL)",
    "poolkit settings": "every setting, and where its value comes from",
    "create_async_engine()": "the same engine in your code: from poolkit import it",
}


def run(seconds: float) -> int:
    """Run the demo and return the exit code."""
    console = output.stdout()
    try:
        with _server(console) as server, _environment(server):
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
def _environment(server: PostgresServer) -> Iterator[None]:
    """The service's environment: the server's URL, and nothing of the caller's own settings."""
    before = dict(os.environ)
    for name in before:
        if name.upper().startswith(("DATABASE_", "LOGFIRE_", "PG")):
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
    _head(console, f"{WORKERS} workers on {pool} for {duration(seconds)}")
    _say(console, "each transaction inserts a row, reads it back and commits")
    with _progress(console, seconds) as advance:
        load = await workload.run(engine, seconds, advance)
    if load.transactions:
        _print_load(console, load)
    verdict = f"{len(load.transactions)} transactions committed, {load.stored} rows in the table"
    _verdict(console, verdict, right=load.is_sound)
    return load.is_sound


@contextmanager
def _progress(console: Console, seconds: float) -> Iterator[Callable[[float], object]]:
    """A bar on a terminal; nothing where it would be garbage."""
    columns = (TextColumn("  running"), BarColumn(), TimeRemainingColumn(compact=True))
    interactive = console.is_terminal and not console.is_dumb_terminal
    with Progress(*columns, console=console, transient=True, disable=not interactive) as bar:
        task = bar.add_task("running", total=seconds)
        yield lambda gone: bar.update(task, completed=gone)


def _print_load(console: Console, load: Load) -> None:
    rate = len(load.transactions) / load.seconds
    _say(console, f"{rate:,.0f} transactions per second")
    series = {"checkout": load.checkouts, "transaction": load.transactions}
    ascii_only = console.options.ascii_only
    for table in (percentile_table(series), histograms(series, ascii_only=ascii_only)):
        console.print()
        console.print(Padding(table, (0, 0, 0, 2), expand=False))
    console.print()


async def _show_fault(console: Console, engine: AsyncEngine, fault: Fault) -> bool:
    _head(console, fault.title)
    _say(console, fault.code, "dim")
    with console.status("waiting for it"):
        outcome = await fault.provoke(engine)
    _print_outcome(console, outcome)
    _verdict(console, fault.claim, right=outcome.as_claimed)
    return outcome.as_claimed


def _print_outcome(console: Console, outcome: Outcome) -> None:
    _labelled(console, "what happened", outcome.happened)
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


def _say(console: Console, sentence: str, style: str = "") -> None:
    console.print(Padding(Text(sentence, style), (0, 0, 0, 2), expand=False))


def _verdict(console: Console, sentence: str, *, right: bool) -> None:
    mark = Text("ok", "bold green") if right else Text("FAILED", "bold red")
    console.print(Padding(output.beside(mark, Text(sentence)), (0, 0, 0, 2), expand=False))


def _labelled(console: Console, label: str, value: str) -> None:
    table = output.beside(Text(f"{label:<21}", "cyan"), Text(value))
    console.print(Padding(table, (0, 0, 0, 2), expand=False))
