"""What happens to the service, which alerts it is to set off, and which it did."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import methodcaller

from observatory.stage import INTERVAL, Stage

PATIENCE = 40.0
"""Seconds that a loaded machine is given besides, until an alert fires or is over."""

_EACH_LOOK = 0.1
_TAIL, _SCRAPES_BEHIND = 1.5, 3
"""Seconds and scrapes that what was begun goes on for after it was told to end."""

_LONGEST_WINDOW = 15 * 60.0
"""Seconds that the rules look back at most."""

Act = Callable[[Stage], None]


def _nothing(_: Stage) -> None:
    """As before."""


@dataclass(frozen=True, slots=True)
class Phase:
    """One of them.

    Attributes:
        name: In the picture.
        story: What happens, in a sentence.
        begin: Makes it happen.
        end: Makes it stop.
        fires: The alerts that it has to set off.
        may: Those that may follow from it.
        minutes: How long it is quiet, where it sets off nothing.
    """

    name: str
    story: str
    begin: Act = _nothing
    end: Act = _nothing
    fires: frozenset[str] = frozenset()
    may: frozenset[str] = frozenset()
    minutes: float = 0.0


@dataclass(slots=True)
class Happened:
    """What was seen of a phase.

    Attributes:
        phase: Which.
        began: Unix time.
        ended: The same.
        before: Alerts that fired when it began.
        fired: Alerts that fired during it, with the seconds until they did.
        annotations: What they said.
    """

    phase: Phase
    began: float
    before: frozenset[str]
    ended: float = 0.0
    fired: dict[str, float] = field(default_factory=dict)
    annotations: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def missing(self) -> frozenset[str]:
        """Alerts that should have fired and did not."""
        return self.phase.fires - self.fired.keys()

    @property
    def unexpected(self) -> frozenset[str]:
        """Alerts that began to fire and should not have."""
        return self.fired.keys() - self.before - self.phase.fires - self.phase.may


_told = methodcaller
_QUIET = _told("tell", "calm")


def _stop(stage: Stage) -> None:
    stage.server.stop("immediate")


def _start(stage: Stage) -> None:
    stage.server.start()


def _hold_and_fill(stage: Stage) -> None:
    stage.tell("hold")
    stage.fill_server()


def _release(stage: Stage) -> None:
    stage.empty_server()
    stage.tell("calm")


PHASES = (
    Phase("calm", "The everyday load, on fewer connections than there are.", minutes=6),
    Phase(
        "crowd",
        "Several times as many callers as the pool can serve.",
        _told("tell", "crowd"),
        _QUIET,
        fires=frozenset(
            {
                "PoolkitUtilisationHigh",
                "PoolkitPoolTimeouts",
                "PoolkitWaitersStanding",
                "PoolkitCheckoutsRefused",
                "PoolkitOverloaded",
            }
        ),
    ),
    Phase(
        "slow",
        "Statements that run into their timeout.",
        _told("tell", "slow"),
        _QUIET,
        fires=frozenset({"PoolkitStatementTimeouts"}),
    ),
    Phase(
        "holder, full server",
        "One connection is kept in hand; other clients fill up the server.",
        _hold_and_fill,
        _release,
        fires=frozenset(
            {"PoolkitLongHolder", "PoolkitHoldersReported", "PoolkitServerConnectionsHigh"}
        ),
    ),
    Phase(
        "outage",
        "The server crashes, and is started again later.",
        _stop,
        _start,
        fires=frozenset({"PoolkitConnectFailures", "PoolkitConnectionsLost"}),
        # Connects that hang and fail stand in the way of the callers behind them.
        may=frozenset({"PoolkitPoolTimeouts", "PoolkitWaitersStanding"}),
    ),
    Phase(
        "forgotten",
        "A connection that nobody closes.",
        _told("tell", "forget"),
        _QUIET,
        fires=frozenset({"PoolkitConnectionsForgotten"}),
    ),
    Phase("calm again", "The everyday load, until all is quiet, and longer.", minutes=6),
)


def run(stage: Stage, phase: Phase) -> Happened:
    """Have it happen until its alerts fire, or for as long as it is quiet."""
    if not phase.fires:
        _settle(stage)
    happened = Happened(phase, time.time(), frozenset(_look(stage)))
    phase.begin(stage)
    lasts = 60 * phase.minutes / stage.factor or _LONGEST_WINDOW / stage.factor + PATIENCE
    _watch(stage, happened, lasts)
    phase.end(stage)
    if phase.fires:
        _watch(stage, happened, _TAIL + _SCRAPES_BEHIND * INTERVAL / stage.factor, to_the_end=True)
    happened.ended = time.time()
    return happened


def _watch(stage: Stage, happened: Happened, lasts: float, *, to_the_end: bool = False) -> None:
    """Note what fires, until all has that should."""
    until = time.time() + lasts
    while time.time() < until:
        for name, said in _look(stage).items():
            happened.fired.setdefault(name, time.time() - happened.began)
            happened.annotations[name] = said
        if happened.phase.fires and not happened.missing and not to_the_end:
            break
        time.sleep(_EACH_LOOK)


def _look(stage: Stage) -> dict[str, dict[str, str]]:
    return {a["labels"]["alertname"]: a["annotations"] for a in stage.prometheus.firing()}


def _settle(stage: Stage) -> None:
    """Until no alert fires; those that never end will be seen by whoever looks next."""
    until = time.time() + _LONGEST_WINDOW / stage.factor + PATIENCE
    while time.time() < until and stage.prometheus.firing():
        time.sleep(_EACH_LOOK)
