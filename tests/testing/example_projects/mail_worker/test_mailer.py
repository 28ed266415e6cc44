import mailer
import pytest
from mailer import Mail
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError

from poolkit import session as plain_session

COUNT = select(func.count()).select_from(Mail)


@pytest.fixture
async def queue(session):
    await mailer.enqueue("a@example.org", "b@example.org")
    yield
    assert await session.scalar(COUNT) < 3


@pytest.fixture
def sent():
    return []


@pytest.fixture
def send(sent):
    async def send(to):
        sent.append(to)

    return send


async def test_in_order(queue, send, sent):
    assert await mailer.send_next(send)
    assert sent == ["a@example.org"]


async def test_the_queue_is_empty_again(session, send):
    assert not await mailer.send_next(send)


async def test_what_cannot_be_sent_stays(queue, session):
    async def fail(to):
        raise OSError(to)

    with pytest.raises(OSError, match="a@"):
        await mailer.send_next(fail)
    assert await session.scalar(COUNT) == 2


async def test_a_refused_row_leaves_the_test_its_transaction(queue, session):
    session.add(Mail(to=None))
    with pytest.raises(IntegrityError):
        await session.commit()
    await session.rollback()
    assert await session.scalar(COUNT) == 2


async def test_workers_with_real_commits(poolkit_database, poolkit_environ, send, sent):
    """Two connections and row locks: this cannot be had within one transaction."""
    async with plain_session(poolkit_database.settings) as session:
        session.add_all([Mail(to=f"{n}@example.org") for n in range(10)])

    await mailer.work(send)

    assert len(sent) == 10
    async with plain_session(poolkit_database.settings) as session:
        assert await session.scalar(COUNT) == 0


async def test_nothing_is_left(poolkit_engine):
    async with poolkit_engine.connect() as connection:
        assert await connection.scalar(COUNT) == 0
