"""Restart under load: twenty writers, and the server is restarted under them ten times."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Literal

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from poolkit.testing import PostgresServer
from replays.engines import make_engine
from replays.ledger import Ground, Ledger
from replays.model import SERVED, Recorder, Timeline

TITLE = "Restart under load"
STORY = """\
Twenty workers write a row each, in a transaction of its own, again and again. The server is
restarted under them ten times, in turn in good order (`fast`) and by a crash (`immediate`), as in a
minor upgrade or when memory runs out.

What was under way when the server went fails, and the error says what became of it: rolled back,
or unknown where only the answer to COMMIT was lost. The driver knows which connections are gone, so
poolkit gives out none of them; whoever needs a connection meanwhile waits while it is tried again.
Afterwards the rows are compared with what each worker was told.
"""
StopMode = Literal["fast", "immediate"]
WORKERS, RESTARTS = 20, 10
BETWEEN = 0.03
"""Seconds between a worker's requests; without it the picture would be of one colour."""

LATE_FAILURES = "requests that began after the server was back and failed"
FIRST_SUCCESS = "from the server's return to the first success"
DISAGREE = "rows that contradict what was reported"
TOLD = "what the writers were told"
SLOTS = "slots in use at the end"
SESSIONS = "sessions at the server after dispose"


async def run(
    server: PostgresServer,
    contestant: str,
    *,
    patience: float = 30.0,
    restarts: int = RESTARTS,
    apart: float = 1.0,
) -> Timeline:
    """Replay it, on a server that nobody else uses meanwhile."""
    ground, ledger = await Ground.make(server), Ledger()
    engine = make_engine(contestant, ground.url)
    recorder = Recorder(contestant, patience)
    done = asyncio.Event()
    workers = [asyncio.ensure_future(_work(recorder, engine, ledger, done)) for _ in range(WORKERS)]
    backs = []
    for number in range(1, restarts + 1):
        await asyncio.sleep(apart)
        mode: StopMode = "fast" if number % 2 else "immediate"
        recorder.mark(f"{number}: {mode}")
        await asyncio.to_thread(server.restart, mode)
        recorder.mark(f"{number}: back")
        backs.append(recorder.now())
    await asyncio.sleep(apart)
    done.set()
    await asyncio.gather(*workers)
    findings = recorder.timeline.findings
    findings[LATE_FAILURES] = str(_late_failures(recorder.timeline))
    findings[FIRST_SUCCESS] = _first_successes(recorder.timeline, backs)
    findings[TOLD] = ", ".join(f"{many} {what}" for what, many in ledger.told.most_common())
    findings[SLOTS] = str(engine.pool.checkedout())  # type: ignore[attr-defined]
    await engine.dispose()
    left = await ground.no_more_sessions_than(0, within=2.0)
    findings[SESSIONS] = "0" if left is not None else str(await ground.sessions())
    findings[DISAGREE] = ledger.disagreements(await ground.rows())
    return recorder.timeline


async def _work(
    recorder: Recorder, engine: AsyncEngine, ledger: Ledger, done: asyncio.Event
) -> None:
    while not done.is_set():
        await recorder.request(partial(_write, engine, ledger))
        await asyncio.sleep(BETWEEN)


async def _write(engine: AsyncEngine, ledger: Ledger) -> None:
    row = ledger.new_row()
    try:
        async with engine.begin() as connection:
            await connection.execute(text("INSERT INTO written VALUES (:id)"), {"id": row})
    except BaseException as error:
        ledger.failed(row, error)
        raise
    ledger.committed(row)


def _late_failures(timeline: Timeline) -> int:
    """Failures of requests that began with the server there, and ended so."""
    down = _downtimes(timeline)
    return sum(
        request.result != SERVED
        and not any(began < request.ended and request.began < ended for began, ended in down)
        for request in timeline.requests
    )


def _downtimes(timeline: Timeline) -> list[tuple[float, float]]:
    times = [when for when, _ in timeline.marks]
    return list(zip(times[::2], times[1::2], strict=True))


def _first_successes(timeline: Timeline, backs: list[float]) -> str:
    ended = sorted(request.ended for request in timeline.served)
    waits = [next((when for when in ended if when >= back), float("inf")) - back for back in backs]
    return f"{max(waits):.3f} s at worst, {sorted(waits)[len(waits) // 2]:.3f} s in the middle"
