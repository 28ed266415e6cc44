"""The parameters of a database URL: libpq's, asyncpg's and a few that services print.

Each has one entry in the table at the end. What is not in the table is refused by name, and so
is a known one whose demand the driver cannot meet.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from poolkit.tls import MODES, TLSOptions

TARGET_SESSION_ATTRS = ("any", "read-write", "read-only", "primary", "standby", "prefer-standby")
TIMEOUTS = {
    "statement_timeout": "statement_timeout",
    "lock_timeout": "lock_timeout",
    "idle_in_transaction_session_timeout": "idle_in_transaction_timeout",
}
"""PostgreSQL settings that are fields of ``DatabaseSettings``."""

_TRUE = {"1", "true", "on", "yes"}
_FALSE = {"0", "false", "off", "no"}
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True, slots=True)
class Keepalive:
    """How fast the operating system notices that a peer has vanished.

    Attributes:
        enabled: Whether idle connections are probed at all.
        idle: Seconds of silence before the first probe.
        interval: Seconds between probes.
        count: Unanswered probes until the connection is given up.
        user_timeout: Seconds that sent data may stay unacknowledged (``TCP_USER_TIMEOUT``); 0
            leaves the system's own. Measured: with keepalive and this both at 2 s a
            vanished peer was noticed in 2.1 s, idle or waiting; neither alone covers both.
    """

    enabled: bool = True
    idle: int = 5
    interval: int = 2
    count: int = 3
    user_timeout: float = 10.0


@dataclass(slots=True)
class UrlParameters:
    """What a URL's parameters ask for.

    Attributes:
        settings: Values for fields of ``DatabaseSettings``.
        driver: Arguments for ``asyncpg.connect``.
        server_settings: PostgreSQL settings for the session, as the server spells them.
        problems: One sentence for each parameter that is refused.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    driver: dict[str, Any] = field(default_factory=dict)
    server_settings: dict[str, str] = field(default_factory=dict)
    tls: TLSOptions = field(default_factory=TLSOptions)
    keepalive: Keepalive = field(default_factory=Keepalive)
    shuffle_hosts: bool = False
    problems: list[str] = field(default_factory=list)


def read_parameters(query: Mapping[str, str]) -> UrlParameters:
    """Translate a URL's parameters. Never raises: what is refused is listed in ``problems``."""
    found = UrlParameters()
    for name, value in query.items():
        handler = _HANDLERS.get(name)
        if handler is None:
            found.problems.append(f"the parameter {name!r} is unknown{_hint(name)}")
            continue
        try:
            handler(found, name, value)
        except ValueError as error:
            found.problems.append(str(error))
    return found


