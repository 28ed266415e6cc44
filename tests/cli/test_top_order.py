"""The order of the sessions, and who stands under whom."""

from __future__ import annotations

import pytest

from poolkit.cli.top.activity import Lock, Session
from poolkit.cli.top.order import ordered, worth_showing


def session(pid: int, state: str | None = "active", seconds: float = 0.0, **more) -> Session:
    facts = {
        "database": "app",
        "user": "app",
        "application": "app",
        "client": None,
        "backend": "client backend",
        "wait": None,
        "query": "",
        "query_for": seconds,
        "state_for": seconds,
    }
    return Session(pid=pid, state=state, **facts | more)


def waiting(pid: int, *blocked_by: int, seconds: float = 1.0) -> Session:
    lock = Lock("relation", "ShareLock", "orders", "orders", seconds)
    return session(pid, lock=lock, blocked_by=blocked_by)


def drawn(*sessions: Session) -> list[tuple[int, int, int]]:
    """Pid, depth, and how many it blocks."""
    return [(p.session.pid, p.depth, p.blocks) for p in ordered(sessions)]


def test_the_worst_first() -> None:
    """Lock queues, long pauses in transactions, long statements, short ones, idle, the server's."""
    found = drawn(
        session(1, "idle", 900.0),
        session(2, None, backend="checkpointer"),
        session(3, "active", 0.2),
        session(4, "idle in transaction", 0.1),
        session(5, "active", 60.0),
        session(6, "active", 70.0),
        session(7, "idle in transaction (aborted)", 2.0),
        session(8, "idle in transaction", 3.0),
        waiting(10, 9),
        session(9, "idle in transaction", 0.5),
        session(11, None, backend=None),
    )

    assert [pid for pid, _, _ in found] == [9, 10, 8, 7, 6, 5, 3, 4, 11, 1, 2]


def test_who_waits_stands_under_whom_it_waits_for() -> None:
    """A queue behind a queue is indented twice; numbers are of all below; longer waits first."""
    found = drawn(
        waiting(4, 2, seconds=1.0),
        waiting(3, 2, seconds=2.0),
        waiting(2, 1, seconds=3.0),
        waiting(5, 1, seconds=9.0),
        session(1, "idle in transaction", 10.0),
    )

    assert found == [(1, 0, 4), (5, 1, 0), (2, 1, 2), (3, 2, 0), (4, 2, 0)]


def test_the_largest_queue_first() -> None:
    """However long the others wait."""
    found = drawn(
        session(1),
        waiting(2, 1, seconds=100.0),
        session(3),
        waiting(4, 3),
        waiting(5, 3),
    )

    assert [pid for pid, _, _ in found] == [3, 4, 5, 1, 2]


def test_under_who_is_at_fault() -> None:
    """Of several blockers it stands under one that does not wait itself; the others are named."""
    (_, _, placed) = ordered([waiting(3, 2, 1), waiting(2, 1, seconds=5.0), session(1)])

    assert (placed.session.pid, placed.depth, placed.others) == (3, 1, (2,))


def test_a_circle_is_shown_once() -> None:
    """Two that wait for each other, before the server ends it."""
    assert sorted(pid for pid, _, _ in drawn(waiting(1, 2), waiting(2, 1))) == [1, 2]


@pytest.mark.parametrize("blocker", [0, 99])
def test_a_blocker_that_is_no_session(blocker: int) -> None:
    """A prepared transaction (0), or one that has just ended: the queue begins with who waits."""
    (placed,) = ordered([waiting(1, blocker)])

    assert (placed.depth, placed.others) == (0, (blocker,))


def test_a_long_chain() -> None:
    """A thousand, each behind the one before."""
    found = drawn(session(0), *(waiting(pid, pid - 1) for pid in range(1, 1000)))

    assert found[0] == (0, 0, 999)
    assert found[-1] == (999, 999, 0)


def test_what_is_worth_showing() -> None:
    """What does something; of the idle only who blocks somebody."""
    placed = ordered(
        [
            session(1, "idle"),
            session(2, "idle"),
            waiting(3, 2),
            session(4),
            session(5, None, backend=None),
            session(6, backend="walsender"),
            session(7, backend="autovacuum worker"),
            waiting(8, 7),
        ]
    )

    assert {p.session.pid for p in placed if worth_showing(p)} == {2, 3, 4, 7, 8}
