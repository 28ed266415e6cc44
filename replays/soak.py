"""The soak: every fault at random, for as long as one likes, and what must hold throughout.

``python -m replays.soak --minutes 30`` (``make soak``) prints one line a minute, stops by itself or
by Ctrl-C, and ends with 1 if anything broke.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import secrets
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.ext.asyncio import AsyncEngine

from poolkit import observe, pool_stats
from poolkit.testing import FaultProxy, PostgresServer, postgres
from replays.crowd import (
    CANCELLED,
    CONNECTION_TIMEOUT,
    OPERATION,
    PING_TIMEOUT,
    POOL_TIMEOUT,
    STATEMENT_TIMEOUT,
    Crowd,
    Watch,
)
from replays.engines import POOLKIT, make_engine
from replays.ledger import AGREED, Ground, Ledger
from replays.model import SERVED, Timeline, select_one
from replays.weather import Weather

TITLE = "The soak"
STORY = """\
Half an hour of everything at random: a slow link, freezes, resets, a server that refuses, is
silent, sleeps, is restarted in good order or by a crash, is read-only; COMMIT or its reply is lost;
backends are killed; somebody sits on the whole pool; bursts, cancellations, and the engine disposed
of in between.

Requests fail in such weather. What must hold all the same, at every look: no more connections than
the limit, nobody waits longer than the settings add up to, every error is one that poolkit knows.
And once a minute, when the weather is healed: no slot is in use, the rows agree with what was
reported, the server has no session too many, the next request is served, and memory and the number
of tasks are what they were.
"""

WORKERS = 24
SIZE, OVERFLOW = 6, 3
LIMIT = SIZE + OVERFLOW
MOST_TASKS = 1000
"""While a burst is on; each request has a few."""

GROWTH_MB, GROWTH_OBJECTS = 24, 0.05
WARM_UP = 0.1
"""Of the run's time, before memory is measured."""

BROKEN = "what broke"
MEMORY = "memory after the warm-up and at the end"
WEATHER = "faults"


@dataclass(frozen=True, slots=True)
class Memory:
    """How much is in use."""

    megabytes: float
    objects: int

    def __str__(self) -> str:
        return f"{self.megabytes:.0f} MB, {self.objects:,} objects"


def _memory() -> Memory:
    gc.collect()
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        megabytes = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:  # no Linux
        megabytes = 0.0
    return Memory(megabytes, len(gc.get_objects()))


class Soak:
    """One run.

    Args:
        server: A server that nobody else uses meanwhile.
        seconds: How long.
        every: Seconds between two checks.
        seed: Of all that is random here.
        say: Told of the progress, a line at a time.
    """

    def __init__(
        self,
        server: PostgresServer,
        *,
        seconds: float,
        every: float,
        seed: int,
        say: Callable[[str], None],
    ) -> None:
        self._server = server
        self._seconds = seconds
        self._every = every
        self._seed = seed
        self._say = say
        self._stop = asyncio.Event()
        self.watch = Watch(say, Timeline(POOLKIT))
        self._ledger = Ledger()
        self._memory: list[Memory] = []
        self._warm: Memory | None = None

    def stop(self) -> None:
        """End early, in good order."""
        self._stop.set()

    async def run(self) -> Timeline:
        """Do it."""
        self._ground = await Ground.make(self._server)
        with FaultProxy(self._ground.url) as self._proxy:
            self._engine = _engine(self._proxy.url)
            observe(self._engine, self.watch.observe)
            self._crowd = Crowd(self._engine, self._ledger, self.watch, self._seed)
            disposed = self._note_disposed
            self._weather = Weather(
                self._proxy, self._ground, self._engine, self._crowd.burst, disposed, self._seed
            )
            background = [asyncio.ensure_future(self._crowd.work()) for _ in range(WORKERS)]
            background.append(asyncio.ensure_future(self._look()))
            try:
                await self._go_on(background)
            finally:
                for task in background:
                    task.cancel()
                await asyncio.wait(background)
                await self._engine.dispose()
            left = await self._ground.no_more_sessions_than(0, within=5.0)
            self.watch.require(left is not None, "sessions are left after dispose")
        self._conclude()
        return self.watch.timeline

    async def _go_on(self, background: list[asyncio.Task[None]]) -> None:
        is_over = False
        while not is_over:
            seconds = min(self._every, self._seconds - self.watch.now())
            weather = asyncio.ensure_future(self._weather.last(seconds))
            stopped = asyncio.ensure_future(self._stop.wait())
            await asyncio.wait({weather, stopped}, return_when=asyncio.FIRST_COMPLETED)
            for task in (weather, stopped):
                task.cancel()
            await asyncio.wait({weather, stopped})
            if not weather.cancelled():
                weather.result()
            for task in background:
                if task.done():
                    task.result()
            is_over = self._stop.is_set() or self.watch.now() >= self._seconds
            await self._check()

    async def _look(self) -> None:
        """At every moment, nearly."""
        while True:
            self.watch.weather = self._weather.now
            stats = pool_stats(self._engine)
            there = stats.used + stats.idle + stats.opening
            self.watch.require(there <= LIMIT, f"the pool counts {there} connections: {stats}")
            # Each may have a request to cancel besides; there may be a scout, and our own look.
            allowed = 2 * LIMIT + self.watch.on_their_way_out() + 2
            found = self._proxy.stats.open
            told = f"{found} connections, {allowed} are explained: {stats}"
            self.watch.require(found <= allowed, told)
            tasks = len(asyncio.all_tasks())
            self.watch.require(tasks <= MOST_TASKS, f"{tasks} tasks")
            began = self.watch.now()
            await asyncio.sleep(0.02)
            lag = self.watch.now() - began - 0.02
            self.watch.lag = max(lag, self.watch.lag * 0.999)

    def _note_disposed(self) -> None:
        self.watch.disposed(pool_stats(self._engine).used)

    async def _check(self) -> None:
        """In calm weather, with nobody at work."""
        require = self.watch.require
        await self._crowd.pause()
        await self._settled(lambda: pool_stats(self._engine).used == 0, within=2 * OPERATION)
        stats = pool_stats(self._engine)
        require(stats.used == stats.waiting == 0, f"slots are missing: {stats}")
        within = OPERATION + CONNECTION_TIMEOUT
        ended = await self._ground.no_more_sessions_than(LIMIT, within=within)
        require(ended is not None, "the server has sessions above the limit")
        await self._settled(lambda: len(asyncio.all_tasks()) <= WORKERS + 5, within=within)
        tasks = len(asyncio.all_tasks())
        require(tasks <= WORKERS + 5, f"{tasks} tasks, and nobody is at work")
        found = self._ledger.disagreements(await self._ground.rows())
        require(found == AGREED, f"rows: {found}")
        await self._serves_again()
        told = self._ledger.told
        self._ledger.forget()
        await self._ground.execute("TRUNCATE written")
        self._proxy.forget()
        self._measure()
        self._tell(told)
        self._crowd.resume()

    async def _serves_again(self) -> None:
        began = self.watch.now()
        try:
            await select_one(self._engine)
        except Exception as error:  # noqa: BLE001 (it is what is looked for)
            self.watch.require(False, f"in calm weather: {error!r}")
        self.watch.within(began, PING_TIMEOUT + 0.5, "a request in calm weather")

    async def _settled(self, condition: Callable[[], bool], within: float) -> None:
        ends = self.watch.now() + within
        while not condition() and self.watch.now() < ends:  # noqa: ASYNC110 (of many sources)
            await asyncio.sleep(0.02)

    def _measure(self) -> None:
        memory = _memory()
        if self._warm is None and self.watch.now() >= WARM_UP * self._seconds:
            self._warm = memory
        self._last = memory

    def _tell(self, told: Counter[str]) -> None:
        minutes, seconds = divmod(int(self.watch.now()), 60)
        ended = self.watch.ended
        failed = sum(ended.values()) - ended[SERVED] - ended[CANCELLED]
        rows = ", ".join(f"{many:,} {what}" for what, many in told.most_common())
        self._say(
            f"{minutes:3d}:{seconds:02d}  {ended[SERVED]:,} served, {failed:,} failed,"
            f" {ended[CANCELLED]:,} cancelled; {sum(self._weather.seen.values())} faults;"
            f" rows since the last look: {rows}; {self._last}; {len(self.watch.broken)} broken"
        )

    def _conclude(self) -> None:
        warm, last = self._warm or self._last, self._last
        grown = last.megabytes - warm.megabytes
        self.watch.require(grown <= GROWTH_MB, f"memory: {warm}, then {last}")
        most = warm.objects * (1 + GROWTH_OBJECTS) + len(self.watch.timeline.requests)
        self.watch.require(last.objects <= most, f"objects: {warm}, then {last}")
        seen = ", ".join(f"{many} {what}" for what, many in self._weather.seen.most_common())
        self.watch.timeline.findings |= {
            MEMORY: f"{warm}; {last}",
            WEATHER: seen,
            BROKEN: "; ".join(self.watch.broken) or "nothing",
        }


