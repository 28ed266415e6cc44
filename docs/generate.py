"""Write what the pages take from the code: reference tables and included examples.

    python docs/generate.py            write them
    python docs/generate.py --check    exit with 1 if a file on disk differs

Fails where a setting or a URL parameter has no place in the pages yet.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from poolkit import parameters
from poolkit.settings import SECRET_FIELDS, DatabaseSettings
from poolkit.telemetry.catalogue import BEYOND, CONVENTIONS, Metric

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PAGES = (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))
CUT = "# The rest only shows that it works."
INCLUSION = re.compile(r"<!-- example: ([\w/]+\.py) -->\n```python\n.*?```\n", re.DOTALL)
GENERATED = "<!-- Written by docs/generate.py from the code: change it there. -->\n\n"

GROUPS = {
    "The database": ("url", "host", "port", "user", "password", "name"),
    "Limits": (
        "connection_timeout",
        "statement_timeout",
        "lock_timeout",
        "idle_in_transaction_timeout",
    ),
    "The pool": (
        "pool_size",
        "max_overflow",
        "pool_timeout",
        "pool_recycle",
        "pool_pre_ping",
        "pool_use_lifo",
        "pool_recycle_jitter",
        "pool_idle_timeout",
        "pool_min_idle",
        "pool_keepalive",
        "pool_ping_idle",
        "pool_ping_timeout",
        "pool_max_waiting",
        "pool_overload_after",
        "pool_max_connecting",
        "leak_threshold",
    ),
    "The session": ("pooler", "application_name", "echo"),
    "Telemetry": (
        "telemetry",
        "logfire_enabled",
        "pool_name",
        "telemetry_slow_checkout",
        "telemetry_parameters",
        "telemetry_sqlcommenter",
        "telemetry_server_interval",
    ),
}

SETTINGS_HEAD = """\
# Settings

Each setting is an environment variable. In code it is a field of `DatabaseSettings` with the same
name, without the prefix and in small letters. Durations are seconds; fractions are allowed.

`poolkit settings` shows what is in force and where each value came from; `poolkit settings --env`
prints all of them as a commented `.env`.
"""

SETTINGS_TAIL = """
## Where values come from

The first source that has a value wins:

1. keyword arguments of `DatabaseSettings` (and `url` of `create_async_engine`);
2. the environment;
3. a file named by the variable with `_FILE` at its end, such as `DATABASE_PASSWORD_FILE` or
   `DATABASE_URL_FILE`; a line break at its end is dropped;
4. `.env` in the working directory, and the files that it names in the same way;
5. a secrets directory: `DatabaseSettings(_secrets_dir="/run/secrets")`, with files such as
   `database_password`.

Parameters of the URL that are settings too, such as `connect_timeout`, count as coming from where
the URL came from; a variable in the same source wins over them.

A URL in a stronger source hides `DATABASE_HOST`, `DATABASE_PORT`, `DATABASE_USER` and
`DATABASE_NAME` in a weaker one, and the parts hide a weaker URL. `DATABASE_PASSWORD` completes
either; a URL that has a password hides one in a weaker source. A variable that is set to the empty
string counts as not set. A variable and its `_FILE` form in one source are refused.

Keyword arguments for SQLAlchemy, given to `create_async_engine`, win over all of these.

## Another prefix

`DatabaseSettings(_env_prefix="REPORTS_")` reads `REPORTS_URL`, `REPORTS_POOL_SIZE` and so on; see
[a second database](../how-to/second-database.md). `LOGFIRE_ENABLED` has no prefix.

## Misspelt names

A variable with the prefix that is no setting but close to one, or that other libraries use for one
(`DATABASE_USERNAME`), is warned about with the likely name (`MisspeltSetting`, a
`SettingsWarning`). `poolkit check` treats it as an error.

## What cannot stand together

Every problem is reported at once, in one `ConfigurationError`. For example:

| settings | message |
| --- | --- |
"""

METRICS_HEAD = """\
# Metrics

What `DATABASE_TELEMETRY`, `LOGFIRE_ENABLED` and `poolkit.telemetry.instrument` emit; see
[export metrics](../how-to/export-metrics.md). Each has its name in OpenTelemetry and, below it, in
Prometheus, where a histogram's series end in `_bucket`, `_count` and `_sum`.

