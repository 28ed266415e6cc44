"""A service's metrics as a source."""

from __future__ import annotations

import asyncio

from poolkit.cli.top.exposition import Endpoint, ExpositionError, Reading
from poolkit.cli.top.pools import pools
from poolkit.cli.top.pools_view import Pools


class Metrics:
    """An endpoint to look at.

    Args:
        endpoint: Where the service shows them.
        interval: Seconds between the first look's two readings, for what happens in between.
    """

    def __init__(self, endpoint: Endpoint, interval: float) -> None:
        self._endpoint = endpoint
        self._interval = interval
        self._before: Reading | None = None

    async def look(self) -> Pools:
        """Look at the endpoint."""
        if self._before is None:
            self._before = await self._read()
            await asyncio.sleep(self._interval)
        before, now = self._before, await self._read()
        self._before = now
        return Pools(self._endpoint.address, now.at - before.at, pools(now, before))

    async def close(self) -> None:
        """Nothing to let go of."""

    async def _read(self) -> Reading:
        reading = await asyncio.to_thread(self._endpoint.read)
        if not pools(reading):
            raise ExpositionError(
                f"{self._endpoint.address} has no metrics of poolkit: set"
                " DATABASE_TELEMETRY=metrics in the service, and have it make an engine"
            )
        return reading
