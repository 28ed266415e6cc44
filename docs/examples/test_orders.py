"""Tests of a service: each in a transaction that is rolled back, on a throwaway PostgreSQL."""

import pytest
from sqlalchemy import MetaData, func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    """The service's tables."""


class Order(Base):
    """What a customer wants."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)


async def place_order(session: AsyncSession) -> None:
    """The code under test, which commits."""
    session.add(Order())
    await session.commit()


@pytest.fixture(scope="session")
def poolkit_schema() -> MetaData:
    """In conftest.py: the tables."""
    return Base.metadata


@pytest.mark.asyncio
@pytest.mark.parametrize("time", ["once", "again"])
async def test_placing_an_order(poolkit_session: AsyncSession, time: str) -> None:
    await place_order(poolkit_session)

    assert await poolkit_session.scalar(select(func.count(Order.id))) == 1, time
