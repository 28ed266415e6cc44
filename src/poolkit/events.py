"""What happens to an engine's connections, as records, and who may watch."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

_log = logging.getLogger("poolkit.events")


@dataclass(frozen=True, slots=True)
class Event:
    """The base of all events."""


@dataclass(frozen=True, slots=True)
class ConnectionOpened(Event):
    """A physical connection was made.

    Attributes:
        address: The server, without credentials.
        duration: Seconds it took, all attempts counted in.
        attempts: Physical connects started, this one counted in.
        pooler: ``none``, ``session`` or ``transaction``: what was found or set.
    """

    address: str
    duration: float
    attempts: int
    pooler: str


@dataclass(frozen=True, slots=True)
class ConnectionOpenFailed(Event):
    """No connection could be made, and the caller was told so.

    Attributes:
        address: The server, without credentials.
        duration: Seconds until giving up.
        attempts: Physical connects started.
        error: What the caller got.
    """

    address: str
    duration: float
    attempts: int
    error: Exception


class Observer(Protocol):
    """Any callable that takes one event; ``list.append`` is one."""

    def __call__(self, event: Event, /) -> object:
        """Take note of the event, quickly: it is called where the event happens."""


def notify(observers: Iterable[Observer], event: Event) -> None:
    """Tell each observer; one that raises is logged and breaks nothing."""
    for observer in observers:
        try:
            observer(event)
        except Exception:  # noqa: BLE001 (it is logged; a checkout must not break on it)
            _log.exception("observer %r failed on %s", observer, type(event).__name__)
