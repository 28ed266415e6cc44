"""The entry point."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from typer.testing import Result

import poolkit

Run = Callable[..., Result]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        # Where Logfire is installed, it has pydantic load it, and it loads rich.
        env=os.environ | {"PYDANTIC_DISABLE_PLUGINS": "__all__"} | environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_version(run: Run) -> None:
    """--version prints the name and the version."""
    assert f"poolkit {poolkit.__version__}\n" == run("--version").stdout


def test_help_names_the_commands(run: Run) -> None:
    """--help has one line for each command."""
    text = run("--help").stdout

    assert all(command in text for command in ("check", "settings", "demo"))


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_names_the_extra_that_is_missing(missing: str) -> None:
    """Without typer or rich: one line with what to install, exit code 2."""
    code = f"import sys; sys.modules[{missing!r}] = None; import poolkit.cli; poolkit.cli.main()"

    done = python(code)

    assert done.returncode == 2
    assert "pip install 'poolkit[cli]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_another_missing_module_is_not_hidden() -> None:
    """Only the command's own packages are excused."""
    code = "import sys; sys.modules['asyncpg'] = None; import poolkit.cli; poolkit.cli.main()"

    assert "asyncpg" in python(code).stderr


def test_importing_the_library_loads_no_command() -> None:
    """`import poolkit` loads neither the command nor its packages."""
    code = "import sys, poolkit; print({'poolkit.cli', 'typer', 'rich'} & set(sys.modules))"

    assert python(code).stdout == "set()\n"


def test_a_terminal_without_unicode() -> None:
    """What an ASCII terminal cannot show becomes a question mark."""
    code = "import sys; sys.argv = ['poolkit', '--help']; import poolkit.cli; poolkit.cli.main()"

    done = python(code, PYTHONIOENCODING="ascii")

    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
