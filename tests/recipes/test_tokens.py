"""The token of docs/how-to/rotate-passwords.md, for a role whose password really changes."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from uuid import uuid4

import asyncpg
import pytest
from sqlalchemy import make_url, text

from poolkit import PasswordUnavailable

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "rotating_password.py"


@pytest.fixture
def recipe() -> ModuleType:
    """The example as a module."""
    spec = spec_from_file_location("rotating_password", EXAMPLE)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def clock(recipe, monkeypatch) -> "Clock":
    """The example's time."""
    clock = Clock()
    monkeypatch.setattr(recipe, "time", clock)
    return clock


class Clock:
    now = 1_000_000.0

    def time(self) -> float:
        return self.now


class Issuer:
    """Issues a token by making it the password of the role; an old one is worth nothing then."""

    lifetime = 900.0

    def __init__(self, recipe: ModuleType, admin: asyncpg.Connection) -> None:
        self.role = f"app_{uuid4().hex}"
        self.issued: list[str] = []
        self.asked = 0
        self.failing: Exception | None = None
        self._recipe = recipe
        self._admin = admin
        self._loop = asyncio.get_running_loop()

    def __call__(self):
        self.asked += 1
        if self.failing:
            raise self.failing
        asyncio.run_coroutine_threadsafe(self.rotate(), self._loop).result(20)
        return self._recipe.Token(self.issued[-1], self._recipe.time.time() + self.lifetime)

    async def rotate(self) -> None:
        token = f"token-{uuid4().hex}"
        await self._admin.execute(f"ALTER ROLE {self.role} PASSWORD '{token}'")
        self.issued.append(token)


@pytest.fixture
async def issuer(recipe, server) -> AsyncIterator[Issuer]:
    """The service that issues tokens, and the role whom they are for."""
    admin = await asyncpg.connect(server.url)
    made = Issuer(recipe, admin)
    await admin.execute(f"CREATE ROLE {made.role} LOGIN")
    yield made
    await admin.close()


@pytest.fixture
async def engine(recipe, issuer, server, make_engine):
    """An engine of that role, with the cache."""
    url = make_url(server.url).set(username=issuer.role, password=None)
    return make_engine(
        url.render_as_string() + "?sslmode=disable",
        password=recipe.TokenCache(issuer),
        pool_size=20,
    )


async def user(connection) -> str:
    return await connection.scalar(text("SELECT current_user"))


async def test_one_renewal_serves_many_connects(engine, issuer) -> None:
    """Twenty at once, and one token."""
    connections = [engine.connect() for _ in range(20)]
    await asyncio.gather(*(connection.start() for connection in connections))

    assert issuer.asked == 1
    assert {await user(connection) for connection in connections} == {issuer.role}
    for connection in connections:
        await connection.close()


async def test_the_next_connect_has_the_next_token(engine, issuer, clock) -> None:
    """Before the old one expires; whoever is connected stays so."""
    async with engine.connect() as old:
        await user(old)
        clock.now += issuer.lifetime - 30

        async with engine.connect() as new:
            assert await user(new) == issuer.role

        assert len(issuer.issued) == 2
        assert await user(old) == issuer.role


async def test_a_failing_renewal_while_the_token_serves(engine, issuer, clock, caplog) -> None:
    """The old token is used, the service is not asked at each connect, and no secret is logged."""
    async with engine.connect() as first:
        await user(first)
        clock.now += issuer.lifetime - 30
        issuer.failing = RuntimeError(f"the service said {issuer.issued[0]}")
        with caplog.at_level(logging.DEBUG):
            async with engine.connect() as second, engine.connect() as third:
                assert {await user(second), await user(third)} == {issuer.role}
        assert issuer.asked == 2

        issuer.failing = None
        clock.now += 6
        await engine.dispose()
        async with engine.connect() as fourth:
            assert await user(fourth) == issuer.role

    assert len(issuer.issued) == 2
    assert "no new token, the old one still serves: RuntimeError" in caplog.text
    assert issuer.issued[0] not in caplog.text


async def test_no_token_at_all(engine, issuer, clock, caplog) -> None:
    """The connect fails at once, and says of the reason no more than its type."""
    issuer.failing = RuntimeError("secret")
    with caplog.at_level(logging.DEBUG), pytest.raises(PasswordUnavailable) as caught:
        async with engine.connect():
            pass

    assert "secret" not in str(caught.value) + repr(caught.value) + caplog.text
    issuer.failing = None
    async with engine.connect() as connection:
        assert await user(connection) == issuer.role


async def test_a_cancelled_connect_does_not_lose_the_renewal(recipe) -> None:
    """It goes on in its thread, and the next one finds it."""
    go_on, asked = threading.Event(), []

    def get():
        asked.append(1)
        go_on.wait(20)
        return recipe.Token("token", time.time() + 900)

    cache = recipe.TokenCache(get)
    first = asyncio.create_task(cache())
    while not asked:
        await asyncio.sleep(0)
    first.cancel()
    second = asyncio.create_task(cache())
    await asyncio.sleep(0)
    go_on.set()

    assert await second == "token"
    assert asked == [1]


def test_it_serves_several_event_loops(recipe) -> None:
    """Worker threads with a loop each, all at once, share one token."""
    asked, together = [], threading.Barrier(4, timeout=20)

    def get():
        asked.append(1)
        time.sleep(0.1)
        return recipe.Token("token", time.time() + 900)

    cache = recipe.TokenCache(get)
    found = []

    def work() -> None:
        together.wait()
        found.append(asyncio.run(cache()))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert (found, asked) == (["token"] * 4, [1])


def test_a_token_is_in_no_repr(recipe) -> None:
    """Not in a dump of the cache's attributes either."""
    token = recipe.Token("secret", 0.0)

    assert "secret" not in repr(token)


def test_the_service_is_asked_again(recipe, monkeypatch) -> None:
    """Three times, with pauses, before the connect fails."""
    attempts = []

    def fail(_name):
        attempts.append(1)
        raise OSError

    monkeypatch.setattr(recipe, "make_url", fail)
    monkeypatch.setenv("DATABASE_URL", "postgresql://app@db.example.com/app")

    with pytest.raises(OSError):
        recipe.get_token()

    assert len(attempts) == 3
