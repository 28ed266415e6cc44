"""What ``QueuePool`` promises, by SQLAlchemy's own tests of it, holds for ``HandoffPool`` as well.

Where the pool's contract decides otherwise, the test's docstring says so.
"""

import asyncio
import inspect
import logging

import pytest
import sqlalchemy
from fakes import (
    CannotConnect,
    ConnectionLost,
    FakeServer,
    make_pool,
    on_virtual_time,
    settle,
    virtual_loop,
)
from sqlalchemy import event, exc, text
from sqlalchemy.pool import Pool, PoolResetState, QueuePool
from sqlalchemy.util import await_only, greenlet_spawn

from poolkit import HandoffPool, create_async_engine

EVENTS = (
    "first_connect connect checkout checkin reset invalidate soft_invalidate close detach"
    " close_detached"
).split()
RETURNED = PoolResetState(transaction_was_reset=False, terminate_only=False, asyncio_safe=True)
SELECT_1 = text("SELECT 1")

since_2_1 = pytest.mark.skipif(
    sqlalchemy.__version__.startswith("2.0."), reason="SQLAlchemy promises it since 2.1"
)


def on_fakes(test):
    """Run ``test(fake, ...)`` in a greenlet, where a pool may wait, on virtual time."""

    def run(**given):
        on_virtual_time(lambda: greenlet_spawn(test, FakeServer(), **given))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    run.__signature__ = inspect.Signature(list(inspect.signature(test).parameters.values())[1:])
    return run


def wait(seconds=None):
    """Let the background work be done."""
    await_only(settle() if seconds is None else asyncio.sleep(seconds))


def numbers(pool):
    return pool.checkedin(), pool.checkedout(), pool.overflow()


def number(proxy):
    return proxy.driver_connection.number


def listen(target, name, seen):
    def listener(*args):
        seen.append((name, *args))

    event.listen(target, name, listener)
    return listener


def listen_to_all(target):
    seen = []
    for name in EVENTS:
        listen(target, name, seen)
    return seen


def names(seen):
    return [name for name, *_ in seen]


class NotAnException(BaseException):
    """What frameworks use to get past ``except Exception``."""


# -- Numbers ---------------------------------------------------------------------------------


@on_fakes
def test_numbers_through_a_life(fake):
    """size, checkedin, checkedout, overflow and timeout are QueuePool's at each step."""
    pool = make_pool(fake, pool_size=2, max_overflow=1, timeout=7)
    assert (pool.size(), pool.timeout()) == (2, 7)
    assert numbers(pool) == (0, 0, -2)
    held, seen = [], []
    for _ in range(3):
        held.append(pool.connect())
        seen.append(numbers(pool))
    for proxy in held:
        proxy.close()
        seen.append(numbers(pool))
    wait()
    assert seen == [(0, 1, -1), (0, 2, 0), (0, 3, 1), (1, 2, 1), (2, 1, 1), (2, 0, 0)]
    pool.connect().close()
    assert numbers(pool) == (2, 0, 0)
    pool.dispose()
    assert numbers(pool) == (0, 0, -2)


@on_fakes
def test_status_begins_as_queuepools_does(fake):
    """status() is QueuePool's line, with more after it."""
    pool = make_pool(fake, pool_size=3, max_overflow=1)
    reference = QueuePool(lambda: None, pool_size=3, max_overflow=1)
    assert pool.status().startswith(reference.status())
    proxy = pool.connect()
    assert pool.status().startswith(
        "Pool size: 3  Connections in pool: 0 Current Overflow: -2 "
        "Current Checked out connections: 1"
    )
    proxy.close()


@pytest.mark.parametrize("settings", [{"pool_size": 0}, {"pool_size": 2, "max_overflow": -1}])
@on_fakes
def test_unlimited(fake, settings):
    """pool_size=0 and max_overflow=-1 put no limit on the connections."""
    pool = make_pool(fake, timeout=0.1, **settings)
    held = [pool.connect() for _ in range(40)]
    assert pool.checkedout() == 40
    assert pool.overflow() == (38 if settings["pool_size"] else 0)
    for proxy in held:
        proxy.close()
    wait()
    kept = settings["pool_size"] or 40
    assert (pool.checkedin(), len(fake.open)) == (kept, kept)


@on_fakes
def test_overflow_is_closed_on_return_and_the_kept_are_reused(fake):
    """No more than the size is kept, and what is kept serves the next callers."""
    pool = make_pool(fake, pool_size=2, max_overflow=3)
    for _ in range(3):
        held = [pool.connect() for _ in range(5)]
        for proxy in held:
            proxy.close()
        wait()
        assert len(fake.open) == pool.checkedin() == 2
    assert fake.connects == 5 + 3 + 3
    assert all(driver.said_goodbye for driver in fake.made if driver.closed)


@on_fakes
def test_what_comes_back_is_kept_until_the_size_is_idle(fake):
    """pool_size is how many may sleep: beyond the size in use, callers reuse one connection."""
    pool = make_pool(fake, pool_size=2, max_overflow=1)
    held = [pool.connect() for _ in range(2)]
    for _ in range(10):
        pool.connect().close()
    for proxy in held:
        proxy.close()
    wait()
    assert (fake.connects, len(fake.open), pool.checkedin()) == (3, 2, 2)


@on_fakes
def test_within_the_size_nothing_is_opened_twice(fake):
    """One caller after the other uses one connection."""
    pool = make_pool(fake, pool_size=3)
    for _ in range(10):
        pool.connect().close()
    assert fake.connects == 1


