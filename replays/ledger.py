"""What was reported of each row, and what the database holds: the two have to agree."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self
from uuid import uuid4

import asyncpg

from poolkit import Outcome, classify
from poolkit.testing import PostgresServer

COMMITTED = "committed"
AGREED = "none"
_TIMEOUT = 10.0


class Ledger:
    """What the program was told of each row that it wrote."""

    def __init__(self) -> None:
        self._last = 0
        self._told: dict[int, str] = {}

    def new_row(self) -> int:
        """A number that no row had yet. Until something is reported of it, anything may be."""
        self._last += 1
        self._told[self._last] = Outcome.UNKNOWN
        return self._last

    def committed(self, row: int) -> None:
        """COMMIT returned."""
        self._told[row] = COMMITTED

    def failed(self, row: int, error: BaseException) -> None:
        """An error or a cancellation came out; what is known to be committed stays so."""
        if self._told[row] != COMMITTED:
            self._told[row] = classify(error).outcome

    def forget(self) -> None:
        """Begin a new page; numbers go on."""
        self._told.clear()

    def told_of(self, row: int) -> str:
        """``committed``, or the outcome."""
        return self._told[row]

    @property
    def told(self) -> Counter[str]:
        """How many were reported how."""
        return Counter(self._told.values())

    def disagreements(self, rows: Mapping[int, int]) -> str:
        """Where the table contradicts what was reported, in words; unknown rows may be either."""
        lost = [r for r, told in self._told.items() if told == COMMITTED and not rows.get(r)]
        not_told = (COMMITTED, Outcome.UNKNOWN)
        undead = [r for r, told in self._told.items() if told not in not_told and rows.get(r)]
        twice = [row for row, times in rows.items() if times > 1]
        found = {
            "reported committed and not there": lost,
            "reported as not committed and there": undead,
            "there twice": twice,
            "there and never written": [row for row in rows if row not in self._told],
        }
        return "; ".join(f"{len(bad)} {what}" for what, bad in found.items() if bad) or AGREED


@dataclass(frozen=True, slots=True)
class Ground:
    """A database of a replay's own, and a look at it that goes past the pool.

    Attributes:
        server: Its server.
        name: The database's.
        url: The same, as a URL.
    """

    server: PostgresServer
    name: str
    url: str

    @classmethod
    async def make(cls, server: PostgresServer) -> Self:
        """An empty database with a table ``written (id)`` that takes an id twice."""
        name = f"replay_{uuid4().hex[:12]}"
        url = await asyncio.to_thread(server.create_database, name)
        ground = cls(server, name, url)
        await ground.execute("CREATE TABLE written (id bigint NOT NULL)")
        return ground

    async def rows(self) -> Counter[int]:
        """How often each row is there."""
        found = await self.fetch("SELECT id, count(*) FROM written GROUP BY id")
        return Counter(dict(found))

    async def sessions(self) -> int:
        """Sessions that the server has on this database, this look's own not among them."""
        query = (
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = $1 AND backend_type = 'client backend'"
        )
        return (await self._run("fetchval", query, self.name, url=self.server.url)) or 0

    async def no_more_sessions_than(self, many: int, *, within: float) -> float | None:
        """Seconds until there were no more of them; None if that took longer."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        while await self.sessions() > many:
            if loop.time() - began > within:
                return None
            await asyncio.sleep(0.02)
        return loop.time() - began

    async def execute(self, statement: str, *arguments: Any) -> None:
        """Past the pool."""
        await self._run("execute", statement, *arguments)

    async def fetch(self, query: str, *arguments: Any) -> list[Any]:
        """The same."""
        return [tuple(row) for row in await self._run("fetch", query, *arguments)]

    async def _run(self, method: str, *arguments: Any, url: str | None = None) -> Any:
        connection = await asyncpg.connect(url or self.url, timeout=_TIMEOUT)
        try:
            return await getattr(connection, method)(*arguments, timeout=_TIMEOUT)
        finally:
            await connection.close(timeout=_TIMEOUT)
