"""Database URLs: everything ``psql`` accepts, and SQLAlchemy's own spelling."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from urllib.parse import quote, unquote

from sqlalchemy.engine import URL

from poolkit.errors import ConfigurationError

DRIVERNAME = "postgresql+asyncpg"
DEFAULT_PORT = 5432
HIGHEST_PORT = 65535
MASK = "***"
EXAMPLE = "postgresql://user:password@host:5432/name"

_OURS = {"postgres", "postgresql", "postgres+asyncpg", "postgresql+asyncpg"}
_ESCAPE_HINT = (
    "percent-encode special characters in the user or the password"
    " (@ is %40, / is %2F), or give the parts: DATABASE_HOST, DATABASE_PASSWORD, ..."
)


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens: a TCP host or the directory of a Unix socket."""

    host: str
    port: int | None = None

    @property
    def is_socket(self) -> bool:
        """Whether the host is the directory of a Unix socket."""
        return self.host.startswith("/")

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port or DEFAULT_PORT}"


@dataclass(frozen=True, slots=True, repr=False)
class DatabaseUrl:
    """A URL taken apart. ``str()`` and ``repr()`` mask its secrets.

    Attributes:
        addresses: In the order in which they are tried; empty means libpq's default (the local
            socket, then localhost).
        query: The parameters that do not say where, who or which database.
    """

    addresses: tuple[Address, ...] = ()
    user: str | None = None
    password: str | None = None
    database: str | None = None
    query: Mapping[str, str] = field(default_factory=dict)

    def sqlalchemy(self) -> URL:
        """The URL for SQLAlchemy: where, who and which database; no parameters."""
        single = len(self.addresses) == 1 and not self.addresses[0].is_socket
        return URL.create(
            DRIVERNAME,
            username=self.user,
            password=self.password,
            host=self.addresses[0].host if single else None,
            port=self.addresses[0].port if single else None,
            database=self.database,
            query={} if single else self._hosts_query(),
        )

    def with_password(self, password: str) -> DatabaseUrl:
        """The same URL with that password."""
        return replace(self, password=password)

    def _hosts_query(self) -> dict[str, str | tuple[str, ...]]:
        if not self.addresses:
            return {}
        if len(self.addresses) == 1:
            (socket,) = self.addresses
            port = {"port": str(socket.port)} if socket.port else {}
            return {"host": socket.host, **port}
        return {"host": tuple(str(address) for address in self.addresses)}

    def __str__(self) -> str:
        login = quote(self.user or "", safe="")
        if self.password is not None:
            login += f":{MASK}"
        hosts = ",".join(
            quote(a.host, safe="") + (f":{a.port}" if a.port else "")
            if a.is_socket
            else (str(a) if a.port else str(a).removesuffix(f":{DEFAULT_PORT}"))
            for a in self.addresses
        )
        query = "&".join(f"{key}={quote(self._shown(key), safe='/,:*')}" for key in self.query)
        return "".join(
            (
                "postgresql://",
                f"{login}@" if login else "",
                hosts,
                f"/{quote(self.database, safe='')}" if self.database is not None else "",
                f"?{query}" if query else "",
            )
        )

    def __repr__(self) -> str:
        return f"DatabaseUrl({str(self)!r})"

    def _shown(self, key: str) -> str:
        return MASK if key == "sslpassword" else self.query[key]


def parse_url(text: str) -> DatabaseUrl:
    """Take a database URL apart.

    Args:
        text: ``postgres://``, ``postgresql://`` or ``postgresql+asyncpg://``, in libpq's or in
            SQLAlchemy's spelling of several hosts.

    Raises:
        ConfigurationError: It is malformed, or for another driver or database. The message
            never repeats the password.
    """
    scheme, separator, rest = text.strip().partition("://")
    if not separator:
        raise ConfigurationError(f"not a URL: write {EXAMPLE}")
    _check_scheme(scheme.lower())
    authority, path, query_text = _split(rest)
    login, at, hosts = authority.rpartition("@")
    if not at and "@" in path:
        raise ConfigurationError(f"the URL has a / or ? before its @: {_ESCAPE_HINT}")
    user, colon, password = login.partition(":")
    url = DatabaseUrl(
        addresses=tuple(_authority_address(host) for host in hosts.split(",") if host),
        user=unquote(user) or None,
        password=unquote(password) if colon else None,
        database=unquote(path[1:]) or None,
    )
    return _with_query(url, _pairs(query_text))


