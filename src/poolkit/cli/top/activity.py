"""A server's sessions by ``pg_stat_activity``: who holds what, for how long, who waits for whom."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncConnection

from poolkit.cli.top.masking import masked, plain

CLIENT = "client backend"
IDLE = "idle"
IN_TRANSACTION = "idle in transaction"

_SERVER = text("""
    SELECT current_setting('server_version') AS version,
           CAST(current_user AS text) AS role,
           CAST(current_database() AS text) AS database,
           pg_backend_pid() AS own_pid,
           CAST(current_setting('max_connections') AS int) AS max_connections,
           CAST(current_setting('superuser_reserved_connections') AS int)
             + coalesce(CAST(current_setting('reserved_connections', true) AS int), 0)
             AS reserved
""")

_SESSIONS = text("""
    WITH locks AS MATERIALIZED (
        SELECT pid, granted, locktype, mode, relation,
               -- A name can be had for this database's relations only.
               CASE WHEN database IN (0, (SELECT oid FROM pg_database
                                          WHERE datname = current_database()))
                    THEN CAST(CAST(relation AS regclass) AS text) END AS name,
               coalesce(virtualxid, CAST(transactionid AS text)) AS transaction,
               classid, objid, objsubid,
               -- Only PostgreSQL 14 and later say it.
               CAST(to_jsonb(l) ->> 'waitstart' AS timestamptz) AS since
        FROM pg_locks AS l
        WHERE NOT granted OR locktype = 'tuple'
    ), clock AS MATERIALIZED (SELECT clock_timestamp() AS now)
    SELECT a.pid,
           CAST(a.datname AS text) AS database,
           CAST(a.usename AS text) AS role,
           a.application_name,
           coalesce(host(a.client_addr), CASE WHEN a.client_port = -1 THEN 'local' END) AS client,
           a.backend_type,
           a.state,
           a.wait_event_type,
           a.wait_event,
           a.query,
           CAST(extract(epoch FROM now - a.backend_start) AS float8) AS connected_for,
           CAST(extract(epoch FROM now - a.xact_start) AS float8) AS transaction_for,
           CAST(extract(epoch FROM now - a.query_start) AS float8) AS query_for,
           CAST(extract(epoch FROM now - a.state_change) AS float8) AS state_for,
           w.locktype, w.mode, w.relation, w.transaction, w.classid, w.objid, w.objsubid,
           -- Who waits for a transaction says by a lock of its own which table's row it is about.
           coalesce(w.name, (SELECT min(name) FROM locks AS r
                             WHERE r.pid = a.pid AND r.granted)) AS name,
           CAST(extract(epoch FROM now - coalesce(w.since, a.query_start)) AS float8) AS waits_for,
           CASE WHEN w.pid IS NOT NULL THEN pg_blocking_pids(a.pid) END AS blocked_by
    FROM clock, pg_stat_activity AS a
    LEFT JOIN LATERAL (SELECT * FROM locks WHERE locks.pid = a.pid AND NOT granted LIMIT 1) AS w
           ON true
