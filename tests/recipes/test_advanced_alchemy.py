"""The recipe for Advanced Alchemy: its repositories and services on poolkit's sessions."""

import asyncio
import importlib.util
import itertools
import warnings
from pathlib import Path

import pytest
from sqlalchemy import text

from poolkit import (
    FaultKind,
    Outcome,
    PoolTimeout,
    classify,
    get_engine,
    get_sessionmaker,
    pool_stats,
    run_in_transaction,
    session,
)

with warnings.catch_warnings():
    # It uses what SQLAlchemy 2.1 deprecates.
    warnings.simplefilter("ignore")
    pytest.importorskip("advanced_alchemy")
    from advanced_alchemy.config import AsyncSessionConfig, SQLAlchemyAsyncConfig
    from advanced_alchemy.exceptions import RepositoryError

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "use_advanced_alchemy.py"
numbers = itertools.count()


@pytest.fixture(scope="module")
def recipe():
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("use_advanced_alchemy", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _database(server, monkeypatch) -> None:
    monkeypatch.setenv("DATABASE_URL", server.create_database(f"alchemy_{next(numbers)}"))


def test_it_runs_again_and_again(recipe, capsys):
    """Each asyncio.run has an engine of its own."""
    for _ in range(2):
        asyncio.run(recipe.main())

    assert capsys.readouterr().out == "refused, and rolled back\nauthors: 2\n" * 2


@pytest.mark.parametrize("wrapped", [True, False])
async def test_a_full_pool_is_known_as_one(recipe, monkeypatch, wrapped):
    """Wrapped by its default or not, the error says 503 and not sent."""
    await recipe.main()
    monkeypatch.setenv("DATABASE_POOL_SIZE", "1")
    monkeypatch.setenv("DATABASE_MAX_OVERFLOW", "0")
    monkeypatch.setenv("DATABASE_POOL_TIMEOUT", "0.1")
    async with session() as holder, session() as waiter:
        await holder.execute(text("SELECT 1"))
        service = recipe.AuthorService(waiter) if wrapped else recipe.authors(waiter)
        with pytest.raises(RepositoryError if wrapped else PoolTimeout) as caught:
            await service.count()

    fault = classify(caught.value)

    assert (fault.kind, fault.http_status) == (FaultKind.POOL_TIMEOUT, 503)
    assert fault.outcome is Outcome.NOT_SENT


async def conflict(recipe, service, attempts: list) -> None:
    """Read and write, with somebody else's write between at the first attempt."""
    attempts.append(ada := await service.get_one(name="Ada"))
    if len(attempts) == 1:
        async with session() as other:
            await other.execute(text("UPDATE author SET updated_at = now() WHERE name = 'Ada'"))
    ada.name = "Ada!"
    await service.update(ada)


async def test_a_transaction_of_it_is_done_again(recipe):
    """`run_in_transaction` repeats the recipe's service after a serialization failure."""
    await recipe.main()
    attempts = []

    await run_in_transaction(
        get_sessionmaker(),
        lambda opened: conflict(recipe, recipe.authors(opened), attempts),
        isolation_level="REPEATABLE READ",
    )

    assert len(attempts) == 2
    async with session() as opened:
        assert await recipe.authors(opened).count(name="Ada!") == 1
    assert pool_stats(get_engine()).used == 0


async def test_a_wrapped_fault_is_the_programs_own(recipe):
    """Why the recipe does not let it wrap: then nothing is repeated."""
    await recipe.main()
    attempts = []

    with pytest.raises(RepositoryError):
        await run_in_transaction(
            get_sessionmaker(),
            lambda opened: conflict(recipe, recipe.AuthorService(opened), attempts),
            isolation_level="REPEATABLE READ",
        )

    assert len(attempts) == 1


async def test_its_configuration_takes_the_engine(recipe):
    """`engine_instance`: its session handling, with time stamps, on poolkit's engine."""
    await recipe.main()
    config = SQLAlchemyAsyncConfig(
        engine_instance=get_engine(), session_config=AsyncSessionConfig(expire_on_commit=False)
    )

    async with config.get_session() as opened:
        author = await recipe.authors(opened).get_one(name="Ada")
        before = author.updated_at
        author.name = "Ida"
        await opened.commit()

    assert config.get_engine() is get_engine()
    assert author.updated_at > before
    async with session() as opened:
        assert await recipe.authors(opened).count(name="Ida") == 1
    assert pool_stats(get_engine()).used == 0


async def test_its_session_that_is_not_committed_leaves_nothing(recipe):
    """`config.get_session()` does not commit by itself."""
    await recipe.main()
    config = SQLAlchemyAsyncConfig(engine_instance=get_engine())

    async with config.get_session() as opened:
        await recipe.authors(opened).create({"name": "Eve"})

    async with session() as opened:
        assert await recipe.authors(opened).count() == 2
    assert pool_stats(get_engine()).used == 0
