"""Whole transactions, done again after faults that pass."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Awaitable, Callable, Coroutine
from typing import (
    Any,
    Concatenate,
    Literal,
    ParamSpec,
    Protocol,
    TypedDict,
    TypeVar,
    Unpack,
    overload,
)

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, async_sessionmaker

from poolkit.attempts import Options, Run, is_lazy, no_transaction, opener, opener_of
from poolkit.errors import ConfigurationError

ATTEMPTS = 5
DEADLINE = 30.0

IsolationLevel = Literal["READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]

_ISOLATION_LEVELS = ("READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE")

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S", bound=AsyncSession)
Given_co = TypeVar("Given_co", AsyncConnection, AsyncSession, covariant=True)


class TransactionOptions(TypedDict, total=False):
    """The keyword arguments of ``run_in_transaction``."""

    attempts: int
    deadline: float | None
    isolation_level: IsolationLevel | None
    idempotent: bool
    retry_lock_timeouts: bool


class TransactionDecorator(Protocol[Given_co]):
    """What ``run_in_transaction`` without a work returns."""

    def __call__(
        self, work: Callable[Concatenate[Given_co, P], Awaitable[T]], /
    ) -> Callable[P, Coroutine[Any, Any, T]]:
        """A function that has the first argument given to it."""


EngineSource = AsyncEngine | Callable[[], AsyncEngine]
SessionSource = async_sessionmaker[S] | Callable[[], async_sessionmaker[S]]


@overload
def run_in_transaction(
    source: EngineSource,
    work: Callable[[AsyncConnection], Awaitable[T]],
    **options: Unpack[TransactionOptions],
) -> Coroutine[Any, Any, T]: ...
@overload
def run_in_transaction(
    source: SessionSource[S],
    work: Callable[[S], Awaitable[T]],
    **options: Unpack[TransactionOptions],
) -> Coroutine[Any, Any, T]: ...
@overload
def run_in_transaction(
    source: EngineSource, **options: Unpack[TransactionOptions]
) -> TransactionDecorator[AsyncConnection]: ...
@overload
def run_in_transaction(
    source: SessionSource[AsyncSession], **options: Unpack[TransactionOptions]
) -> TransactionDecorator[AsyncSession]: ...


def run_in_transaction(
    source: Any,
    work: Any = None,
    *,
    attempts: int = ATTEMPTS,
    deadline: float | None = DEADLINE,
    isolation_level: IsolationLevel | None = None,
    idempotent: bool = False,
    retry_lock_timeouts: bool = False,
) -> Any:
    """Do a unit of work in a transaction of its own, and again as a whole after a passing fault.

    That is a deadlock, a serialization failure, a connection lost before COMMIT, a stale plan, a
    failure to get a connection. Between attempts is a pause of random length. The work's own
    exceptions go through as they are, and nothing is repeated after a cancellation or after the
    answer to COMMIT was lost.

    Without ``work`` it is a decorator: ``@run_in_transaction(engine)``.

    Args:
        source: An ``AsyncEngine``, an ``async_sessionmaker``, or a function that returns one.
        work: An async callable that takes the ``AsyncConnection``, or the ``AsyncSession`` where
            a session maker is given. It may roll back; it must not commit.
        attempts: How often the work is begun at most.
        deadline: Seconds in total, pauses included. It ends an attempt that is under way, but
            not its COMMIT; None is no limit.
        isolation_level: Of the transaction; None is the engine's.
        idempotent: Whether doing the work twice does no harm: then it is repeated even if nobody
            knows whether COMMIT took effect.
        retry_lock_timeouts: Whether to repeat after a lock timeout too.

    Returns:
        What the work returned, once it is committed.

    Raises:
        ConfigurationError: An argument will not do.
        TransactionAborted: The work swallowed an error of the database.
        DeadlineExceeded: The deadline ended the work.
        Exception: The last fault's own error when attempts or time are used up.
    """
    _check(attempts, deadline, isolation_level)
    options = Options(attempts, deadline, isolation_level, idempotent, retry_lock_timeouts)
    if not is_lazy(source):
        opener(source)
    if work is None:
        return functools.partial(_decorated, source, options)
    return Run(opener_of(source), _checked(work), options).result()


def _check(attempts: Any, deadline: Any, isolation_level: Any) -> None:
    if isinstance(attempts, bool) or not isinstance(attempts, int) or attempts < 1:
        raise ConfigurationError(f"attempts={attempts!r}: give a whole number from 1 up")
    if deadline is not None and not _is_duration(deadline):
        raise ConfigurationError(f"deadline={deadline!r}: give seconds above 0; None is no limit")
    if isolation_level == "AUTOCOMMIT":
        raise no_transaction()
    if isolation_level is not None and isolation_level not in _ISOLATION_LEVELS:
        raise ConfigurationError(
            f"isolation_level={isolation_level!r}: give one of {', '.join(_ISOLATION_LEVELS)}"
        )


def _is_duration(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _checked(work: Any) -> Callable[[Any], Awaitable[Any]]:
    if inspect.iscoroutine(work):
        work.close()
        raise ConfigurationError(
            "the work is a coroutine, which can run only once: give the async function itself,"
            " with functools.partial or a lambda for its other arguments"
        )
    if not callable(work):
        raise ConfigurationError(f"the work is no async callable but {type(work).__name__}")
    return work  # type: ignore[no-any-return]


def _decorated(source: Any, options: Options, work: Any, /) -> Callable[..., Any]:
    if not inspect.iscoroutinefunction(work):
        raise ConfigurationError(f"only an async function can be decorated, {work!r} is none")

    @functools.wraps(work)
    async def run(*args: Any, **kwargs: Any) -> Any:
        bound = functools.partial(_call_with_first, work, args, kwargs)
        return await Run(opener_of(source), bound, options).result()

    signature = inspect.signature(work)
    rest = list(signature.parameters.values())[1:]
    run.__signature__ = signature.replace(parameters=rest)  # type: ignore[attr-defined]
    return run


def _call_with_first(work: Any, args: Any, kwargs: Any, first: Any) -> Any:
    return work(first, *args, **kwargs)
