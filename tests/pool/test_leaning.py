"""Each private name of SQLAlchemy that the pool leans on: a test fails where it changes."""

import inspect

import pytest
import sqlalchemy
from fakes import FakeServer, make_pool, on_virtual_time
from sqlalchemy.pool import Pool, QueuePool
from sqlalchemy.pool import base as pool_base
from sqlalchemy.util import concurrency, greenlet_spawn

from poolkit.pool.record import PooledRecord


def test_the_record_is_made_by_the_pool_and_connects_in_its_init():
    record = pool_base._ConnectionRecord
    assert next(iter(inspect.signature(record.__init__).parameters)) == "self"
    assert list(inspect.signature(record.__init__).parameters)[1] == "pool"
    made = []
    pool = QueuePool(lambda: made.append(1) or object())
    assert type(pool._create_connection()) is record
    assert made == [1]
    assert pool._create_connection().dbapi_connection is not None


def test_every_record_in_a_checkout_is_the_pools_own():
    async def main():
        pool = make_pool(FakeServer())
        proxy = await greenlet_spawn(pool.connect)
        assert type(proxy._connection_record) is PooledRecord
        await greenlet_spawn(proxy.close)

    on_virtual_time(main)


def test_the_record_knows_its_proxy_by_a_weak_reference():
    async def main():
        pool = make_pool(FakeServer())
        proxy = await greenlet_spawn(pool.connect)
        record = proxy._connection_record
        assert record.fairy_ref() is proxy
        await greenlet_spawn(proxy.close)
        assert record.fairy_ref is None
        assert record.lost is False

    assert "fairy_ref" in pool_base._ConnectionRecord.__slots__
    on_virtual_time(main)


@pytest.mark.skipif(sqlalchemy.__version__ < "2.1", reason="there is none on SQLAlchemy 2.0")
def test_the_record_says_when_its_proxy_was_collected():
    assert isinstance(
        inspect.getattr_static(pool_base._ConnectionRecord, "needs_gc", None), property
    )


def test_invalidate_is_called_with_these_arguments():
    assert list(inspect.signature(Pool._invalidate).parameters) == [
        "self",
        "connection",
        "exception",
        "_checkin",
    ]


def test_in_greenlet_tells_whether_something_can_be_awaited():
    assert concurrency.in_greenlet() is False
    seen = []

    async def main():
        await greenlet_spawn(lambda: seen.append(concurrency.in_greenlet()))

    on_virtual_time(main)
    assert seen == [True]
