"""`poolkit settings`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from poolkit import DatabaseSettings

Run = Callable[..., Result]

SECRET = "hunter2-s3cret"
URL = f"postgresql://me:{SECRET}@db.example.com/app"


def line(result: Result, variable: str) -> list[str]:
    """The columns of a variable's row."""
    (row,) = re.findall(rf"^{variable} +(\S.*\S)\s*$", result.stdout, re.MULTILINE)
    return re.split(r"  +", row)


def test_says_where_each_value_came_from(run: Run) -> None:
    """The table names the environment, .env, a file, the URL's parameters and defaults."""
    Path(".env").write_text("DATABASE_POOL_SIZE=7\n")
    Path("secret").write_text(SECRET)

    result = run(
        "settings",
        DATABASE_URL="postgresql://me@h/d?connect_timeout=4",
        DATABASE_CONNECTION_TIMEOUT="",
        DATABASE_PASSWORD_FILE="secret",
        DATABASE_LOCK_TIMEOUT="1.5",
    )

    assert result.exit_code == 0, result.output
    assert line(result, "DATABASE_POOL_SIZE") == ["7", ".env"]
    assert line(result, "DATABASE_LOCK_TIMEOUT") == ["1.5", "environment"]
    assert line(result, "DATABASE_MAX_OVERFLOW") == ["5", "default"]
    assert line(result, "DATABASE_CONNECTION_TIMEOUT")[0] == "4"
    assert line(result, "DATABASE_PASSWORD")[0] == "***"
    assert {"URL's", "parameters"} <= set(result.stdout.split())
    assert len(DatabaseSettings.model_fields) == len(
        re.findall(r"^(?:DATABASE_|LOGFIRE_)", result.stdout, re.MULTILINE)
    )


@pytest.mark.parametrize("form", [[], ["--json"], ["--env"]])
def test_masks_passwords(run: Run, form: list[str]) -> None:
    """No form shows the password, neither the field's nor the URL's."""
    result = run("settings", *form, DATABASE_URL=URL, DATABASE_PASSWORD=SECRET)

    assert result.exit_code == 0, result.output
    assert SECRET not in result.output
    assert "***" in result.output


def test_json(run: Run) -> None:
    """--json has each field's variable, value and origin."""
    result = run("settings", "--json", DATABASE_URL=URL, DATABASE_POOL_SIEZ="1")

    found = json.loads(result.stdout)
    assert found["ok"] is True
    assert found["settings"]["url"] == {
        "variable": "DATABASE_URL",
        "value": "postgresql://me:***@db.example.com/app",
        "origin": "environment",
    }
    assert found["settings"]["pool_size"]["value"] == 10
    assert found["settings"]["pool_size"]["origin"] == "default"
    assert found["settings"]["logfire_enabled"]["variable"] == "LOGFIRE_ENABLED"
    assert "DATABASE_POOL_SIZE" in found["warnings"][0]


def test_env_loads_back(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What --env prints gives the same settings again, the password aside."""
    given = {
        "DATABASE_URL": URL,
        "DATABASE_POOL_SIZE": "3",
        "DATABASE_POOL_USE_LIFO": "false",
        "DATABASE_STATEMENT_TIMEOUT": "0.25",
        "DATABASE_CONNECTION_TIMEOUT": "4",
        "DATABASE_APPLICATION_NAME": r"it's a \ name # here",
    }
    Path(".env").write_text(run("settings", "--env", **given).stdout)
    monkeypatch.delenv("DATABASE_CONNECTION_TIMEOUT")

    back, origins = DatabaseSettings.with_origins()

    expected = DatabaseSettings(
        url=URL.replace(SECRET, "***"),  # type: ignore[arg-type]
        pool_size=3,
        pool_use_lifo=False,
        statement_timeout=0.25,
        connection_timeout=4,
        application_name=r"it's a \ name # here",
    )
    assert expected == back
    assert set(origins.values()) == {".env"}
    assert origins.keys() == expected.model_fields_set


def test_env_describes_each_variable(run: Run) -> None:
    """--env has a comment above every variable and defaults commented out."""
    lines = run("settings", "--env", DATABASE_URL=URL).stdout.splitlines()

    for name in DatabaseSettings.model_fields:
        variable = DatabaseSettings.variable(name, "DATABASE_")
        (at,) = (i for i, text in enumerate(lines) if re.match(rf"(# )?{variable}=", text))
        assert lines[at - 1].startswith("# ")
    assert "# DATABASE_POOL_SIZE=10" in lines
    assert max(map(len, lines)) <= 80


def test_env_leaves_a_secret_file_in_place(run: Run) -> None:
    """A password from a file is not set a second time, which would be refused."""
    Path("secret").write_text(SECRET)

    text = run(
        "settings",
        "--env",
        DATABASE_URL="postgresql://me@h/d",
        DATABASE_PASSWORD_FILE="secret",
    ).stdout

    assert "# read from the file that DATABASE_PASSWORD_FILE names" in text
    assert "DATABASE_PASSWORD=" not in text


def test_other_prefix(run: Run) -> None:
    """With --env-prefix the variables are read and shown under their own names."""
    result = run("settings", "--env-prefix", "REPORTS_", REPORTS_URL=URL, REPORTS_POOL_SIZE="2")

    assert line(result, "REPORTS_POOL_SIZE") == ["2", "environment"]


def test_bad_settings(run: Run) -> None:
    """Bad settings: exit code 2 and the error that `check` prints."""
    environment = {"DATABASE_URL": URL, "DATABASE_POOL_SIZE": "x"}

    result = run("settings", **environment)

    assert result.exit_code == 2
    assert result.stderr == run("check", **environment).stderr
    assert "DATABASE_POOL_SIZE" in result.stderr
    assert json.loads(run("settings", "--json", **environment).stdout)["ok"] is False


def test_misspelt_name_is_a_warning(run: Run) -> None:
    """A misspelt name is warned about on stderr; the listing itself succeeds."""
    result = run("settings", DATABASE_URL=URL, DATABASE_POOL_SIEZ="1")

    assert result.exit_code == 0
    assert "did you mean DATABASE_POOL_SIZE?" in " ".join(result.stderr.split())


def test_two_forms_are_refused(run: Run) -> None:
    """--json and --env exclude each other."""
    assert run("settings", "--json", "--env").exit_code == 2
