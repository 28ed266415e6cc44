"""The listener: one task that asks for work again and again, and a database that becomes slow."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

from poolkit.testing import FaultProxy, PostgresServer
from replays.engines import make_engine
from replays.model import Recorder, Timeline, fill, select_one

TITLE = "The listener"
STORY = """\
A worker's listener asks the database for work four times a second. The database becomes slow: first
each answer takes half a second, then the machine is so busy that what is asked on the connections
there are is never answered. Six seconds later it is well again, and takes new connections. In the
outage behind this the listener stood at its statement for ever, and its service did nothing from
then on, long after the database had recovered.

With poolkit a statement has an end (`DATABASE_STATEMENT_TIMEOUT`, 10 s as it comes, 2 s here): the
server's first, and a second later the client's, for a server that is not heard any more. The
connection is dropped, and the next question goes to a new one. The recipe has no such limit; its
listener asks nothing after that one.
"""
SLOW, WELL, ENDS = 2.0, 8.0, 14.0
STATEMENT_TIMEOUT = 2.0
BOUND = STATEMENT_TIMEOUT + 1.0 + 2.0
"""Seconds: the server's limit, the client's beyond it, and the leave-taking."""


async def run(server: PostgresServer, contestant: str, *, patience: float = 30.0) -> Timeline:
    """Replay it."""
    async with FaultProxy(server) as proxy:
        engine = make_engine(contestant, proxy.url, statement_timeout=STATEMENT_TIMEOUT)
        await fill(engine, 2)
        recorder = Recorder(contestant, patience)
        listening = asyncio.ensure_future(_listen(recorder, partial(select_one, engine)))
        await asyncio.sleep(SLOW)
        proxy.latency = 0.5
        recorder.mark("slow")
        await asyncio.sleep((WELL - SLOW) / 3)
        proxy.freeze(replies_only=True)
        recorder.mark("no answer")
        await asyncio.sleep(WELL - recorder.now())
        proxy.latency = 0
        recorder.mark("well again")
        await listening
        proxy.reset()
        await engine.dispose()
        return recorder.timeline


async def _listen(recorder: Recorder, ask: Callable[[], Awaitable[None]]) -> None:
    while recorder.now() < ENDS:
        await recorder.request(ask)
        await asyncio.sleep(0.25)
