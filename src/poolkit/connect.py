"""The connect: bounded in total, retried, raced over the addresses, with typed failures."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from poolkit import errors
from poolkit.addresses import Candidate, candidates, listed
from poolkit.connect_failures import failure, is_transient, speaks_against_address
from poolkit.driver import DriverConnection
from poolkit.errors import ConfigurationError, ConnectError
from poolkit.events import ConnectionOpened, ConnectionOpenFailed, Observer, shared
from poolkit.opening import STARTUP_SAFE, Opener, Progress, Trial
from poolkit.race import Race
from poolkit.scouts import Endpoint, Scouts, offers_tls
from poolkit.url import DEFAULT_PORT

__all__ = ["STARTUP_SAFE", "Connector"]

FIRST_PAUSE = 0.05
LONGEST_PAUSE = 0.25
"""Seconds: the longest pause between attempts, so that a server that is back is found soon."""

SECOND_CHANCE = 1.0
"""Seconds of silence after which a second attempt is replaced; doubled every time."""

_Opened = tuple[DriverConnection, Candidate]


@dataclass(eq=False, slots=True)
class Connector(Opener):
    """``asyncpg.connect`` as an engine needs it; the dialect's ``async_creator_fn``.

    Called with asyncpg's own arguments. Transient failures (refused, name not found, reset, too
    many connections, server starting) are retried with fully jittered exponential pauses until
    ``timeout`` seconds have gone in total; the others fail at once. An address that does not
    answer holds up none of the others, and is asked anew once it does.

    Attributes:
        shuffle_hosts: Try several hosts in random order.
        observers: Told of every connect and every failure.
    """

    shuffle_hosts: bool = False
    observers: Iterable[Observer] = ()
    _scouts: Scouts = field(default_factory=Scouts, repr=False)

    async def __call__(self, *, timeout: float | None, **arguments: Any) -> DriverConnection:
        """Make one connection.

        Args:
            timeout: Seconds for everything; None or 0 is no limit.
            arguments: ``asyncpg.connect``'s; ``password`` may be a callable, sync or async.

        Raises:
            ConnectError: A subclass that says what went wrong; ``orig`` is the last cause.
            ConfigurationError: The arguments cannot work with the pooler that was found.
        """
        loop = asyncio.get_running_loop()
        progress = Progress(loop.time())
        try:
            connection, candidate = await self._within(timeout or None, progress, arguments)
        except ConnectError as error:
            failed = ConnectionOpenFailed(error.address, error.elapsed, error.attempts, error)
            shared(self.observers).notify(failed)
            raise
        took = loop.time() - progress.started
        opened = ConnectionOpened(str(candidate), took, progress.attempts, connection.pooler)
        shared(self.observers).notify(opened)
        return connection

    async def _within(
        self, timeout: float | None, progress: Progress, arguments: dict[str, Any]
    ) -> _Opened:
        try:
            async with asyncio.timeout(timeout) as bound:
                progress.deadline = bound.when()
                return await self._persist(progress, arguments)
        except ConnectError:
            raise
        except TimeoutError as error:
            cause = progress.cause or error
            if progress.cause is not None and progress.has_just_begun():
                raise failure(progress.so_far(), progress.cause) from cause
            raise errors.ConnectTimeout(progress.so_far(), cause) from cause

    async def _persist(self, progress: Progress, arguments: dict[str, Any]) -> _Opened:
        loop = asyncio.get_running_loop()
        for limit in _longest_pauses():
            try:
                return await self._try_all(progress, arguments)
            except Exception as error:
                await _give_up_unless_transient(error, progress, arguments)
                pause = _up_to(limit)
                if progress.deadline is not None and loop.time() + pause >= progress.deadline:
                    raise failure(progress.so_far(), error) from error
            await asyncio.sleep(pause)
        raise AssertionError("unreachable")

    async def _try_all(self, progress: Progress, arguments: dict[str, Any]) -> _Opened:
        """One round over all addresses; raises the last transient error of the round."""
        progress.address = str(Candidate(listed(arguments)[0]))  # until one is tried
        found = await candidates(arguments, self.reputation, shuffle=self.shuffle_hosts)
        return await self._first_usable([Trial(each, progress, arguments) for each in found])

    async def _first_usable(self, trials: Sequence[Trial]) -> _Opened:
        """One after the other; beside one that is silent, or has had its share, all the others."""
        for index, trial in enumerate(trials):
            rest = trials[index + 1 :]
            others = [*rest, *trials[:index]]
            if not others:
                return await self._try(trial)
            race = Race(
                relief=partial(self._keep_trying, others),
                due=self._until_next(trial, rest),
                discard=_terminate,
            )
            try:
                return await race.run(partial(self._try, trial))
            except Exception as error:
                if not rest or race.was_relieved or not is_transient(error):
                    raise
        raise ConfigurationError("no address to connect to")

    async def _keep_trying(self, trials: Sequence[Trial]) -> _Opened:
        """Round after round, while another address is waited for."""
        for limit in _longest_pauses():
            try:
                return await self._first_usable([each.anew() for each in trials])
            except Exception as error:  # noqa: BLE001 (raised unless it is transient)
                await _give_up_unless_transient(error, trials[0].progress, trials[0].arguments)
            await asyncio.sleep(_up_to(limit))
        raise AssertionError("unreachable")

    def _until_next(self, first: Trial, rest: Sequence[Trial]) -> Callable[[], float]:
        """What tells how long the first still has for itself."""
        now = asyncio.get_running_loop().time
        patience = self.reputation.patience_for(first.candidate, [each.candidate for each in rest])
        deadline = first.progress.deadline
        end = math.inf if deadline is None else now() + (deadline - now()) / (len(rest) + 1)

        def due() -> float:
            silent = first.silence.seconds
            if silent >= self.reputation.patience:
                self.reputation.note_bad(first.candidate)
            return min(patience - silent, end - now())

        return due

    async def _try(self, trial: Trial) -> _Opened:
        """One patient attempt; once it is silent, others beside it as soon as a scout is answered.

        The server may have come back in the meantime, and what was sent to it before be lost. The
        patient attempt goes on all the same: it may be held by a server that is waking up.
        """
        endpoint = trial.candidate.endpoint
        if endpoint is None:
            return await self._attempt(trial)
        return await Race(
            relief=partial(self._try_afresh, trial, endpoint),
            due=lambda: self.reputation.patience - trial.silence.seconds,
            discard=_terminate,
        ).run(partial(self._attempt, trial))

    async def _try_afresh(self, trial: Trial, endpoint: Endpoint) -> _Opened:
        """One attempt after the other, each when something has answered there."""
        self.reputation.note_bad(trial.candidate)
        chance = SECOND_CHANCE
        for limit in _longest_pauses():
            await self._scouts.wait_for_answer(endpoint)
            try:
                return await self._attempt_unless_silent(trial.anew(), chance)
            except Exception as error:
                if not is_transient(error):
                    raise
                chance *= 2 if isinstance(error, _Silent) else 1
            await asyncio.sleep(_up_to(limit))
        raise AssertionError("unreachable")

    async def _attempt_unless_silent(self, trial: Trial, chance: float) -> _Opened:
        return await Race(
            relief=_give_up,
            due=lambda: chance - trial.silence.seconds,
            discard=_terminate,
        ).run(partial(self._attempt, trial))

    async def _attempt(self, trial: Trial) -> _Opened:
        candidate = trial.candidate
        try:
            connection = await self.open(trial)
        except Exception as error:
            if speaks_against_address(error):
                self.reputation.note_bad(candidate)
            if is_transient(error):
                trial.progress.cause = error
            raise
        self.reputation.note_good(candidate)
        return connection, candidate


async def _give_up_unless_transient(
    error: Exception, progress: Progress, arguments: dict[str, Any]
) -> None:
    if isinstance(error, ConfigurationError | ConnectError):
        raise error
    progress.cause = error
    if type(error) is ConnectionError and await _refuses_tls(progress, arguments):
        raise errors.TLSRefused(progress.so_far(), error) from error
    if not is_transient(error):
        raise failure(progress.so_far(), error) from error


async def _refuses_tls(progress: Progress, arguments: dict[str, Any]) -> bool:
    """Ask whether the server offers TLS.

    asyncpg raises a bare ConnectionError both for a server without TLS and for one that hung
    up while it was asked; only the second is worth another attempt.
    """
    for address in listed(arguments):
        if address is None or address.is_socket or str(address) != progress.address:
            continue
        try:
            return await offers_tls((address.host, address.port or DEFAULT_PORT)) is False
        except OSError:
            return False
    return False


class _Silent(TimeoutError):
    """A second attempt has had its chance."""


async def _give_up() -> _Opened:
    raise _Silent


def _longest_pauses() -> Iterator[float]:
    limit = FIRST_PAUSE
    while True:
        yield limit
        limit = min(limit * 2, LONGEST_PAUSE)


def _up_to(limit: float) -> float:
    return random.uniform(0, limit)  # noqa: S311 (spreads load; not a secret)


def _terminate(opened: _Opened) -> None:
    connection, _ = opened
    connection.terminate()
