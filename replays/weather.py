"""Faults at random, one after the other: what happens to the database of the soak."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Awaitable, Callable

from sqlalchemy import exc
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from poolkit.testing import FaultProxy
from replays.ledger import Ground

LONGEST = 60.0
"""Seconds that one fault may take, a slow restart of the server counted in."""


class Weather:
    """Makes faults, one at a time, with pauses in between.

    Attributes:
        seen: How often each came.
        now: The one that is under way.
    """

    def __init__(
        self,
        proxy: FaultProxy,
        ground: Ground,
        engine: AsyncEngine,
        burst: Callable[[int], Awaitable[None]],
        disposed: Callable[[], None],
        seed: int,
    ) -> None:
        self.seen = Counter[str]()
        self.now = "calm"
        self._proxy = proxy
        self._ground = ground
        self._engine = engine
        self._burst_of = burst
        self._disposed = disposed
        self._chance = random.Random(seed)
        self._kinds: tuple[Callable[[], Awaitable[None]], ...] = (
            self._slow_link, self._freeze, self._reset, self._refuse, self._silence, self._sleep,
            self._lose_commit, self._freeze_commit, self._kill, self._restart, self._read_only,
            self._exhaust, self._burst, self._dispose,
        )  # fmt: skip

    async def last(self, seconds: float) -> None:
        """Have faults for so long, each kind once before one comes again; then heal."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + seconds
        coming: list[Callable[[], Awaitable[None]]] = []
        while loop.time() < ends:
            coming = coming or self._chance.sample(self._kinds, len(self._kinds))
            await self._come(coming.pop())
            await asyncio.sleep(self._chance.uniform(0, 1))

    async def _come(self, kind: Callable[[], Awaitable[None]]) -> None:
        self.now = kind.__name__.removeprefix("_").replace("_", " ")
        self.seen[self.now] += 1
        try:
            async with asyncio.timeout(LONGEST):
                await kind()
        finally:
            self.now = "calm"
            self._proxy.latency = 0
            self._proxy.heal()

    def _tosses(self) -> bool:
        return self._chance.getrandbits(1) == 1

    def _around_commit(self) -> tuple[str | None, str | None]:
        return ("COMMIT", None) if self._tosses() else (None, "COMMIT")

    async def _last(self, longest: float) -> None:
        await asyncio.sleep(self._chance.uniform(0.1, longest))

    async def _slow_link(self) -> None:
        self._proxy.latency = self._chance.uniform(0.01, 0.1)
        await self._last(2)

    async def _freeze(self) -> None:
        frozen = self._proxy.connections
        self._proxy.freeze(replies_only=self._tosses())
        await self._last(3)
        if self._tosses():
            for connection in frozen:
                connection.reset()

    async def _reset(self) -> None:
        for connection in self._proxy.connections:
            if self._tosses():
                connection.reset()
            elif self._tosses():
                connection.close()

    async def _refuse(self) -> None:
        self._proxy.refuse()
        if self._tosses():
            self._proxy.reset()
        await self._last(4)

    async def _silence(self) -> None:
        self._proxy.silence()
        if self._tosses():
            self._proxy.close()
        await self._last(4)

    async def _sleep(self) -> None:
        dead = self._proxy.connections
        self._proxy.sleep()
        await self._last(4)
        self._proxy.wake()
        await self._last(1)
        for connection in dead:  # or the server would keep their sessions
            connection.reset()

    async def _lose_commit(self) -> None:
        before, after = self._around_commit()
        for _ in range(3):
            trap = self._proxy.cut(before=before, after=after, reset=self._tosses())
            with contextlib.suppress(TimeoutError):
                await trap.reached(timeout=1)
            trap.disarm()

    async def _freeze_commit(self) -> None:
        there = self._proxy.connections
        before, after = self._around_commit()
        trap = self._proxy.freeze_at(before=before, after=after)
        with contextlib.suppress(TimeoutError):
            await trap.reached(timeout=1)
            await self._last(3)
        for connection in there:
            connection.reset()

    async def _kill(self) -> None:
        await self._ground.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid() AND random() < 0.7"
        )

    async def _restart(self) -> None:
        mode = self._chance.choice(("fast", "immediate"))
        await _in_thread(self._ground.server.restart, mode)

    async def _read_only(self) -> None:
        try:
            await _in_thread(self._ground.server.set_read_only)
            await self._last(2)
        finally:
            await _in_thread(self._ground.server.set_read_only, False)

    async def _exhaust(self) -> None:
        """Somebody takes all that there is, and sits on it."""
        taken: list[AsyncConnection] = []
        pool = self._engine.pool
        try:
            for _ in range(pool.size() * 2):  # type: ignore[attr-defined]
                taken.append(await self._engine.connect())  # noqa: PERF401 (what is taken is closed)
        except exc.SQLAlchemyError:
            pass  # there is no more
        try:
            await self._last(1)
        finally:
            for connection in taken:
                await connection.close()

    async def _burst(self) -> None:
        await self._burst_of(80)

    async def _dispose(self) -> None:
        self._disposed()
        await self._engine.dispose()


async def _in_thread(work: Callable[..., None], *arguments: object) -> None:
    """To its end, although the caller may be cancelled: a server is not left half restarted."""
    task = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    try:
        await asyncio.shield(task)
    finally:
        await asyncio.wait({task})
