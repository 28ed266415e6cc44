"""The recipes for SQLModel: its session on poolkit's engine, by itself and in FastAPI."""

import asyncio
import importlib.util
import itertools
from pathlib import Path

import pytest
from sqlalchemy import text

from poolkit import get_engine, pool_stats
from poolkit import session as plain_session

sqlmodel = pytest.importorskip("sqlmodel")
httpx = pytest.importorskip("httpx")

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
numbers = itertools.count()


def load(name):
    """A fresh copy of an example, with tables of its own registering."""
    sqlmodel.SQLModel.metadata.clear()
    sqlmodel.main.default_registry.dispose()
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _database(server, monkeypatch) -> None:
    monkeypatch.setenv("DATABASE_URL", server.create_database(f"sqlmodel_{next(numbers)}"))


def test_it_runs_again_and_again(capsys):
    """Each asyncio.run has an engine of its own, and the recipe works on all of them."""
    recipe = load("use_sqlmodel")

    for _ in range(3):
        asyncio.run(recipe.main())

    assert capsys.readouterr().out == "Ada ['bolts', 'nuts']\n" * 3


async def test_a_block_that_fails_leaves_nothing():
    """After an exception nothing of the block is committed, and the connection is back."""
    recipe = load("use_sqlmodel")
    await recipe.main()

    async def fail() -> None:
        async with recipe.session() as session:
            session.add(recipe.Customer(name="Eve"))
            await session.flush()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()

    async with recipe.session() as session:
        assert len((await session.exec(sqlmodel.select(recipe.Customer))).all()) == 1
    assert pool_stats(get_engine()).used == 0


async def test_a_commit_and_a_refresh_in_the_block_are_allowed():
    """What SQLModel's own documentation does with a session works in the block."""
    recipe = load("use_sqlmodel")
    await recipe.main()

    async with recipe.session() as session:
        eve = recipe.Customer(name="Eve")
        session.add(eve)
        await session.commit()
        await session.refresh(eve)

    assert eve.id == 2


@pytest.fixture
async def notes():
    """The FastAPI application of the recipe, and a client."""
    recipe = load("sqlmodel_fastapi")
    async with get_engine().begin() as connection:
        await connection.run_sync(sqlmodel.SQLModel.metadata.create_all)
    transport = httpx.ASGITransport(recipe.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
        yield client


async def test_the_dependency_commits_before_the_response(notes):
    """What is answered is there for everybody; the connection is back."""
    response = await notes.post("/notes", json={"text": "hello"})

    assert (response.status_code, response.json()) == (200, {"id": 1, "text": "hello"})
    async with plain_session() as session:
        assert await session.scalar(text("SELECT text FROM note")) == "hello"
    assert (await notes.get("/notes")).json() == [{"id": 1, "text": "hello"}]
    assert pool_stats(get_engine()).used == 0


async def test_a_commit_that_fails_is_no_success(notes):
    """A deferred constraint fails at COMMIT: the answer is a 500, and nothing is there."""
    async with plain_session() as session:
        await session.execute(
            text("ALTER TABLE note ADD CONSTRAINT u UNIQUE (text) DEFERRABLE INITIALLY DEFERRED")
        )

    codes = [(await notes.post("/notes", json={"text": "same"})).status_code for _ in range(2)]

    assert codes == [200, 500]
    assert len((await notes.get("/notes")).json()) == 1
    assert pool_stats(get_engine()).used == 0
