"""A library with a session maker of its own, and a worker that uses it."""

import asyncio
import os

from sqlalchemy import delete, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

Session = async_sessionmaker(expire_on_commit=False)


class Base(DeclarativeBase):
    pass


class Mail(Base):
    __tablename__ = "mails"

    id: Mapped[int] = mapped_column(primary_key=True)
    to: Mapped[str]


async def enqueue(*addresses: str) -> None:
    async with Session.begin() as session:
        session.add_all([Mail(to=address) for address in addresses])


async def send_next(send) -> bool:
    """Take one from the queue; it stays there if it cannot be sent."""
    take = text('SELECT id, "to" FROM mails ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED')
    async with Session.begin() as session:
        mail = (await session.execute(take)).first()
        if mail is None:
            return False
        await session.execute(delete(Mail).where(Mail.id == mail.id))
        await send(mail.to)
        return True


async def work(send, workers: int = 2) -> None:
    """What the worker's process does."""
    engine = create_async_engine(
        os.environ["DATABASE_URL"].replace("postgresql:", "postgresql+asyncpg:")
    )
    Session.configure(bind=engine)

    async def until_empty() -> None:
        while await send_next(send):
            pass

    await asyncio.gather(*(until_empty() for _ in range(workers)))
    await engine.dispose()
