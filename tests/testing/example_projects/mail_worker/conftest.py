import mailer
import pytest


async def lay(database):
    """As migrations would."""
    import asyncpg  # noqa: PLC0415

    connection = await asyncpg.connect(database.url)
    await connection.execute('CREATE TABLE mails (id serial PRIMARY KEY, "to" text NOT NULL)')
    await connection.close()


@pytest.fixture(scope="session")
def poolkit_schema():
    return lay


@pytest.fixture
def session(monkeypatch, poolkit_sessionmaker, poolkit_session):
    """The library's sessions in the test's transaction."""
    monkeypatch.setattr(mailer, "Session", poolkit_sessionmaker)
    return poolkit_session
