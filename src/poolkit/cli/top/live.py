"""The live view: sources that are looked at again and again, drawn on the alternate screen."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from contextlib import suppress

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.styled import Styled
from rich.text import Text

from poolkit.cli.top.pictures import BAD, age, line
from poolkit.cli.top.terminal import Screen, signals
from poolkit.cli.top.view import Frame, Look, Source, failure

REDRAW = 1.0
"""Seconds after which it is drawn anew whatever happens: times go on."""

OVERDUE = 3.0
"""Seconds without an answer, beyond the interval, from which on that is said."""

KEYS = "q quit   a idle sessions, too   p pause"


class Feed:
    """A source with what was last seen of it."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.last: Look | None = None
        self.error: Exception | None = None
        self._seen = math.nan

    async def look(self) -> None:
        """Look once; what is raised is kept, and told."""
        try:
            self.last = await self.source.look()
        except Exception as error:  # noqa: BLE001 (whatever it is, it is shown)
            self.error = error
            return
        self.error, self._seen = None, time.monotonic()

    def silent(self) -> float:
        """Seconds since it was last seen."""
        return time.monotonic() - self._seen


class View:
    """What is on the screen.

    Attributes:
        everything: Whether what is idle is shown.
        paused: Whether it stands still.
    """

    def __init__(self, feeds: Sequence[Feed], interval: float, *, everything: bool) -> None:
        self._feeds = feeds
        self._interval = interval
        self.everything = everything
        self.paused = False

    def draw(self, console: Console) -> RenderableType:
        """The whole screen."""
        width, height = console.size
        ascii_only = console.options.ascii_only
        parts: list[RenderableType] = []
        left = height - 1  # the keys
        for place, feed in enumerate(self._feeds):
            head = self._head(feed)
            left -= len(head) + (place > 0)
            share = left if place == len(self._feeds) - 1 else left // 2
            body = self._body(feed, Frame(width, max(0, share), ascii_only, self.everything))
            lines = len(console.render_lines(body, pad=False))
            left -= lines
            parts += [*([Text("")] if place else []), *head, body]
        gap = [Text("\n" * (left - 1))] if left > 0 else []
        paused = "   paused" if self.paused else ""
        return Group(*parts, *gap, line(Text(KEYS + paused, "dim")))

    def _head(self, feed: Feed) -> list[Text]:
        assert feed.last is not None
        title = line(Text(feed.last.title, "bold"))
        if feed.error is not None:
            silent = Text(f"last seen {age(feed.silent())} ago: ", BAD)
            problems = " ".join(failure(feed.error).problems)
            return [title, line(silent, Text(problems))]
        if not self.paused and feed.silent() > self._interval + OVERDUE:
            return [title, line(Text(f"no answer for {age(feed.silent())}", BAD))]
        return [title]

    def _body(self, feed: Feed, frame: Frame) -> RenderableType:
        assert feed.last is not None
        drawn = feed.last.draw(frame)
        return Styled(drawn, "dim") if feed.error is not None else drawn


async def run(
    console: Console, feeds: Sequence[Feed], *, interval: float, everything: bool
) -> None:
    """Show feeds that have been looked at once, until the user has had enough."""
    view = View(feeds, interval, everything=everything)
    over, changed = asyncio.Event(), asyncio.Event()

    def press(key: str) -> None:
        match key:
            case "q" | "Q" | "\x04":
                over.set()
            case "a":
                view.everything = not view.everything
            case "p" | " ":
                view.paused = not view.paused
        changed.set()

    def end() -> None:
        over.set()
        changed.set()

    live = Live(console=console, screen=True, auto_refresh=False, vertical_overflow="crop")
    screen = Screen(live, press, end)
    handlers = dict.fromkeys(("SIGINT", "SIGTERM", "SIGHUP"), end)
    handlers |= {"SIGWINCH": changed.set, "SIGTSTP": screen.suspend}
    with screen, signals(handlers):
        looking = [
            asyncio.create_task(_keep_looking(feed, view, changed, interval)) for feed in feeds
        ]
        try:
            while not over.is_set():
                live.update(view.draw(console), refresh=True)
                changed.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), REDRAW)
        finally:
            for task in looking:
                task.cancel()
            await asyncio.gather(*looking, return_exceptions=True)


async def _keep_looking(feed: Feed, view: View, changed: asyncio.Event, interval: float) -> None:
    while True:
        await asyncio.sleep(interval)
        if not view.paused:
            await feed.look()
            changed.set()
