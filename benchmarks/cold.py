"""A cold pool far from its server, and callers that give up before a connect is done."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from sqlalchemy.exc import SQLAlchemyError

from benchmarks.engines import (
    POOLKIT,
    STOCK,
    Contestant,
    OnEngine,
    Sizes,
    poolkit_engine,
    stock_engine,
    through,
)
from benchmarks.model import Row, Section
from benchmarks.proxy import proxy
from poolkit import CloseReason, pool_stats
from poolkit.testing import PostgresServer

RTT = 0.020
PATIENCE = 0.250
PER_SECOND = 40
WORKERS = 10
AGAIN = f"{WORKERS} workers, again and again"
STREAM = f"{PER_SECOND} a second"
SIZES = Sizes(5)


@dataclass(slots=True)
class Outcome:
    """What became of the callers.

    Attributes:
        began: When it began, in the event loop's seconds.
        arrivals: When each came, in seconds since then.
        served: Which of them were served, and when.
        connects: Connections that the proxy saw.
        cancelled: Those that were lost because their caller gave up in mid-query, where known.
    """

    began: float
    arrivals: list[float] = field(default_factory=list)
    served: dict[int, float] = field(default_factory=dict)
    connects: int = 0
    cancelled: int | None = None

    def now(self) -> float:
        """Seconds since it began."""
        return asyncio.get_running_loop().time() - self.began

    def late_failures(self) -> int:
        """Callers that came after the first one was served, and still were not."""
        first = min(self.served.values(), default=0.0)
        late = [n for n, arrived in enumerate(self.arrivals) if arrived >= first]
        return len([n for n in late if n not in self.served])

    def show(self) -> str:
        """In one line."""
        text = f"{len(self.served)} of {len(self.arrivals)} in {self.connects} connects"
        if self.cancelled is not None:
            text += f" ({self.cancelled} lost to callers that gave up in mid-query)"
        if self.served:
            text += f", first at {min(self.served.values()):.2f} s"
        return text


Outcomes = dict[str, dict[str, Outcome]]


async def run(server: PostgresServer, *, quick: bool) -> Section:
    """Each contestant on a proxy of its own."""
    outcomes: Outcomes = {AGAIN: {}, STREAM: {}}
    for way, come in ((AGAIN, _come_again), (STREAM, _stream)):
        for name, make in ((POOLKIT, poolkit_engine), (STOCK, stock_engine)):
            with proxy(server.port, rtt=RTT) as latency:
                contestant = OnEngine(make(through(server.url, latency.port), SIZES))
                outcome = outcomes[way][name] = Outcome(asyncio.get_running_loop().time())
                await come(contestant, outcome, 2.0 if quick else 5.0)
                outcome.connects = latency.connects()
                if name == POOLKIT:
                    closed = pool_stats(contestant.engine).closed
                    outcome.cancelled = closed[CloseReason.INVALIDATED]
                await contestant.close()
    return _section(outcomes)


async def _come_again(contestant: Contestant, outcome: Outcome, seconds: float) -> None:
    async def worker() -> None:
        while outcome.now() < seconds:
            await _call(contestant, outcome)

    await asyncio.gather(*(worker() for _ in range(WORKERS)))


async def _stream(contestant: Contestant, outcome: Outcome, seconds: float) -> None:
    async with asyncio.TaskGroup() as tasks:
        for number in range(int(PER_SECOND * seconds)):
            await asyncio.sleep(number / PER_SECOND - outcome.now())
            tasks.create_task(_call(contestant, outcome))


async def _call(contestant: Contestant, outcome: Outcome) -> None:
    number = len(outcome.arrivals)
    outcome.arrivals.append(outcome.now())
    try:
        async with asyncio.timeout(PATIENCE):
            await contestant.request()
    except (TimeoutError, OSError, SQLAlchemyError):
        return
    outcome.served[number] = outcome.now()


def _section(outcomes: Outcomes) -> Section:
    return Section(
        title="A cold pool whose callers give up early",
        method=(
            f"{WORKERS} workers that come again and again, or {PER_SECOND} callers a second, each"
            f" of which gives up after {PATIENCE * 1000:g} ms, on a cold pool of {SIZES.size}+0 at"
            f" {RTT * 1000:g} ms round-trip time. Counted: those served, and the connections that"
            " the proxy saw."
        ),
        rows=[_row(way, of) for way, of in outcomes.items()],
        header=["callers", "contestant", "served", "not served, came after the first success"],
        figures=[
            [way, name, outcome.show(), str(outcome.late_failures())]
            for way, of in outcomes.items()
            for name, outcome in of.items()
        ],
    )


def _row(way: str, of: dict[str, Outcome]) -> Row:
    ours = of[POOLKIT]
    return Row(
        f"cold pool at {RTT * 1000:g} ms, {way}, gone after {PATIENCE * 1000:g} ms: served",
        ours.show(),
        f"{STOCK}: {of[STOCK].show()}",
        f"all that came after the first was served; at most {SIZES.size} connects",
        bool(ours.served) and not ours.late_failures() and ours.connects <= SIZES.size,
    )