@pytest.mark.parametrize(("lifo", "order"), [(True, [3, 3, 3, 3]), (False, [1, 2, 3, 1])])
@on_fakes
def test_fifo_goes_round_and_lifo_stays(fake, lifo, order):
    """Sequential use takes each idle connection in turn, or ever the same one."""
    pool = make_pool(fake, pool_size=3, use_lifo=lifo)
    held = [pool.connect() for _ in range(3)]
    for proxy in held:
        proxy.close()
    used = []
    for _ in order:
        proxy = pool.connect()
        used.append(number(proxy))
        proxy.close()
    assert used == order


@on_fakes
def test_a_timeout_is_sqlalchemys(fake):
    """It is sqlalchemy.exc.TimeoutError, with its code and a timeout of two decimals."""
    pool = make_pool(fake, timeout=0.05)
    proxy = pool.connect()
    with pytest.raises(exc.TimeoutError) as caught:
        pool.connect()
    assert str(caught.value).startswith(
        "QueuePool limit of size 1 overflow 0 reached, connection timed out, timeout 0.05"
    )
    assert caught.value.code == "3o7r"
    assert numbers(pool) == (0, 1, 0)
    proxy.close()
    pool.connect().close()


# -- Events ----------------------------------------------------------------------------------


@on_fakes
def test_events_of_a_life_in_order_with_their_arguments(fake):
    """first_connect, connect, checkout, reset, checkin, close: each gets what its page says."""
    pool = make_pool(fake)
    seen = listen_to_all(pool)
    proxy = pool.connect()
    dbapi, record = proxy.dbapi_connection, proxy._connection_record
    proxy.close()
    assert seen == [
        ("first_connect", dbapi, record),
        ("connect", dbapi, record),
        ("checkout", dbapi, record, proxy),
        ("reset", dbapi, record, RETURNED),
        ("checkin", dbapi, record),
    ]
    del seen[:]
    pool.dispose()
    assert seen == [("close", dbapi, record)]


@on_fakes
def test_first_connect_once_connect_for_each(fake):
    """first_connect is for the first connection only, connect and checkout for all."""
    pool = make_pool(fake, pool_size=2)
    seen = listen_to_all(pool)
    one, two = pool.connect(), pool.connect()
    assert names(seen) == ["first_connect", "connect", "checkout", "connect", "checkout"]
    one.close()
    two.close()
    del seen[:]
    pool.connect().close()
    assert names(seen) == ["checkout", "reset", "checkin"]


@on_fakes
def test_a_slow_first_connect_is_done_before_any_checkout(fake):
    """Connections that are opened side by side wait for the first one's listener."""
    pool = make_pool(fake, pool_size=3)
    seen = []

    @event.listens_for(pool, "first_connect")
    def slow(dbapi, record):
        wait(1)
        seen.append("first_connect")

    listen(pool, "connect", seen)
    listen(pool, "checkout", seen)

    async def use():
        proxy = await greenlet_spawn(pool.connect)
        await asyncio.sleep(1)
        await greenlet_spawn(proxy.close)

    async def all_at_once():
        await asyncio.gather(use(), use(), use())

    await_only(all_at_once())
    assert seen[0] == "first_connect"
    assert seen.count("first_connect") == 1
    assert sorted(names(seen[1:])) == ["checkout"] * 3 + ["connect"] * 3


@on_fakes
def test_a_first_connect_that_fails_is_done_again(fake):
    """Its listener runs until it has succeeded once."""
    pool = make_pool(fake)
    seen = []

    @event.listens_for(pool, "first_connect")
    def initialise(dbapi, record):
        seen.append(dbapi.driver.number)
        if len(seen) == 1:
            raise ValueError("not yet")

    with pytest.raises(ValueError, match="not yet"):
        pool.connect()
    assert numbers(pool) == (0, 0, -1)
    pool.connect().close()
    pool.dispose()
    pool.connect().close()
    assert seen == [1, 2]


@on_fakes
def test_a_first_connect_that_cannot_connect_is_done_by_the_next(fake):
    """The listeners see nothing of a creator that failed."""
    fake.errors = [CannotConnect("no")]
    pool = make_pool(fake)
    seen = listen_to_all(pool)
    with pytest.raises(CannotConnect):
        pool.connect()
    assert seen == []
    pool.connect().close()
    assert names(seen)[:3] == ["first_connect", "connect", "checkout"]


@on_fakes
def test_listeners_can_be_put_first(fake):
    """insert=True comes before those that are there."""
    pool = make_pool(fake)
    seen = []
    event.listen(pool, "connect", lambda *_: seen.append(1))
    event.listen(pool, "connect", lambda *_: seen.append(2), insert=True)
    event.listen(pool, "connect", lambda *_: seen.append(3))
    pool.connect().close()
    assert seen == [2, 1, 3]


@on_fakes
def test_listeners_given_as_events(fake):
    """events= takes pairs of a listener and a name."""
    seen = []
    pool = make_pool(fake, events=[(lambda *args: seen.append(len(args)), "checkout")])
    pool.connect().close()
    pool.recreate().connect().close()
    assert seen == [3, 3]


@on_fakes
def test_listeners_on_the_class(fake):
    """Those on Pool hear of every pool, those on QueuePool of none of ours."""
    seen = []
    heard, unheard = listen(Pool, "connect", seen), listen(QueuePool, "connect", [])
    try:
        pool = make_pool(fake)
        assert unheard not in pool.dispatch.connect
        pool.connect().close()
        make_pool(fake).connect().close()
        assert names(seen) == ["connect"] * 2
    finally:
        event.remove(Pool, "connect", heard)
        event.remove(QueuePool, "connect", unheard)


