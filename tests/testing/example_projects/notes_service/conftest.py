import httpx
import notes
import pytest

from poolkit.fastapi import get_session


@pytest.fixture(scope="session")
def poolkit_schema():
    return notes.Base.metadata


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
def app(poolkit_get_session):
    notes.app.dependency_overrides[get_session] = poolkit_get_session
    yield notes.app
    notes.app.dependency_overrides.clear()


@pytest.fixture
async def client(app, anyio_backend):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://notes") as c:
        yield c
