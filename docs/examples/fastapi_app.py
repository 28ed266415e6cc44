"""FastAPI: one engine for the life of the application, one session for each request."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, Request
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from poolkit import create_async_engine, drain


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    engine = create_async_engine()
    app.state.sessions = async_sessionmaker(engine, expire_on_commit=False)
    yield
    await drain(engine)


async def session(request: Request) -> AsyncIterator[AsyncSession]:
    async with request.app.state.sessions.begin() as opened:
        yield opened


# "function": committed, and the connection given back, before the response is sent.
SessionDep = Annotated[AsyncSession, Depends(session, scope="function")]

app = FastAPI(lifespan=lifespan)


@app.get("/database")
async def database(session: SessionDep) -> str:
    return str(await session.scalar(text("SELECT current_database()")))


# The rest only shows that it works.
async def main() -> None:
    """Ask the application, without a network between."""
    import httpx  # noqa: PLC0415

    transport = httpx.ASGITransport(app)
    async with lifespan(app), httpx.AsyncClient(transport=transport) as client:
        print((await client.get("http://app/database")).json())


if __name__ == "__main__":
    import asyncio

    asyncio.run(main())