@pytest.mark.parametrize("used_before", [True, False])
@on_fakes
def test_listeners_survive_recreate(fake, used_before):
    """Every event is told of the new pool as of the old, first_connect once for each."""
    pool = make_pool(fake)
    seen = listen_to_all(pool)
    if used_before:
        pool.connect().close()
    again = pool.recreate()
    if not used_before:
        pool.connect().close()
        wait()  # by the contract the old pool keeps nothing any more
    del seen[:]
    again.connect().close()
    assert names(seen) == ["first_connect", "connect", "checkout", "reset", "checkin"]


@on_fakes
def test_invalidate_is_told_before_the_end_and_with_its_reason(fake):
    """invalidate, then close, both while the connection is there; then checkin without it."""
    pool = make_pool(fake)
    proxy = pool.connect()
    dbapi, record, error = proxy.dbapi_connection, proxy._connection_record, ValueError("bad")
    seen, open_then = listen_to_all(pool), []
    for name in ("invalidate", "close"):
        event.listen(pool, name, lambda *_: open_then.append(not dbapi.driver.closed))
    proxy.invalidate(error)
    assert seen == [
        ("invalidate", dbapi, record, error),
        ("close", dbapi, record),
        ("checkin", None, record),
    ]
    assert open_then == [True, True]
    assert dbapi.driver.closed


@pytest.mark.parametrize("error", [None, ValueError("bad")])
@on_fakes
def test_soft_invalidate_is_told_and_the_connection_stays_in_use(fake, error):
    """Its user goes on with it; it is not handed out again."""
    pool = make_pool(fake)
    proxy = pool.connect()
    dbapi, record = proxy.dbapi_connection, proxy._connection_record
    seen = listen_to_all(pool)
    proxy.invalidate(error, soft=True)
    assert seen == [("soft_invalidate", dbapi, record, error)]
    assert (proxy.is_valid, proxy.dbapi_connection) == (True, dbapi)
    assert not dbapi.driver.closed
    proxy.close()
    wait()
    assert names(seen) == ["soft_invalidate", "reset", "checkin", "close"]
    again = pool.connect()
    assert number(again) == 2
    again.close()


@on_fakes
def test_detach_and_its_close_are_told(fake):
    """detach when it leaves the pool; then reset for an end, and close_detached."""
    pool = make_pool(fake)
    proxy = pool.connect()
    dbapi, record = proxy.dbapi_connection, proxy._connection_record
    seen = listen_to_all(pool)
    proxy.detach()
    assert seen == [("detach", dbapi, record)]
    del seen[:]
    open_then = []
    event.listen(pool, "close_detached", lambda dbapi: open_then.append(not dbapi.driver.closed))
    proxy.close()
    state = PoolResetState(transaction_was_reset=False, terminate_only=True, asyncio_safe=True)
    assert seen == [("reset", dbapi, None, state), ("close_detached", dbapi)]
    assert open_then == [True]


@pytest.mark.parametrize("end", ["dispose", "overflow", "recycle", "soft"])
@on_fakes
def test_close_is_told_before_the_close(fake, end):
    """As the page on PoolEvents.close says, so that the listener may still use it."""
    pool = make_pool(fake, pool_size=1, max_overflow=1, recycle=10, pool_idle_timeout=0)
    open_then = []
    event.listen(pool, "close", lambda dbapi, record: open_then.append(not dbapi.driver.closed))
    proxy = pool.connect()
    if end == "overflow":
        other = pool.connect()
        other.close()
    elif end == "recycle":
        wait(11)
    elif end == "soft":
        proxy.invalidate(soft=True)
    proxy.close()
    if end == "dispose":
        pool.dispose()
    wait()
    assert open_then == [True]


def test_close_is_told_when_the_loop_has_ended():
    """dispose() tells of every connection that it closes, wherever it is called."""
    fake = FakeServer()
    pool = make_pool(fake)
    seen = listen_to_all(pool)

    async def use():
        proxy = await greenlet_spawn(pool.connect)
        await greenlet_spawn(proxy.close)

    with asyncio.Runner(loop_factory=virtual_loop) as runner:
        runner.run(use())
    del seen[:]
    pool.dispose()
    assert (names(seen), fake.open) == (["close"], [])


# -- Reset on return -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "calls"),
    [
        ("rollback", ["rollback"]),
        (True, ["rollback"]),
        ("commit", ["commit"]),
        (None, []),
        (False, []),
    ],
)
@on_fakes
def test_reset_on_return(fake, how, calls):
    """rollback, commit or nothing; the event comes in each case, and first."""
    pool = make_pool(fake, reset_on_return=how)
    seen = []

    @event.listens_for(pool, "reset")
    def told(dbapi, record, state):
        seen.append((list(dbapi.calls), state))

    proxy = pool.connect()
    dbapi = proxy.dbapi_connection
    proxy.close()
    assert (dbapi.calls, seen) == (calls, [([], RETURNED)])
    assert pool.recreate()._reset_on_return is pool._reset_on_return


@on_fakes
def test_an_unknown_reset_is_an_argument_error(fake):
    """Told when the pool is made."""
    with pytest.raises(exc.ArgumentError, match="reset_on_return"):
        make_pool(fake, reset_on_return="sometimes")


@on_fakes
def test_an_invalidated_connection_is_not_reset(fake):
    """Nothing is asked of it but its end."""
    pool = make_pool(fake)
    seen = listen_to_all(pool)
    proxy = pool.connect()
    dbapi = proxy.dbapi_connection
    proxy.invalidate()
    assert "reset" not in names(seen)
    assert dbapi.calls == ["terminate"]


