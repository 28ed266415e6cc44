"""Settings that are each well-formed but cannot stand together, each with its reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from poolkit import tls
from poolkit.errors import ConfigurationError
from poolkit.url import EXAMPLE, DatabaseUrl, parse_url

if TYPE_CHECKING:
    from poolkit.settings import DatabaseSettings

Name = Callable[[str], str]
Rule = Callable[["DatabaseSettings", Name], Iterator[str]]


def find(settings: DatabaseSettings, *, unknown: frozenset[str], of: Name) -> list[str]:
    """One sentence for each contradiction.

    Args:
        settings: Well-formed values.
        unknown: Fields whose values were malformed; rules about them are left out.
        of: Gives a field's variable.
    """
    return [
        sentence
        for fields, rule in _RULES.items()
        if unknown.isdisjoint(fields)
        for sentence in rule(settings, of)
    ]


def _address(s: DatabaseSettings, of: Name) -> Iterator[str]:
    if s.url is None:
        if s.host is None:
            yield (
                f"{of('url')} is not set: set it to {EXAMPLE}, or set {of('host')}, {of('user')},"
                f" {of('password')} and {of('name')}"
            )
        return
    try:
        url = parse_url(s.url.get_secret_value())
    except ConfigurationError as error:
        yield f"{of('url')}: {error}"
        return
    for problem in s.url_parameters().problems:
        yield f"{of('url')}: {problem}"
    yield from _parts_differ(s, url, of)
    try:
        tls.resolve(s.url_parameters().tls)
    except ConfigurationError as error:
        yield f"{of('url')}: {error}"


def _parts_differ(s: DatabaseSettings, url: DatabaseUrl, of: Name) -> Iterator[str]:
    hosts = ",".join(address.host for address in url.addresses)
    ports = {address.port for address in url.addresses}
    same = {
        "host": s.host in (None, hosts),
        "port": s.port is None or ports == {s.port},
        "user": s.user in (None, url.user),
        "name": s.name in (None, url.database),
        "password": s.password is None or url.password in (None, s.password.get_secret_value()),
    }
    for field, agrees in same.items():
        if not agrees:
            yield f"{of(field)} and {of('url')} say different things: unset one of them"


def _keepalive(s: DatabaseSettings, of: Name) -> Iterator[str]:
    if 0 < s.pool_recycle <= s.pool_keepalive:
        yield (
            f"{of('pool_keepalive')}={s.pool_keepalive:g} is not below"
            f" {of('pool_recycle')}={s.pool_recycle:g}: a connection would be replaced before its"
            " first heartbeat"
        )


def _min_idle(s: DatabaseSettings, of: Name) -> Iterator[str]:
    if s.pool_min_idle > s.pool_size:
        yield (
            f"{of('pool_min_idle')}={s.pool_min_idle} is above {of('pool_size')}={s.pool_size}:"
            " the pool keeps no more than its size"
        )


def _ping_timeout(s: DatabaseSettings, of: Name) -> Iterator[str]:
    if s.pool_ping_timeout > s.connection_timeout:
        yield (
            f"{of('pool_ping_timeout')}={s.pool_ping_timeout:g} is above"
            f" {of('connection_timeout')}={s.connection_timeout:g}: checking an old connection"
            " would take longer than making a new one"
        )


def _lock_timeout(s: DatabaseSettings, of: Name) -> Iterator[str]:
    if 0 < s.statement_timeout <= s.lock_timeout:
        yield (
            f"{of('lock_timeout')}={s.lock_timeout:g} is not below"
            f" {of('statement_timeout')}={s.statement_timeout:g}: it could never act"
        )


def _caches(s: DatabaseSettings, of: Name) -> Iterator[str]:
    if s.url is None:
        return
    try:
        driver = s.url_parameters().driver
    except ConfigurationError:
        return  # reported with the URL
    yield from cache_problems(driver, s.pooler, of)


def cache_problems(driver: dict[str, object], pooler: str, of: Name) -> Iterator[str]:
    """What is wrong with statement cache sizes, from the URL or from ``connect_args``."""
    sizes = {
        name: driver[name]
        for name in ("statement_cache_size", "prepared_statement_cache_size")
        if name in driver
    }
    if len({bool(size) for size in sizes.values()}) > 1:
        yield (
            "statement_cache_size and prepared_statement_cache_size are one setting: one on and"
            " one off decodes rows wrongly after a column's type changes. Set both to 0 or neither"
        )
    elif pooler == "transaction" and any(sizes.values()):
        yield (
            f"{next(iter(sizes))}={next(iter(sizes.values()))} contradicts"
            f" {of('pooler')}=transaction: a prepared statement lives on one server connection,"
            " and the next transaction may get another. Leave it out, or set"
            f" {of('pooler')}=none if the pooler keeps prepared statements itself"
        )


def _application_name(s: DatabaseSettings, of: Name) -> Iterator[str]:
    limit = 63
    if len(s.application_name.encode()) > limit:
        yield (
            f"{of('application_name')}={s.application_name!r} is longer than the {limit} bytes"
            " that PostgreSQL keeps: shorten it"
        )


_RULES: dict[tuple[str, ...], Rule] = {
    ("url", "host", "port", "user", "password", "name"): _address,
    ("url", "pooler"): _caches,
    ("pool_keepalive", "pool_recycle"): _keepalive,
    ("pool_min_idle", "pool_size"): _min_idle,
    ("pool_ping_timeout", "connection_timeout"): _ping_timeout,
    ("lock_timeout", "statement_timeout"): _lock_timeout,
    ("application_name",): _application_name,
}
