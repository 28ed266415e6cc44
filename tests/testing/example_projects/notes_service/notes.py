"""A service that keeps notes."""

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel
from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from poolkit.fastapi import SessionDep, lifespan


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "notes"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


class NoteIn(BaseModel):
    text: str


app = FastAPI(lifespan=lifespan())


@app.post("/notes", status_code=201)
async def add(note: NoteIn, session: SessionDep) -> int:
    added = Note(text=note.text)
    session.add(added)
    await session.flush()
    if not note.text:
        raise HTTPException(422, "a note has a text")
    return added.id


@app.get("/notes")
async def texts(session: SessionDep) -> list[str]:
    return list(await session.scalars(select(Note.text).order_by(Note.id)))