@pytest.mark.parametrize("where", ["listener", "rollback"])
@on_fakes
def test_an_error_in_reset_costs_the_connection_and_not_the_slot(fake, where, caplog):
    """It is logged, the connection is invalidated with it, and close() does not raise."""
    pool = make_pool(fake)
    proxy = pool.connect()
    seen = listen_to_all(pool)
    if where == "listener":
        error = ValueError("in reset")

        def fail(*_):
            raise error

        event.listen(pool, "reset", fail)
    else:
        proxy.driver_connection.broken = proxy.dbapi_connection.in_transaction = True
    with caplog.at_level(logging.ERROR):
        proxy.close()
    assert "Exception during reset" in caplog.text
    assert names(seen) == ["reset", "invalidate", "close", "checkin"]
    assert isinstance(seen[1][-1], ValueError if where == "listener" else ConnectionLost)
    assert (numbers(pool), fake.open) == ((0, 0, -1), [])


@since_2_1
@on_fakes
def test_a_base_exception_in_reset_is_raised_and_frees_the_slot(fake, caplog):
    """It is not swallowed; the connection is gone and its place is free."""
    pool = make_pool(fake)
    proxy = pool.connect()
    errors = [NotAnException()]

    @event.listens_for(pool, "reset")
    def fail(*_):
        if errors:
            raise errors.pop()

    with caplog.at_level(logging.ERROR), pytest.raises(NotAnException):
        proxy.close()
    del proxy
    wait()
    assert numbers(pool) == (0, 0, -1)
    pool.connect().close()


# -- Invalidate, close, detach ---------------------------------------------------------------


@on_fakes
def test_invalidate_closes_and_the_next_gets_another(fake):
    """The proxy is worth nothing afterwards, and its slot is free."""
    pool = make_pool(fake, timeout=0)
    proxy = pool.connect()
    proxy.invalidate()
    assert (proxy.is_valid, proxy.dbapi_connection) == (False, None)
    assert fake.open == []
    again = pool.connect()
    assert number(again) == 2
    proxy.close()  # of no consequence to the other
    assert numbers(pool) == (0, 1, 0)
    again.close()
    assert numbers(pool) == (1, 0, 0)


@on_fakes
def test_invalidate_after_the_end_is_a_warning(fake):
    """Twice, or after close: nothing happens to anybody else's connection."""
    pool = make_pool(fake)
    invalidated, closed = pool.connect(), None
    invalidated.invalidate()
    closed = pool.connect()
    closed.close()
    for proxy in (invalidated, closed):
        with pytest.warns(exc.SAWarning, match="already-closed"):
            proxy.invalidate()
    assert numbers(pool) == (1, 0, 0)


@on_fakes
def test_a_second_close_is_of_no_consequence(fake):
    """The slot is not freed twice, and the next holder keeps its connection."""
    pool = make_pool(fake, timeout=0)
    proxy = pool.connect()
    proxy.close()
    other = pool.connect()
    proxy.close()
    assert numbers(pool) == (0, 1, 0)
    with pytest.raises(exc.TimeoutError):
        pool.connect()
    other.close()
    assert numbers(pool) == (1, 0, 0)


@on_fakes
def test_a_second_check_in_of_a_record_is_a_warning(fake):
    """And no second place among the idle."""
    pool = make_pool(fake)
    proxy = pool.connect()
    record = proxy._connection_record
    proxy.close()
    with pytest.warns(exc.SAWarning, match="Double checkin"):
        record.checkin()
    assert numbers(pool) == (1, 0, 0)


@since_2_1
@on_fakes
def test_a_proxy_is_a_context_manager(fake):
    """Its end is a check-in, also when an error ends it."""
    pool = make_pool(fake)

    def use():
        with pool.connect() as proxy:
            assert proxy.is_valid
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        use()
    assert numbers(pool) == (1, 0, 0)


@on_fakes
def test_a_detached_connection_lives_on_its_own(fake):
    """Usable, its slot free, untouched by dispose, and really closed by close()."""
    pool = make_pool(fake, timeout=0)
    proxy = pool.connect()
    proxy.detach()
    assert (proxy.is_detached, proxy.is_valid) == (True, True)
    assert numbers(pool) == (0, 0, -1)
    other = pool.connect()
    assert number(other) == 2
    other.close()
    pool.dispose()
    driver = proxy.dbapi_connection.driver
    assert await_only(driver.execute("SELECT 1"))
    proxy.close()
    assert (driver.closed, driver.said_goodbye) == (True, True)
    assert not proxy.is_valid


@on_fakes
def test_an_idle_record_that_is_invalidated_is_not_given_out(fake):
    """Soft or hard, by whoever kept the record from an event."""
    pool = make_pool(fake)
    for soft in (True, False):
        proxy = pool.connect()
        record, before = proxy._connection_record, number(proxy)
        proxy.close()
        record.invalidate(soft=soft)
        again = pool.connect()
        assert number(again) != before
        again.close()
    wait()
    assert len(fake.open) == 1


@on_fakes
def test_an_invalidate_listener_that_raises_does_not_keep_the_slot(fake):
    """The error is its caller's; the pool goes on."""
    pool = make_pool(fake, timeout=0)
    errors = [ValueError("in invalidate")]

    @event.listens_for(pool, "invalidate")
    def fail(*_):
        if errors:
            raise errors.pop()

    proxy = pool.connect()
    with pytest.raises(ValueError, match="in invalidate"):
        proxy.invalidate()
    proxy.close()
    assert pool.checkedout() == 0
    pool.connect().close()


# -- Recycle ---------------------------------------------------------------------------------


@on_fakes
def test_recycle_replaces_only_what_is_too_old(fake):
    """The young are reused, the old closed and made anew, with connect told."""
    pool = make_pool(fake, recycle=30, pool_recycle_jitter=0, pool_idle_timeout=0)
    pool.connect().close()
    pool._stop_keeper()  # which would find it first
    wait(20)
    proxy = pool.connect()
    assert number(proxy) == 1
    proxy.close()
    wait(20)
    seen = listen_to_all(pool)
    proxy = pool.connect()
    wait()
    assert number(proxy) == 2
    assert sorted(names(seen)) == ["checkout", "close", "connect", "first_connect"]
    proxy.close()


