"""Tests that leave a connection out fail: a pytest plugin, registered where it is asked for."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import greenlet  # type: ignore[import-untyped]
import pytest
from sqlalchemy import event
from sqlalchemy.pool import Pool

FIXTURE = "poolkit_no_leaks"
GRACE = 1.0
"""Seconds that an event loop in another thread has to give a connection back."""

_BETWEEN = frozenset({"sqlalchemy", "poolkit", "asyncio", "contextlib", "greenlet"})
"""Modules between a checkout and the code that asked for it."""


@dataclass(frozen=True, slots=True)
class _Holder:
    task: str | None
    place: str
    loop: asyncio.AbstractEventLoop | None

    def __str__(self) -> str:
        return f"  taken {self.place}" + (f" by the task {self.task!r}" if self.task else "")


class LeakWatch:
    """Watches the connections of every pool while a test runs.

    Args:
        everywhere: Whether all tests are watched, and not only those that ask for it.
    """

    def __init__(self, *, everywhere: bool) -> None:
        self._everywhere = everywhere
        self._out: dict[Any, _Holder] = {}
        self._lost: list[_Holder] = []
        self._paused = 0

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, None, None]:
        """Begin before the first fixture."""
        if self._watches(item):
            event.listen(Pool, "checkout", self._checkout)
            event.listen(Pool, "checkin", self._checkin)
        return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any]
    ) -> Generator[None, object, object]:
        """What a fixture of several tests holds is no leak of the first."""
        wider = fixturedef.scope != "function"
        self._paused += wider
        try:
            return (yield)
        finally:
            self._paused -= wider

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, None, None]:
        """Look after the last fixture."""
        try:
            yield
            if self._watches(item):
                self._fail_if_any()
        finally:
            self._stop()

    def _watches(self, item: pytest.Item) -> bool:
        return self._everywhere or FIXTURE in getattr(item, "fixturenames", ())

    def _fail_if_any(self) -> None:
        deadline = time.monotonic() + GRACE
        while any(_runs_elsewhere(h) for h in self._out.values()) and time.monotonic() < deadline:
            time.sleep(0.01)
        left = [*self._lost, *self._out.values()]
        if left:
            what = "a connection" if len(left) == 1 else f"{len(left)} connections"
            places = "\n".join(str(holder) for holder in left)
            pytest.fail(f"the test left {what} out (close it, or use async with):\n{places}", False)

    def _stop(self) -> None:
        self._out.clear()
        self._lost.clear()
        if event.contains(Pool, "checkout", self._checkout):
            event.remove(Pool, "checkout", self._checkout)
            event.remove(Pool, "checkin", self._checkin)

    def _checkout(self, _connection: Any, record: Any, _proxy: Any) -> None:
        if not self._paused:
            self._out[record] = _holder()

    def _checkin(self, _connection: Any, record: Any) -> None:
        holder = self._out.pop(record, None)
        if holder is not None and getattr(record, "lost", False):
            self._lost.append(holder)  # forgotten, and found by the garbage collector


def _runs_elsewhere(holder: _Holder) -> bool:
    return holder.loop is not None and holder.loop.is_running()


def _holder() -> _Holder:
    try:
        task = asyncio.current_task()
    except RuntimeError:
        return _Holder(None, _place(), None)
    name = None if task is None else task.get_name()
    return _Holder(name, _place(), asyncio.get_running_loop())


def _place() -> str:
    for frame in _frames():
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _BETWEEN:
            return f"at {frame.f_code.co_filename}:{frame.f_lineno}, in {frame.f_code.co_name}"
    return "at an unknown place"


def _frames() -> Iterator[FrameType]:
    """From here outwards, over the edges of greenlets."""
    current: Any = greenlet.getcurrent()
    frame: FrameType | None = sys._getframe()  # noqa: SLF001 (as the standard library's own tools)
    while current is not None:
        while frame is not None:
            yield frame
            frame = frame.f_back
        current = current.parent
        frame = None if current is None else current.gr_frame
