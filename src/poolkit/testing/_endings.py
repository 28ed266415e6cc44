"""What a test's engine and transaction leave behind, ended on the event loop that they used."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from sqlalchemy import event

from poolkit import DatabaseSettings, create_async_engine
from poolkit.lifecycle import pools_of
from poolkit.loops import before_end

GRACE = 1.0
"""Seconds that connections in use have to come back when their test or its loop ends."""

_ANSWER = 10.0
"""Seconds that a loop in another thread has to do it."""


class Ending:
    """A coroutine function that is called once: by `finish()`, or by its loop before that ends.

    Made on the running event loop.
    """

    def __init__(self, close: Callable[[], Awaitable[None]]) -> None:
        self.loop = asyncio.get_running_loop()
        self._close = close
        self._done = False
        self._generator = before_end(self._end)

    def finish(self) -> None:
        """Have it done now, from outside of the loop; nothing if it was done or the loop closed."""
        if self._done or self.loop.is_closed():
            return
        if self.loop.is_running():
            ending = asyncio.run_coroutine_threadsafe(self._generator.aclose(), self.loop)
            ending.result(_ANSWER)
        else:
            self.loop.run_until_complete(self._generator.aclose())

    async def _end(self) -> None:
        self._done = True
        await self._close()


class TestEngine:
    """An engine for one test, whose connections are closed with the test or its event loop.

    Whichever comes first: plugins close a function's loop before or after its fixtures.
    """

    __test__ = False

    def __init__(self, settings: DatabaseSettings) -> None:
        self.engine = create_async_engine(settings=settings)
        self._endings: list[Ending] = []
        event.listen(self.engine.sync_engine, "connect", self._connected)

    def close(self) -> None:
        """Leave no session at the server."""
        for ending in self._endings:
            ending.finish()
        for pool in pools_of(self.engine):
            if pool.loop is not None and pool.loop.is_closed():
                pool.abandon()  # it was closed without having been told of its generators

    def _connected(self, *_: Any) -> None:
        loop = asyncio.get_running_loop()
        if not any(ending.loop is loop for ending in self._endings):
            self._endings.append(Ending(self._leave))

    async def _leave(self) -> None:
        loop = asyncio.get_running_loop()
        pools = [pool for pool in pools_of(self.engine) if pool.loop is loop]
        await asyncio.gather(*(pool.drain(GRACE) for pool in pools))
        self._endings = [ending for ending in self._endings if ending.loop is not loop]
        await self.engine.dispose()  # the next loop may use it
