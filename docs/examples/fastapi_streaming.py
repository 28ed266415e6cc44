"""FastAPI: what runs after the response has begun, and what has to hold on."""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import BackgroundTasks, Depends, FastAPI
from fastapi.responses import StreamingResponse
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from poolkit import get_engine, pool_stats, session
from poolkit.fastapi import SessionDep, get_session, lifespan

NUMBERS = text("SELECT generate_series(1, 3)")
HeldOn = Annotated[AsyncSession, Depends(get_session, scope="request")]

app = FastAPI(lifespan=lifespan())


async def count(name: str) -> None:
    async with session() as opened:
        print(name, await opened.scalar(text("SELECT 1")))


@app.get("/task")
async def with_task(session: SessionDep, tasks: BackgroundTasks) -> int:
    """The session is over when the task begins: it opens its own."""
    tasks.add_task(count, "in the background:")
    return await session.scalar(text("SELECT 1"))


@app.get("/stream")
async def stream(session: HeldOn) -> StreamingResponse:
    """One transaction, and one connection, until the last row is sent."""

    async def rows() -> AsyncIterator[str]:
        async for number in await session.stream_scalars(NUMBERS):
            print("connections in use:", pool_stats(get_engine()).used)
            yield f"{number}\n"

    return StreamingResponse(rows())


# The rest only shows that it works.
async def main() -> None:
    """Ask the application, without a network between."""
    import httpx  # noqa: PLC0415

    transport = httpx.ASGITransport(app)
    async with lifespan()(app), httpx.AsyncClient(transport=transport) as client:
        await client.get("http://app/task")
        print((await client.get("http://app/stream")).text.split())


if __name__ == "__main__":
    import asyncio

    asyncio.run(main())
