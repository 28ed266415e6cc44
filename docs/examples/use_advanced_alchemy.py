"""Advanced Alchemy: its repositories and services on poolkit's sessions."""

import asyncio

from advanced_alchemy.base import BigIntAuditBase
from advanced_alchemy.repository import SQLAlchemyAsyncRepository
from advanced_alchemy.service import SQLAlchemyAsyncRepositoryService
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from poolkit import get_engine, session


class Author(BigIntAuditBase):
    """With times of creation and change."""

    __tablename__ = "author"

    name: Mapped[str] = mapped_column(unique=True)


class AuthorRepository(SQLAlchemyAsyncRepository[Author]):
    """Reads and writes."""

    model_type = Author


class AuthorService(SQLAlchemyAsyncRepositoryService[Author, AuthorRepository]):
    """From dictionaries to authors."""

    repository_type = AuthorRepository


def authors(opened: AsyncSession) -> AuthorService:
    # Errors stay as they are raised, for handlers and retries to tell one from the other.
    return AuthorService(opened, wrap_exceptions=False)


async def main() -> None:
    """Add authors, one of them twice."""
    async with get_engine().begin() as connection:
        await connection.run_sync(Author.metadata.drop_all)
        await connection.run_sync(Author.metadata.create_all)
    async with session() as opened:
        await authors(opened).create_many([{"name": "Ada"}, {"name": "Bob"}])
    try:
        async with session() as opened:
            await authors(opened).create({"name": "Eve"})
            await authors(opened).create({"name": "Ada"})
    except IntegrityError:
        print("refused, and rolled back")
    async with session() as opened:
        print("authors:", await authors(opened).count())


if __name__ == "__main__":
    asyncio.run(main())
