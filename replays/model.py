"""What happened to each request of a replay, and when."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from poolkit import classify

SERVED = "served"
STILL_WAITING = "still waiting"


@dataclass(frozen=True, slots=True)
class Request:
    """One request.

    Attributes:
        began: Seconds since the replay began.
        ended: The same.
        result: ``served``, ``still waiting``, or the kind of fault.
    """

    began: float
    ended: float
    result: str

    @property
    def took(self) -> float:
        """Seconds."""
        return self.ended - self.began


@dataclass(slots=True)
class Timeline:
    """All requests of one run.

    Attributes:
        contestant: Whose run it is.
        requests: In the order in which they ended.
        marks: What happened to the database, and when.
        findings: What else was found out.
    """

    contestant: str
    requests: list[Request] = field(default_factory=list)
    marks: list[tuple[float, str]] = field(default_factory=list)
    findings: dict[str, str] = field(default_factory=dict)

    @property
    def results(self) -> Counter[str]:
        """How many requests ended how."""
        return Counter(request.result for request in self.requests)

    @property
    def served(self) -> list[Request]:
        """Those that were."""
        return [request for request in self.requests if request.result == SERVED]

    def at(self, mark: str) -> float:
        """When something happened."""
        return next(when for when, what in self.marks if what == mark)

    def worst(self) -> float:
        """Seconds of the longest request."""
        return max((request.took for request in self.requests), default=0.0)


class Recorder:
    """Takes the time of requests.

    Args:
        contestant: Whose they are.
        patience: Seconds after which one is given up as hung.
    """

    def __init__(self, contestant: str, patience: float) -> None:
        self.timeline = Timeline(contestant)
        self._patience = patience
        self._loop = asyncio.get_running_loop()
        self._zero = self._loop.time()

    def now(self) -> float:
        """Seconds since the replay began."""
        return self._loop.time() - self._zero

    def mark(self, what: str) -> None:
        """Note what happened to the database."""
        self.timeline.marks.append((self.now(), what))

    async def request(self, work: Callable[[], Awaitable[Any]]) -> BaseException | None:
        """Do it, and note how it ended; returns its error."""
        began = self.now()
        task = asyncio.ensure_future(work())
        done, _ = await asyncio.wait({task}, timeout=self._patience)
        if not done:
            self._note(began, STILL_WAITING)
            task.cancel()
            await asyncio.wait({task}, timeout=5)
            return TimeoutError("still waiting")
        error = None if task.cancelled() else task.exception()
        self._note(began, SERVED if error is None else str(classify(error).kind))
        return error

    def _note(self, began: float, result: str) -> None:
        self.timeline.requests.append(Request(began, self.now(), result))


async def select_one(engine: AsyncEngine) -> None:
    """The least that a request does."""
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
        await connection.commit()


async def arrive(
    recorder: Recorder, work: Callable[[], Awaitable[Any]], *, many: int, over: float
) -> None:
    """Requests that arrive evenly over so many seconds, whether the others are served or not."""
    tasks = []
    for number in range(many):
        await asyncio.sleep(max(0.0, number * over / many - recorder.now()))
        tasks.append(asyncio.ensure_future(recorder.request(work)))
    await asyncio.gather(*tasks)


async def fill(engine: AsyncEngine, connections: int) -> None:
    """Leave that many idle connections."""
    checked_out = [await engine.connect() for _ in range(connections)]
    for connection in checked_out:
        await connection.execute(text("SELECT 1"))
    for connection in checked_out:
        await connection.close()
