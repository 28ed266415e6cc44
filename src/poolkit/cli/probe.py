"""One connection, and everything that it tells about the server and the way to it."""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
import statistics
import time
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

from poolkit.driver import DriverConnection, is_ours
from poolkit.engine import create_async_engine
from poolkit.events import ConnectionOpened, Event
from poolkit.parameters import parse_duration
from poolkit.settings import DatabaseSettings

ROUND_TRIPS = 15
PATIENCE = 15.0
"""Seconds for everything after the connect, should the server fall silent."""

_SERVER = text("""
    SELECT current_setting('server_version') AS version,
           CAST(current_user AS text) AS role,
           CAST(current_database() AS text) AS database,
           current_setting('transaction_read_only') = 'on' AS read_only,
           CAST(current_setting('max_connections') AS int) AS max_connections,
           CAST(current_setting('superuser_reserved_connections') AS int)
             + coalesce(CAST(current_setting('reserved_connections', true) AS int), 0)
             AS reserved,
           (SELECT rolconnlimit FROM pg_roles WHERE rolname = current_user) AS role_limit,
           (SELECT datconnlimit FROM pg_database WHERE datname = current_database())
             AS database_limit,
           -- The type of others' backends is hidden from ordinary users, their database is not.
           (SELECT count(*) FROM pg_stat_activity WHERE datid IS NOT NULL
             AND coalesce(backend_type, 'client backend') = 'client backend') AS in_use
""")


@dataclass(frozen=True, slots=True)
class Tls:
    """The TLS session.

    Attributes:
        version: The protocol's, e.g. ``TLSv1.3``.
        certificate_verified: Whether the certificate was checked against an authority.
        host_name_verified: Whether it was checked to be for this host.
    """

    version: str
    cipher: str
    certificate_verified: bool
    host_name_verified: bool


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds, as the server reports them inside a transaction; 0 is off."""

    statement: float
    lock: float
    idle_in_transaction: float


@dataclass(frozen=True, slots=True)
class Room:
    """Connections: what one process may open, and what the server has.

    Attributes:
        reserved: What the server keeps for superusers and ``pg_use_reserved_connections``.
        role_limit: The role's own limit, None for none.
        database_limit: The database's own limit, None for none.
        in_use: Now, by all clients, this one counted in.
    """

    pool_size: int
    max_overflow: int
    max_connections: int
    reserved: int
    role_limit: int | None
    database_limit: int | None
    in_use: int

    @property
    def per_process(self) -> int:
        """What one process may open."""
        return self.pool_size + self.max_overflow

    @property
    def usable(self) -> int:
        """What is there for this role and database, if nobody else were connected."""
        limits = (self.role_limit, self.database_limit)
        return min([self.max_connections - self.reserved, *(n for n in limits if n is not None)])

    @property
    def processes(self) -> int:
        """How many processes with full pools fit."""
        return self.usable // self.per_process

    @property
    def free(self) -> int:
        """What is free now, this connection counted as free."""
        return max(0, self.max_connections - self.reserved - self.in_use + 1)


@dataclass(frozen=True, slots=True)
class Found:
    """What one connection found.

    Attributes:
        address: The server, without credentials.
        limit_sent: Seconds of the statement timeout that the settings ask for.
        connect_seconds: To establish the connection, all attempts counted in.
        round_trip_seconds: The median of several.
        tls: None on a plain connection.
    """

    address: str
    server_version: str
    role: str
    database: str
    read_only: bool
    pooler: str
    connect_seconds: float
    attempts: int
    round_trip_seconds: float
    tls: Tls | None
    timeouts: Timeouts
    limit_sent: float
    room: Room

    @property
    def is_local(self) -> bool:
        """Whether the way to the server stays on this machine."""
        host = self.address.rpartition(":")[0].strip("[]")
        if host in ("", "localhost") or host.startswith("/"):  # "": the driver's default socket
            return True
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False


async def probe(settings: DatabaseSettings) -> Found:
    """Connect once and look around; bounded in all.

    Raises:
        ConfigurationError: A setting cannot be honoured.
        ConnectError: No connection.
    """
    events: list[Event] = []
    # No echo: it would go to stdout, among the report.
    engine = create_async_engine(settings=settings, observers=[events.append], echo=False)
    try:
        async with (
            asyncio.timeout(settings.connection_timeout + PATIENCE),
            engine.connect() as connection,
        ):
            (opened,) = (e for e in events if isinstance(e, ConnectionOpened))
            return await _look_around(connection, opened, settings)
    finally:
        await engine.dispose()


async def _look_around(
    connection: AsyncConnection, opened: ConnectionOpened, settings: DatabaseSettings
) -> Found:
    driver = (await connection.get_raw_connection()).driver_connection
    assert is_ours(driver)
    round_trip = await _round_trip(driver)
    server = (await connection.execute(_SERVER)).one()
    return Found(
        address=opened.address,
        server_version=str(server.version).split()[0],
        role=server.role,
        database=server.database,
        read_only=server.read_only,
        pooler=driver.pooler,
        connect_seconds=opened.duration,
        attempts=opened.attempts,
        round_trip_seconds=round_trip,
        tls=_tls(driver.ssl_object),
        timeouts=await _timeouts(connection),
        limit_sent=driver.session_limit,
        room=_room(server, settings),
    )


async def _round_trip(driver: DriverConnection) -> float:
    times = []
    for _ in range(ROUND_TRIPS):
        started = time.perf_counter()
        await driver.execute("SELECT 1")
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _tls(session: ssl.SSLObject | None) -> Tls | None:
    if session is None:
        return None
    verified = session.context.verify_mode == ssl.CERT_REQUIRED
    return Tls(
        version=session.version() or "unknown",
        cipher=(session.cipher() or ("unknown",))[0],
        certificate_verified=verified,
        host_name_verified=verified and session.context.check_hostname,
    )


async def _timeouts(connection: AsyncConnection) -> Timeouts:
    return Timeouts(
        statement=await _shown(connection, "statement_timeout"),
        lock=await _shown(connection, "lock_timeout"),
        idle_in_transaction=await _shown(connection, "idle_in_transaction_session_timeout"),
    )


async def _shown(connection: AsyncConnection, name: str) -> float:
    return parse_duration(str(await connection.scalar(text(f"SHOW {name}"))))


def _room(server: Row[Any], settings: DatabaseSettings) -> Room:
    return Room(
        pool_size=settings.pool_size,
        max_overflow=settings.max_overflow,
        max_connections=server.max_connections,
        reserved=server.reserved,
        role_limit=_limit(server.role_limit),
        database_limit=_limit(server.database_limit),
        in_use=server.in_use,
    )


def _limit(number: int | None) -> int | None:
    return None if number is None or number < 0 else number
