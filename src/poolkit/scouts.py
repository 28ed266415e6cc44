"""Scouts: short questions that find out whether anything answers at an address."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TypeAlias

Endpoint: TypeAlias = tuple[str, int]
"""An IP address and a port."""

SCOUTING = 0.25
"""Seconds that a scout has; the next one is sent when they are over."""

_SSL_REQUEST = (8).to_bytes(4) + (80877103).to_bytes(4)


async def offers_tls(endpoint: Endpoint) -> bool | None:
    """Ask a server whether it offers TLS; None if it hangs up instead of answering.

    It is answered before anything is authenticated or started: the server opens no session.

    Raises:
        OSError: There is no way to the server.
    """
    reader, writer = await asyncio.open_connection(*endpoint)
    try:
        writer.write(_SSL_REQUEST)
        return {b"S": True, b"N": False}.get(await reader.read(1))
    finally:
        writer.close()


@dataclass(eq=False, slots=True)
class _Scout:
    task: asyncio.Task[bool]
    waiting: int = 0


@dataclass(eq=False, slots=True)
class Scouts:
    """At most one scout is under way to an address, however many wait for its answer."""

    _out: dict[tuple[asyncio.AbstractEventLoop, Endpoint], _Scout] = field(default_factory=dict)

    async def wait_for_answer(self, endpoint: Endpoint) -> None:
        """Send one scout after the other until one is answered."""
        while not await self._join(endpoint):
            pass

    async def _join(self, endpoint: Endpoint) -> bool:
        loop = asyncio.get_running_loop()
        key = loop, endpoint
        scout = self._out.get(key)
        if scout is None or scout.task.done():
            scout = self._out[key] = _Scout(loop.create_task(_is_answered(endpoint)))
        scout.waiting += 1
        try:
            return await asyncio.shield(scout.task)
        finally:
            scout.waiting -= 1
            if not scout.waiting:
                scout.task.cancel()
                if self._out.get(key) is scout:
                    del self._out[key]


async def _is_answered(endpoint: Endpoint) -> bool:
    """Whether an answer came in time; a failure takes just as long, so that nobody is hammered."""
    try:
        async with asyncio.timeout(SCOUTING):
            try:
                return await offers_tls(endpoint) is not None
            except OSError:
                pass
            await asyncio.Event().wait()
    except TimeoutError:
        pass
    return False
