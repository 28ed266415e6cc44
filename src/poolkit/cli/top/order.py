"""The order of the sessions: the worst first, and who waits under whom it waits for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from poolkit.cli.top.activity import IDLE, Session

LONG = 1.0
"""Seconds that a statement, or a pause in a transaction, may take before it is called long."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A session in its place.

    Attributes:
        depth: How many sessions stand between it and one that waits for no lock.
        blocks: Sessions that wait for it, directly or not.
        others: Who blocks it besides the session that it stands under; 0 is a prepared transaction.
    """

    session: Session
    depth: int = 0
    blocks: int = 0
    others: tuple[int, ...] = ()


def ordered(sessions: Sequence[Session]) -> list[Placed]:
    """All sessions: lock queues, then long pauses in transactions, long statements, the rest.

    A lock queue begins with who holds the lock; the largest queue comes first.
    """
    queues = _queues(sessions)
    queued = {placed.session.pid for queue in queues for placed in queue}
    queues.sort(key=lambda queue: (-len(queue), -_longest_wait(queue)))
    others = sorted((s for s in sessions if s.pid not in queued), key=_badness)
    return [placed for queue in queues for placed in queue] + [Placed(s) for s in others]


def worth_showing(placed: Placed) -> bool:
    """Whether a session does something: it is in a lock queue, or a client that is not idle."""
    session = placed.session
    in_queue = session.lock is not None or placed.blocks > 0
    return in_queue or (session.is_client and session.state not in (None, IDLE))


def _queues(sessions: Sequence[Session]) -> list[list[Placed]]:
    known = {s.pid: s for s in sessions}
    waiting = sorted((s for s in sessions if s.lock is not None), key=lambda s: -(s.seconds or 0))
    followers: dict[int, list[Session]] = {}
    for session in waiting:
        blocker = _blocker(session, known)
        if blocker is not None:
            followers.setdefault(blocker, []).append(session)
    heads = [known[pid] for pid in followers if known[pid].lock is None]
    heads += [s for s in waiting if _blocker(s, known) is None]
    seen: set[int] = set()
    queues = [_queue(head, followers, seen) for head in heads]
    # What is left waits in a circle; the server will end that by an error for one of them.
    return queues + [_queue(s, followers, seen) for s in waiting if s.pid not in seen]


def _blocker(session: Session, known: Mapping[int, Session]) -> int | None:
    """Under which session one stands: rather one that is at fault than one that waits too."""
    pids = [pid for pid in session.blocked_by if pid in known]
    return min(pids, key=lambda pid: known[pid].lock is not None, default=None)


def _queue(head: Session, followers: Mapping[int, list[Session]], seen: set[int]) -> list[Placed]:
    placed: list[Placed] = []
    stack: list[tuple[Session, int, int | None]] = [(head, 0, None)]
    while stack:
        session, depth, above = stack.pop()
        if session.pid in seen:
            continue
        seen.add(session.pid)
        others = tuple(pid for pid in session.blocked_by if pid != above)
        placed.append(Placed(session, depth, others=others))
        below = reversed(followers.get(session.pid, []))
        stack += [(each, depth + 1, session.pid) for each in below]
    return _with_numbers(placed)


def _with_numbers(queue: Sequence[Placed]) -> list[Placed]:
    """Each with the number of those that stand below it."""
    numbered: list[Placed] = []
    behind: list[tuple[int, int]] = []  # depth, and how many stand there and below
    for placed in reversed(queue):
        blocks = 0
        while behind and behind[-1][0] > placed.depth:
            blocks += behind.pop()[1]
        behind.append((placed.depth, blocks + 1))
        numbered.append(replace(placed, blocks=blocks))
    return numbered[::-1]


def _longest_wait(queue: Sequence[Placed]) -> float:
    return max((p.session.seconds or 0) for p in queue if p.session.lock is not None)


def _badness(session: Session) -> tuple[int, float]:
    seconds = session.seconds or 0.0
    is_long = seconds >= LONG
    if not session.is_client:
        rank = 5
    elif session.is_in_transaction and is_long:
        rank = 0
    elif session.state == "active" and is_long:
        rank = 1
    elif session.state not in (None, IDLE):
        rank = 2
    else:
        rank = 3 if session.is_hidden else 4
    return rank, -(seconds if rank != 2 else session.transaction_for or seconds)  # noqa: PLR2004
