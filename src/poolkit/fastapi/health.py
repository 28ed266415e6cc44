"""``/health/live`` and ``/health/ready``: whether to restart a process, and whether to send to it.

Readiness asks the server, on a connection that no caller misses: never in the pool's line.
"""

from __future__ import annotations

import asyncio
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import Pool
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from poolkit.connect_failures import failure
from poolkit.errors import ConfigurationError, causes
from poolkit.faults import FaultKind, classify
from poolkit.lifecycle import warm_up
from poolkit.opening import Progress
from poolkit.pool import HandoffPool, aside, liveness

FRESH = 0.25
"""Seconds for which an answer serves the probes that come after it, too."""

_NO_STORE = {"Cache-Control": "no-store"}


def routes(
    prefix: str,
    find: Callable[[HTTPConnection], AsyncEngine],
    is_ending: Callable[[], bool],
    within: float,
) -> list[Route]:
    """The two routes; plain ones, which no dependency of the application stands before.

    Args:
        prefix: What their paths begin with.
        find: Gives the engine.
        is_ending: Whether the application's lifespan is at its end.
        within: Seconds that the server has to answer.
    """
    readiness = Readiness(within)

    async def live(_: Request) -> Response:
        return JSONResponse({"status": "live"}, headers=_NO_STORE)

    async def ready(request: Request) -> Response:
        if is_ending():
            return _answered(_DRAINING)
        try:
            engine = find(request)
        except ConfigurationError as error:
            return _answered(State("unavailable", classify(error).kind))
        return _answered(await readiness.of(engine))

    return [Route(f"{prefix}/live", live), Route(f"{prefix}/ready", ready)]


@dataclass(frozen=True, slots=True)
class State:
    """How an engine stands.

    Attributes:
        status: ``ready``, ``draining`` or ``unavailable``.
        reason: Why it is unavailable.
        saturated: Whether the database answers, and every connection of the pool is in use.
    """

    status: str
    reason: FaultKind | None = None
    saturated: bool = False


_DRAINING = State("draining")


def _answered(state: State) -> Response:
    body: dict[str, Any] = {"status": state.status}
    if state.reason is not None:
        body["reason"] = str(state.reason)
    if state.saturated:
        body["saturated"] = True
    return JSONResponse(body, 200 if state.status == "ready" else 503, _NO_STORE)


class Readiness:
    """Whether engines' servers answer; probes that come together share one question.

    Args:
        within: Seconds that the server has to answer.
    """

    def __init__(self, within: float) -> None:
        self._within = within
        self._asked: weakref.WeakKeyDictionary[Pool, _Question] = weakref.WeakKeyDictionary()

    async def of(self, engine: AsyncEngine) -> State:
        """How the engine stands."""
        pool = engine.pool
        if _is_draining(pool):
            return _DRAINING
        loop = asyncio.get_running_loop()
        question = self._asked.get(pool)
        if question is None or not question.serves(loop):
            self._asked[pool] = question = _Question(engine, self._within, loop)
        reason = await asyncio.shield(question.task)  # others may wait for it
        if _is_draining(pool) or reason is FaultKind.POOL_DRAINING:
            return _DRAINING
        if reason is not None:
            return State("unavailable", reason)
        return State("ready", saturated=_is_saturated(pool))


class _Question:
    """One look at a server, for all who ask meanwhile and shortly after."""

    def __init__(self, engine: AsyncEngine, within: float, loop: asyncio.AbstractEventLoop) -> None:
        self.task = loop.create_task(_look(engine, within))
        self._loop = loop
        self._answered_at = 0.0
        self.task.add_done_callback(self._note)

    def serves(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Whether its answer is to come, or is fresh."""
        if self._loop is not loop or self.task.cancelled():
            return False
        return not self.task.done() or loop.time() - self._answered_at < FRESH

    def _note(self, _: object) -> None:
        self._answered_at = self._loop.time()


async def _look(engine: AsyncEngine, within: float) -> FaultKind | None:
    """Ask the server; what is wrong, if anything is."""
    pool = engine.pool
    try:
        async with asyncio.timeout(within):
            if isinstance(pool, HandoffPool):
                await _ask(engine, pool, within)
            else:
                await _ask_any(engine)
    except Exception as error:  # noqa: BLE001 (told by its kind; a probe has no use for more)
        return _reason(pool, error)
    return None


async def _ask(engine: AsyncEngine, pool: HandoffPool, within: float) -> None:
    """On an idle connection, and if it does not answer on a new one.

    An idle connection may be dead while the server is back: its siblings are checked, too.
    """
    await warm_up(engine, 0)  # opens nothing: an engine that was not used yet gets its loop
    if pool.checkedin():
        try:
            await aside.ask(pool, _select, within / 2)
        except Exception:  # noqa: BLE001 (if it is the server, it will say so again)
            liveness.check_idle(pool)
        else:
            return
    await aside.ask(pool, _select, within)


async def _select(connection: Any) -> None:
    await connection.execute("SELECT 1")


async def _ask_any(engine: AsyncEngine) -> None:
    """Another pool has no way past its line."""
    async with engine.connect() as connection:
        await connection.exec_driver_sql("SELECT 1")


def _reason(pool: Pool, error: Exception) -> FaultKind | None:
    kind = classify(error).kind
    if not isinstance(pool, HandoffPool):
        return kind
    if kind is FaultKind.DEADLINE_EXCEEDED:
        kind = _kind_so_far(error)
    if kind is FaultKind.TOO_MANY_CONNECTIONS and pool.checkedout():
        return None  # it answers, and serves us on the connections that we have
    return kind


def _kind_so_far(error: Exception) -> FaultKind:
    """What the connect has met with that the bound cut short: it goes on trying for longer."""
    for cause in causes(error):
        for frame, _ in traceback.walk_tb(cause.__traceback__):
            progress = frame.f_locals.get("progress")
            if isinstance(progress, Progress) and progress.cause is not None:
                return classify(failure(progress.so_far(), progress.cause)).kind
    return FaultKind.CONNECT_TIMEOUT


def _is_draining(pool: Pool) -> bool:
    return isinstance(pool, HandoffPool) and pool.stats().draining


def _is_saturated(pool: Pool) -> bool:
    return isinstance(pool, HandoffPool) and pool.checkedout() >= pool.limit()