All of them have the attributes `db.client.connection.pool.name`, `db.system.name`, `db.namespace`,
`server.address` and `server.port`. Of several hosts, the address is the first one's. Histograms
have the bounds 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5 and 10 s.

## By the semantic conventions

"""

CLASHES: tuple[dict[str, Any], ...] = (
    {"pool_min_idle": 20},
    {"pool_keepalive": 60, "pool_recycle": 30},
    {"connection_timeout": 2, "pool_ping_timeout": 3},
    {"lock_timeout": 30},
    {"url": "postgresql://app@db.example.com/app?statement_cache_size=100&pgbouncer=true"},
    {"url": "postgresql://app@db.example.com/app", "host": "other.example.com"},
    {"url": "postgresql+psycopg://app@db.example.com/app"},
)

URL_HEAD = """\
# URL parameters

A URL starts with `postgres://`, `postgresql://` or `postgresql+asyncpg://` and may have any of
libpq's parameters. A parameter that is not listed as honoured here is refused by name when the
engine is made; none is dropped in silence.

`host`, `port`, `user`, `password`, `dbname` and `database` as parameters win over the same part of
the URL, as in libpq. Several hosts are written with commas (`host1:5432,host2:5432`) or as in
SQLAlchemy (`?host=host1:5432&host=host2:5432`), an IPv6 address in brackets (`[::1]:5432`), a Unix
socket as its directory (`postgresql:///app?host=/run/postgresql`).

What the URL leaves open is filled in from `PGSSLMODE`, `PGSSLROOTCERT`, `PGSSLCERT`, `PGSSLKEY`,
`PGSSLCRL`, `PGCHANNELBINDING` and `~/.postgresql`, as libpq does it. That also serves where the
parts are given (`DATABASE_HOST`, ...) instead of a URL.

## Honoured

