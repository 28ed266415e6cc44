"""`poolkit check`."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import asyncpg
import pytest
from typer.testing import Result

from poolkit.cli.check import cautions
from poolkit.cli.probe import Found, Room, Timeouts, Tls
from poolkit.testing import PostgresServer

Run = Callable[..., Result]

SECRET = "hunter2-s3cret"
LOGIN = f"postgresql://me:{SECRET}@"


def told(result: Result) -> str:
    """Everything printed, unfolded."""
    return " ".join(result.output.split())


def assert_one_clear_error(result: Result, exit_code: int, *words: str) -> None:
    """The exit code, one error on stderr that holds the words, and nothing that must not be."""
    assert result.exit_code == exit_code, result.output
    assert len(re.findall(r"^error:", result.stderr, re.MULTILINE)) == 1
    for word in words:
        assert word in told(result)
    assert "Traceback" not in result.output
    assert SECRET not in result.output


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, ["DATABASE_URL is not set", "postgresql://user:password@host:5432/name"]),
        ({"DATABASE_URL": SECRET}, ["DATABASE_URL", "not a URL"]),
        ({"DATABASE_URL": f"mysql://me:{SECRET}@h/d"}, ["DATABASE_URL", "'mysql'"]),
        ({"DATABASE_URL": f"{LOGIN}h:port/d"}, ["DATABASE_URL", "the port 'port'"]),
        ({"DATABASE_URL": f"{LOGIN}h/d?sslmod=require"}, ["DATABASE_URL", "sslmod"]),
        (
            {"DATABASE_URL": f"{LOGIN}h/d", "DATABASE_POOL_SIZE": "ten"},
            ["DATABASE_POOL_SIZE='ten'", "integer", "10"],
        ),
        (
            {"DATABASE_URL": f"{LOGIN}h/d", "DATABASE_STATEMENT_TIMEOUT": "-1"},
            ["DATABASE_STATEMENT_TIMEOUT='-1'", "greater than or equal to 0"],
        ),
        (
            {"DATABASE_URL": f"{LOGIN}h/d", "DATABASE_CONNECTION_TIMEOUT": "0"},
            ["DATABASE_CONNECTION_TIMEOUT='0'", "greater than 0"],
        ),
        (
            {"DATABASE_URL": f"{LOGIN}h/d?sslmode=verify-full&sslrootcert=/none.pem"},
            ["sslrootcert=/none.pem", "no such file"],
        ),
        (
            {"DATABASE_URL": f"{LOGIN}h/d", "DATABASE_PASSWORD_FILE": "/none"},
            ["DATABASE_PASSWORD_FILE=/none", "cannot be read"],
        ),
    ],
)
def test_bad_settings_are_named_with_their_remedy(
    run: Run, environment: dict[str, str], words: list[str]
) -> None:
    """Bad settings: exit code 2 and one error that names the variable."""
    assert_one_clear_error(run("check", **environment), 2, *words)


def test_several_problems_are_one_bullet_each(run: Run) -> None:
    """All problems come at once, under one heading."""
    result = run("check", f"{LOGIN}h/d", DATABASE_POOL_SIZE="ten", DATABASE_LOCK_TIMEOUT="-3")

    assert_one_clear_error(result, 2, "2 problems", "DATABASE_POOL_SIZE", "DATABASE_LOCK_TIMEOUT")
    assert len(re.findall(r"^  \* ", result.stderr, re.MULTILINE)) == 2


def test_other_prefix_is_named(run: Run) -> None:
    """With --env-prefix the other variables are read, and named."""
    result = run("check", "--env-prefix", "REPORTS_", DATABASE_URL=f"{LOGIN}h/d")

    assert_one_clear_error(result, 2, "REPORTS_URL is not set")


def test_env_file_that_is_no_text(run: Run) -> None:
    """A .env in another encoding is an error that names it."""
    Path(".env").write_bytes(b"DATABASE_URL=postgresql://\xff\n")

    assert_one_clear_error(run("check"), 2, ".env", "UTF-8")


def test_refused(run: Run, closed_port: int) -> None:
    """Nobody listens: exit code 1, the address and where it is set."""
    result = run("check", f"{LOGIN}127.0.0.1:{closed_port}/d", DATABASE_CONNECTION_TIMEOUT="0.3")

    assert_one_clear_error(result, 1, f"127.0.0.1:{closed_port}", "DATABASE_URL's host and port")


def test_host_not_found(run: Run) -> None:
    """A host name without an address: exit code 1, and the name's place."""
    result = run("check", f"{LOGIN}nowhere.invalid/d", DATABASE_CONNECTION_TIMEOUT="0.3")

    assert_one_clear_error(result, 1, "nowhere.invalid:5432", "DATABASE_")


