"""Tests of a FastAPI application, without a network between."""

from collections.abc import AsyncIterator, Callable

import httpx
import pytest
from fastapi import FastAPI, HTTPException
from sqlalchemy import Column, Integer, MetaData, Table, func, insert, select
from sqlalchemy.ext.asyncio import AsyncSession

from poolkit.fastapi import SessionDep, get_session

GetSession = Callable[[], AsyncIterator[AsyncSession]]

metadata = MetaData()
orders = Table("orders", metadata, Column("id", Integer, primary_key=True))
app = FastAPI()


@app.post("/orders")
async def place(session: SessionDep, pieces: int) -> None:
    await session.execute(insert(orders))
    if pieces < 1:
        raise HTTPException(422)


# conftest.py


@pytest.fixture(scope="session")
def poolkit_schema() -> MetaData:
    return metadata


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def client(poolkit_get_session: GetSession) -> httpx.AsyncClient:
    app.dependency_overrides[get_session] = poolkit_get_session
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app")


# test_orders.py


@pytest.mark.anyio
async def test_a_refused_order_is_not_kept(
    client: httpx.AsyncClient, poolkit_session: AsyncSession
) -> None:
    async with client:
        assert (await client.post("/orders?pieces=1")).is_success
        assert (await client.post("/orders?pieces=0")).is_client_error

    assert await poolkit_session.scalar(select(func.count(orders.c.id))) == 1
