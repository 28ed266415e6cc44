"""SQLModel in FastAPI: a SessionDep of one's own, with SQLModel's class."""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Depends, FastAPI
from sqlmodel import Field, SQLModel, select
from sqlmodel.ext.asyncio.session import AsyncSession

from poolkit import get_engine
from poolkit.fastapi import lifespan


class Note(SQLModel, table=True):
    """One note."""

    id: int | None = Field(default=None, primary_key=True)
    text: str


async def get_session() -> AsyncIterator[AsyncSession]:
    async with AsyncSession(get_engine(), expire_on_commit=False) as session:
        yield session
        await session.commit()


# "function": committed, and the connection given back, before the response is sent.
SessionDep = Annotated[AsyncSession, Depends(get_session, scope="function")]

app = FastAPI(lifespan=lifespan())


@app.post("/notes")
async def add(note: Note, session: SessionDep) -> Note:
    session.add(note)
    await session.flush()  # gives it its id
    return note


@app.get("/notes")
async def notes(session: SessionDep) -> list[Note]:
    return list((await session.exec(select(Note))).all())


# The rest only shows that it works.
async def main() -> None:
    """Ask the application, without a network between."""
    import httpx  # noqa: PLC0415

    async with get_engine().begin() as connection:
        await connection.run_sync(SQLModel.metadata.drop_all)
        await connection.run_sync(SQLModel.metadata.create_all)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
        print((await client.post("/notes", json={"text": "hello"})).json())
        print((await client.get("/notes")).json())


if __name__ == "__main__":
    import asyncio

    asyncio.run(main())
