"""The recipe for Litestar, and what its Advanced Alchemy plugin does on poolkit's engine."""

import importlib.util
import itertools
import socket
import sys
import warnings
from pathlib import Path

import httpx
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from poolkit import get_engine, pool_stats, session

with warnings.catch_warnings():
    # Advanced Alchemy, which Litestar imports where it is installed, uses what SQLAlchemy 2.1
    # deprecates.
    warnings.simplefilter("ignore")
    litestar = pytest.importorskip("litestar")
    pytest.importorskip("advanced_alchemy")
    from advanced_alchemy.config import AsyncSessionConfig
    from advanced_alchemy.extensions.litestar import SQLAlchemyAsyncConfig, SQLAlchemyPlugin
    from litestar.di import NamedDependency, Provide
    from litestar.params import FromPath
    from litestar.response import Stream

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "use_litestar.py"
numbers = itertools.count()


@pytest.fixture
def recipe(monkeypatch):
    """A fresh copy of the example."""
    spec = importlib.util.spec_from_file_location("use_litestar", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "use_litestar", module)  # where Litestar reads annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def database(server, monkeypatch) -> str:
    url = server.create_database(f"litestar_{next(numbers)}")
    monkeypatch.setenv("DATABASE_URL", url)
    return url


@pytest.fixture
async def once(database) -> None:
    """A table with a constraint that is looked at at COMMIT."""
    async with session() as opened:
        await opened.execute(text("CREATE TABLE once (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)"))


def client(app):
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://app")


async def stored() -> list[int]:
    async with session() as opened:
        return list(await opened.scalars(text("SELECT n FROM once ORDER BY n")))


async def test_it_serves_and_leaves_nothing(recipe, database):
    """Warm at the start, no connection after the end; and once more on the same loop."""
    for _ in range(2):
        async with recipe.app.lifespan(), client(recipe.app) as ask:
            assert pool_stats(get_engine()).idle == 1
            for _ in range(20):
                assert (await ask.get("/database")).text == database.rpartition("/")[2]
            assert pool_stats(get_engine()).used == 0
        assert pool_stats(get_engine()).idle == 0


async def test_where_the_database_is_away_it_says_503(recipe, monkeypatch):
    """No server listens: 503 with Retry-After, and nothing internal in it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        monkeypatch.setenv("DATABASE_URL", f"postgresql://u:secret@127.0.0.1:{port}/d")
        monkeypatch.setenv("DATABASE_CONNECTION_TIMEOUT", "0.5")
        async with client(recipe.app) as ask:
            response = await ask.get("/database")

    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert response.json() == {"status_code": 503}


async def test_the_commit_comes_before_the_response(recipe, once):
    """What is answered is committed; a commit that fails is a 500 and leaves nothing."""

    @litestar.post("/add/{n:int}")
    async def add(n: FromPath[int], db_session: NamedDependency[AsyncSession]) -> int:
        await db_session.execute(text("INSERT INTO once VALUES (:n)"), {"n": n})
        return n

    @litestar.post("/fail")
    async def fail(db_session: NamedDependency[AsyncSession]) -> None:
        await db_session.execute(text("INSERT INTO once VALUES (7)"))
        raise litestar.exceptions.NotFoundException

    recipe.app.register(add)
    recipe.app.register(fail)
    async with client(recipe.app) as ask:
        assert (await ask.post("/add/1")).status_code == 201
        assert await stored() == [1]
        assert (await ask.post("/add/1")).status_code == 500
        assert (await ask.post("/fail")).status_code == 404
        assert await stored() == [1]
    assert pool_stats(get_engine()).used == 0


async def test_two_dependencies_end_as_an_error_too(recipe, once):
    """Litestar ends two of them in tasks of their own: a commit that fails is a 500 all the same."""

    async def other():
        yield 1

    @litestar.post("/both", dependencies={"other": Provide(other)})
    async def both(db_session: NamedDependency[AsyncSession], other: NamedDependency[int]) -> int:
        await db_session.execute(text("INSERT INTO once VALUES (1), (1)"))
        return other

    recipe.app.register(both)
    async with client(recipe.app) as ask:
        assert (await ask.post("/both")).status_code == 500
    assert await stored() == []
    assert pool_stats(get_engine()).used == 0


async def test_a_stream_holds_no_connection_of_the_handler(recipe, database):
    """The handler's session has ended when the stream begins."""
    seen = []

    @litestar.get("/stream")
    async def stream(db_session: NamedDependency[AsyncSession]) -> Stream:
        await db_session.execute(text("SELECT 1"))

        async def rows():
            seen.append(pool_stats(get_engine()).used)
            yield "row"

        return Stream(rows())

    recipe.app.register(stream)
    async with client(recipe.app) as ask:
        assert (await ask.get("/stream")).text == "row"
    assert seen == [0]


class TestWithThePlugin:
    @pytest.fixture
    def made(self, once):
        """An application with the plugin, on poolkit's engine."""

        def make(**options):
            config = SQLAlchemyAsyncConfig(
                engine_instance=get_engine(),
                session_config=AsyncSessionConfig(expire_on_commit=False),
                **options,
            )

            @litestar.post("/add/{n:int}")
            async def add(n: FromPath[int], db_session: NamedDependency[AsyncSession]) -> int:
                await db_session.execute(text("INSERT INTO once VALUES (:n)"), {"n": n})
                if not options:
                    await db_session.commit()
                return n

            return litestar.Litestar(
                [add], plugins=[SQLAlchemyPlugin(config=config)], logging_config=None
            )

        return make

    async def test_a_handler_that_commits_itself_is_safe(self, made):
        """On poolkit's engine: the answer says what became of the commit; nothing is left out."""
        app = made()
        async with app.lifespan(), client(app) as ask:
            codes = [(await ask.post("/add/1")).status_code for _ in range(2)]
            assert pool_stats(get_engine()).used == 0

        assert codes[0] == 201
        assert codes[1] >= 400
        assert await stored() == [1]

    async def test_autocommit_hides_a_commit_that_failed(self, made):
        """Why the recipe advises against `before_send_handler="autocommit"`: 201, and no row."""
        app = made(before_send_handler="autocommit")
        async with app.lifespan(), client(app) as ask:
            codes = [(await ask.post("/add/1")).status_code for _ in range(2)]
            assert pool_stats(get_engine()).used == 0

        assert codes == [201, 201]
        assert await stored() == [1]
