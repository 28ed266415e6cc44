"""What the demo sees of a pool, and the pictures of it."""

from __future__ import annotations

import asyncio

from rich.console import Console, RenderableType

from poolkit import create_async_engine, pool_stats
from poolkit.cli.watch import Sample, Seen, came, picture, timeline, watching
from poolkit.events import CheckedOut, CloseReason, ConnectionClosed, ConnectionOpened
from poolkit.testing import PostgresServer


def drawn(what: RenderableType) -> list[str]:
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(what)
    return [line.rstrip() for line in capture.get().splitlines()]


def test_events_are_told_in_words() -> None:
    """By kind, with the longest wait; what did not happen is left out."""
    seen = Seen(pings=3, pings_failed=1)
    for event in (
        ConnectionOpened("h:5432", 0.01, 1, "none"),
        CheckedOut(0.0, 0.0),
        CheckedOut(0.25, 0.0),
        ConnectionClosed(CloseReason.PING_FAILED, 1.0),
    ):
        seen.note(event)

    assert seen.told == (
        "2 checkouts, 1 after a wait of up to 250 ms; 1 opened; closed: 1 ping failed;"
        " 3 pings, 1 failed"
    )
    assert Seen().told == "nothing"


def test_who_overtakes_is_seen() -> None:
    """A caller that came earlier and is served later was overtaken; in order, nobody was."""
    seen = Seen()
    for place in (1, 3):
        came.set(place)
        seen.note(CheckedOut(0.3, 0.0))
    assert seen.overtaken == 0
    came.set(2)
    seen.note(CheckedOut(0.3, 0.0))
    assert seen.overtaken == 1


async def test_a_newcomer_that_goes_first_is_seen(server: PostgresServer) -> None:
    """The order in which callers come reaches the pool's events."""
    engine = create_async_engine(server.url, pool_size=1, max_overflow=0, pool_overload_after=0.01)
    order: list[int] = []

    async def call(place: int) -> None:
        came.set(place)
        async with engine.connect():
            order.append(place)

    async with watching(engine, lambda _: None) as seen:
        async with engine.connect():
            callers = [asyncio.create_task(call(place)) for place in (1, 2)]
            await asyncio.sleep(0.1)  # real: until the newest are served first
        await asyncio.gather(*callers)
    await engine.dispose()

    assert order == [2, 1]
    assert seen.overtaken == 1


def test_timeline() -> None:
    """The highest value in each step; waiting has a scale of its own; ASCII if it must be."""
    samples = [Sample(0, 4, 0, 0), Sample(2, 2, 0, 0), Sample(4, 0, 1, 10)]

    assert drawn(timeline(Seen(limit=4, samples=samples), ascii_only=True)) == [
        "used     .+#  at most 4",
        "idle     #+.  at most 4",
        "opening  ..-  at most 1",
        "waiting  ..#  at most 10",
    ]
    long = Seen(limit=4, samples=samples * 1000)
    assert max(map(len, drawn(timeline(long)))) <= 78


def test_picture_fits() -> None:
    """However many wait and whatever happened."""
    seen = Seen(limit=4, samples=[Sample(4, 0, 0, 1000)])
    for _ in range(1000):
        seen.note(CheckedOut(0.25, 0.1))

    assert max(map(len, drawn(picture(seen)))) <= 78
    assert drawn(picture(Seen()))[0].split() == ["used", "0"]


async def test_watching(server: PostgresServer) -> None:
    """Gauges and events for the length of the block; afterwards nobody watches."""
    shown: list[Seen] = []
    engine = create_async_engine(server.url, pool_size=1, max_overflow=0)
    others = list(engine.pool.observers)
    async with watching(engine, shown.append) as seen, engine.connect():
        before = pool_stats(engine)
    async with engine.connect():
        pass
    await engine.dispose()

    assert shown
    assert before.used == 1
    assert seen.events[CheckedOut] == 1
    assert seen.limit == 1
    assert list(engine.pool.observers) == others