"""

MEANINGS = {
    "application_name": "`DATABASE_APPLICATION_NAME`",
    "fallback_application_name": "`DATABASE_APPLICATION_NAME`, unless `application_name` says it",
    "connect_timeout": "`DATABASE_CONNECTION_TIMEOUT`, for all addresses and attempts together",
    "timeout": "the same, in asyncpg's spelling",
    "pgbouncer": "true: `DATABASE_POOLER=transaction`",
    "options": "`-c name=value` and `--name=value` become PostgreSQL settings of the session;"
    " `statement_timeout`, `lock_timeout` and `idle_in_transaction_session_timeout` among them"
    " become the `DATABASE_*` setting; the rest (Neon's `endpoint=...`) is sent as it is",
    "target_session_attrs": "which of several servers will do",
    "load_balance_hosts": "`random`: try several hosts in random order",
    "sslmode": "TLS; see [TLS](../how-to/tls.md)",
    "ssl": "SQLAlchemy's and asyncpg's spelling of `sslmode`, with the same values;"
    " `true` is `require`, `false` is `disable`",
    "sslnegotiation": "`direct`: begin with TLS at once (PostgreSQL 17+)",
    "direct_tls": "true: the same, in asyncpg's spelling",
    "sslrootcert": "file of trusted authorities, or `system`",
    "sslcert": "file of the client's certificate",
    "sslkey": "file of the client's key",
    "sslpassword": "passphrase of the client's key",
    "sslcrl": "file of revoked certificates",
    "sslcrldir": "directory of revoked certificates",
    "sslcertmode": "`disable`: send no client certificate",
    "ssl_min_protocol_version": "oldest TLS that will do; default `TLSv1.2`",
    "ssl_max_protocol_version": "newest TLS that will do",
    "channel_binding": "`require`: raises `sslmode` to `verify-full`, for asyncpg has no channel"
    " binding; the others ask for nothing",
    "passfile": "password file, as asyncpg reads it",
    "service": "connection service, as asyncpg reads it",
    "servicefile": "file of connection services",
    "krbsrvname": "Kerberos service name",
    "gsslib": "library for GSSAPI authentication",
    "keepalives": "whether TCP probes an idle connection; default true",
    "keepalives_idle": "seconds of silence before the first probe; default 5",
    "keepalives_interval": "seconds between probes; default 2",
    "keepalives_count": "unanswered probes until the connection is given up; default 3",
    "tcp_user_timeout": "milliseconds that sent data may stay unacknowledged; default 10000,"
    " 0 leaves the system's",
    "command_timeout": "the client's own limit, in seconds; 0 is none. Default: 1 s above the"
    " statement timeout",
    "statement_cache_size": "asyncpg's cache of prepared statements; 0 turns SQLAlchemy's off too",
    "prepared_statement_cache_size": "SQLAlchemy's cache; 0 turns asyncpg's off too",
    "max_cached_statement_lifetime": "seconds that asyncpg keeps a prepared statement",
    "max_cacheable_statement_size": "bytes of the longest statement that asyncpg caches",
}

_HARMLESS = ("0", "1", "false", "off", "no", "disable", "prefer", "auto", "utf8", "utf-8", "3.0")
_HARMLESS += ("3.2", "latest")
_VALUES = {
    r"is not one of (?P<names>.+)": None,
    r"is neither true nor false": "true or false",
    r"is not a whole number from 0 up": "whole number",
    r"is not a number of seconds": "seconds",
}


def settings_page() -> str:
    """The reference of the settings."""
    fields = DatabaseSettings.model_fields
    listed = [name for names in GROUPS.values() for name in names]
    if sorted(listed) != sorted(fields):
        sys.exit(
            f"docs/generate.py: in one of GROUPS and the fields only: {set(listed) ^ {*fields}}"
        )
    sections = [
        f"\n## {title}\n\n" + _table(("variable", "type", "default", "meaning"), _rows(names))
        for title, names in GROUPS.items()
    ]
    clashes = "".join(f"| {_code(clash)} | {_complaint(clash)} |\n" for clash in CLASHES)
    return GENERATED + SETTINGS_HEAD + "".join(sections) + SETTINGS_TAIL + clashes


def url_page() -> str:
    """The reference of the URL's parameters."""
    honoured, harmless, refused = [], [], []
    for name in parameters._HANDLERS:  # noqa: SLF001 (the table itself)
        told = _problem(name, "\0")
        if told is None or "cannot be honoured" not in told:
            honoured.append((f"`{name}`", _accepted(told), MEANINGS[name]))
        elif values := [v for v in _HARMLESS if _problem(name, v) is None]:
            harmless.append((f"`{name}`", _listed(values), _after_colon(told)))
        else:
            refused.append((f"`{name}`", _after_colon(told)))
    refused += [
        (f"`{name}`", _after_colon(str(_problem(name, "1"))))
        for name in sorted(parameters._ELSEWHERE)  # noqa: SLF001
    ]
    stale = MEANINGS.keys() - parameters._HANDLERS.keys()  # noqa: SLF001
    if stale:
        sys.exit(f"docs/generate.py: MEANINGS of parameters that are gone: {stale}")
    return "".join(
        (
            GENERATED,
            URL_HEAD,
            _table(("parameter", "values", "meaning"), honoured),
            "\n## Accepted where they ask for nothing\n\nOther values are refused.\n\n",
            _table(("parameter", "accepted", "why no other"), harmless),
            "\n## Refused\n\nBy name, and so is every parameter that stands in no table here.\n\n",
            _table(("parameter", "remedy or reason"), refused),
        )
    )


def metrics_page() -> str:
    """The reference of the metrics."""
    head = ("metric", "kind, unit", "attributes", "meaning")
    return "".join(
        (
            GENERATED,
            METRICS_HEAD,
            _table(head, map(_metric, CONVENTIONS)),
            "\n## Beyond the conventions\n\n",
            _table(head, map(_metric, BEYOND)),
        )
    )


def _metric(metric: Metric) -> tuple[str, ...]:
    own = ", ".join(f"`{name}`" for name in metric.attributes)
    names = f"`{metric.name}`<br>`{metric.prometheus}`"
    return names, f"{metric.kind}, `{metric.unit}`", own, metric.description


def with_examples(page: str) -> str:
    """The page with its included examples as they are in their files now."""
    return INCLUSION.sub(lambda match: _included(match[1]), page)


