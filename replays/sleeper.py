"""The sleeper: an idle pool before a serverless database that needs 8 seconds to wake."""

from __future__ import annotations

import asyncio
from functools import partial

from poolkit.testing import FaultProxy, PostgresServer
from replays.engines import make_engine
from replays.model import Recorder, Timeline, arrive, fill, select_one

TITLE = "The sleeper"
STORY = """\
A serverless database was suspended after five idle minutes. The pool's connections are still open
on our side; nothing answers on them any more. Waking takes 8 seconds, during which 100 requests
arrive. In the outage behind this, five requests hung for minutes and took the whole pool with them.

poolkit pings what was idle for longer than a second, gives the ping one second, and drops what does
not answer without waiting for the peer. The connects that replace it wait for the database
(`DATABASE_CONNECTION_TIMEOUT`, 10 s), and everybody waits in line for them. The recipe's ping waits
until the operating system gives the socket up.
"""
IDLE, REQUESTS, ASLEEP = 5, 100, 8.0


async def run(server: PostgresServer, contestant: str, *, patience: float = 60.0) -> Timeline:
    """Replay it."""
    async with FaultProxy(server) as proxy:
        engine = make_engine(contestant, proxy.url)
        await fill(engine, IDLE)
        await asyncio.sleep(1.2)  # idle: for longer than the ping's window
        recorder = Recorder(contestant, patience)
        proxy.sleep(ASLEEP)
        recorder.mark("asleep")
        asyncio.get_running_loop().call_later(ASLEEP, recorder.mark, "awake")
        await arrive(recorder, partial(select_one, engine), many=REQUESTS, over=ASLEEP)
        proxy.reset()
        await engine.dispose()
        return recorder.timeline
