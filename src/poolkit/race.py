"""Two attempts side by side: the second is begun only when the first keeps us waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_CLOSE = 0.001
"""Seconds that are not worth a timer, and may be nothing but the rounding of a float."""


class Silence:
    """How long an attempt has been waiting for the first answer to what it asked."""

    def __init__(self) -> None:
        self._asked: float | None = None

    def begin(self) -> None:
        """A question goes out."""
        self._asked = asyncio.get_running_loop().time()

    def end(self) -> None:
        """An answer has come, or nothing is asked any more."""
        self._asked = None

    @property
    def seconds(self) -> float:
        """0 while no question is open."""
        if self._asked is None:
            return 0.0
        return asyncio.get_running_loop().time() - self._asked


@dataclass(eq=False)
class Race(Generic[T]):
    """An attempt in the caller's own task, and a relief in another one if it is due.

    The first result counts, and so does the first error; whatever else is under way is cancelled.

    Attributes:
        relief: Begins the second attempt.
        due: Seconds after which to ask again; 0 or less: the relief begins now.
        discard: Gets a result that came too late.
    """

    relief: Callable[[], Coroutine[Any, Any, T]]
    due: Callable[[], float]
    discard: Callable[[T], None]

    def __post_init__(self) -> None:
        self._helper: asyncio.Task[T] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._overtaken = asyncio.timeout(None)
        self._may_be_overtaken = True

    @property
    def was_relieved(self) -> bool:
        """Whether the second attempt has begun."""
        return self._helper is not None

    async def run(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """The first result."""
        self._look()
        taken = False
        try:
            try:
                async with self._overtaken:
                    return await attempt()
            except Exception:
                if self._helper is None or not self._overtaken.expired():
                    raise
            result = await self._helper
            taken = True
            return result
        finally:
            # Nothing is awaited here: a cancellation in between would lose the result.
            self._clean_up(taken=taken)

    def _look(self) -> None:
        wait = self.due()
        loop = asyncio.get_running_loop()
        if wait > _CLOSE:
            self._timer = loop.call_later(wait, self._look)
        else:
            self._timer = None
            self._helper = loop.create_task(self.relief())
            self._helper.add_done_callback(self._settle)

    def _settle(self, helper: asyncio.Task[T]) -> None:
        if self._may_be_overtaken and not helper.cancelled():
            self._overtaken.reschedule(asyncio.get_running_loop().time())

    def _clean_up(self, *, taken: bool) -> None:
        self._may_be_overtaken = False
        if self._timer is not None:
            self._timer.cancel()
        if self._helper is not None and not taken:
            self._helper.cancel()
            self._helper.add_done_callback(self._throw_away)

    def _throw_away(self, helper: asyncio.Task[T]) -> None:
        if not helper.cancelled() and helper.exception() is None:
            self.discard(helper.result())
