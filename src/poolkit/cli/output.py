"""What is printed, and how: consoles, failures, warnings, JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from poolkit.errors import ConnectError, StatementTimeout, describe

MICROSECOND, MILLISECOND = 1e-6, 1e-3


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong, as the user reads it.

    Attributes:
        type: The exception's name, as a program would catch it.
        problems: One sentence each, with the setting and the remedy.
        details: What else is known, for JSON.
    """

    type: str
    problems: Sequence[str]
    details: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """What stands under `error` in the JSON output."""
        message = "\n".join(self.problems)
        return {"type": self.type, "message": message, "problems": [*self.problems]} | self.details


def failure(error: BaseException) -> Failure:
    """Read any exception."""
    return Failure(type(error).__name__, _problems(error), _details(error))


def _problems(error: BaseException) -> list[str]:
    ours = isinstance(error, ConnectError | StatementTimeout)
    if isinstance(error, SQLAlchemyError) and (ours or not isinstance(error, DBAPIError)):
        return str(error.args[0]).splitlines()  # str() may add a link
    return [describe(error)]


def _details(error: BaseException) -> dict[str, Any]:
    if not isinstance(error, ConnectError):
        return {}
    return {
        "address": error.address,
        "attempts": error.attempts,
        "elapsed": round(error.elapsed, 3),
        "sqlstate": error.sqlstate,
    }


def stdout() -> Console:
    """The console for results; made anew, for a test may have replaced the stream."""
    return Console(highlight=False)


def stderr() -> Console:
    """The console for errors and warnings."""
    return Console(stderr=True, highlight=False)


def print_json(value: object) -> None:
    """One JSON object on stdout, free of colours and line folding."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_failure(found: Failure) -> None:
    """On stderr: one sentence, or a bullet for each of several problems."""
    head = Text("error:", style="bold red")
    if len(found.problems) == 1:
        stderr().print(beside(head, Text(found.problems[0])))
        return
    stderr().print(beside(head, Text(f"{len(found.problems)} problems with the settings")))
    for problem in found.problems:
        stderr().print(beside(Text("  *"), Text(problem)))


def print_warnings(console: Console, sentences: Iterable[str]) -> None:
    """Each with a hanging indent."""
    for sentence in sentences:
        console.print(beside(Text("warning:", style="bold yellow"), Text(sentence)))


def beside(head: Text, body: Text) -> Table:
    """A head, and a body that folds under itself; no markup is read in either."""
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(head, body)
    return table


def duration(seconds: float) -> str:
    """Three digits and a unit: ``85 us``, ``1.23 ms``, ``10 s``."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    if seconds >= MILLISECOND:
        return f"{seconds / MILLISECOND:.3g} ms"
    return f"{seconds / MICROSECOND:.3g} us"


def limit(seconds: float) -> str:
    """A timeout; 0 is off."""
    return duration(seconds) if seconds else "off"


def count(number: int, thing: str) -> str:
    """``1 connection``, ``2 connections``, ``3 processes``."""
    plural = f"{thing}es" if thing.endswith("s") else f"{thing}s"
    return f"{number} {thing if number == 1 else plural}"
