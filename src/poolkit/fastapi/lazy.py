"""A connection that is taken from the pool at its first use."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractAsyncContextManager
from functools import wraps
from typing import Any

from sqlalchemy import exc as sa_exc
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncTransaction

from poolkit.fastapi.sessions import ended
from poolkit.sessions import commit_by


def _starting(method: Any) -> Any:
    """The method, with the connection taken first."""

    @wraps(method)
    async def started(self: LazyConnection, *args: Any, **kwargs: Any) -> Any:
        await self.ensure_started()
        return await method(self, *args, **kwargs)

    return started


class LazyConnection(AsyncConnection):
    """An ``AsyncConnection`` that starts by itself, and has an end that is final.

    ``scalar``, ``scalars`` and ``stream_scalars`` are SQLAlchemy's, on the methods here.
    """

    __slots__ = ("_has_ended", "_is_starting")

    def __init__(self, engine: AsyncEngine) -> None:
        super().__init__(engine)
        self._has_ended = self._is_starting = False

    # -- Beginning and end ---------------------------------------------------------------------

    async def ensure_started(self) -> None:
        """Take a connection, unless there is one.

        Raises:
            ResourceClosedError: The handler has ended.
        """
        if self.sync_connection is None or self._has_ended:
            await self.start()

    async def start(self, is_ctxmanager: bool = False) -> AsyncConnection:  # noqa: FBT001, FBT002
        """Take a connection.

        Raises:
            ResourceClosedError: The handler has ended.
            InvalidRequestError: There is one, or another task is taking it.
        """
        if self._has_ended:
            ended("connection")
        if self._is_starting:
            raise sa_exc.InvalidRequestError("two tasks use one connection at the same time")
        self._is_starting = True
        try:
            return await super().start(is_ctxmanager)
        finally:
            self._is_starting = False

    async def end(self) -> None:
        """Give it back for good; what is not committed is rolled back."""
        self._has_ended = True
        if self.sync_connection is not None and not self.sync_connection.closed:
            await super().__aexit__(None, None, None)  # which no cancellation interrupts

    # -- What takes a connection first ---------------------------------------------------------

    exec_driver_sql = _starting(AsyncConnection.exec_driver_sql)
    execute = _starting(AsyncConnection.execute)
    execution_options = _starting(AsyncConnection.execution_options)
    get_isolation_level = _starting(AsyncConnection.get_isolation_level)
    get_raw_connection = _starting(AsyncConnection.get_raw_connection)
    invalidate = _starting(AsyncConnection.invalidate)
    run_sync = _starting(AsyncConnection.run_sync)

    def stream(self, *args: Any, **kwargs: Any) -> Any:
        """As SQLAlchemy's."""
        return _StartingStream(self, super().stream(*args, **kwargs))

    def begin(self) -> AsyncTransaction:
        """As SQLAlchemy's."""
        return _StartingTransaction(self)

    def begin_nested(self) -> AsyncTransaction:
        """As SQLAlchemy's."""
        return _StartingTransaction(self, nested=True)

    # -- What needs none -----------------------------------------------------------------------

    async def commit(self) -> None:
        """Commit; does nothing where nothing was done.

        Raises:
            TransactionAborted: The server rolled back, because a statement had failed.
        """
        if self.in_transaction():
            await commit_by(super().commit, (self._proxied,))

    async def rollback(self) -> None:
        """Roll back; does nothing where nothing was done."""
        if self.sync_connection is not None:
            await super().rollback()

    async def close(self) -> None:
        """Give the connection back; does nothing where there is none."""
        if self.sync_connection is not None:
            await super().close()

    def in_transaction(self) -> bool:
        """Whether a transaction is in progress."""
        return self.sync_connection is not None and super().in_transaction()

    def in_nested_transaction(self) -> bool:
        """Whether a savepoint is in progress."""
        return self.sync_connection is not None and super().in_nested_transaction()

    def get_transaction(self) -> AsyncTransaction | None:
        """The transaction in progress."""
        return None if self.sync_connection is None else super().get_transaction()

    def get_nested_transaction(self) -> AsyncTransaction | None:
        """The savepoint in progress."""
        return None if self.sync_connection is None else super().get_nested_transaction()

    @property
    def closed(self) -> bool:
        """Whether it cannot be used any more."""
        return self._has_ended or (self.sync_connection is not None and super().closed)

    @property
    def invalidated(self) -> bool:
        """Whether the connection beneath was invalidated."""
        return self.sync_connection is not None and super().invalidated

    @property  # type: ignore[misc]
    def dialect(self) -> Dialect:
        """The engine's."""
        return self.sync_engine.dialect


class _StartingTransaction(AsyncTransaction):
    """A transaction on a connection that may not have been started."""

    __slots__ = ()

    connection: LazyConnection

    async def start(self, is_ctxmanager: bool = False) -> AsyncTransaction:  # noqa: FBT001, FBT002
        """Begin it."""
        await self.connection.ensure_started()
        return await super().start(is_ctxmanager)


class _StartingStream(AbstractAsyncContextManager[Any]):
    """A stream on a connection that may not have been started; awaited, or a context manager."""

    __slots__ = ("_connection", "_stream")

    def __init__(self, connection: LazyConnection, stream: Any) -> None:
        self._connection = connection
        self._stream = stream

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._begin().__await__()

    async def _begin(self) -> Any:
        await self._connection.ensure_started()
        return await self._stream

    async def __aenter__(self) -> Any:
        await self._connection.ensure_started()
        return await self._stream.__aenter__()

    async def __aexit__(self, *error: object) -> Any:
        return await self._stream.__aexit__(*error)
