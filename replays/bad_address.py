"""The bad address: one of three addresses swallows what is sent to it."""

from __future__ import annotations

from functools import partial

from sqlalchemy.engine import make_url

from poolkit.testing import FaultProxy, PostgresServer
from replays.engines import POOLKIT, make_engine
from replays.model import Recorder, Timeline, select_one

TITLE = "The bad address"
STORY = """\
A database behind three addresses, the first of which accepts connections and never answers. Each
request opens a connection of its own, as after a deployment. In the outage behind this, whoever was
given the bad address hung for twenty minutes, while the others were served in 3 ms.

poolkit goes on to the next address soon after the first has not answered, and remembers who was
silent: the bad address delays nobody twice. The recipe waits for it every time, for as long as the
driver's own timeout (`timeout=`, 60 s as it comes; 5 s here, so that the picture ends).
"""
REQUESTS = 10


async def run(server: PostgresServer, contestant: str, *, patience: float = 30.0) -> Timeline:
    """Replay it."""
    async with (
        FaultProxy(server) as bad,
        FaultProxy(server, host="127.0.0.2") as good,
        FaultProxy(server, host="127.0.0.3") as other,
    ):
        bad.silence()
        url = _url(contestant, server, bad, good, other)
        engine = make_engine(contestant, url, connection_timeout=5.0)
        recorder = Recorder(contestant, patience)
        recorder.mark("one address is silent")
        for _ in range(REQUESTS):
            await recorder.request(partial(select_one, engine))
            await engine.dispose()
        return recorder.timeline


def _url(contestant: str, server: PostgresServer, *proxies: FaultProxy) -> str:
    url = make_url(server.url)
    who = f"{url.username}:{url.password}@"
    addresses = [f"{proxy.host}:{proxy.port}" for proxy in proxies]
    if contestant == POOLKIT:
        return f"postgresql://{who}{','.join(addresses)}/{url.database}"
    return f"postgresql://{who}/{url.database}?" + "&".join(f"host={a}" for a in addresses)
