"""``poolkit check``: the report, its warnings, and what is said of failures."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from poolkit.cli import output
from poolkit.cli.loading import load
from poolkit.cli.output import Failure, count, duration, limit
from poolkit.cli.probe import Found, Room, probe
from poolkit.errors import ConfigurationError
from poolkit.settings import DatabaseSettings

OK, NO_CONNECTION, BAD_SETTINGS = 0, 1, 2

POOLERS = {
    "none": "none, straight to the server",
    "session": "in session mode",
    "transaction": "in transaction mode: prepared statements off, limits set in each transaction",
}


def run(url: str | None, *, prefix: str, as_json: bool) -> int:
    """Check, print, and return the exit code."""
    loaded = load(prefix, url)
    found = loaded.error or _probe(loaded.settings)
    if isinstance(found, Exception):
        tell = _print_json_failure if as_json else _print_failure
        tell(output.failure(found), loaded.doubts)
        return BAD_SETTINGS if isinstance(found, ConfigurationError) else NO_CONNECTION
    report = _print_json if as_json else _print_text
    report(found, list(cautions(found, prefix)), loaded.doubts)
    return BAD_SETTINGS if loaded.doubts else OK


def _probe(settings: DatabaseSettings | None) -> Found | Exception:
    assert settings is not None
    try:
        return asyncio.run(probe(settings))
    except Exception as error:  # noqa: BLE001 (whatever it is, the user is told in one sentence)
        return error


def cautions(found: Found, prefix: str) -> Iterator[str]:
    """What works and is yet not well, in plain words with the remedy."""
    yield from _tls_cautions(found)
    yield from _timeout_cautions(found, f"{prefix}statement_timeout".upper())
    yield from _room_cautions(found, f"{prefix}pool_size".upper())
    if found.read_only:
        yield (
            "transactions are read-only here: the server is a standby, or the role, the database"
            " or the URL says so; target_session_attrs=read-write in the URL looks for a primary"
        )


def _tls_cautions(found: Found) -> Iterator[str]:
    if found.is_local or (found.tls is not None and found.tls.host_name_verified):
        return
    if found.tls is None:
        yield (
            f"the connection to {found.address} is not encrypted: whoever is on the way reads and"
            " changes everything. Add sslmode=verify-full to the URL"
        )
    elif not found.tls.certificate_verified:
        yield (
            f"the connection to {found.address} is encrypted, but the certificate is not verified:"
            " anyone on the way can pose as the server. Add sslmode=verify-full to the URL, and"
            " sslrootcert=<file> if the authority is not a public one"
        )
    else:
        yield (
            f"the certificate of {found.address} is verified, but not that it is for this host:"
            " add sslmode=verify-full to the URL"
        )


def _timeout_cautions(found: Found, variable: str) -> Iterator[str]:
    in_force = found.timeouts.statement
    if not in_force and not found.limit_sent:
        yield (
            f"no statement timeout ({variable}=0): a stuck statement holds its connection for"
            " ever. Set the longest time that a statement may take, in seconds"
        )
    elif in_force != found.limit_sent:
        yield (
            f"{variable} asks for {limit(found.limit_sent)}, but in the server's transactions"
            f" {limit(in_force)} is in force: something between us or at the server overrides it"
        )


def _room_cautions(found: Found, variable: str) -> Iterator[str]:
    room = found.room
    if found.pooler != "none":
        return  # there the pooler's own limits decide
    if not room.processes:
        yield (
            f"one process may open {room.per_process} connections, but there is room for"
            f" {room.usable} only ({_source(room)}): lower {variable} or MAX_OVERFLOW, or raise"
            " the server's limit"
        )
    elif room.free < room.per_process:
        yield (
            f"only {count(room.free, 'connection')} of the server's {room.max_connections} are"
            f" free now, and one process may open {room.per_process}: it would get 'too many"
            " connections' under load"
        )


def _print_text(found: Found, warned: list[str], doubts: Sequence[str]) -> None:
    console = output.stdout()
    console.print(Text(f"{found.address}, database {found.database}, as {found.role}", "bold"))
    console.print(_table(found))
    output.print_warnings(console, warned)
    if doubts:
        _print_failure(_misspelt(doubts), [])
        return
    verdict = f"ready, with {count(len(warned), 'warning')}" if warned else "ready"
    console.print(Text(verdict, "bold yellow" if warned else "bold green"))


def _table(found: Found) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(found):
        table.add_row(f"  {name}", Text(value))
    return table


def _rows(found: Found) -> Iterator[tuple[str, str]]:
    tries = f" ({found.attempts} attempts)" if found.attempts > 1 else ""
    timeouts = found.timeouts
    yield "server", f"PostgreSQL {found.server_version}"
    yield "connected in", f"{duration(found.connect_seconds)}{tries}"
    yield "round trip", duration(found.round_trip_seconds)
    yield "TLS", _tls_row(found)
    yield "pooler", POOLERS[found.pooler]
    yield (
        "timeouts",
        (
            f"at the server: statement {limit(timeouts.statement)}, lock {limit(timeouts.lock)},"
            f" idle in transaction {limit(timeouts.idle_in_transaction)}"
        ),
    )
    yield from _room_rows(found)


def _tls_row(found: Found) -> str:
    if found.tls is None:
        return "off"
    checked = {
        (False, False): "certificate not verified",
        (True, False): "certificate verified, host name not verified",
        (True, True): "certificate and host name verified",
    }
    tls = found.tls
    return f"{tls.version}, {checked[tls.certificate_verified, tls.host_name_verified]}"


def _room_rows(found: Found) -> Iterator[tuple[str, str]]:
    room = found.room
    yield (
        "pool",
        (
            f"{room.pool_size} + {room.max_overflow} overflow: at most"
            f" {count(room.per_process, 'connection')} per process"
        ),
    )
    yield "room", f"{count(room.usable, 'connection')} ({_source(room)}), {room.in_use} in use now"
    if found.pooler == "none":
        verb = "fits" if room.processes == 1 else "fit"
        yield "", f"{count(room.processes, 'process')} with such a pool {verb}"
    else:
        yield "", "how many processes fit is up to the pooler's own limits"


def _source(room: Room) -> str:
    if room.usable == room.max_connections - room.reserved:
        return f"max_connections {room.max_connections} - {room.reserved} reserved"
    if room.usable == room.role_limit:
        return "the role's connection limit"
    return "the database's connection limit"


def _misspelt(doubts: Sequence[str]) -> Failure:
    return Failure("SettingsWarning", doubts)


def _print_failure(found: Failure, doubts: Sequence[str]) -> None:
    output.print_failure(found)
    output.print_warnings(output.stderr(), doubts)


def _print_json_failure(found: Failure, doubts: Sequence[str]) -> None:
    output.print_json({"ok": False, "error": found.as_json(), "warnings": [*doubts]})


def _print_json(found: Found, warned: list[str], doubts: Sequence[str]) -> None:
    error: dict[str, Any] = {"error": _misspelt(doubts).as_json()} if doubts else {}
    room = found.room
    facts = asdict(found)
    facts["room"] |= {
        "per_process": room.per_process,
        "usable": room.usable,
        "processes": room.processes,
        "free": room.free,
    }
    output.print_json({"ok": not doubts, **error, **facts, "warnings": warned})
