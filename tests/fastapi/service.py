"""A service on poolkit, as people write them: what ``uvicorn service:app`` serves.

Each row is written in the way that its path says. The rest is for the test to look at.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

from fastapi import BackgroundTasks, FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from poolkit import get_engine, pool_stats, session
from poolkit.fastapi import AutocommitSessionDep, ConnectionDep, SessionDep, install, lifespan

PIECE = b"x" * 4096
PIECES = 8
STREAMS = 20
"""So many answers have to be under way at once before any of them goes on."""

INSERT = text("INSERT INTO written (id) VALUES (:id)")
ORPHAN = text("INSERT INTO children (id, parent) VALUES (:id, -1)")
BACKGROUND = text("INSERT INTO written (id, part) VALUES (:id, 'background')")
SLEEP = text("SELECT pg_sleep(:seconds)")
COUNT = text("SELECT count(*) FROM written")

app = FastAPI(lifespan=lifespan())
install(app)
streams = asyncio.Barrier(STREAMS)


@app.post("/rows/{row}")
async def write(row: int, session: SessionDep, work: float = 0.0, wait: float = 0.0) -> int:
    """Written; ``work`` at the database, then ``wait`` for somebody else."""
    await session.execute(INSERT, {"id": row})
    if work:
        await session.execute(SLEEP, {"seconds": work})
    await asyncio.sleep(wait)
    return row


@app.post("/core/{row}")
async def write_core(row: int, connection: ConnectionDep, work: float = 0.0) -> int:
    """The same on a connection."""
    await connection.execute(INSERT, {"id": row})
    if work:
        await connection.execute(SLEEP, {"seconds": work})
    return row


@app.post("/orphans/{row}")
async def orphan(row: int, session: SessionDep) -> int:
    """Nothing fails but the COMMIT."""
    await session.execute(INSERT, {"id": row})
    await session.execute(ORPHAN, {"id": row})
    return row


@app.post("/refused/{row}")
async def refused(row: int, session: SessionDep) -> int:
    """An answer that is an exception."""
    await session.execute(INSERT, {"id": row})
    raise HTTPException(409, "not this one")


@app.post("/broken/{row}")
async def broken(row: int, session: SessionDep) -> int:
    """A bug after the write."""
    await session.execute(INSERT, {"id": row})
    raise KeyError(row)


@app.post("/swallowed/{row}")
async def swallowed(row: int, session: SessionDep) -> int:
    """A failed statement that the program goes on after: the server commits nothing any more."""
    await session.execute(INSERT, {"id": row})
    with suppress(DBAPIError):
        await session.execute(text("SELECT 1 / 0"))
    return row


@app.post("/swallowed-core/{row}")
async def swallowed_core(row: int, connection: ConnectionDep) -> int:
    """The same on a connection."""
    await connection.execute(INSERT, {"id": row})
    with suppress(DBAPIError):
        await connection.execute(text("SELECT 1 / 0"))
    return row


@app.post("/streams/{row}")
async def stream(row: int, session: SessionDep, background: BackgroundTasks) -> StreamingResponse:
    """A row, a long answer, and a row in the background."""
    await session.execute(INSERT, {"id": row})
    background.add_task(write_in_background, row)
    return StreamingResponse(pieces(), background=background)


async def pieces() -> AsyncIterator[bytes]:
    """The rest comes when so many have begun."""
    yield PIECE
    await streams.wait()
    for _ in range(PIECES - 1):
        yield PIECE


async def write_in_background(row: int) -> None:
    """With the session of a script."""
    async with session() as opened:
        await opened.execute(BACKGROUND, {"id": row})


@app.get("/sleep")
async def sleep(session: SessionDep, seconds: float) -> None:
    """Holds a connection."""
    await session.execute(SLEEP, {"seconds": seconds})


@app.get("/count")
async def count(session: AutocommitSessionDep) -> int:
    """A read."""
    return await session.scalar(COUNT) or 0


@app.get("/stats")
async def stats() -> dict[str, int]:
    """How the pool stands."""
    now = pool_stats(get_engine())
    return {"used": now.used, "idle": now.idle, "opening": now.opening, "waiting": now.waiting}
