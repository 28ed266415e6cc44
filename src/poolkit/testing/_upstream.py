"""The server behind a proxy: where it is, and its URL by way of the proxy."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

from poolkit.testing._server import PostgresServer

_PORT = 5432
_ADDRESS = {"host", "hostaddr", "port"}

Server = PostgresServer | str | tuple[str, int] | Path
"""A server of `postgres()`, a `postgresql://` URL, a host and a port, or a Unix socket."""


@dataclass(frozen=True, slots=True)
class Upstream:
    """The server's address: a host and a port, or the path of a Unix socket."""

    host: str
    port: int
    socket: str | None
    url: str

    async def connect(self, protocol: Callable[[], asyncio.Protocol]) -> None:
        loop = asyncio.get_running_loop()
        if self.socket is None:
            await loop.create_connection(protocol, self.host, self.port)
        else:
            await loop.create_unix_connection(protocol, self.socket)


def upstream(server: Server) -> Upstream:
    """The address of a server.

    Raises:
        ValueError: The URL is none of PostgreSQL's, or names several servers.
    """
    if isinstance(server, PostgresServer):
        return Upstream(server.host, server.port, None, server.url)
    if isinstance(server, tuple):
        return Upstream(*server, None, "postgresql://")
    if isinstance(server, Path):
        return Upstream("", 0, str(server), "postgresql://")
    return _of_url(server)


def rewritten(url: str, host: str, port: int) -> str:
    """The URL with another address; user, password, database and options stay."""
    parts = _split(url)
    account = f"{userinfo}@" if (userinfo := parts.netloc.rpartition("@")[0]) else ""
    place = f"[{host}]" if ":" in host else host
    kept = [
        item for item in parse_qsl(parts.query, keep_blank_values=True) if item[0] not in _ADDRESS
    ]
    return parts._replace(
        netloc=f"{account}{place}:{port}", query=urlencode(kept, safe="/")
    ).geturl()


def _of_url(url: str) -> Upstream:
    parts = _split(url)
    query = dict(parse_qsl(parts.query))
    netloc = parts.netloc.rpartition("@")[2]
    if "," in netloc or "," in query.get("host", "") + query.get("hostaddr", ""):
        raise ValueError("the URL names several servers: a proxy stands before one")
    try:
        port = parts.port if parts.port is not None else int(query.get("port", _PORT))
    except ValueError:
        raise ValueError("the URL's port is no number") from None
    host = query.get("hostaddr") or unquote(parts.hostname or "") or query.get("host", "localhost")
    if host.startswith("/"):
        return Upstream("", 0, f"{host}/.s.PGSQL.{port}", url)
    return Upstream(host, port, None, url)


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
    except ValueError:
        # Not chained: it would quote a piece of the URL, and that may be of the password.
        raise ValueError("not a valid URL") from None
    if parts.scheme.partition("+")[0] not in {"postgres", "postgresql"}:
        raise ValueError("not a postgresql:// URL")
    return parts
