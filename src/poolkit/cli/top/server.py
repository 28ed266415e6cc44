"""A server as a source: one connection of our own, read-only, with a short limit."""

from __future__ import annotations

import asyncio

from sqlalchemy.ext.asyncio import AsyncConnection

from poolkit.cli.top import activity
from poolkit.cli.top.activity_view import Sessions
from poolkit.driver import is_ours
from poolkit.engine import create_async_engine
from poolkit.events import ConnectionOpened, Event
from poolkit.settings import DatabaseSettings

APPLICATION = "poolkit top"
STATEMENT_LIMIT = 2.0
"""Seconds that a look's statement may take at the server."""

PATIENCE = 5.0
"""Seconds of a look after the connect, should the server fall silent."""

_OURS = {
    "pool_size": 1,
    "max_overflow": 0,
    "pool_min_idle": 0,
    "pool_keepalive": 0.0,
    "pool_name": None,
    "telemetry": "off",
    "logfire_enabled": False,
    "echo": False,
}
"""In place of the service's own: one connection, and nothing told of it."""


class Server:
    """A server to look at.

    Raises:
        ConfigurationError: A setting cannot be honoured.
    """

    def __init__(self, settings: DatabaseSettings) -> None:
        self._patience = settings.connection_timeout + PATIENCE
        self._address = ""
        self._engine = create_async_engine(
            settings=settings.model_copy(update=_OURS),
            observers=[self._note],
            server_settings={
                "application_name": APPLICATION,
                "statement_timeout": f"{STATEMENT_LIMIT:g}s",
            },
            execution_options={"postgresql_readonly": True},
        )

    def _note(self, event: Event) -> None:
        if isinstance(event, ConnectionOpened):
            self._address = event.address

    async def look(self) -> Sessions:
        """Look at the server."""
        async with asyncio.timeout(self._patience), self._engine.connect() as connection:
            pooler = await _pooler(connection)
            return Sessions(self._address, await activity.read(connection, pooler))

    async def close(self) -> None:
        """Close the connection."""
        await self._engine.dispose()


async def _pooler(connection: AsyncConnection) -> str:
    driver = (await connection.get_raw_connection()).driver_connection
    return driver.pooler if is_ours(driver) else "none"
