"""Sessions and connections for handlers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Depends
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from starlette.requests import HTTPConnection

from poolkit.fastapi.clients import Client
from poolkit.fastapi.engines import engine_of
from poolkit.fastapi.lazy import LazyConnection
from poolkit.fastapi.sessions import AutocommitSession, HandlerSession
from poolkit.sessions import commit


async def get_session(connection: HTTPConnection) -> AsyncIterator[AsyncSession]:
    """A session for the handler: ``SessionDep``.

    It takes a connection at its first use. When the handler returns it is committed, before the
    response is sent; after any exception, and if the client has gone, it is rolled back. Its
    objects stay readable, and it itself cannot be used any more.

    Raises:
        TransactionAborted: The handler swallowed an error of the database: nothing is committed.
        HTTPException: 499: the client has gone, so nothing is committed.
    """
    client = Client(connection)
    session = AsyncSession(
        engine_of(connection),
        sync_session_class=HandlerSession,
        expire_on_commit=False,
        close_resets_only=False,
    )
    try:
        yield session
        if session.in_transaction():
            await client.must_be_there()
            await commit(session)
    finally:
        if session.in_transaction():
            await _roll_back(session)
        else:
            session.sync_session.close()  # it has no connection: nothing to wait for


async def get_connection(connection: HTTPConnection) -> AsyncIterator[AsyncConnection]:
    """A connection for the handler: ``ConnectionDep``; otherwise as ``get_session``.

    Raises:
        TransactionAborted: The handler swallowed an error of the database: nothing is committed.
        HTTPException: 499: the client has gone, so nothing is committed.
    """
    client = Client(connection)
    lazy = LazyConnection(engine_of(connection))
    try:
        yield lazy
        if lazy.in_transaction():
            await client.must_be_there()
            await lazy.commit()
    finally:
        await lazy.end()


async def get_autocommit_session(connection: HTTPConnection) -> AsyncIterator[AsyncSession]:
    """A session without a transaction: ``AutocommitSessionDep``.

    Each statement is its own transaction, so that a read is one round trip. What is pending when
    the handler returns is flushed, statement by statement: nothing can be rolled back.
    """
    session = AsyncSession(
        engine_of(connection),
        sync_session_class=AutocommitSession,
        expire_on_commit=False,
        close_resets_only=False,
    )
    try:
        yield session
        sync = session.sync_session
        if sync.new or sync.dirty or sync.deleted:
            await session.flush()
        sync.close()  # nothing to wait for: no transaction is to be ended
    except BaseException:
        await _roll_back(session)
        raise


async def _roll_back(session: AsyncSession) -> None:
    """Close it, which no cancellation interrupts."""
    await session.__aexit__(None, None, None)


SessionDep = Annotated[AsyncSession, Depends(get_session, scope="function")]
ConnectionDep = Annotated[AsyncConnection, Depends(get_connection, scope="function")]
AutocommitSessionDep = Annotated[AsyncSession, Depends(get_autocommit_session, scope="function")]
