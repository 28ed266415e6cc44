"""One run of ``run_in_transaction``: its attempts, and the watch over each.

One attempt is one fresh connection or session, the work, and COMMIT. The watch over it tells what
no exception can: whether COMMIT was sent, and whether the server did commit.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import asyncpg
from sqlalchemy import Connection, event
from sqlalchemy import exc as sa_exc
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker

from poolkit import reports, sessions
from poolkit.driver import is_ours
from poolkit.errors import (
    ConfigurationError,
    DeadlineExceeded,
    Outcome,
    find_sqlstate,
)
from poolkit.events import TransactionRetried
from poolkit.faults import Fault, FaultKind, classify
from poolkit.pool import HandoffPool
from poolkit.sessions import IN_FAILED_TRANSACTION

if TYPE_CHECKING:
    from tenacity import AsyncRetrying, RetryCallState

_log = logging.getLogger(reports.TRANSACTIONS)

FIRST_PAUSE = 0.05
"""Seconds that the first pause lasts at most; each further one may be twice as long."""
LONGEST_PAUSE = 2.0

_THE_DATABASES = (
    sa_exc.SQLAlchemyError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)
"""What leaves the work and is not the program's own."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Options:
    """``run_in_transaction``'s keyword arguments, checked."""

    attempts: int
    deadline: float | None
    isolation_level: str | None
    idempotent: bool
    retry_lock_timeouts: bool


# -- Where connections and sessions come from ----------------------------------------------


class _Opener(Protocol):
    """What differs between an engine and a session maker."""

    def fresh(self) -> Any:
        """An async context manager that gives the work's argument."""

    def pool(self) -> Any:
        """The pool that it uses, if that is known."""

    async def begin(self, target: Any, watch: _Watch) -> None:
        """Begin the transaction under the watch."""

    async def flush(self, target: Any) -> None:
        """Send what is still held back."""


@dataclass(frozen=True, slots=True)
class _EngineOpener:
    engine: AsyncEngine

    def fresh(self) -> AsyncConnection:
        return self.engine.connect()

    def pool(self) -> Any:
        return self.engine.pool

    async def begin(self, target: AsyncConnection, watch: _Watch) -> None:
        if watch.isolation_level is not None:
            await target.execution_options(isolation_level=watch.isolation_level)
        connection: Any = target.sync_connection
        watch.over(connection)
        await target.begin()

    async def flush(self, target: AsyncConnection) -> None:
        pass


@dataclass(frozen=True, slots=True)
class _SessionOpener:
    maker: async_sessionmaker[AsyncSession]

    def fresh(self) -> AsyncSession:
        return self.maker()

    def pool(self) -> Any:
        bind = self.maker.kw.get("bind")
        return getattr(bind, "pool", None)

    async def begin(self, target: AsyncSession, watch: _Watch) -> None:
        event.listen(target.sync_session, "after_begin", watch.session_began)
        await target.begin()
        level = watch.isolation_level
        if self.maker.kw.get("bind") is not None:
            # Before the work: so a failed connect is told from an error of the work's own.
            await target.connection(
                execution_options={} if level is None else {"isolation_level": level}
            )

    async def flush(self, target: AsyncSession) -> None:
        await target.flush()


def is_lazy(source: Any) -> bool:
    """Whether it is a function that returns what connections come from."""
    return callable(source) and not isinstance(source, async_sessionmaker)


def opener_of(source: Any) -> _Opener:
    """Where connections come from, of a lazy source too."""
    if not is_lazy(source):
        return opener(source)
    made = source()
    if inspect.iscoroutine(made):
        made.close()
    return opener(made)


def opener(source: Any) -> _Opener:
    """Where connections come from.

    Raises:
        ConfigurationError: It is neither an engine nor a session maker.
    """
    if isinstance(source, AsyncEngine):
        return _EngineOpener(source)
    if isinstance(source, async_sessionmaker):
        return _SessionOpener(source)
    wanted = "give an AsyncEngine, an async_sessionmaker, or a function that returns one"
    if isinstance(source, AsyncSession | AsyncConnection):
        wanted += "; each attempt needs a fresh one"
    raise ConfigurationError(f"{type(source).__name__} will not do: {wanted}")


def no_transaction() -> ConfigurationError:
    """The error for AUTOCOMMIT."""
    return ConfigurationError(
        "in AUTOCOMMIT there is no transaction to do again: give another isolation_level, or an"
        " engine without it"
    )


# -- One attempt ---------------------------------------------------------------------------


class _Phase(Enum):
    BEGINNING = "waiting for a connection"
    WORKING = "working"
    COMMITTING = "committing"


