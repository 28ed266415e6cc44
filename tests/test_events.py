"""Observers: who is told of what, and that what nobody wants is not made."""

from __future__ import annotations

import pytest

from poolkit import observe
from poolkit.events import CheckedIn, CheckedOut, Event, Observers, OverloadBegan, OverloadEnded

EVERY = [CheckedOut(0.0, 0.0), CheckedIn(1.0), OverloadBegan(3), OverloadEnded(2.0)]


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        (None, EVERY),
        ([Event], EVERY),
        ([CheckedIn, OverloadBegan], [EVERY[1], EVERY[2]]),
        ([], []),
    ],
)
def test_an_observer_is_told_of_what_it_wants(wanted, told) -> None:
    """All by default; of several kinds, only those."""
    observers, seen = Observers(), []
    observers.add(seen.append, wanted)
    for event in EVERY:
        observers.notify(event)
    assert seen == told


def test_an_end_is_one_observers_own() -> None:
    """Of two that are equal, each ends by itself, and once."""
    observers, seen = Observers(), []
    ends = [observers.add(seen.append), observers.add(seen.append)]
    ends[0]()
    ends[0]()
    observers.notify(EVERY[0])
    assert (seen, list(observers)) == ([EVERY[0]], [seen.append])
    ends[1]()
    observers.notify(EVERY[0])
    assert (len(seen), list(observers)) == (1, [])


def test_who_comes_and_goes_is_in_the_list_that_was_asked_for() -> None:
    """A pool asks once."""
    observers = Observers([print])
    wanting = observers.wanting(CheckedOut)
    assert wanting == [print]
    end = observers.add(repr, [CheckedOut])
    assert wanting == [print, repr]
    end()
    assert wanting == [print]
    assert wanting is observers.wanting(CheckedOut)


def test_an_observer_may_end_its_watch_while_it_is_told() -> None:
    """And those after it are told all the same."""
    observers, seen = Observers(), []
    end = observers.add(lambda _: end())
    observers.add(seen.append)
    observers.notify(EVERY[0])
    assert seen == [EVERY[0]]


async def test_what_nobody_wants_is_not_made(engine, monkeypatch) -> None:
    """With an observer of other things a checkout makes no event."""
    observe(engine, print, [OverloadBegan])
    for kind in (CheckedOut, CheckedIn):
        monkeypatch.delattr(kind, "__init__")
    async with engine.connect():
        pass
    await engine.dispose()


async def test_a_replaced_pool_tells_the_same_observers(engine) -> None:
    """After ``dispose()`` too, those that came before it and those that come after."""
    seen: list[Event] = []
    observe(engine, seen.append, [CheckedOut])
    await engine.dispose()
    end = observe(engine, seen.append, [CheckedIn])
    async with engine.connect():
        pass
    assert [type(event) for event in seen] == [CheckedOut, CheckedIn]
    end()


async def test_only_the_first_use_of_a_connection_says_how_long_its_connect_took(engine) -> None:
    """Whether or not anybody watched then."""
    async with engine.connect():
        pass
    seen: list[CheckedOut] = []
    observe(engine, seen.append, [CheckedOut])
    async with engine.connect():
        pass
    assert [event.open for event in seen] == [0.0]
