"""What every metric and span of an engine says of it, in the semantic conventions' names."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Engine

from poolkit.logs import place, pool_name

__all__ = ["POOL_NAME", "database_attributes", "pool_name"]

POOL_NAME = "db.client.connection.pool.name"


def database_attributes(engine: Engine) -> dict[str, Any]:
    """The database that an engine is for; of several hosts, the first."""
    host, port, database = place(engine)
    return {
        "db.system.name": "postgresql",
        "db.namespace": database,
        "server.address": host,
        "server.port": port,
    }