@on_fakes
def test_recycle_counts_from_the_connections_own_connect(fake):
    """What replaces another at its checkout is young, however old the other was."""
    pool = make_pool(fake, recycle=30, pool_recycle_jitter=0, pool_idle_timeout=0)
    pool.connect().close()
    pool._stop_keeper()
    errors = [exc.DisconnectionError()]

    @event.listens_for(pool, "checkout")
    def check(*_):
        if errors:
            raise errors.pop()

    wait(20)
    pool.connect().close()
    pool._stop_keeper()
    wait(20)
    proxy = pool.connect()
    found = number(proxy)
    proxy.close()
    assert found == 2


@on_fakes
def test_a_failure_to_replace_an_old_one_keeps_no_slot(fake):
    """The error is the caller's, and the numbers are as before."""
    pool = make_pool(fake, max_overflow=2, recycle=5, pool_idle_timeout=0, timeout=0)
    pool.connect().close()
    pool._stop_keeper()
    wait(10)
    fake.errors = [CannotConnect("no")]
    with pytest.raises(CannotConnect):
        pool.connect()
    assert numbers(pool) == (0, 0, -1)
    held = [pool.connect() for _ in range(3)]
    assert numbers(pool) == (0, 3, 2)
    for proxy in held:
        proxy.close()


# -- Recreate and dispose --------------------------------------------------------------------


@on_fakes
def test_recreate_connects_nothing_and_keeps_queuepools_arguments(fake):
    """A pool of the same kind and measures, cold."""
    pool = make_pool(
        fake, pool_size=3, max_overflow=4, timeout=5.5, use_lifo=False, reset_on_return="commit"
    )
    again = pool.recreate()
    assert type(again) is type(pool)
    assert again is not pool
    assert fake.connects == 0
    assert (again.size(), again.timeout(), again._max_overflow) == (3, 5.5, 4)
    assert again._dialect is pool._dialect
    assert again._creator == pool._creator
    proxy = again.connect()
    dbapi = proxy.dbapi_connection
    proxy.close()
    assert dbapi.calls == ["commit"]
    assert numbers(again) == (1, 0, -2)


@on_fakes
def test_a_pool_that_was_disposed_of_is_used_again(fake):
    """It opens new connections and keeps them."""
    pool = make_pool(fake, pool_size=2)
    first = [pool.connect() for _ in range(2)]
    for proxy in first:
        proxy.close()
    for _ in range(2):
        pool.dispose()
        assert (numbers(pool), fake.open) == ((0, 0, -2), [])
    proxy = pool.connect()
    assert number(proxy) == 3
    proxy.close()
    assert numbers(pool) == (1, 0, -1)


# -- Failures --------------------------------------------------------------------------------


@on_fakes
def test_a_failed_connect_frees_the_slot(fake):
    """As often as it happens, within the size and in the overflow."""
    pool = make_pool(fake, pool_size=1, max_overflow=1, timeout=0)
    for held in ([], [1]):
        proxies = [pool.connect() for _ in held]
        before = numbers(pool)
        fake.refusing = True
        for _ in range(5):
            with pytest.raises(CannotConnect):
                pool.connect()
        assert numbers(pool) == before
        fake.refusing = False
        proxies.append(pool.connect())
        for proxy in proxies:
            proxy.close()
        pool.dispose()


@pytest.mark.parametrize("name", ["first_connect", "connect"])
@on_fakes
def test_a_connect_listener_that_fails_frees_the_slot(fake, name):
    """Its error is the caller's, and the next caller is served, with its info."""
    pool = make_pool(fake, timeout=0)
    errors = [ValueError("in connect")]

    @event.listens_for(pool, name)
    def fail(*_):
        if errors:
            raise errors.pop()

    @event.listens_for(pool, "connect")
    def mark(dbapi, record):
        record.info["mark"] = True

    with pytest.raises(ValueError, match="in connect"):
        pool.connect()
    assert numbers(pool) == (0, 0, -1)
    proxy = pool.connect()
    assert proxy.info == {"mark": True}
    proxy.close()


@on_fakes
def test_a_connect_listener_that_fails_leaves_no_connection_open(fake):
    """Nobody else knows of the connection: it has to be closed there and then."""
    pool = make_pool(fake)

    @event.listens_for(pool, "connect")
    def fail(*_):
        raise ValueError("in connect")

    with pytest.raises(ValueError, match="in connect"):
        pool.connect()
    wait()
    assert (len(fake.made), fake.open) == (1, [])


@on_fakes
def test_a_connect_listeners_base_exception_is_the_callers(fake):
    """What is no Exception is raised as it is, too, and frees the slot."""
    pool = make_pool(fake, timeout=0)
    errors = [NotAnException("in connect")]

    @event.listens_for(pool, "connect")
    def fail(*_):
        if errors:
            raise errors.pop()

    with pytest.raises(BaseException) as caught:
        pool.connect()
    assert numbers(pool) == (0, 0, -1)
    pool.connect().close()
    assert isinstance(caught.value, NotAnException)


@pytest.mark.parametrize("error", [ValueError, NotAnException])
@on_fakes
def test_a_checkout_listener_that_fails_frees_the_slot(fake, error):
    """Its error is the caller's; the connection is not trusted any more."""
    pool = make_pool(fake, timeout=0)
    pool.connect().close()
    errors = [error()]
    seen = listen_to_all(pool)

    @event.listens_for(pool, "checkout")
    def fail(*_):
        if errors:
            raise errors.pop()

    with pytest.raises(error):
        pool.connect()
    assert names(seen) == ["checkout", "invalidate", "close", "checkin"]
    assert (numbers(pool), fake.open) == ((0, 0, -1), [])
    pool.connect().close()