def parse_duration(text: str) -> float:
    """Seconds from a PostgreSQL duration (``1500``, ``'1500ms'``, ``2s``, ``1min``).

    A bare number is milliseconds, as in PostgreSQL.

    Raises:
        ValueError: It is no duration.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*(us|ms|s|min|h|d)?\s*", text)
    if match is None:
        raise ValueError(f"{text!r} is not a PostgreSQL duration such as 1500, 1500ms or 2s")
    return float(match[1]) * _UNITS[match[2] or "ms"]


def split_options(text: str) -> tuple[dict[str, str], str]:
    """Split libpq's ``options`` into settings (``-c name=value``, ``--name=value``) and the rest.

    The rest is kept to the letter: Neon's ``endpoint=...`` is no PostgreSQL option at all.
    """
    settings: dict[str, str] = {}
    rest: list[str] = []
    words = iter(_words(text))
    for word in words:
        assignment = next(words, "") if word == "-c" else _assignment(word)
        name, equals, value = assignment.partition("=")
        if equals and name:
            settings[name.strip().replace("-", "_").lower()] = value
        else:
            rest.append(word if word != "-c" else f"-c {assignment}".rstrip())
    return settings, " ".join(rest)


def _words(text: str) -> list[str]:
    # As the server does it: words end at a space, and a backslash keeps the next character.
    lexer = shlex.shlex(text, posix=True)
    lexer.whitespace_split = True
    lexer.quotes = lexer.commenters = ""
    return list(lexer)


def _assignment(word: str) -> str:
    if word.startswith("--"):
        return word[2:]
    return word[2:] if word.startswith("-c") else ""


Handler = Callable[[UrlParameters, str, str], None]


def _setting(target: str, convert: Callable[[str, str], Any]) -> Handler:
    def handle(found: UrlParameters, name: str, value: str) -> None:
        found.settings[target] = convert(name, value)

    return handle


def _driver(convert: Callable[[str, str], Any]) -> Handler:
    def handle(found: UrlParameters, name: str, value: str) -> None:
        found.driver[name] = convert(name, value)

    return handle


def _tls(attribute: str, convert: Callable[[str, str], Any]) -> Handler:
    def handle(found: UrlParameters, name: str, value: str) -> None:
        found.tls = replace(found.tls, **{attribute: convert(name, value)})

    return handle


def _keepalive(attribute: str, convert: Callable[[str, str], Any]) -> Handler:
    def handle(found: UrlParameters, name: str, value: str) -> None:
        found.keepalive = replace(found.keepalive, **{attribute: convert(name, value)})

    return handle


def _only(*accepted: str, why: str) -> Handler:
    """Values that ask for nothing, or for what is so anyway, are accepted; others refused."""

    def handle(_: UrlParameters, name: str, value: str) -> None:
        if value.lower() not in accepted:
            raise ValueError(f"{name}={value} cannot be honoured: {why}")

    return handle


def _refused(why: str) -> Handler:
    def handle(_: UrlParameters, name: str, value: str) -> None:  # noqa: ARG001 (may be secret)
        raise ValueError(f"the parameter {name!r} cannot be honoured: {why}")

    return handle


def _text(_: str, value: str) -> str:
    return value


def _integer(name: str, value: str) -> int:
    if not (value.isascii() and value.isdigit()):
        raise ValueError(f"{name}={value!r} is not a whole number from 0 up")
    return int(value)


def _positive_seconds(name: str, value: str) -> float:
    seconds = _seconds(name, value)
    if seconds <= 0:
        raise ValueError(
            f"{name}={value} asks for no limit, and here every wait has an end: leave it out, or"
            " give seconds above 0"
        )
    return seconds


def _seconds(name: str, value: str) -> float:
    if not re.fullmatch(r"\d+(\.\d*)?", value):
        raise ValueError(f"{name}={value!r} is not a number of seconds")
    return float(value)


def _milliseconds(name: str, value: str) -> float:
    return _integer(name, value) / 1000


def _boolean(name: str, value: str) -> bool:
    if value.lower() not in _TRUE | _FALSE:
        raise ValueError(f"{name}={value!r} is neither true nor false")
    return value.lower() in _TRUE


def _one_of(*names: str) -> Callable[[str, str], str]:
    def convert(name: str, value: str) -> str:
        if value not in names:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(names)}")
        return value

    return convert


def _ssl(found: UrlParameters, name: str, value: str) -> None:
    """SQLAlchemy's and asyncpg's ``ssl=<mode>``, and JDBC's ``ssl=true``, which libpq takes too."""
    mode = value if value in MODES else ("require" if _boolean(name, value) else "disable")
    if found.tls.mode not in (None, mode):
        raise ValueError(f"ssl={value} contradicts sslmode={found.tls.mode}")
    found.tls = replace(found.tls, mode=mode)


def _sslmode(found: UrlParameters, name: str, value: str) -> None:
    mode = _one_of(*MODES)(name, value)
    if found.tls.mode not in (None, mode):
        raise ValueError(f"sslmode={value} contradicts ssl={found.tls.mode}")
    found.tls = replace(found.tls, mode=mode)


def _options(found: UrlParameters, _: str, value: str) -> None:
    server_settings, rest = split_options(value)
    if rest:
        server_settings["options"] = rest
    for name, setting in server_settings.items():
        if name == "application_name":
            found.settings[name] = setting
        elif name in TIMEOUTS:
            found.settings[TIMEOUTS[name]] = parse_duration(setting)
        else:
            found.server_settings[name] = setting


def _pgbouncer(found: UrlParameters, name: str, value: str) -> None:
    if _boolean(name, value):
        found.settings["pooler"] = "transaction"


def _fallback_application_name(found: UrlParameters, _: str, value: str) -> None:
    found.settings.setdefault("application_name", value)


def _load_balance_hosts(found: UrlParameters, name: str, value: str) -> None:
    found.shuffle_hosts = _one_of("disable", "random")(name, value) == "random"


def _ssl_negotiation(name: str, value: str) -> bool:
    return _one_of("postgres", "direct")(name, value) == "direct"


def _certificate_mode(name: str, value: str) -> bool:
    return _one_of("allow", "disable")(name, value) == "allow"