class _Watch:
    """What the connections of one attempt may do, and how far they got.

    Attributes:
        isolation_level: What was asked for.
        phase: What the attempt is doing.
        refusal: What the work was told when it tried to commit.
    """

    def __init__(self, isolation_level: str | None) -> None:
        self.isolation_level = isolation_level
        self.phase = _Phase.BEGINNING
        self.refusal: sa_exc.InvalidRequestError | None = None
        self._connections: list[Connection] = []
        self._committing: list[Connection] = []
        self._was_ended = False

    def session_began(self, _session: Any, _transaction: Any, connection: Connection) -> None:
        """Called by a session with each connection that it takes."""
        level = self.isolation_level
        if level not in {None, connection.get_execution_options().get("isolation_level")}:
            raise ConfigurationError(
                f"isolation_level={level!r} cannot be given to a session that has several engines"
                " or began again after a rollback: say it to the engine, by"
                " engine.execution_options(isolation_level=...)"
            )
        self.over(connection)

    def over(self, connection: Connection) -> None:
        """Watch this connection too."""
        if getattr(connection.connection.dbapi_connection, "autocommit", False):
            raise no_transaction()
        if connection not in self._connections:
            self._connections.append(connection)
            event.listen(connection, "commit", self._before_commit)
            event.listen(connection, "rollback", self._before_rollback)

    def work_is_done(self) -> None:
        """The work is done; raises what it was told if it tried to commit itself."""
        if self.refusal is not None:
            raise self.refusal
        self.phase = _Phase.COMMITTING

    def end(self) -> None:
        """Leave the connections alone; one that a session was bound to lives on."""
        for connection in self._connections:
            event.remove(connection, "commit", self._before_commit)
            event.remove(connection, "rollback", self._before_rollback)

    def _before_commit(self, connection: Connection) -> None:
        try:
            self._let_commit(connection)
        except BaseException:
            _roll_back(connection)
            raise

    def _before_rollback(self, connection: Connection) -> None:
        # A flush that fails rolls back by itself; afterwards nobody can tell.
        self._was_ended = self._was_ended or _is_ended(connection)

    def _let_commit(self, connection: Connection) -> None:
        if self.phase is not _Phase.COMMITTING:
            self.refusal = sa_exc.InvalidRequestError(
                "run_in_transaction commits when the work is done: take commit(), and begin() as"
                " a block, out of the work; begin_nested() is fine"
            )
            raise self.refusal
        driver: Any = connection.connection.driver_connection
        if is_ours(driver):
            driver.check_next_commit()
        else:
            connection.exec_driver_sql("SELECT 1")  # fails where the transaction is aborted
        self._committing.append(connection)

    def was_ended_by_sql(self) -> bool:
        """Whether the server answers outside of a transaction, as after a COMMIT sent as text."""
        if self.phase is not _Phase.WORKING:
            return False
        return self._was_ended or any(
            connection.in_transaction() and _is_ended(connection)
            for connection in self._connections
        )

    def has_committed(self) -> bool:
        """Whether one has, and yet there is an error: of a second engine, or of a listener."""
        return any(connection.get_transaction() is None for connection in self._committing)


def _is_ended(connection: Connection) -> bool:
    """Whether the server is in no transaction any more."""
    if connection.closed or connection.invalidated:
        return False
    driver = connection.connection.driver_connection
    return isinstance(driver, asyncpg.Connection) and not driver.is_in_transaction()


def _roll_back(connection: Connection) -> None:
    """After an error before COMMIT, where SQLAlchemy takes the transaction for ended by it."""
    if connection.invalidated:
        return
    try:
        connection.connection.rollback()
    except Exception:  # noqa: BLE001 (what led here is raised; nobody uses the connection again)
        connection.invalidate()


@dataclass(frozen=True, slots=True)
class _Attempt(Generic[T]):
    """How one attempt ended.

    Attributes:
        result: What the work returned.
        error: What was raised instead.
        fault: What that means, if the work may be done again.
    """

    result: T | None = None
    error: Exception | None = None
    fault: Fault | None = None


