import warnings

import anyio
import notes
import pytest
from sqlalchemy import func, select

from poolkit.fastapi import get_session

with warnings.catch_warnings():  # of Starlette and anyio, about their own names
    warnings.simplefilter("ignore")
    from fastapi.testclient import TestClient

COUNT = select(func.count()).select_from(notes.Note)
pytestmark = pytest.mark.anyio


@pytest.fixture
async def first(poolkit_session):
    """An async fixture of the user's, before and after the test."""
    poolkit_session.add(notes.Note(text="first"))
    await poolkit_session.commit()
    yield
    assert await poolkit_session.scalar(COUNT) >= 1


@pytest.mark.parametrize("_", [1, 2])
async def test_a_note_is_kept_until_the_end_of_the_test(client, poolkit_session, _):
    response = await client.post("/notes", json={"text": "hello"})
    assert response.status_code == 201
    assert (await client.get("/notes")).json() == ["hello"]
    assert await poolkit_session.scalar(COUNT) == 1


async def test_what_a_fixture_wrote_is_there(client, first):
    assert (await client.get("/notes")).json() == ["first"]


async def test_a_request_that_fails_is_undone(client, first, poolkit_session):
    assert (await client.post("/notes", json={"text": ""})).status_code == 422
    assert (await client.get("/notes")).json() == ["first"]


async def test_requests_side_by_side(client, poolkit_no_leaks):
    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(lambda: client.post("/notes", json={"text": "one of five"}))
    assert len((await client.get("/notes")).json()) == 5


async def test_one_session_for_the_test_and_the_application(client, app, poolkit_session):
    app.dependency_overrides[get_session] = lambda: poolkit_session
    await client.post("/notes", json={"text": "hello"})
    assert (await client.get("/notes")).json() == ["hello"]


def test_sync(app, poolkit_environ):
    with TestClient(app) as client:
        client.post("/notes", json={"text": "hello"})
        assert client.get("/notes").json() == ["hello"]


def test_the_whole_application_on_a_database_of_its_own(poolkit_database, poolkit_environ):
    with TestClient(notes.app) as client:
        client.post("/notes", json={"text": "kept"})
    with TestClient(notes.app) as client:
        assert client.get("/notes").json() == ["kept"]


async def test_nothing_is_left(poolkit_engine):
    async with poolkit_engine.connect() as connection:
        assert await connection.scalar(COUNT) == 0
