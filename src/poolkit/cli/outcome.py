"""What a step of the demo has to report."""

from __future__ import annotations

from dataclasses import dataclass

from poolkit.cli.watch import Seen


@dataclass(frozen=True, slots=True)
class Outcome:
    """What happened and what the caller got, in plain words, and whether it was as claimed.

    Attributes:
        happened: What happened.
        caller: What the caller got.
        as_claimed: Whether that was as claimed.
        error: What the caller got, if it was an error worth reading.
        seen: The pool meanwhile.
    """

    happened: str
    caller: str
    as_claimed: bool
    error: BaseException | None = None
    seen: Seen | None = None
