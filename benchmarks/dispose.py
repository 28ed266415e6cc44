"""Disposing of idle connections whose peer has vanished."""

from __future__ import annotations

import asyncio
import contextlib

from sqlalchemy.ext.asyncio import AsyncEngine

from benchmarks.engines import POOLKIT, STOCK, Sizes, poolkit_engine, stock_engine, through
from benchmarks.model import Row, Section
from benchmarks.proxy import proxy
from poolkit.testing import PostgresServer

IDLE = 10
LIMIT = 3.0


async def run(server: PostgresServer, *, quick: bool) -> Section:
    """Each contestant on a proxy that goes silent."""
    patience = 3.0 if quick else 10.0
    found = {}
    for name, make in ((POOLKIT, poolkit_engine), (STOCK, stock_engine)):
        with proxy(server.port) as peer:
            engine = make(through(server.url, peer.port), Sizes(IDLE))
            await _fill(engine)
            peer.freeze()
            found[name] = await _dispose(engine, patience)
    return _section(found, patience)


async def _fill(engine: AsyncEngine) -> None:
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(IDLE):
            await stack.enter_async_context(engine.connect())


async def _dispose(engine: AsyncEngine, patience: float) -> float | None:
    clock = asyncio.get_running_loop().time
    began = clock()
    try:
        async with asyncio.timeout(patience):
            await engine.dispose()
    except TimeoutError:
        return None
    return clock() - began


def _section(found: dict[str, float | None], patience: float) -> Section:
    shown = {
        name: f"still running at {patience:g} s" if seconds is None else f"{seconds:.2f} s"
        for name, seconds in found.items()
    }
    ours = found[POOLKIT]
    return Section(
        title="Dispose with a peer that vanished",
        method=(
            f"`engine.dispose()` with {IDLE} idle connections through a proxy that has stopped"
            f" forwarding without closing anything; given up after {patience:g} s."
        ),
        rows=[
            Row(
                f"dispose of {IDLE} idle connections to a vanished peer",
                shown[POOLKIT],
                f"{STOCK}: {shown[STOCK]}",
                f"bounded, in parallel: at most {LIMIT:g} s",
                ours is not None and ours <= LIMIT,
            )
        ],
        header=["contestant", "time"],
        figures=[[name, text] for name, text in shown.items()],
    )
