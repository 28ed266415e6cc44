"""ORM sessions that say so when their COMMIT is a rollback."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session

from poolkit.driver import is_ours
from poolkit.errors import TransactionAborted, find_sqlstate

IN_FAILED_TRANSACTION = "25P02"
_CONNECTIONS = "poolkit.connections"


class NotingSession(Session):
    """A session that notes its connections, for ``commit`` below."""


@event.listens_for(NotingSession, "after_begin")
def _note(session: Session, _transaction: Any, connection: Connection) -> None:
    session.info.setdefault(_CONNECTIONS, {})[connection.engine] = connection


def make_sessionmaker(engine: AsyncEngine) -> async_sessionmaker[AsyncSession]:
    """A session maker on the engine; its sessions' objects stay readable after a commit."""
    return async_sessionmaker(engine, expire_on_commit=False, sync_session_class=NotingSession)


async def commit(session: AsyncSession) -> None:
    """Commit what a session has done.

    Where a statement had failed and the program went on, the server answers COMMIT with a
    rollback, which SQLAlchemy and asyncpg report as done. Sessions of ``get_sessionmaker()``
    report it as what it is.

    Raises:
        TransactionAborted: Nothing was committed.
    """
    await commit_by(session.commit, session.info.get(_CONNECTIONS, {}).values())


async def commit_by(
    commit: Callable[[], Awaitable[None]], connections: Iterable[Connection]
) -> None:
    """Commit connections, each of which tells if the server answers with a rollback.

    Raises:
        TransactionAborted: Nothing was committed.
    """
    for connection in connections:
        if not connection.closed and not connection.invalidated:
            driver = connection.connection.driver_connection
            if is_ours(driver):
                driver.check_next_commit()
    try:
        await commit()
    except Exception as error:
        if find_sqlstate(error) == IN_FAILED_TRANSACTION:
            raise aborted(error) from error
        raise


def aborted(error: BaseException) -> TransactionAborted:
    """The error for a COMMIT that was a rollback."""
    return TransactionAborted(None, None, error).explained(
        "nothing was committed: a statement of the work failed, the work went on, and the server"
        " had aborted the transaction"
    )
