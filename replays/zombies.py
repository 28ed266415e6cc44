"""Zombies: three idle connections whose peer vanished, and three requests."""

from __future__ import annotations

import asyncio
from functools import partial

from poolkit.testing import FaultProxy, PostgresServer
from replays.engines import make_engine
from replays.model import Recorder, Timeline, fill, select_one

TITLE = "Zombies"
STORY = """\
A firewall, a NAT gateway or a laptop's sleep has forgotten three idle connections. Both ends think
that they are open, and nothing that is sent arrives. The database itself is well. Three requests
come at once.

With poolkit each finds out within the ping's second (`DATABASE_POOL_PING_TIMEOUT`), drops the
connection without waiting for the peer, and connects anew.
"""


async def run(server: PostgresServer, contestant: str, *, patience: float = 30.0) -> Timeline:
    """Replay it."""
    async with FaultProxy(server) as proxy:
        engine = make_engine(contestant, proxy.url)
        await fill(engine, 3)
        await asyncio.sleep(1.2)
        recorder = Recorder(contestant, patience)
        proxy.freeze()
        recorder.mark("frozen")
        await asyncio.gather(*(recorder.request(partial(select_one, engine)) for _ in range(3)))
        proxy.reset()
        await engine.dispose()
        return recorder.timeline