def test_silent_server(run: Run, silent_port: int) -> None:
    """A server that never answers: the connection timeout ends it, and is named."""
    result = run("check", f"{LOGIN}127.0.0.1:{silent_port}/d", DATABASE_CONNECTION_TIMEOUT="0.3")

    assert_one_clear_error(result, 1, "no answer", "DATABASE_CONNECTION_TIMEOUT")


def test_tls_required_and_not_offered(run: Run, port_without_tls: int) -> None:
    """sslmode=require against a server without TLS: refused, with both remedies."""
    result = run("check", f"{LOGIN}127.0.0.1:{port_without_tls}/d?sslmode=require")

    assert_one_clear_error(result, 1, "demands TLS", "sslmode=prefer")


def test_wrong_password(run: Run, server: PostgresServer) -> None:
    """A wrong password: the user is named, the password is not."""
    result = run("check", f"postgresql://postgres:{SECRET}@127.0.0.1:{server.port}/postgres")

    assert_one_clear_error(result, 1, "28P01", "DATABASE_PASSWORD")


def test_unknown_database(run: Run, server: PostgresServer) -> None:
    """A database that is not there: its name, and where it is set."""
    result = run("check", server.url.removesuffix("postgres") + "nope")

    assert_one_clear_error(result, 1, '"nope" does not exist', "DATABASE_NAME")


def test_certificate_not_trusted(run: Run, server: PostgresServer) -> None:
    """A certificate of an unknown authority: how to name the authority."""
    result = run("check", f"{server.url}?sslmode=verify-full")

    assert_one_clear_error(result, 1, "sslrootcert=<file>")
    assert server.password not in result.output


def test_misspelt_variable(run: Run, server: PostgresServer) -> None:
    """A misspelt name: the report, and an error with the name that was likely meant."""
    result = run("check", DATABASE_URL=server.url, DATABASE_POOL_SIEZ="3")

    assert_one_clear_error(result, 2, "DATABASE_POOL_SIEZ", "did you mean DATABASE_POOL_SIZE?")
    assert "PostgreSQL" in result.stdout


def test_misspelt_variable_beside_another_error(run: Run) -> None:
    """A misspelt name is mentioned where it may explain the error."""
    result = run("check", DATABASE_HOTS="h")

    assert_one_clear_error(result, 2, "DATABASE_URL is not set", "did you mean DATABASE_HOST?")


def test_finds_what_is_there(run: Run, server: PostgresServer) -> None:
    """A good server: exit code 0 and everything that the user should know."""
    result = run("check", DATABASE_URL=server.url, DATABASE_LOCK_TIMEOUT="1.5")

    assert result.exit_code == 0, result.output
    text = told(result)
    assert f"127.0.0.1:{server.port}, database postgres, as postgres" in text
    assert f"PostgreSQL {server.version_string.split()[0]}" in text
    assert "TLSv1.3, certificate not verified" in text
    assert "pooler none" in text
    assert "statement 10 s, lock 1.5 s, idle in transaction off" in text
    assert "10 + 5 overflow: at most 15 connections per process" in text
    assert "max_connections 100 - 3 reserved" in text
    assert "6 processes with such a pool fit" in text
    assert text.endswith("ready")
    assert server.password not in result.output
    assert not result.stderr


def test_tls_verified(run: Run, server: PostgresServer) -> None:
    """With sslmode=verify-full the certificate and the host name are reported as verified."""
    url = f"{server.url}?sslmode=verify-full&sslrootcert={quote(str(server.ca_file), safe='/')}"

    result = run("check", url)

    assert result.exit_code == 0, result.output
    assert "certificate and host name verified" in told(result)


def test_tls_off(run: Run, server: PostgresServer) -> None:
    """A plain connection is reported as such."""
    assert "TLS off" in told(run("check", f"{server.url}?sslmode=disable"))


def test_ordinary_user_sees_all_connections(run: Run, server: PostgresServer) -> None:
    """A role without privileges gets the same count, and its own connection limit counts."""

    async def make_role_and_check() -> Result:
        admin = await asyncpg.connect(server.url)
        try:
            await admin.execute("CREATE ROLE small LOGIN PASSWORD 'x' CONNECTION LIMIT 7")
            url = server.url.replace(f"postgres:{server.password}@", "small:x@")
            return await asyncio.to_thread(run, "check", url, "--json")
        finally:
            await admin.execute("DROP ROLE small")
            await admin.close()

    found = json.loads(asyncio.run(make_role_and_check()).stdout)

    assert found["room"]["in_use"] >= 2
    assert (found["room"]["role_limit"], found["room"]["usable"]) == (7, 7)
    assert "the role's connection limit" in found["warnings"][0]


