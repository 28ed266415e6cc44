"""Round trips of a request, counted by the proxy: exact, on any machine."""

from __future__ import annotations

import asyncio

from benchmarks.engines import (
    PING,
    POOLKIT,
    RECIPE,
    SELECT,
    Contestant,
    OnEngine,
    Sizes,
    available,
    contest,
    poolkit_engine,
    through,
)
from benchmarks.model import Chart, Row, Section, Spread
from benchmarks.proxy import Proxy, proxy
from poolkit.testing import PostgresServer

IDLE_WINDOW = 1.0
TARGETS = {POOLKIT: 3, PING: 6, RECIPE: 9}
_AUTOCOMMIT = "poolkit, AUTOCOMMIT"
_AFTER_IDLE = "poolkit, after the idle window"


async def run(server: PostgresServer, *, quick: bool) -> Section:
    """Count, after each contestant has warmed up."""
    with proxy(server.port) as counter:
        url = through(server.url, counter.port)
        async with contest(available(), url, Sizes(1)) as contestants:
            counts = {n: await _count(c, counter, quick) for n, c in contestants.items()}
            await asyncio.sleep(1.1 * IDLE_WINDOW)
            counts[_AFTER_IDLE] = await _count_once(contestants[POOLKIT], counter)
        engine = OnEngine(poolkit_engine(url, Sizes(1), isolation_level="AUTOCOMMIT"))
        counts[_AUTOCOMMIT] = await _count(engine, counter, quick)
        await engine.close()
    return _section(counts)


async def _count(contestant: Contestant, counter: Proxy, quick: bool) -> int:  # noqa: FBT001
    for _ in range(8):  # psycopg prepares a statement at its fifth execution
        await contestant.request()
    found = {await _count_once(contestant, counter) for _ in range(5 if quick else 20)}
    if len(found) != 1:
        raise RuntimeError(f"{contestant}: round trips differ from request to request: {found}")
    return found.pop()


async def _count_once(contestant: Contestant, counter: Proxy) -> int:
    before = counter.round_trips()
    await contestant.request(SELECT)
    return counter.round_trips() - before


def _section(counts: dict[str, int]) -> Section:
    ours = (counts[POOLKIT], counts[_AUTOCOMMIT], counts[_AFTER_IDLE])
    others = {name: count for name, count in counts.items() if not name.startswith(POOLKIT)}
    return Section(
        title="Round trips of a request",
        method=(
            "Checkout, `SELECT 1`, commit and check-in on a hot connection, through a proxy that"
            " counts how often the client's flush is answered. The idle window"
            f" (`DATABASE_POOL_PING_IDLE`) is {IDLE_WINDOW:g} s. `asyncpg.Pool` runs without its"
            " own reset query."
        ),
        rows=[
            Row(
                "round trips: hot; AUTOCOMMIT; after the idle window",
                "; ".join(map(str, ours)),
                ", ".join(f"{name} {count}" for name, count in others.items()),
                "3; 1; 4 (pre-ping 6, recipe 9)",
                ours == (3, 1, 4) and all(counts[n] == count for n, count in TARGETS.items()),
            )
        ],
        header=["contestant", "round trips"],
        figures=[[name, str(count)] for name, count in counts.items()],
        charts=[
            Chart(
                "Round trips of checkout, SELECT, commit, check-in",
                "round trips",
                [""],
                {name: [Spread.of([count])] for name, count in counts.items()},
            )
        ],
    )