def _included(name: str) -> str:
    code = (DOCS / "examples" / name).read_text(encoding="utf-8").partition(CUT)[0].rstrip()
    return f"<!-- example: {name} -->\n```python\n{code}\n```\n"


def _rows(names: Iterable[str]) -> Iterator[tuple[str, ...]]:
    for name in names:
        field = DatabaseSettings.model_fields[name]
        default, meaning = _default(name, field)
        yield f"`{DatabaseSettings.variable(name)}`", _type(name, field), default, meaning


def _default(name: str, field: FieldInfo) -> tuple[str, str]:
    """The default in words, and the description without it."""
    text, _, told = (field.description or "").partition(" Default: ")
    if told:
        return told.removesuffix("."), text
    if field.default is None:
        return "required" if name == "url" else "none", text
    value = f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
    return f"`{value.lower() if isinstance(field.default, bool) else value}`", text


def _type(name: str, field: FieldInfo) -> str:
    kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind]
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{value}`" for value in kinds)
    if name in SECRET_FIELDS:
        return "URL" if name == "url" else "text, secret"
    if bool in kinds:
        return "true or false" + (", `debug`" if len(kinds) > 1 else "")
    if str in kinds:
        return "text"
    kind = "whole number" if int in kinds else "number"
    if (field.description or "").startswith("Seconds"):
        kind = "seconds"
    return ", ".join([kind, *_bounds(field.metadata)])


def _bounds(metadata: Iterable[object]) -> Iterator[str]:
    for bound in metadata:
        match bound:
            case Ge(ge=low):
                yield f"from {low}"
            case Gt(gt=low):
                yield f"above {low}"
            case Le(le=high):
                yield f"to {high}"
            case Lt(lt=high):
                yield f"below {high}"


def _complaint(clash: dict[str, Any]) -> str:
    values = {"url": "postgresql://app@db.example.com/app", **clash}
    try:
        DatabaseSettings(_env_file=None, **values)
    except ValidationError as error:
        (detail,) = error.errors(include_url=False)
        return _plain(detail["msg"].removeprefix("DATABASE_URL: "))
    sys.exit(f"docs/generate.py: {clash} is not refused")


def _code(clash: dict[str, Any]) -> str:
    return "<br>".join(f"`{DatabaseSettings.variable(k)}={v}`" for k, v in clash.items())


def _problem(name: str, value: str) -> str | None:
    problems = parameters.read_parameters({name: value}).problems
    return problems[0] if problems else None


def _accepted(told: str | None) -> str:
    if told is None:
        return "text"
    for pattern, words in _VALUES.items():
        if match := re.search(pattern, told):
            return words or _listed(match["names"].split(", "))
    sys.exit(f"docs/generate.py: no words for what is accepted: {told}")


def _listed(values: Iterable[str]) -> str:
    return ", ".join(f"`{value}`" for value in values)


def _after_colon(told: str) -> str:
    return _plain(told.partition(": ")[2])


def _plain(text: str) -> str:
    """Text in which nothing is taken for a tag."""
    return text.replace("<", "&lt;").replace(">", "&gt;")


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(_cell(cell) for cell in line) + " |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")


def main(*, check: bool) -> int:
    """Write the pages, or say which would change."""
    for name in [name for name in os.environ if name.upper().startswith(("DATABASE_", "PG"))]:
        del os.environ[name]  # the pages do not depend on whose machine this is
    wanted = {page: with_examples(page.read_text(encoding="utf-8")) for page in PAGES}
    wanted[DOCS / "reference" / "settings.md"] = settings_page()
    wanted[DOCS / "reference" / "url-parameters.md"] = url_page()
    wanted[DOCS / "reference" / "metrics.md"] = metrics_page()
    stale = [
        page
        for page, text in wanted.items()
        if not page.exists() or page.read_text(encoding="utf-8") != text
    ]
    for page in stale:
        if check:
            print(f"{page.relative_to(ROOT)} is not as docs/generate.py writes it")
        else:
            page.write_text(wanted[page], encoding="utf-8")
            print(f"wrote {page.relative_to(ROOT)}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