""")


@dataclass(frozen=True, slots=True)
class Lock:
    """A lock that is waited for.

    Attributes:
        kind: ``pg_locks.locktype``, e.g. ``relation`` or ``transactionid``.
        mode: E.g. ``ShareLock``.
        relation: The table's or index's name, if it is one of this database's.
        target: What is locked, in words.
        seconds: Waited so far; None if that is hidden.
    """

    kind: str
    mode: str
    relation: str | None
    target: str
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Session:
    """One process of the server. What the role may not see is None.

    Attributes:
        client: The client's address; ``local`` for a Unix socket.
        backend: ``client backend`` for a connection, or what else it is.
        state: ``active``, ``idle``, ``idle in transaction``, ...
        wait: What it waits for by ``pg_stat_activity``, e.g. ``IO DataFileRead``.
        query: The statement that runs or ran last, without its literals.
        connected_for: Seconds since it connected.
        transaction_for: Seconds since its transaction began; None outside of one.
        query_for: Seconds since its statement began.
        state_for: Seconds in its state.
        lock: The lock that it waits for.
        blocked_by: Who holds that lock, or is before it in the queue; 0 is a prepared transaction.
    """

    pid: int
    database: str | None
    user: str | None
    application: str
    client: str | None
    backend: str | None
    state: str | None
    wait: str | None
    query: str
    connected_for: float | None = None
    transaction_for: float | None = None
    query_for: float | None = None
    state_for: float | None = None
    lock: Lock | None = None
    blocked_by: tuple[int, ...] = ()

    @property
    def is_hidden(self) -> bool:
        """Whether the role may see no more than that there is a session, and whose."""
        return self.backend is None

    @property
    def is_client(self) -> bool:
        """Whether it is a connection. What is hidden is, if it has a database."""
        return self.backend == CLIENT or (self.is_hidden and self.database is not None)

    @property
    def is_in_transaction(self) -> bool:
        """Whether it holds a transaction open, and does nothing in it."""
        return (self.state or "").startswith(IN_TRANSACTION)

    @property
    def seconds(self) -> float | None:
        """How long what it does now has lasted: the wait, the statement, or being idle."""
        if self.lock is not None:
            return self.lock.seconds
        return self.query_for if self.state == "active" else self.state_for


@dataclass(frozen=True, slots=True)
class Application:
    """The connections of one ``application_name``.

    Attributes:
        longest: Seconds of its oldest transaction.
    """

    name: str
    connections: int
    active: int
    idle: int
    in_transaction: int
    blocked: int
    hidden: int
    longest: float | None


@dataclass(frozen=True, slots=True)
class Activity:
    """A server's sessions at one instant; ours is not among them.

    Attributes:
        role: Who looked.
        pooler: What stood between us and the server.
        connections: Of all clients, ours counted in.
        max_connections: The server's limit.
        reserved: What the server keeps of it for superusers and reserved roles.
    """

    version: str
    role: str
    database: str
    pooler: str
    connections: int
    max_connections: int
    reserved: int
    sessions: Sequence[Session]

    @property
    def clients(self) -> list[Session]:
        """The sessions that are connections."""
        return [s for s in self.sessions if s.is_client]

    @property
    def hidden(self) -> int:
        """Connections whose state and statements the role may not see."""
        return sum(s.is_hidden for s in self.clients)

    @property
    def applications(self) -> list[Application]:
        """Connections by application, the largest first."""
        names = Counter(s.application for s in self.clients)
        return [
            _application(name, [s for s in self.clients if s.application == name])
            for name, _ in sorted(names.items(), key=lambda each: (-each[1], each[0]))
        ]


def _application(name: str, sessions: Sequence[Session]) -> Application:
    ages = [s.transaction_for for s in sessions if s.transaction_for is not None]
    return Application(
        name=name,
        connections=len(sessions),
        active=sum(s.state == "active" and s.lock is None for s in sessions),
        idle=sum(s.state == IDLE for s in sessions),
        in_transaction=sum(s.is_in_transaction for s in sessions),
        blocked=sum(s.lock is not None for s in sessions),
        hidden=sum(s.is_hidden for s in sessions),
        longest=max(ages, default=None),
    )


async def read(connection: AsyncConnection, pooler: str) -> Activity:
    """Look at the server."""
    server = (await connection.execute(_SERVER)).one()
    rows = (await connection.execute(_SESSIONS)).all()
    sessions = [_session(row) for row in rows]
    return Activity(
        version=str(server.version).split()[0],
        role=server.role,
        database=server.database,
        pooler=pooler,
        connections=sum(s.is_client for s in sessions),
        max_connections=server.max_connections,
        reserved=server.reserved,
        sessions=[s for s in sessions if s.pid != server.own_pid],
    )


def _session(row: Row[Any]) -> Session:
    wait = " ".join(filter(None, (row.wait_event_type, row.wait_event)))
    hidden = row.backend_type is None
    return Session(
        pid=row.pid,
        database=row.database and plain(row.database),
        user=row.role and plain(row.role),
        application=plain(row.application_name or ""),
        client=row.client,
        backend=row.backend_type,
        state=row.state,
        wait=wait or None,
        query="" if hidden else masked(row.query or ""),
        connected_for=_elapsed(row.connected_for),
        transaction_for=_elapsed(row.transaction_for),
        query_for=_elapsed(row.query_for),
        state_for=_elapsed(row.state_for),
        lock=_lock(row),
        blocked_by=_distinct(row.blocked_by or ()),
    )


def _elapsed(seconds: float | None) -> float | None:
    return None if seconds is None else max(0.0, seconds)  # it may have begun after the look


def _distinct(pids: Iterable[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(pids))


def _lock(row: Row[Any]) -> Lock | None:
    if row.locktype is None:
        return None
    name = row.name and plain(row.name)
    return Lock(row.locktype, row.mode, name, _target(row, name), _elapsed(row.waits_for))


def _target(row: Row[Any], name: str | None) -> str:
    where = name or (f"relation {row.relation}" if row.relation else None)
    match row.locktype:
        case "relation":
            return where or "a relation"
        case "transactionid":
            return f"a row of {where}" if where else f"transaction {row.transaction}"
        case "tuple":
            return f"a row of {where or 'a table'}"
        case "virtualxid":
            return f"transaction {row.transaction}"
        case "advisory":
            return f"advisory lock {_advisory(row)}"
        case kind:
            return f"{kind} of {where}" if where else str(kind)


def _advisory(row: Row[Any]) -> str:
    """The key as it was given: one number of 64 bits, or two of 32."""
    if row.objsubid == 1:
        key = (row.classid << 32) | row.objid
        return str(key - (1 << 64) if key >> 63 else key)
    pair = (number - (1 << 32) if number >> 31 else number for number in (row.classid, row.objid))
    return ", ".join(map(str, pair))
