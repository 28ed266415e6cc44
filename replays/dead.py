"""Dead for good: as the sleeper, and it never wakes; much later, another server takes over."""

from __future__ import annotations

import asyncio
from functools import partial

from poolkit.testing import FaultProxy, PostgresServer
from replays.engines import make_engine
from replays.model import Recorder, Timeline, arrive, fill, select_one

TITLE = "Dead for good"
STORY = """\
The same idle pool, and the database never answers again: whoever connects is accepted by the
network and hears nothing. After a while a new server takes over the address.

With poolkit each request fails within its bound, and with what went wrong. After two connects in
a row that failed, requests fail at once, while one probe goes on in the background; as soon as a
server answers, requests are served.
"""
IDLE = 5
CONNECTION_TIMEOUT = 3.0
BOUND = 1.0 + 2 * CONNECTION_TIMEOUT
"""Seconds: the ping, the wait for a slot, and a connect."""


async def run(
    server: PostgresServer, contestant: str, *, patience: float = 30.0, dead: float = 15.0
) -> Timeline:
    """Replay it."""
    async with FaultProxy(server) as proxy:
        engine = make_engine(
            contestant,
            proxy.url,
            connection_timeout=CONNECTION_TIMEOUT,
            pool_timeout=CONNECTION_TIMEOUT,
        )
        await fill(engine, IDLE)
        await asyncio.sleep(1.2)
        recorder = Recorder(contestant, patience)
        proxy.silence()
        proxy.freeze()
        recorder.mark("dead")
        asyncio.get_running_loop().call_later(dead, _take_over, proxy, recorder)
        many = round((dead + 3) * 10)
        await arrive(recorder, partial(select_one, engine), many=many, over=dead + 3)
        proxy.reset()
        await engine.dispose()
        return recorder.timeline


def _take_over(proxy: FaultProxy, recorder: Recorder) -> None:
    proxy.accept()
    recorder.mark("a server is there")
