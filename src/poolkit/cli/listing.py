"""``poolkit settings``: what is in force, from where, as a table, JSON or a ``.env``."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import Secret, SecretStr
from rich.table import Table
from rich.text import Text

from poolkit.cli import output
from poolkit.cli.loading import Loaded, load
from poolkit.settings import DatabaseSettings

Form = Literal["table", "json", "env"]
Value = str | int | float | bool | None

MASK = "***"
DEFAULT = "default"
WIDTH = 80

_BARE = re.compile(r"[\w./:@?&=%+,*\[\]-]*")  # needs no quotes in a .env


@dataclass(frozen=True, slots=True)
class Entry:
    """One setting; its value is masked already."""

    field: str
    variable: str
    value: Value
    origin: str
    description: str


def run(form: Form, *, prefix: str) -> int:
    """Print the settings, or what is wrong with them, and return the exit code."""
    loaded = load(prefix)
    if loaded.settings is None:
        _print_bad(loaded, as_json=form == "json")
        return 2
    entries = list(_entries(loaded.settings, loaded, prefix))
    if form == "json":
        _print_json(entries, loaded)
        return 0
    _print_env(entries) if form == "env" else _print_table(entries, loaded.settings)
    output.print_warnings(output.stderr(), loaded.doubts)
    return 0


def _entries(settings: DatabaseSettings, loaded: Loaded, prefix: str) -> Iterator[Entry]:
    for name, field in type(settings).model_fields.items():
        yield Entry(
            field=name,
            variable=settings.variable(name, prefix),
            value=_masked(getattr(settings, name)),
            origin=loaded.origins.get(name, DEFAULT),
            description=field.description or "",
        )


def _masked(value: Value | Secret[str] | SecretStr) -> Value:
    if isinstance(value, SecretStr):
        return MASK
    return str(value) if isinstance(value, Secret) else value  # a URL masks its own password


def _print_bad(loaded: Loaded, *, as_json: bool) -> None:
    assert loaded.error is not None
    found = output.failure(loaded.error)
    if as_json:
        output.print_json({"ok": False, "error": found.as_json(), "warnings": [*loaded.doubts]})
        return
    output.print_failure(found)
    output.print_warnings(output.stderr(), loaded.doubts)


def _print_json(entries: list[Entry], loaded: Loaded) -> None:
    shown = {
        e.field: {"variable": e.variable, "value": e.value, "origin": e.origin} for e in entries
    }
    output.print_json({"ok": True, "settings": shown, "warnings": [*loaded.doubts]})


def _print_table(entries: list[Entry], settings: DatabaseSettings) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("variable", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("from", overflow="fold")
    for entry in entries:
        style = "dim" if entry.origin == DEFAULT else "green"
        table.add_row(entry.variable, Text(_text(entry.value) or "-"), entry.origin, style=style)
    console = output.stdout()
    console.print(table)
    console.print(output.beside(Text("connects to"), Text(str(settings.database_url()))))


def _text(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.15g}"
    return "" if value is None else str(value)


def _print_env(entries: list[Entry]) -> None:
    print("# The settings of poolkit. What is commented out is the default.")
    print(f"# Passwords are shown as {MASK}: put the real ones in their place.")
    for entry in entries:
        print()
        print(_comment(entry.description))
        print(_assignment(entry))


def _comment(text: str) -> str:
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent="# ",
        subsequent_indent="# ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _assignment(entry: Entry) -> str:
    if entry.origin.startswith("file named"):  # set here too, the two would contradict
        return f"# read from the file that {entry.variable}_FILE names"
    mark = "# " if entry.origin == DEFAULT else ""
    return f"{mark}{entry.variable}={_quoted(_text(entry.value))}"


def _quoted(value: str) -> str:
    if _BARE.fullmatch(value):
        return value
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