@on_fakes
def test_a_disconnection_at_checkout_is_put_right_unseen(fake):
    """The connection is invalidated and another comes in its place, told as such."""
    pool = make_pool(fake, timeout=0)
    seen = listen_to_all(pool)
    errors = [exc.DisconnectionError("gone")]

    @event.listens_for(pool, "checkout")
    def check(*_):
        if errors:
            raise errors.pop()

    proxy = pool.connect()
    assert number(proxy) == 2
    assert names(seen) == [
        "first_connect", "connect", "checkout", "invalidate", "close", "connect", "checkout"
    ]  # fmt: skip
    assert (numbers(pool), len(fake.open)) == ((0, 1, 0), 1)
    proxy.close()
    again = pool.connect()
    assert number(again) == 2
    again.close()


@on_fakes
def test_disconnections_without_end_are_an_error(fake):
    """After the third attempt; no slot and no connection is left of it."""
    pool = make_pool(fake, timeout=0)

    @event.listens_for(pool, "checkout")
    def check(*_):
        raise exc.DisconnectionError("gone")

    for attempts in (3, 6):
        with pytest.raises(exc.InvalidRequestError, match="This connection is closed"):
            pool.connect()
        assert (fake.connects, fake.open, numbers(pool)) == (attempts, [], (0, 0, -1))


@on_fakes
def test_a_disconnection_that_cannot_be_put_right_frees_the_slot(fake):
    """The connect's error is the caller's."""
    pool = make_pool(fake, timeout=0, max_overflow=2)
    pool.connect().close()
    errors = [exc.DisconnectionError("gone")]

    @event.listens_for(pool, "checkout")
    def check(*_):
        if errors:
            raise errors.pop()

    fake.errors = [CannotConnect("no")]
    with pytest.raises(CannotConnect):
        pool.connect()
    assert (numbers(pool), fake.open) == ((0, 0, -1), [])
    held = [pool.connect() for _ in range(3)]
    assert numbers(pool) == (0, 3, 2)
    for proxy in held:
        proxy.close()


@on_fakes
def test_invalidate_pool_error_leaves_no_dead_one_to_be_given_out(fake):
    """By the contract the others are asked first: the dead are dropped and the living kept."""
    pool = make_pool(fake, pool_size=3)
    held = [pool.connect() for _ in range(3)]
    for proxy in held:
        proxy.close()
    fake.made[0].broken = True
    errors = [exc.InvalidatePoolError()]

    @event.listens_for(pool, "checkout")
    def check(*_):
        if errors:
            raise errors.pop()

    proxy = pool.connect()
    wait()
    assert number(proxy) == 4
    assert [driver.number for driver in fake.open] == [2, 4]
    assert numbers(pool) == (1, 1, -1)
    proxy.close()


@on_fakes
def test_an_error_at_the_close_of_an_overflow_connection_is_nobodys(fake, caplog):
    """Its user sees nothing, and its place is free."""
    pool = make_pool(fake, max_overflow=1, timeout=0)
    one, two = pool.connect(), pool.connect()

    async def fail(**_):
        raise ConnectionLost("in close")

    one.driver_connection.close = two.driver_connection.close = fail
    one.close()
    two.close()
    wait()
    assert numbers(pool)[1:] == (0, 0)
    other = [pool.connect() for _ in range(2)]
    for proxy in other:
        vars(proxy.driver_connection).pop("close", None)
        proxy.close()


# -- Info, creators --------------------------------------------------------------------------


@on_fakes
def test_info_is_the_connections(fake):
    """It stays over check-ins, and is empty for the connection that replaces it."""
    pool = make_pool(fake)
    proxy = pool.connect()
    proxy.info["x"] = 1
    record = proxy._connection_record
    assert record.info is proxy.info
    proxy.close()
    proxy = pool.connect()
    assert proxy.info == {"x": 1}
    proxy.invalidate()
    proxy = pool.connect()
    assert proxy.info == {}
    proxy.close()


@on_fakes
def test_record_info_is_the_slots(fake):
    """It outlives what is replaced at checkout; by the contract a lost slot does not go on."""
    pool = make_pool(fake)
    proxy = pool.connect()
    proxy.info["x"] = proxy.record_info["y"] = 1
    proxy.close()
    errors = [exc.DisconnectionError()]

    @event.listens_for(pool, "checkout")
    def check(*_):
        if errors:
            raise errors.pop()

    proxy = pool.connect()
    assert (proxy.info, proxy.record_info) == ({}, {"y": 1})
    proxy.invalidate()
    proxy = pool.connect()
    assert (proxy.info, proxy.record_info) == ({}, {})
    proxy.close()


@on_fakes
def test_a_detached_connection_keeps_a_copy_of_its_info(fake):
    """It has no record any more, hence no record_info."""
    pool = make_pool(fake)
    proxy = pool.connect()
    proxy.info["x"] = 1
    before = proxy.info
    proxy.detach()
    assert (proxy.info, proxy.record_info) == ({"x": 1}, None)
    assert proxy.info is not before
    proxy.close()


@on_fakes
def test_a_creator_may_take_the_record_and_be_replaced(fake):
    """It is given the record it connects for; another is used from then on."""
    given = []

    def creator(record):
        given.append(record)
        return fake.connect()

    pool = HandoffPool(creator, dialect=make_pool(fake)._dialect)
    proxy = pool.connect()
    assert given == [proxy._connection_record]
    proxy.close()
    proxy = pool.recreate().connect()
    assert given[1:] == [proxy._connection_record]
    proxy.close()
    pool._creator = fake.connect
    pool.dispose()
    pool.connect().close()
    assert (len(given), fake.connects) == (2, 3)