class Run(Generic[T]):
    """One call of ``run_in_transaction``."""

    def __init__(
        self, opener: _Opener, work: Callable[[Any], Awaitable[T]], options: Options
    ) -> None:
        self._opener = opener
        self._work = work
        self._options = options
        self._begun = 0

    async def result(self) -> T:
        """What the work returned; raises what ended the last attempt."""
        self._time = asyncio.get_running_loop().time
        self._since = self._time()
        deadline = self._options.deadline
        self._ends = None if deadline is None else self._since + deadline
        last: _Attempt[T] = await self._retrying()(self._attempt)
        if last.error is None:
            return last.result  # type: ignore[return-value]
        if last.fault is not None:
            last.error.add_note(f"run_in_transaction gave up after {self._spent()}")
        try:
            raise last.error
        finally:
            del last  # or the error's traceback would refer to itself

    def _retrying(self) -> AsyncRetrying:
        # Here, because it imports Tornado where that is installed.
        from tenacity import (  # noqa: PLC0415
            AsyncRetrying,
            retry_if_result,
            wait_random_exponential,
        )

        return AsyncRetrying(
            sleep=_pause,
            wait=wait_random_exponential(multiplier=FIRST_PAUSE, max=LONGEST_PAUSE),
            stop=self._is_over,
            retry=retry_if_result(lambda attempt: attempt.fault is not None),
            before_sleep=self._tell,
            retry_error_callback=_last_attempt,
        )

    def _is_over(self, state: RetryCallState) -> bool:
        if state.attempt_number >= self._options.attempts:
            return True
        return self._ends is not None and self._time() + state.upcoming_sleep >= self._ends

    def _tell(self, state: RetryCallState) -> None:
        failed = _last_attempt(state)
        kind, pause = failed.fault.kind, state.upcoming_sleep
        pool = self._opener.pool()
        reports.retried(
            attempt=self._begun,
            pause=pause,
            kind=kind,
            error=failed.error,
            pool=getattr(pool, "name", None),
        ).write()
        if isinstance(pool, HandoffPool):
            pool.counters.retries += 1
            if pool.observers.wanting(TransactionRetried):
                told = TransactionRetried(self._begun, pause, kind, failed.error)
                pool.observers.notify(told)

    def _spent(self) -> str:
        seconds = self._time() - self._since
        return f"{self._begun} attempt{'s' * (self._begun != 1)} in {seconds:.1f} s"

    async def _attempt(self) -> _Attempt[T]:
        """Raises nothing but what is no ``Exception``, a cancellation for one."""
        self._begun += 1
        watch = _Watch(self._options.isolation_level)
        clock = asyncio.timeout_at(self._ends)
        attempt: _Attempt[T] | None = None
        try:
            async with clock, self._opener.fresh() as target:
                attempt = await self._work_and_commit(target, watch, clock)
        except Exception as error:  # noqa: BLE001 (raised when the attempts are over, or logged)
            if attempt is not None:  # it is done: giving back the connection changes nothing
                _log.warning("the connection was not given back in good order", exc_info=True)
            elif clock.expired():
                attempt = _Attempt(error=self._timeout(watch, error))
            else:
                attempt = self._failed(error, watch)
        finally:
            watch.end()
        return attempt

    async def _work_and_commit(
        self, target: Any, watch: _Watch, clock: asyncio.Timeout
    ) -> _Attempt[T]:
        try:
            await self._opener.begin(target, watch)
            watch.phase = _Phase.WORKING
            result = await self._called(target)
            await self._opener.flush(target)
            await self._stop(clock, watch)
            watch.work_is_done()
            await target.commit()
        except Exception as error:  # noqa: BLE001 (raised when the attempts are over)
            return self._failed(error, watch)
        return _Attempt(result)

    async def _called(self, target: Any) -> T:
        begun = self._work(target)
        if not inspect.isawaitable(begun):
            raise ConfigurationError(
                f"the work is not async: it returned {type(begun).__name__}, nothing to await"
            )
        return await begun

    async def _stop(self, clock: asyncio.Timeout, watch: _Watch) -> None:
        """Let COMMIT finish: nobody could tell what became of one that was cut short."""
        if clock.expired():
            await asyncio.sleep(0)  # the cancellation is under way, unless the work swallowed it
            raise self._timeout(watch, TimeoutError())
        clock.reschedule(None)

    def _timeout(self, watch: _Watch, error: BaseException) -> DeadlineExceeded:
        return DeadlineExceeded(None, None, error).explained(
            f"nothing was committed: the deadline of {self._options.deadline:g} s ended attempt"
            f" {self._begun} ({watch.phase.value})"
        )

    def _failed(self, error: Exception, watch: _Watch) -> _Attempt[T]:
        if watch.phase is _Phase.COMMITTING and find_sqlstate(error) == IN_FAILED_TRANSACTION:
            aborted = sessions.aborted(error)
            aborted.__cause__ = error
            return _Attempt(error=aborted)
        return _Attempt(error=error, fault=self._passing_fault(error, watch))

    def _passing_fault(self, error: Exception, watch: _Watch) -> Fault | None:
        """What the error means, if the work may be done again after it."""
        if watch.phase is _Phase.WORKING and not isinstance(error, _THE_DATABASES):
            return None
        fault = classify(error)
        if fault.outcome is Outcome.UNKNOWN or watch.has_committed():
            if not self._options.idempotent:
                error.add_note("it may have been committed, so the work was not done again")
                return None
            return fault if fault.retryable or fault.connection_lost else None
        if fault.kind is FaultKind.LOCK_TIMEOUT and not self._options.retry_lock_timeouts:
            return None
        if not fault.retryable or watch.was_ended_by_sql():
            return None
        return fault


def _last_attempt(state: RetryCallState) -> Any:
    outcome: Any = state.outcome
    return outcome.result()


async def _pause(seconds: float) -> None:
    await asyncio.sleep(seconds)