_NO_GSS = "asyncpg has no GSSAPI encryption; use TLS (sslmode=...)"
_NO_WAY = "asyncpg has no way to"

_HANDLERS: dict[str, Handler] = {
    # What DatabaseSettings also says; a variable or an argument wins over the URL.
    "application_name": _setting("application_name", _text),
    "fallback_application_name": _fallback_application_name,
    "connect_timeout": _setting("connection_timeout", _positive_seconds),
    "timeout": _setting("connection_timeout", _positive_seconds),
    "pgbouncer": _pgbouncer,
    # PostgreSQL settings.
    "options": _options,
    "client_encoding": _only("utf8", "utf-8", "auto", why="asyncpg speaks UTF8 only"),
    # Which server.
    "target_session_attrs": _driver(_one_of(*TARGET_SESSION_ATTRS)),
    "load_balance_hosts": _load_balance_hosts,
    "hostaddr": _refused("put the address itself into the host, or the name into your resolver"),
    # TLS.
    "sslmode": _sslmode,
    "ssl": _ssl,
    "sslnegotiation": _tls("direct", _ssl_negotiation),
    "direct_tls": _tls("direct", _boolean),
    "sslrootcert": _tls("root", _text),
    "sslcert": _tls("certificate", _text),
    "sslkey": _tls("key", _text),
    "sslpassword": _tls("key_password", _text),
    "sslcrl": _tls("crl", _text),
    "sslcrldir": _tls("crl_directory", _text),
    "sslcertmode": _tls("send_certificate", _certificate_mode),
    "ssl_min_protocol_version": _tls("minimum", _text),
    "ssl_max_protocol_version": _tls("maximum", _text),
    "channel_binding": _tls("channel_binding", _one_of("disable", "prefer", "require")),
    "sslcompression": _only("0", why="TLS compression is unsafe and gone"),
    "sslsni": _only("1", why="Python's TLS always names the host it asks for"),
    "gssencmode": _only("disable", "prefer", why=_NO_GSS),
    "gssdelegation": _only("0", why=f"{_NO_WAY} delegate credentials"),
    # Who.
    "passfile": _driver(_text),
    "service": _driver(_text),
    "servicefile": _driver(_text),
    "krbsrvname": _driver(_text),
    "gsslib": _driver(_one_of("gssapi", "sspi")),
    "require_auth": _refused(
        f"{_NO_WAY} insist on a method; settle it in the server's pg_hba.conf"
    ),
    "requirepeer": _refused(f"{_NO_WAY} check the server process's user"),
    # The network.
    "keepalives": _keepalive("enabled", _boolean),
    "keepalives_idle": _keepalive("idle", _integer),
    "keepalives_interval": _keepalive("interval", _integer),
    "keepalives_count": _keepalive("count", _integer),
    "tcp_user_timeout": _keepalive("user_timeout", _milliseconds),
    "min_protocol_version": _only("3.0", why="asyncpg speaks protocol 3.0"),
    "max_protocol_version": _only("3.0", "3.2", "latest", why="asyncpg speaks protocol 3.0"),
    "replication": _only("0", "false", "off", "no", why=f"{_NO_WAY} speak that protocol"),
    # The driver's own, as text.
    "command_timeout": _driver(_seconds),
    "statement_cache_size": _driver(_integer),
    "prepared_statement_cache_size": _driver(_integer),
    "max_cached_statement_lifetime": _driver(_integer),
    "max_cacheable_statement_size": _driver(_integer),
}

_ELSEWHERE = {
    "connection_limit": "set DATABASE_POOL_SIZE instead",
    "pool_timeout": "set DATABASE_POOL_TIMEOUT instead",
    "pool_size": "set DATABASE_POOL_SIZE instead",
    "max_overflow": "set DATABASE_MAX_OVERFLOW instead",
    "schema": "write options=-c%20search_path=<schema> instead",
    "search_path": "write options=-c%20search_path=<schema> instead",
    "statement_timeout": "set DATABASE_STATEMENT_TIMEOUT instead",
    "lock_timeout": "set DATABASE_LOCK_TIMEOUT instead",
    "sslaccept": "write sslmode=... instead",
    "server_settings": "write options=-c%20<name>=<value> instead",
    "async_fallback": "take it out: there is no fallback",
    "prepared_statement_name_func": "it takes a function: pass it in connect_args",
}


def _hint(name: str) -> str:
    return f": {_ELSEWHERE[name]}" if name in _ELSEWHERE else "; take it out of the URL"