# -- The engine, on a real PostgreSQL --------------------------------------------------------


@pytest.fixture
def make(make_engine, server):
    """An engine of one connection, with settings by name."""

    def engine_with(**settings):
        settings = {"url": server.url, "pool_size": 1, "max_overflow": 0} | settings
        return make_engine(settings=settings)

    return engine_with


async def pid(connection):
    return (await connection.execute(text("SELECT pg_backend_pid()"))).scalar_one()


class TestEngine:
    async def test_connect_with_and_without_a_context(self, make) -> None:
        """Both give the connection back, and it is used again."""
        engine = make()
        async with engine.connect() as connection:
            first = await pid(connection)
            assert (engine.pool.checkedin(), engine.pool.checkedout()) == (0, 1)
        assert (engine.pool.checkedin(), engine.pool.checkedout()) == (1, 0)
        connection = await engine.connect()
        assert await pid(connection) == first
        await connection.close()
        await connection.close()
        assert (engine.pool.checkedin(), engine.pool.checkedout()) == (1, 0)

    async def test_a_connection_that_was_not_started(self, make) -> None:
        """engine.connect() alone takes nothing from the pool."""
        engine = make()
        connection = engine.connect()
        with pytest.raises(exc.InvalidRequestError, match="not been started"):
            await connection.execute(SELECT_1)
        assert (engine.pool.checkedin(), engine.pool.checkedout()) == (0, 0)

    async def test_begin_commits_and_rolls_back(self, make) -> None:
        """By whether an error ends it; the same connection serves both."""
        engine = make()
        async with engine.begin() as connection:
            await connection.execute(text("CREATE TEMPORARY TABLE t (n int)"))
            await connection.execute(text("INSERT INTO t VALUES (1)"))

        async def fail() -> None:
            async with engine.begin() as connection:
                await connection.execute(text("INSERT INTO t VALUES (2)"))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await fail()
        async with engine.begin() as connection:
            assert (await connection.execute(text("SELECT n FROM t"))).scalars().all() == [1]
        assert (engine.pool.checkedin(), engine.pool.checkedout()) == (1, 0)

    async def test_what_was_not_committed_is_rolled_back_on_return(self, make) -> None:
        """engine.connect() commits nothing by itself, whatever ends it."""
        engine = make()
        async with engine.begin() as connection:
            await connection.execute(text("CREATE TEMPORARY TABLE t (n int)"))
        async with engine.connect() as connection:
            await connection.execute(text("INSERT INTO t VALUES (1)"))

        async def fail() -> None:
            async with engine.connect() as connection:
                await connection.execute(text("INSERT INTO t VALUES (1)"))
                await connection.execute(text("SELECT nonsense"))

        with pytest.raises(exc.ProgrammingError):
            await fail()
        async with engine.connect() as connection:
            assert (await connection.execute(text("SELECT n FROM t"))).all() == []

    @pytest.mark.parametrize("begun", [True, False])
    async def test_reset_says_whether_the_engine_rolled_back(self, make, begun) -> None:
        """transaction_was_reset is the engine's word to the pool's listeners."""
        engine = make()
        seen = []
        listen(engine.sync_engine, "reset", seen)
        async with engine.connect() as connection:
            if begun:
                await connection.begin()
        ((_, _, _, state),) = seen
        assert state == PoolResetState(
            transaction_was_reset=begun, terminate_only=False, asyncio_safe=True
        )

    async def test_raw_connection(self, make) -> None:
        """The pool's proxy, of the driver's connection, given back by close()."""
        engine = make()
        raw = await engine.raw_connection()
        assert engine.pool.checkedout() == 1
        assert await raw.driver_connection.fetchval("SELECT 1") == 1
        await greenlet_spawn(raw.close)
        assert (engine.pool.checkedin(), engine.pool.checkedout()) == (1, 0)

    async def test_the_proxy_of_a_connection(self, make) -> None:
        """get_raw_connection() is the proxy in use, and info is its dictionary."""
        engine = make()
        async with engine.connect() as connection:
            proxy = await connection.get_raw_connection()
            assert proxy is connection.sync_connection.connection
            connection.info["x"] = 1
            assert proxy.info["x"] == 1
        async with engine.connect() as connection:
            assert connection.info["x"] == 1

    async def test_invalidate_and_go_on(self, make) -> None:
        """The connection object reconnects by itself; the session before has ended."""
        engine = make()
        async with engine.connect() as connection:
            before, old = await pid(connection), await connection.get_raw_connection()
            driver = old.driver_connection
            await connection.invalidate()
            assert connection.invalidated
            assert driver.is_closed()
            await connection.rollback()
            assert await pid(connection) != before
            assert not old.is_valid
            assert engine.pool.checkedout() == 1
        assert (engine.pool.checkedin(), engine.pool.checkedout()) == (1, 0)

    async def test_detach(self, make) -> None:
        """The connection stays usable, its slot is free, and its close ends the session."""
        engine = make(pool_timeout=1)
        async with engine.connect() as connection:
            raw = await connection.get_raw_connection()
            driver = raw.driver_connection
            await greenlet_spawn(connection.sync_connection.detach)
            async with engine.connect() as other:
                assert await pid(other) != await pid(connection)
        assert driver.is_closed()
        assert (engine.pool.checkedin(), engine.pool.checkedout()) == (1, 0)

    async def test_the_pool_after_dispose(self, make) -> None:
        """Another of the same kind, empty, and fit for use; the old one's sessions are closed."""
        engine = make()
        async with engine.connect() as connection:
            driver = (await connection.get_raw_connection()).driver_connection
        old = engine.pool
        await engine.dispose()
        assert engine.pool is not old
        assert type(engine.pool) is HandoffPool
        assert (old.checkedin(), engine.pool.checkedin(), driver.is_closed()) == (0, 0, True)
        async with engine.connect() as connection:
            await connection.execute(SELECT_1)
        assert engine.pool.checkedin() == 1

    async def test_dispose_without_close(self, make) -> None:
        """close=False leaves the old pool's connections as they are."""
        engine = make()
        async with engine.connect() as connection:
            driver = (await connection.get_raw_connection()).driver_connection
        old = engine.pool
        await engine.dispose(close=False)
        assert engine.pool is not old
        assert (old.checkedin(), driver.is_closed()) == (1, False)
        await greenlet_spawn(old.dispose)
        assert driver.is_closed()

    async def test_dispose_while_in_use(self, make) -> None:
        """The holder goes on; by the contract its connection is closed as it comes back."""
        engine = make()
        async with engine.connect() as connection:
            driver = (await connection.get_raw_connection()).driver_connection
            await engine.dispose()
            async with engine.connect() as other:
                assert await pid(other) != await pid(connection)
        for _ in range(100):
            await asyncio.sleep(0.01)
            if driver.is_closed():
                break
        assert driver.is_closed()
        assert (engine.pool.checkedin(), engine.pool.checkedout()) == (1, 0)

    async def test_listeners_on_the_engine_and_its_pool_survive_dispose(self, make) -> None:
        """Told of the pool before and of the one after."""
        engine = make()
        on_engine, on_pool = listen_to_all(engine.sync_engine), listen_to_all(engine.pool)
        for _ in range(2):
            del on_engine[:], on_pool[:]
            async with engine.connect() as connection:
                await connection.execute(SELECT_1)
            await engine.dispose()
            told = ["first_connect", "connect", "checkout", "reset", "checkin", "close"]
            assert names(on_engine) == told
            assert names(on_pool) == told

    async def test_pool_events_by_argument(self, server) -> None:
        """create_async_engine(pool_events=...) reaches the pool."""
        seen = []
        engine = create_async_engine(
            server.url, pool_events=[(lambda *args: seen.append(len(args)), "checkout")]
        )
        async with engine.connect() as connection:
            await connection.execute(SELECT_1)
        await engine.dispose()
        assert seen == [3]

    async def test_a_connect_listener_sets_up_each_session(self, make) -> None:
        """It may use the DBAPI's cursor, as SQLAlchemy's page on events shows."""
        engine = make()

        @event.listens_for(engine.sync_engine, "connect")
        def set_up(dbapi, record):
            cursor = dbapi.cursor()
            cursor.execute("SET application_name TO 'set-up'")
            cursor.close()
            dbapi.commit()

        async with engine.connect() as connection:
            found = await connection.execute(text("SHOW application_name"))
            assert found.scalar_one() == "set-up"

    async def test_a_checkout_listener_that_finds_it_gone(self, make) -> None:
        """DisconnectionError makes another session in its place, on the driver as well."""
        engine = make()
        async with engine.connect() as connection:
            before = await pid(connection)
        errors = [exc.DisconnectionError("gone")]

        @event.listens_for(engine.sync_engine, "checkout")
        def check(dbapi, record, proxy):
            if errors:
                raise errors.pop()

        async with engine.connect() as connection:
            assert await pid(connection) != before
        assert (engine.pool.checkedin(), engine.pool.checkedout()) == (1, 0)

    async def test_an_exhausted_pool(self, make) -> None:
        """sqlalchemy.exc.TimeoutError through the engine too, and nothing is lost by it."""
        engine = make(pool_timeout=0.05)
        async with engine.connect():
            with pytest.raises(exc.TimeoutError, match=r"^QueuePool limit of size 1 overflow 0"):
                await engine.connect()
        async with engine.connect() as connection:
            await connection.execute(SELECT_1)

    @pytest.mark.parametrize("to_the_end", [True, False])
    async def test_stream(self, make, to_the_end) -> None:
        """Rows come while the connection is held; left half-way, it comes back fit for use."""
        engine = make()
        query = text("SELECT n FROM generate_series(1, 5000) AS s (n)")
        seen = []
        async with engine.connect() as connection, connection.stream(query) as result:
            async for row in result.scalars():
                seen.append(row)
                assert engine.pool.checkedout() == 1
                if not to_the_end and row == 3:
                    break
        assert len(seen) == (5000 if to_the_end else 3)
        async with engine.connect() as connection:
            assert (await connection.execute(SELECT_1)).scalar_one() == 1
        assert (engine.pool.checkedin(), engine.pool.checkedout()) == (1, 0)

    async def test_an_isolation_level_ends_with_its_checkout(self, make) -> None:
        """The next user of the connection has the default again."""
        engine = make()
        show = text("SHOW transaction_isolation")
        async with engine.connect() as connection:
            await connection.execution_options(isolation_level="SERIALIZABLE")
            assert (await connection.execute(show)).scalar_one() == "serializable"
        async with engine.connect() as connection:
            assert (await connection.execute(show)).scalar_one() == "read committed"
        assert engine.pool.checkedin() == 1

    async def test_the_first_connects_side_by_side(self, make) -> None:
        """The dialect is set up once, before any of them is used."""
        engine = make(pool_size=3)
        seen = []
        listen(engine.sync_engine, "first_connect", seen)

        async def use() -> int:
            async with engine.connect() as connection:
                await asyncio.sleep(0.05)
                return await pid(connection)

        found = await asyncio.gather(use(), use(), use())
        assert len(set(found)) == 3
        assert names(seen) == ["first_connect"]
        assert engine.dialect.server_version_info
