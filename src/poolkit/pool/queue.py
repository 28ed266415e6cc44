"""Who waits for a connection, and who is next: first come, first served, until overloaded."""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from poolkit.pool.connects import Opening
    from poolkit.pool.record import PooledRecord


class Waiter:
    """A caller in the queue.

    Attributes:
        future: Resolved with a connection, or with the error to raise.
        since: When the wait began, in the event loop's seconds.
        opening: The connect that is under way for it, if one is.
        late: Its time is up; it is only kept for the sake of that connect.
    """

    __slots__ = ("future", "late", "opening", "since")

    def __init__(self, future: asyncio.Future[PooledRecord], since: float) -> None:
        self.future = future
        self.since = since
        self.opening: Opening | None = None
        self.late = False


LEAST_PATIENCE = 0.1
"""Fraction of ``overload_after``: who gives up sooner tells nothing of the others' patience."""

USEFUL_WAIT = 0.5
"""Fraction of the callers' patience after which what is left of it may be too short for the work.

Measured by ``make bench``: with a quarter, more of those in line give up needlessly.
"""

OUTLIVED = 1.25
"""Times the patience that was learned: whoever still stands in line then has more of it."""

FADING = 0.9
"""What is left of the patience that was learned each time that somebody gives up sooner."""

STEADY = 0.9
"""Fraction of its length that a queue keeps where the same callers come again and again."""


class WaitQueue:
    """The callers in line; every operation takes constant time.

    First come, first served, until the first in line has waited for too long; then newest first,
    for they are the likeliest still to be there, and the others would time out whoever is served.
    Too long is

    - ``overload_after`` seconds, not counting those until the last connect succeeded (a cold start
      is served in order): newest first until the queue is empty again, or until in as many seconds
      it has become neither longer nor shorter and nobody has left it. Then these are workers that
      come again and again, after a hitch, and to serve the newest would be to starve the others;
    - or half of what callers were seen to have patience for: their deadlines are shorter, and in
      turn each connection would come to one about to give up. Newest first as long as that is so,
      and as long as the first in line has not shown that it has more patience.

    A queue that stands but moves, and whose callers stay, never gets there.

    Args:
        overload_after: Seconds; 0 is never.
    """

    def __init__(self, overload_after: float) -> None:
        self.waiters: OrderedDict[Waiter, None] = OrderedDict()
        self.opened_at = -math.inf
        self.overloaded_since: float | None = None
        self._overload_after = overload_after
        self._patience = math.inf
        self._until_empty = self._newest_first = False
        self._looked_at = -math.inf
        self._length = self._left = 0

    def __len__(self) -> int:
        return len(self.waiters)

    def __contains__(self, waiter: Waiter) -> bool:
        return waiter in self.waiters

    def add(self, waiter: Waiter, *, first: bool = False) -> None:
        """Put a caller at the end of the line, or at its head."""
        self.waiters[waiter] = None
        if first:
            self.waiters.move_to_end(waiter, last=False)

    def discard(self, waiter: Waiter) -> None:
        """Take out a caller that leaves without a connection, if it is still there."""
        if waiter in self.waiters:
            del self.waiters[waiter]
            self._left += 1

    def note_patience(self, seconds: float) -> None:
        """A caller that was first in line, or had a connection from it, gave up after so long."""
        if seconds >= LEAST_PATIENCE * self._overload_after:
            known = self._patience
            self._patience = seconds if known == math.inf else max(seconds, FADING * known)

    def oldest(self) -> Waiter:
        """The first in line."""
        return next(iter(self.waiters))

    def pop(self, now: float) -> Waiter:
        """Take out the caller whose turn it is."""
        waiter, _ = self.waiters.popitem(last=self.is_overloaded(now))
        return waiter

    def is_overloaded(self, now: float) -> bool:
        """Whether the newest is served next; settled anew at each call."""
        if not self.waiters or self._overload_after <= 0:
            return False
        since = self.oldest().since
        if now - since >= OUTLIVED * self._patience:
            self._patience = math.inf
        if self._until_empty:
            self._look_whether_it_is_steady(now)
        elif now - max(since, self.opened_at) >= self._overload_after:
            self._until_empty = True
            self._look(now)
        self._newest_first = self._until_empty or now - since >= USEFUL_WAIT * self._patience
        if self._newest_first and self.overloaded_since is None:
            self.overloaded_since = now
        return self._newest_first

    def _look_whether_it_is_steady(self, now: float) -> None:
        if now - self._looked_at < self._overload_after:
            return
        if not self._left and STEADY * self._length <= len(self.waiters) <= self._length / STEADY:
            self.end_overload()
            self.opened_at = now  # those in line are to be served before they count as late again
        else:
            self._look(now)

    def _look(self, now: float) -> None:
        self._looked_at, self._length, self._left = now, len(self.waiters), 0

    def end_overload(self) -> None:
        """The queue is empty, or was never too long: what was learned is forgotten."""
        self.overloaded_since = None
        self._until_empty = self._newest_first = False
        self._patience = math.inf

    def in_turn(self) -> Iterator[Waiter]:
        """The callers in the order in which they would be served now."""
        return reversed(self.waiters) if self._newest_first else iter(self.waiters)
