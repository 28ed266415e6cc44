"""Each outage, replayed: poolkit does what its page says."""

import asyncio

from replays import bad_address, dead, listener, sleeper, zombies
from replays.engines import POOLKIT
from replays.model import SERVED, STILL_WAITING

from poolkit import FaultKind

PING_TIMEOUT = 1.0
LOADED = 1.0
"""Seconds that a loaded machine may add."""


def first_served(timeline, mark):
    """Seconds from then to the first that is served of those that came later."""
    since = timeline.at(mark)
    return min(r.ended for r in timeline.served if r.began >= since) - since


async def test_the_sleeper(server):
    """All who came while it slept are served within a second of its waking."""
    timeline = await sleeper.run(server, POOLKIT)
    assert timeline.results == {SERVED: sleeper.REQUESTS}
    last = max(request.ended for request in timeline.requests)
    assert last - timeline.at("awake") < 1 + LOADED


async def test_dead_for_good(server):
    """Each request fails within its bound, none hangs, and the first success comes at once."""
    timeline = await dead.run(server, POOLKIT)
    assert set(timeline.results) <= {SERVED, FaultKind.CONNECT_TIMEOUT, FaultKind.POOL_TIMEOUT}
    assert timeline.worst() < dead.BOUND + LOADED
    assert first_served(timeline, "a server is there") < 0.5 + LOADED
    failed = [r for r in timeline.requests if r.result != SERVED]
    at_once = [r for r in failed if r.began > 2 * dead.BOUND]
    assert at_once
    assert all(request.took < LOADED for request in at_once)


async def test_the_bad_address(server):
    """All connects succeed, and the silent address delays one of them."""
    timeline = await bad_address.run(server, POOLKIT)
    assert timeline.results == {SERVED: bad_address.REQUESTS}
    assert timeline.worst() < 1 + LOADED
    delayed = [request for request in timeline.requests if request.took > 0.2]
    assert len(delayed) <= 1 + 1  # one more on a loaded machine


async def test_zombies(server):
    """Nobody waits for longer than the ping's time and half a second."""
    timeline = await zombies.run(server, POOLKIT)
    assert timeline.results == {SERVED: 3}
    assert timeline.worst() < PING_TIMEOUT + 0.5 + LOADED


async def test_the_listener(server):
    """One statement runs into its limit, and the listener goes on."""
    timeline = await listener.run(server, POOLKIT)
    assert set(timeline.results) == {SERVED, FaultKind.STATEMENT_TIMEOUT}
    assert timeline.results[FaultKind.STATEMENT_TIMEOUT] <= 3
    assert timeline.worst() < listener.BOUND + LOADED
    assert first_served(timeline, "well again") < 3 + LOADED


async def test_a_replay_tells_who_hangs(server):
    """The stock recipe does, on frozen connections: the replay would notice."""
    async with asyncio.timeout(60):
        timeline = await zombies.run(server, "SQLAlchemy, common recipe", patience=3)
    assert timeline.results == {STILL_WAITING: 3}
