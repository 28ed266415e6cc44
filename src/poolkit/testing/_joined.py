"""Sessions that share one transaction, which is rolled back at the end of a test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import DBAPIError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.util import await_only, greenlet_spawn
from sqlalchemy.util.concurrency import in_greenlet

from poolkit import WrongEventLoop
from poolkit.sessions import NotingSession, commit
from poolkit.testing._endings import Ending

_REMEDY = (
    "use one event loop for the whole test (with TestClient: `with TestClient(app) as client:`),"
    " or poolkit_database, whose commits are real"
)

_PATIENCE = 10.0
_STUCK = (
    "the sessions of a test share one transaction and take turns, and another task's session has"
    f" been open for {_PATIENCE:g} s: commit or close it first, or use poolkit_database"
)


class TestTransaction:
    """A transaction on a connection of its own, begun at first use and never committed."""

    __test__ = False

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine.sync_engine
        self._connection: Connection | None = None
        self._ending: Ending | None = None
        self._opening = asyncio.Lock()  # two sessions may come for it at once
        self._turns: dict[JoinedSession, asyncio.Task[Any] | None] = {}
        self._turn_ended = asyncio.Event()

    def connection(self) -> Connection:
        """The connection, inside the transaction; to be called in SQLAlchemy's greenlet."""
        if self._ending is None:
            await_only(self._opening.acquire())
            try:
                if self._ending is None:
                    self._begin()
            finally:
                self._opening.release()
        if self._connection is None:
            raise WrongEventLoop(f"the test's transaction ended with its event loop: {_REMEDY}")
        if self._ending is None or self._ending.loop is not asyncio.get_running_loop():
            raise WrongEventLoop(f"the test's transaction is on another event loop: {_REMEDY}")
        return self._connection

    def take_turn(self, session: JoinedSession) -> None:
        """Wait for sessions of other tasks to end: of savepoints, the last set is released first.

        To be called in SQLAlchemy's greenlet.
        """
        task = asyncio.current_task()
        if session in self._turns:
            return
        while any(other is not task and not _is_over(other) for other in self._turns.values()):
            self._turn_ended.clear()
            try:
                await_only(asyncio.wait_for(self._turn_ended.wait(), _PATIENCE))
            except TimeoutError:
                raise InvalidRequestError(_STUCK) from None
        if session.takes_turns:
            self._turns[session] = task

    def end_turn(self, session: JoinedSession) -> None:
        """Let the next one in."""
        if self._turns.pop(session, self) is not self:
            self._turn_ended.set()

    def roll_back(self) -> None:
        """End it, on its loop."""
        if self._ending is not None:
            self._ending.finish()

    def _begin(self) -> None:
        connection = self.engine.connect()
        try:
            connection.begin()
            event.listen(connection, "commit", _refuse)
            event.listen(connection, "release_savepoint", _undo_if_aborted)
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        self._ending = Ending(self._close)

    async def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await greenlet_spawn(connection.close)


def _is_over(task: asyncio.Task[Any] | None) -> bool:
    return task is not None and task.done()


def _refuse(_: Connection) -> None:
    raise InvalidRequestError(
        "the test's transaction is rolled back at its end and cannot be committed: commit by the"
        " session, whose commits are savepoints, or use poolkit_database, whose commits are real"
    )


def _undo_if_aborted(connection: Connection, name: str, _: Any) -> None:
    """Before a savepoint is released: a failure must not end what the test goes on with.

    SQLAlchemy forgets a savepoint that the server refused to release, and would not go back to it.
    """
    try:
        connection.exec_driver_sql("SELECT 1")
    except DBAPIError:
        connection.exec_driver_sql(f"ROLLBACK TO SAVEPOINT {name}")
        raise


class JoinedSession(NotingSession):
    """A session inside a test's transaction: its commits release a savepoint.

    Attributes:
        test_transaction: That transaction.
        takes_turns: Whether sessions of other tasks wait for it to end.
    """

    def __init__(
        self, *args: Any, transaction: TestTransaction, takes_turns: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(*args, join_transaction_mode="create_savepoint", **kwargs)
        self.test_transaction = transaction
        self.takes_turns = takes_turns

    def get_bind(self, *_: Any, **__: Any) -> Engine | Connection:
        """The transaction's connection; whoever asks outside of a statement gets the engine."""
        if not in_greenlet():
            return self.test_transaction.engine
        connection = self.test_transaction.connection()
        self.test_transaction.take_turn(self)  # last: its begin follows with no wait between
        return connection


@event.listens_for(JoinedSession, "after_transaction_end")
def _ended(session: JoinedSession, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        session.test_transaction.end_turn(session)


def joined_sessionmaker(
    transaction: TestTransaction, session_class: type[AsyncSession]
) -> async_sessionmaker[AsyncSession]:
    """A session maker whose sessions are all inside the test's transaction."""
    base = session_class.sync_session_class
    joined: type[Session] = JoinedSession
    if not issubclass(JoinedSession, base):
        joined = type("JoinedSession", (JoinedSession, base), {})
    return async_sessionmaker(
        class_=session_class,
        sync_session_class=joined,
        expire_on_commit=False,
        transaction=transaction,
    )


def as_dependency(
    sessions: async_sessionmaker[AsyncSession],
) -> Callable[[], AsyncIterator[AsyncSession]]:
    """A dependency for FastAPI: a session, committed at the end, rolled back on any exception."""

    async def get_session() -> AsyncIterator[AsyncSession]:
        async with sessions() as session:
            yield session
            await commit(session)

    return get_session