def _engine(url: str) -> AsyncEngine:
    return make_engine(
        POOLKIT,
        url,
        pool_size=SIZE,
        max_overflow=OVERFLOW,
        pool_timeout=POOL_TIMEOUT,
        connection_timeout=CONNECTION_TIMEOUT,
        statement_timeout=STATEMENT_TIMEOUT,
        pool_ping_timeout=PING_TIMEOUT,
        pool_idle_timeout=5.0,
        pool_recycle=20.0,
        pool_keepalive=3.0,
        pool_max_waiting=40,
    )


async def run(
    server: PostgresServer,
    contestant: str = POOLKIT,
    *,
    seconds: float = 1800.0,
    every: float = 60.0,
    seed: int = 1,
    say: Callable[[str], None] = print,
) -> Timeline:
    """Replay it, on a server that nobody else uses meanwhile; the requests are samples.

    Raises:
        ValueError: Another contestant; what is looked at is poolkit's.
    """
    if contestant != POOLKIT:
        raise ValueError(f"the soak looks at poolkit's pool, {contestant} has none")
    return await Soak(server, seconds=seconds, every=every, seed=seed, say=say).run()


def main() -> int:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(prog="python -m replays.soak", description=TITLE)
    parser.add_argument("--minutes", type=float, default=30.0, help="how long (30)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10_000))
    arguments = parser.parse_args()
    for name in list(os.environ):
        if name.startswith(("DATABASE_", "PG")):
            del os.environ[name]
    logging.disable(logging.CRITICAL)  # connections are lost on purpose, by the hundred
    _say(f"{arguments.minutes:g} minutes, --seed {arguments.seed}; Ctrl-C ends it in good order")
    timeline = asyncio.run(_main(arguments.minutes * 60, arguments.seed))
    for what, found in timeline.findings.items():
        _say(f"{what}: {found}")
    return int(timeline.findings[BROKEN] != "nothing")


async def _main(seconds: float, seed: int) -> Timeline:
    loop = asyncio.get_running_loop()
    async with postgres() as server:
        soak = Soak(server, seconds=seconds, every=60.0, seed=seed, say=_say)

        def interrupted() -> None:
            loop.remove_signal_handler(signal.SIGINT)  # a second one ends it at once
            soak.stop()

        loop.add_signal_handler(signal.SIGINT, interrupted)
        _say(f"began, on PostgreSQL {server.version_string}")
        return await soak.run()


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
