"""The commands and their options."""

from __future__ import annotations

from typing import Annotated

import typer

import poolkit
from poolkit.cli import check as checking
from poolkit.cli import demo as demonstration
from poolkit.cli import listing

app = typer.Typer(
    name="poolkit",
    help="PostgreSQL connection pools for async Python: check, configure, demonstrate.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # its tracebacks may show variables, and so passwords
    context_settings={"help_option_names": ["-h", "--help"]},
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Prefix = Annotated[
    str,
    typer.Option("--env-prefix", metavar="PREFIX", help="What the variables' names begin with."),
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"poolkit {poolkit.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    """PostgreSQL connection pools for async Python: check, configure, demonstrate."""


@app.command(short_help="Connect, and say what is there and whether it is well.")
def check(
    url: Annotated[
        str | None,
        typer.Argument(metavar="[URL]", help="In place of DATABASE_URL.", show_default=False),
    ] = None,
    as_json: AsJson = False,
    env_prefix: Prefix = "DATABASE_",
) -> None:
    """Connect with the settings from DATABASE_*, and say what is there and whether it is well.

    Exit code: 0 all is well or only warned of, 1 no usable connection, 2 bad settings.
    """
    raise typer.Exit(checking.run(url, prefix=env_prefix, as_json=as_json))


@app.command(short_help="Show every setting in force, and where it came from.")
def settings(
    as_json: AsJson = False,
    env: Annotated[
        bool, typer.Option("--env", help="Print a commented .env; passwords as ***.")
    ] = False,
    env_prefix: Prefix = "DATABASE_",
) -> None:
    """Show every setting in force, and where it came from. Passwords are masked.

    Exit code: 0, or 2 for bad settings.
    """
    if as_json and env:
        raise typer.BadParameter("give either --json or --env")
    form: listing.Form = "json" if as_json else "env" if env else "table"
    raise typer.Exit(listing.run(form, prefix=env_prefix))


@app.command(short_help="Load and break a throwaway server, and show what callers get.")
def demo(
    seconds: Annotated[
        float, typer.Option(help="How long the workload runs.", min=0.1, max=3600)
    ] = 4.0,
) -> None:
    """Start a throwaway PostgreSQL, put it under load, break it, and show what callers get.

    Touches no database but its own. Exit code: 0 if every step behaved as claimed, otherwise 1.
    """
    raise typer.Exit(demonstration.run(seconds))