def parse_hosts(text: str, port: int | None = None) -> tuple[Address, ...]:
    """Addresses from a comma-separated list as in libpq's ``host`` parameter."""
    return tuple(
        replace(address, port=address.port or port)
        for address in (_query_address(host) for host in text.split(",") if host)
    )


def _check_scheme(scheme: str) -> None:
    if scheme in _OURS:
        return
    if scheme.startswith(("postgres+", "postgresql+")):
        driver = scheme.partition("+")[2]
        raise ConfigurationError(
            f"the URL asks for the driver {driver!r}, and poolkit drives asyncpg:"
            " write postgresql:// or postgresql+asyncpg://"
        )
    raise ConfigurationError(
        f"the URL's scheme is {scheme!r}, and poolkit is for PostgreSQL: write {EXAMPLE}"
    )


def _split(rest: str) -> tuple[str, str, str]:
    match = re.fullmatch(r"([^/?]*)(/[^?]*)?(?:\?(.*))?", rest, re.DOTALL)
    if match is None:  # every text matches; kept so that the type is certain
        raise ConfigurationError(f"not a URL: write {EXAMPLE}")
    return match[1], match[2] or "", match[3] or ""


def _authority_address(text: str) -> Address:
    bracketed = re.fullmatch(r"\[([^\]]+)\](?::(.*))?", text)
    if bracketed:
        return Address(unquote(bracketed[1]), _port(bracketed[2]))
    host, _, port = text.partition(":")
    if ":" in port:
        raise ConfigurationError(
            f"the host {text!r} has more than one colon: write an IPv6 address in brackets,"
            f" as in [::1]:5432; otherwise {_ESCAPE_HINT}"
        )
    return Address(unquote(host), _port(port))


def _query_address(text: str) -> Address:
    if text.startswith("/"):
        directory, _, port = text.partition(":")
        return Address(directory, _port(port))
    if text.startswith("[") or text.count(":") == 1:
        return _authority_address(text)
    return Address(text)


def _port(text: str | None) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= HIGHEST_PORT):
        raise ConfigurationError(
            f"the port {text!r} is not a number from 1 to {HIGHEST_PORT};"
            f" if it is a part of the password, {_ESCAPE_HINT}"
        )
    return int(text)


def _pairs(text: str) -> list[tuple[str, str]]:
    pairs = []
    for item in filter(None, text.split("&")):
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigurationError(f"the URL's parameter {unquote(key)!r} has no value")
        pairs.append((unquote(key), unquote(value)))
    return pairs


def _with_query(url: DatabaseUrl, pairs: Iterable[tuple[str, str]]) -> DatabaseUrl:
    """As in libpq, a parameter wins over the part of the URL that says the same."""
    collected: dict[str, list[str]] = {}
    for key, value in pairs:
        collected.setdefault(key, []).append(value)
    hosts = ",".join(collected.pop("host", ()))
    ports = ",".join(collected.pop("port", ()))
    single = {key: _only(key, values) for key, values in collected.items()}
    return replace(
        url,
        addresses=_addresses(parse_hosts(hosts) if hosts else url.addresses, ports),
        user=single.pop("user", url.user),
        password=single.pop("password", url.password),
        database=single.pop("dbname", single.pop("database", url.database)),
        query=single,
    )


def _only(key: str, values: list[str]) -> str:
    if len(set(values)) > 1:
        raise ConfigurationError(f"the URL gives {key!r} twice, with different values")
    return values[0]


def _addresses(addresses: tuple[Address, ...], ports: str) -> tuple[Address, ...]:
    if not ports:
        return addresses
    numbers = [_port(port) for port in ports.split(",")]
    if len(numbers) == 1:
        return tuple(replace(a, port=numbers[0]) for a in addresses or (Address("localhost"),))
    if len(numbers) != len(addresses):
        raise ConfigurationError(
            f"the URL names {len(addresses)} hosts and {len(numbers)} ports: give one port,"
            " or one for each host"
        )
    return tuple(replace(a, port=port) for a, port in zip(addresses, numbers, strict=True))
