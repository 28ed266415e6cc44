"""SQLModel: its models and its session, which has `exec`, on poolkit's engine."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy.orm import selectinload
from sqlmodel import Field, Relationship, SQLModel, select
from sqlmodel.ext.asyncio.session import AsyncSession

from poolkit import get_engine


class Customer(SQLModel, table=True):
    """Somebody who orders."""

    id: int | None = Field(default=None, primary_key=True)
    name: str
    orders: list["Order"] = Relationship(back_populates="customer")


class Order(SQLModel, table=True):
    """What was ordered."""

    id: int | None = Field(default=None, primary_key=True)
    item: str
    customer_id: int = Field(foreign_key="customer.id", index=True)
    customer: Customer = Relationship(back_populates="orders")


@asynccontextmanager
async def session() -> AsyncIterator[AsyncSession]:
    """As `poolkit.session()`, with SQLModel's class."""
    async with AsyncSession(get_engine(), expire_on_commit=False) as opened:
        yield opened
        await opened.commit()


async def main() -> None:
    """Write two orders, and read them with their customer."""
    async with get_engine().begin() as connection:
        await connection.run_sync(SQLModel.metadata.drop_all)
        await connection.run_sync(SQLModel.metadata.create_all)
    async with session() as opened:
        opened.add(Customer(name="Ada", orders=[Order(item="nuts"), Order(item="bolts")]))
    async with session() as opened:
        # Loaded with the rest: an attribute that has to be fetched later cannot be awaited.
        every = select(Customer).options(selectinload(Customer.orders))
        found = (await opened.exec(every)).all()
    for customer in found:
        print(customer.name, sorted(order.item for order in customer.orders))


if __name__ == "__main__":
    asyncio.run(main())
