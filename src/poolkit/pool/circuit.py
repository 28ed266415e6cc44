"""Failing fast while the database is down: who would have to connect is told so at once."""

from __future__ import annotations

import copy
import math
import random

from poolkit import errors

FAILURES_IN_A_ROW = 2
"""Connects that fail one after the other, each retried for its whole time, before callers fail
fast. Those that were under way together count as one, so that whoever waits behind a failed connect
still begins one of its own; two of them, by default, are 20 s without an answer."""

SLOW = 0.1
"""Seconds that a failure has to take to count: nobody loses time by one that comes at once."""

LONGEST_PAUSE = 0.25
"""Seconds between two probes at most, so that a server that is back is found within 0.5 s."""

UNASKED = 30.0
"""Seconds without a caller after which probing ends, and the next caller connects again."""

_NOT_AN_OUTAGE = (
    errors.ConfigurationError,
    errors.AuthenticationFailed,
    errors.DatabaseNotFound,
    errors.PasswordUnavailable,
    errors.StartupParameterRefused,
    errors.TLSRefused,
)


class Circuit:
    """Whether connects are worth a caller's time.

    Closed, as in electricity, all is well. After ``FAILURES_IN_A_ROW`` it is open: who would have
    to connect gets the last error at once, and one probe at a time goes on in the background, with
    jittered pauses. The first connect that succeeds closes it.

    Attributes:
        error: What the last connect failed with; None once one has succeeded.
        failing_since: When the first connect of the row failed.
        asked_at: When a caller was last turned away.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.failing_since = math.inf
        self.asked_at = -math.inf
        self._counted_at = -math.inf
        self._failures = 0
        self._pause = 0.0

    @property
    def is_open(self) -> bool:
        """Whether callers fail fast."""
        return self._failures >= FAILURES_IN_A_ROW

    def close(self) -> None:
        """A connect succeeded, or the past is to be forgotten."""
        self.__init__()  # type: ignore[misc]

    def note_failure(self, error: BaseException, began: float, now: float) -> None:
        """A connect failed."""
        if not isinstance(error, Exception):
            return  # cancelled
        self.error = error
        if isinstance(error, _NOT_AN_OUTAGE):
            self._failures = 0  # the server answers
        elif began >= self._counted_at and (now - began >= SLOW or self.is_open):
            self._count(now)

    def _count(self, now: float) -> None:
        if not self._failures:
            self.failing_since = now
        self._failures += 1
        self._counted_at = now
        if self._failures == FAILURES_IN_A_ROW:
            self.asked_at = now

    def last_error(self, now: float) -> BaseException:
        """What the caller is told who is turned away now: the last error, its own copy."""
        assert self.error is not None
        self.asked_at = now
        return _noted(
            self.error,
            f"not tried again for this caller: {self._failures} connects in a row have failed, and"
            " one goes on trying in the background",
        )

    def next_pause(self, now: float) -> float | None:
        """Seconds until the next probe; None if nobody has asked for long."""
        if now - self.asked_at >= UNASKED:
            return None
        self._pause = min(max(self._pause * 2, LONGEST_PAUSE / 8), LONGEST_PAUSE)
        return random.uniform(0, self._pause)  # noqa: S311 (spreads load; not a secret)


def _noted(error: BaseException, note: str) -> BaseException:
    """A copy, for a traceback and notes belong to one caller; some exceptions have no copies."""
    try:
        own = copy.copy(error)
    except Exception:  # noqa: BLE001 (a foreign driver's exception that cannot be made anew)
        return error
    own.__cause__ = error.__cause__
    own.__notes__ = [*getattr(error, "__notes__", ()), note]
    return own
