"""The commands and their options."""

from __future__ import annotations

from typing import Annotated

import typer

import poolkit
from poolkit.cli import check as checking
from poolkit.cli import dashboard as dashboards
from poolkit.cli import demo as demonstration
from poolkit.cli import listing
from poolkit.cli import top as watching

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


@app.command(short_help="Watch a server's sessions, or a service's pools, live.")
def top(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[URL]",
            help="A database, in place of DATABASE_URL; or a service's http://host:9464/metrics.",
            show_default=False,
        ),
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Of a throwaway server and service.")
    ] = False,
    interval: Annotated[
        float, typer.Option(metavar="SECONDS", help="Between two looks.", min=0.1, max=3600)
    ] = 1.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print what is there now; so it does into a pipe.")
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Sessions that are idle, and the server's own, too.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Once, as one JSON object.")] = False,
    env_prefix: Prefix = "DATABASE_",
) -> None:
    """Watch who holds what at a server, and who waits for whom; or how a service's pools do.

    It looks at the server with the settings from DATABASE_* and one connection, read-only.
    Keys: q quit, a idle sessions too, p pause. Exit code: 0, 1 nothing to look at, 2 bad settings.
    """
    if demo and source is not None:
        raise typer.BadParameter("give either a URL or --demo")
    options = watching.Options(interval, once, as_json, everything)
    raise typer.Exit(watching.run(source, options, prefix=env_prefix, demo=demo))


@app.command(short_help="Print the dashboard for Grafana or Logfire, or Prometheus's alerts.")
def dashboard(
    which: Annotated[dashboards.Dashboard, typer.Argument(help="Which to print.")],
    runbooks: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Where the runbooks are, for the links.", show_default=False
        ),
    ] = None,
) -> None:
    """Print Grafana's dashboard (JSON), Prometheus's alert rules (YAML) or Logfire's panels (SQL).

    For a file: poolkit dashboard alerts > poolkit.yml. Exit code: 0, or 2 for another name.
    """
    if runbooks is not None and not dashboards.is_address(runbooks):
        raise typer.BadParameter(f"{runbooks!r} is not an address", param_hint="--runbooks")
    typer.echo(dashboards.text(which, runbooks), nl=False)