def test_json_of_what_is_there(run: Run, server: PostgresServer) -> None:
    """--json prints one object with the same facts as numbers, even while SQL is echoed."""
    result = run("check", "--json", DATABASE_URL=server.url, DATABASE_ECHO="true")

    found = json.loads(result.stdout)
    assert result.exit_code == 0
    assert found["ok"] is True
    assert found["address"] == f"127.0.0.1:{server.port}"
    assert found["pooler"] == "none"
    assert found["timeouts"] == {"statement": 10.0, "lock": 0.0, "idle_in_transaction": 0.0}
    assert found["tls"]["version"] == "TLSv1.3"
    assert 0 < found["round_trip_seconds"] < found["connect_seconds"] < 2
    assert found["room"]["processes"] == 97 // 15
    assert found["warnings"] == []


def test_json_of_a_failed_connect(run: Run, closed_port: int) -> None:
    """--json reports a failed connect on stdout, with the type and what was tried."""
    url = f"{LOGIN}127.0.0.1:{closed_port}/d"

    result = run("check", "--json", url, DATABASE_CONNECTION_TIMEOUT="0.3")

    found = json.loads(result.stdout)
    assert result.exit_code == 1
    assert found["ok"] is False
    assert found["error"]["type"] in {"ConnectRefused", "ConnectTimeout"}
    assert found["error"]["address"] == f"127.0.0.1:{closed_port}"
    assert found["error"]["attempts"] >= 1
    assert SECRET not in result.output


def test_json_of_bad_settings(run: Run) -> None:
    """--json reports bad settings on stdout, one problem each."""
    result = run("check", "--json", f"{LOGIN}h/d", DATABASE_POOL_SIZE="x", DATABASE_ECHO="loud")

    found = json.loads(result.stdout)
    assert result.exit_code == 2
    assert found["error"]["type"] == "ConfigurationError"
    assert len(found["error"]["problems"]) == 2
    assert SECRET not in result.output


def test_json_of_a_misspelt_name(run: Run, server: PostgresServer) -> None:
    """--json has both the facts and the error of a misspelt name."""
    result = run("check", "--json", DATABASE_URL=server.url, DATABASE_POOL_SIEZ="3")

    found = json.loads(result.stdout)
    assert result.exit_code == 2
    assert (found["ok"], found["error"]["type"]) == (False, "SettingsWarning")
    assert found["address"] == f"127.0.0.1:{server.port}"


VERIFIED = Tls("TLSv1.3", "AES", certificate_verified=True, host_name_verified=True)
WELL = Found(
    address="db.example.com:5432",
    server_version="17.2",
    role="app",
    database="app",
    read_only=False,
    pooler="none",
    connect_seconds=0.1,
    attempts=1,
    round_trip_seconds=0.01,
    tls=VERIFIED,
    timeouts=Timeouts(statement=10.0, lock=0.0, idle_in_transaction=0.0),
    limit_sent=10.0,
    room=Room(10, 5, 100, 3, None, None, in_use=1),
)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (replace(WELL, tls=None), "not encrypted"),
        (
            replace(
                WELL, tls=replace(VERIFIED, certificate_verified=False, host_name_verified=False)
            ),
            "certificate is not verified",
        ),
        (replace(WELL, tls=replace(VERIFIED, host_name_verified=False)), "for this host"),
        (
            replace(WELL, timeouts=Timeouts(0.0, 0.0, 0.0), limit_sent=0.0),
            "REPORTS_STATEMENT_TIMEOUT=0",
        ),
        (replace(WELL, timeouts=Timeouts(5.0, 0.0, 0.0)), "5 s is in force"),
        (replace(WELL, room=replace(WELL.room, max_connections=10)), "REPORTS_POOL_SIZE"),
        (replace(WELL, room=replace(WELL.room, in_use=90)), "only 8 connections"),
        (replace(WELL, read_only=True), "read-only"),
    ],
)
def test_warns(found: Found, words: str) -> None:
    """Each thing that works and is not well gives one warning in plain words."""
    (warning,) = cautions(found, "REPORTS_")

    assert words in warning


@pytest.mark.parametrize("address", ["127.0.0.1:5432", "[::1]:5432", "/run/pg:5432", "localhost:1"])
def test_no_warning_of_plain_connections_on_this_machine(address: str) -> None:
    """What never leaves the machine needs no TLS."""
    assert list(cautions(replace(WELL, address=address, tls=None), "DATABASE_")) == []


def test_pooler_decides_on_room() -> None:
    """Behind a pooler the server's max_connections says nothing of our pool."""
    found = replace(WELL, pooler="transaction", room=replace(WELL.room, max_connections=10))

    assert list(cautions(found, "DATABASE_")) == []
