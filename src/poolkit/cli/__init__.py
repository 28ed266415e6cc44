"""The command ``poolkit``: check a database, show the settings, demonstrate the library."""

from __future__ import annotations

import io
import logging
import sys

NEEDED = frozenset({"rich", "typer"})


def main() -> None:
    """Run the command line, or say what to install for it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an ASCII terminal gets `?`, not a traceback
    # The commands say themselves what they find; log lines would end up in their pictures.
    logging.getLogger("poolkit").addHandler(logging.NullHandler())
    try:
        from poolkit.cli.app import app  # noqa: PLC0415 (its packages are optional)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in NEEDED:
            raise
        print(
            f"poolkit: the command needs the package {error.name}: pip install 'poolkit[cli]'",
            file=sys.stderr,
        )
        sys.exit(2)
    app(prog_name="poolkit")
