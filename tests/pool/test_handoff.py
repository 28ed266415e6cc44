"""Each sentence of the pool's contract, by example, on a virtual clock."""

import asyncio
import logging

import pytest
from fakes import (
    Caller,
    CannotConnect,
    ConnectionLost,
    FakeServer,
    callers,
    holding,
    idle,
    make_pool,
    on_fakes,
    on_virtual_time,
    settle,
    virtual_loop,
)
from sqlalchemy import event
from sqlalchemy.util import greenlet_spawn

from poolkit import (
    CheckedIn,
    CheckedOut,
    CheckoutRefused,
    CheckoutTimedOut,
    CloseReason,
    ConnectionClosed,
    ConnectionInvalidated,
    ConnectionOpened,
    LongHolder,
    LongHolderReturned,
    OverloadBegan,
    OverloadEnded,
    PoolDraining,
    PoolOverloaded,
    PoolTimeout,
    WrongEventLoop,
)
from poolkit.pool import keeper


def reasons(events):
    return [event.reason for event in events if isinstance(event, ConnectionClosed)]


# -- Direct hand-off -------------------------------------------------------------------------


@on_fakes
async def test_those_who_wait_are_served_in_the_order_in_which_they_came(server):
    pool = make_pool(server)
    (holder,) = await holding(pool)
    waiting = await callers(pool, 4)
    for caller in [holder, *waiting[:3]]:
        await caller.give_back()
    await waiting[3].get()
    order = sorted(waiting, key=lambda c: (c.got_at, waiting.index(c)))
    assert order == waiting
    assert len(server.made) == 1
    await waiting[3].give_back()


@on_fakes
async def test_a_newcomer_does_not_overtake(server):
    """Even one that comes in the very instant in which the connection is given back."""
    pool = make_pool(server)
    (holder,) = await holding(pool)
    (first,) = await callers(pool, 1)
    holder.do("close")
    newcomer = Caller(pool, "newcomer")
    await settle()
    assert (first.holds, newcomer.holds) == (True, False)
    await first.give_back()
    await newcomer.get()
    await newcomer.give_back()


@pytest.mark.parametrize(("lifo", "expected"), [(True, 3), (False, 1)])
def test_idle_connections_are_taken_last_in_first_out(lifo, expected):
    async def main():
        pool = make_pool(FakeServer(), pool_size=3, use_lifo=lifo)
        held = await holding(pool, 3)
        for caller in held:
            await caller.give_back()
        (caller,) = await holding(pool)
        assert caller.driver.number == expected
        await caller.give_back()

    on_virtual_time(main)


# -- Waking whoever waits --------------------------------------------------------------------


@on_fakes
async def test_a_waiter_behind_a_failed_connect_starts_its_own_at_once(server):
    server.connect_delay, server.errors = 1.0, [CannotConnect("no")]
    pool = make_pool(server, timeout=10)
    first, second = await callers(pool, 2)
    with pytest.raises(CannotConnect):
        await first.get()
    await second.get()
    assert second.got_at == pytest.approx(2.0)
    await second.give_back()


@pytest.mark.parametrize("how", ["invalidate", "detach", "lose"])
def test_a_lost_connection_is_capacity_for_the_first_in_line(how):
    async def main():
        server = FakeServer()
        pool = make_pool(server)
        (holder,) = await holding(pool)
        (waiter,) = await callers(pool, 1)
        holder.do(how)
        await waiter.get()
        assert waiter.driver.number == 2
        assert pool.stats().used == 1
        await waiter.give_back()
        if how == "detach":
            await holder.give_back()
        assert [driver.number for driver in server.open] == [2]

    on_virtual_time(main)


@on_fakes
async def test_a_waiter_that_was_granted_and_cancelled_passes_it_on(server):
    pool = make_pool(server)
    (holder,) = await holding(pool)
    first, second = await callers(pool, 2)
    proxy, holder.proxy = holder.proxy, None
    await greenlet_spawn(proxy.close)
    first.cancel()
    await settle()
    assert second.holds
    assert len(server.made) == 1
    await second.give_back()


@on_fakes
async def test_freed_capacity_wakes_a_waiter_when_the_check_in_is_cancelled(server):
    """The connection turns out dead at check-in; the task is cancelled as it is dropped."""
    pool = make_pool(server, timeout=None)
    (holder,) = await holding(pool)
    (waiter,) = await callers(pool, 1)
    holder.driver.kill()
    discard = pool._discard

    def cancelled_then(*given):
        holder.cancel()
        discard(*given)

    pool._discard = cancelled_then
    holder.do("close")
    await settle()
    assert waiter.holds
    await waiter.give_back()


@on_fakes
async def test_freed_capacity_wakes_a_waiter_when_taking_leave_is_cancelled(server):
    """The rollback fails, SQLAlchemy drops the connection, and the task is cancelled as it does."""
    pool = make_pool(server, timeout=None)
    (holder,) = await holding(pool)
    (waiter,) = await callers(pool, 1)
    holder.do("begin")
    await settle()
    holder.driver.kill()
    holder.do("close")
    await settle(1)
    holder.cancel()
    await settle()
    assert isinstance(holder.error, asyncio.CancelledError)
    assert waiter.holds
    await waiter.give_back()
    assert pool.checkedout() == 0


@on_fakes
async def test_freed_capacity_wakes_a_waiter_when_a_failed_ping_is_cancelled(server):
    """The connection fails its ping; the task is cancelled as it is dropped."""
    pool = make_pool(server, timeout=None)
    await idle(pool)
    await asyncio.sleep(2)
    server.ping_delay, server.made[0].broken = 0.5, True
    (pinging,) = await callers(pool, 1)
    (waiter,) = await callers(pool, 1)
    failed = pool._discard

    def cancelled_then(*given):
        pinging.cancel()
        failed(*given)

    pool._discard = cancelled_then
    await asyncio.sleep(1)
    assert waiter.holds
    await waiter.give_back()


# -- Connects --------------------------------------------------------------------------------


@on_fakes
async def test_no_more_than_max_connecting_connects_are_under_way(server):
    server.connect_delay = 1.0
    pool = make_pool(server, pool_size=10, pool_max_connecting=3, pool_overload_after=0)
    made = await callers(pool, 10)
    assert len(server.connecting) == 3
    await asyncio.sleep(5)
    assert [caller.holds for caller in made] == [True] * 10
    assert made[-1].got_at == pytest.approx(4.0)
    for caller in made:
        await caller.give_back()


@on_fakes
async def test_a_warm_up_keeps_to_the_limits(server):
    """Also when callers come while it waits for its turn to connect."""
    server.connect_delay = 1.0
    pool = make_pool(server, pool_size=3, pool_max_connecting=2, timeout=None)
    warming = asyncio.create_task(pool.open(3))
    await settle()
    highest, made = 0, []
    for _ in range(60):
        made.append(Caller(pool))
        for _ in range(4):
            await asyncio.sleep(0)
            highest = max(highest, pool._total())
            assert len(pool._connects.under_way) <= 2
        await asyncio.sleep(0.1)
    await warming
    assert highest <= 3
    for caller in made:
        caller.do("close")
    await asyncio.sleep(10)
    assert [caller for caller in made if not caller.done] == []


@on_fakes
async def test_a_connect_goes_on_when_its_caller_gives_up(server):
    server.connect_delay = 1.0
    pool = make_pool(server)
    (caller,) = await callers(pool, 1)
    await asyncio.sleep(0.25)
    caller.cancel()
    await asyncio.sleep(1)
    assert (pool.checkedin(), pool.checkedout(), len(server.made)) == (1, 0, 1)


@on_fakes
async def test_an_adopted_connect_serves_the_next_caller(server):
    server.connect_delay = 1.0
    pool = make_pool(server)
    (first,) = await callers(pool, 1)
    first.cancel()
    await asyncio.sleep(0.5)
    (second,) = await callers(pool, 1)
    await second.get()
    assert second.got_at == pytest.approx(1.0, abs=0.01)
    assert server.connects == 1
    await second.give_back()


@on_fakes
async def test_a_caller_that_finds_an_adopted_connect_is_not_turned_away_at_once(server):
    """With pool_timeout=0 a connect that is under way is waited for, whoever asked for it."""
    server.connect_delay = 1.0
    pool = make_pool(server, timeout=0)
    (first,) = await callers(pool, 1)
    first.cancel()
    await settle()
    (second,) = await callers(pool, 1)
    await second.get()
    await second.give_back()


@on_fakes
async def test_a_connect_under_way_outlasts_the_pool_timeout(server):
    """It has a bound of its own; the caller gets its connection or its error."""
    server.connect_delay = 2.0
    pool = make_pool(server, timeout=1)
    (caller,) = await callers(pool, 1)
    await caller.get()
    assert caller.got_at == pytest.approx(2.0, abs=0.01)
    await caller.give_back()


# -- Overload --------------------------------------------------------------------------------


@on_fakes
async def test_in_overload_the_newest_are_served_first_until_the_queue_is_empty(server):
    events = []
    pool = make_pool(server, timeout=None, pool_overload_after=1.0, observers=[events.append])
    (holder,) = await holding(pool)
    waiting = []
    for _ in range(4):
        waiting += await callers(pool, 1)
        await asyncio.sleep(0.4)
    served = []
    for caller in waiting:
        caller.on_checkout = served.append
    last = holder
    for _ in range(4):
        await last.give_back()
        last = served[-1]
        assert pool.stats().overloaded is (len(served) < 4)
    await last.give_back()
    assert served == waiting[::-1]
    overload = [e for e in events if isinstance(e, OverloadBegan | OverloadEnded)]
    assert [type(e) for e in overload] == [OverloadBegan, OverloadEnded]
    assert overload[0].waiting == 4
    assert pool.stats().overloads == 1
    # and first come, first served again
    (holder,) = await holding(pool)
    first, second = await callers(pool, 2)
    await holder.give_back()
    assert (first.holds, second.holds) == (True, False)
    await first.give_back()
    await second.give_back()


@on_fakes
async def test_a_queue_that_stands_but_moves_stays_first_come_first_served(server):
    events, served = [], []
    pool = make_pool(server, pool_overload_after=1.0, observers=[events.append])

    async def worker(number):
        for _ in range(10):
            proxy = await greenlet_spawn(pool.connect)
            served.append(number)
            await asyncio.sleep(0.1)
            await greenlet_spawn(proxy.close)

    await asyncio.gather(*(worker(number) for number in range(8)))
    assert served == list(range(8)) * 10
    assert not [e for e in events if isinstance(e, OverloadBegan)]


async def worst_wait_of_steady_workers(pool, many, disturb):
    """So many workers with 10 ms of work each, again and again for ten seconds."""
    loop, waits = asyncio.get_running_loop(), []
    ends = loop.time() + 10

    async def work():
        while loop.time() < ends:
            asked = loop.time()
            proxy = await greenlet_spawn(pool.connect)
            waits.append(loop.time() - asked)
            await asyncio.sleep(0.01 + stalled[0])
            await greenlet_spawn(proxy.close)

    stalled = [0.0]
    workers = [asyncio.ensure_future(work()) for _ in range(many)]
    await asyncio.sleep(2)
    await disturb(stalled)
    await asyncio.gather(*workers)
    return max(waits)


@on_fakes
async def test_one_impatient_caller_does_not_starve_steady_workers(server):
    """Its patience is not theirs: the first in line shows that, and is served."""
    pool = make_pool(server, pool_size=5, timeout=None)

    async def disturb(_):
        for _ in range(10):
            (hasty,) = await callers(pool, 1)
            while not hasty.holds:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)
            hasty.cancel()

    assert await worst_wait_of_steady_workers(pool, 60, disturb) < 0.5
    await greenlet_spawn(pool.dispose)


@on_fakes
async def test_a_hitch_does_not_starve_steady_workers(server):
    """After it the queue is as long as before, and nobody leaves: the old are served again."""
    events = []
    pool = make_pool(server, pool_size=5, timeout=None, observers=[events.append])

    async def disturb(stalled):
        stalled[0] = 1.5
        await asyncio.sleep(1)
        stalled[0] = 0.0

    assert await worst_wait_of_steady_workers(pool, 20, disturb) < 4
    overload = [type(e) for e in events if isinstance(e, OverloadBegan | OverloadEnded)]
    assert overload == [OverloadBegan, OverloadEnded]
    await greenlet_spawn(pool.dispose)


@on_fakes
async def test_overload_can_be_turned_off(server):
    pool = make_pool(server, timeout=None, pool_overload_after=0)
    (holder,) = await holding(pool)
    first, second = await callers(pool, 2)
    await asyncio.sleep(60)
    await holder.give_back()
    assert (first.holds, second.holds) == (True, False)
    await first.give_back()
    await second.give_back()


@on_fakes
async def test_beyond_max_waiting_the_newcomer_is_refused(server):
    events = []
    pool = make_pool(server, pool_max_waiting=1, observers=[events.append])
    (holder,) = await holding(pool)
    waiter, refused = await callers(pool, 2)
    assert isinstance(refused.error, PoolOverloaded)
    assert "pool_max_waiting=1 callers wait" in str(refused.error)
    assert [e.error for e in events if isinstance(e, CheckoutRefused)] == [refused.error]
    assert pool.stats().refused == 1
    await holder.give_back()
    await waiter.give_back()


@on_fakes
async def test_beyond_max_waiting_the_oldest_is_refused_in_overload(server):
    pool = make_pool(server, timeout=None, pool_max_waiting=2, pool_overload_after=1.0)
    (holder,) = await holding(pool)
    oldest, older = await callers(pool, 2)
    await asyncio.sleep(1.5)
    (newcomer,) = await callers(pool, 1)
    assert isinstance(oldest.error, PoolOverloaded)
    await holder.give_back()
    assert (older.holds, newcomer.holds) == (False, True)
    await newcomer.give_back()
    await older.give_back()


@on_fakes
async def test_max_waiting_does_not_refuse_while_there_is_room(server):
    """Callers on a cold pool do not wait for a slot: a connect of their own is under way."""
    server.connect_delay = 0.1
    pool = make_pool(server, pool_size=4, pool_max_waiting=1)
    made = await callers(pool, 4)
    assert [caller.error for caller in made] == [None] * 4
    for caller in made:
        await caller.get()
        await caller.give_back()


@on_fakes
async def test_a_caller_whose_ping_failed_is_not_refused(server):
    """The caller sees nothing of the ping that failed, though the queue is full by then."""
    pool = make_pool(server, pool_max_waiting=1)
    await idle(pool)
    await asyncio.sleep(5)
    server.made[0].frozen = True
    (pinging,) = await callers(pool, 1)
    (waiter,) = await callers(pool, 1)
    await asyncio.sleep(2)
    assert (pinging.error, pinging.holds) == (None, True)
    await pinging.give_back()
    await waiter.give_back()


# -- Live before dead ------------------------------------------------------------------------


@on_fakes
async def test_a_live_connection_is_given_out_before_a_slot_whose_connection_is_gone(server):
    pool = make_pool(server, pool_size=2)
    one, two = await holding(pool, 2)
    await one.give_back()
    await two.give_back("invalidate")
    assert (pool.checkedin(), pool.checkedout()) == (1, 0)
    (caller,) = await holding(pool)
    assert (caller.driver.number, server.connects) == (1, 2)
    await caller.give_back()


@on_fakes
async def test_a_soft_invalidated_connection_is_not_kept_as_idle(server):
    """It will not be used again, so that its slot is capacity and a live one goes first."""
    pool = make_pool(server, pool_size=2)
    one, two = await holding(pool, 2)
    await one.give_back()
    two.do("soft")
    await two.give_back()
    (caller,) = await holding(pool)
    assert (caller.driver.number, server.connects) == (1, 2)
    await caller.give_back()


@on_fakes
async def test_a_connection_that_the_driver_knows_to_be_dead_costs_no_round_trip(server):
    pool = make_pool(server, pool_size=2)
    await idle(pool, 2)
    await asyncio.sleep(60)
    for driver in server.made:
        driver.kill()
    (caller,) = await holding(pool)
    assert caller.driver.number == 3
    assert [driver.pings for driver in server.made] == [0, 0, 0]
    assert pool.stats().closed[CloseReason.LOST] == 2
    await caller.give_back()


@on_fakes
async def test_a_connection_that_died_in_use_is_not_kept(server):
    pool = make_pool(server)
    (holder,) = await holding(pool)
    holder.driver.kill()
    await holder.give_back()
    assert pool.checkedin() == 0


# -- Liveness --------------------------------------------------------------------------------


@on_fakes
async def test_a_connection_is_checked_once_when_it_was_idle_for_long(server):
    events = []
    server.ping_delay = 0.25
    pool = make_pool(server, pool_ping_idle=1.0, observers=[events.append])
    await idle(pool)
    await asyncio.sleep(0.9)
    await idle(pool)
    assert server.made[0].pings == 0
    await asyncio.sleep(1.1)
    await idle(pool)
    assert server.made[0].pings == 1
    taken = [e for e in events if isinstance(e, CheckedOut)]
    assert taken[-1].ping == pytest.approx(0.25)
    assert taken[-1].wait == 0
    stats = pool.stats()
    assert (stats.pings, stats.pings_failed) == (1, 0)
    assert stats.ping_seconds == pytest.approx(0.25)


@on_fakes
async def test_liveness_can_be_turned_off(server):
    pool = make_pool(server, pre_ping=False)
    await idle(pool)
    await asyncio.sleep(60)
    await idle(pool)
    assert server.made[0].pings == 0


@on_fakes
async def test_a_ping_is_bounded_and_what_failed_it_is_replaced(server):
    pool = make_pool(server, pool_ping_timeout=0.5)
    await idle(pool)
    await asyncio.sleep(5)
    server.made[0].frozen = True
    began = asyncio.get_running_loop().time()
    (caller,) = await holding(pool)
    assert caller.got_at - began == pytest.approx(0.5, abs=0.01)
    assert (caller.driver.number, server.made[0].closed) == (2, True)
    assert pool.stats().closed[CloseReason.PING_FAILED] == 1
    await caller.give_back()


@on_fakes
async def test_idle_siblings_are_checked_when_one_failed_its_ping(server):
    pool = make_pool(server, pool_size=3)
    await idle(pool, 3)
    await asyncio.sleep(5)
    await asyncio.sleep(0)
    server.made[2].broken = server.made[1].broken = True
    (caller,) = await holding(pool)
    await settle()
    assert [driver.pings for driver in server.made[:3]] == [1, 1, 1]
    assert [driver.closed for driver in server.made[:3]] == [False, True, True]
    await caller.give_back()


@on_fakes
async def test_siblings_in_use_are_checked_before_their_next_use(server):
    """They were in somebody's hands when one failed its ping; they are answered for since."""
    pool = make_pool(server, pool_size=2)
    one, two = await holding(pool, 2)
    proxy = one.proxy
    pool._invalidate(proxy, ConnectionLost())
    one.proxy = None
    await two.give_back()  # a check-in is an answer
    await idle(pool)
    assert server.made[1].pings == 0


@on_fakes
async def test_a_cancelled_ping_leaves_nothing_behind(server):
    server.ping_delay = 0.5
    pool = make_pool(server)
    await idle(pool)
    await asyncio.sleep(5)
    (caller,) = await callers(pool, 1)
    caller.cancel()
    await settle()
    assert (pool.checkedout(), pool.checkedin(), server.open) == (0, 0, [])
    await idle(pool)


# -- Recycling -------------------------------------------------------------------------------


@on_fakes
async def test_each_lifetime_is_shortened_by_a_fraction_of_its_own(server):
    pool = make_pool(server, pool_size=10, recycle=100, pool_recycle_jitter=0.2)
    await idle(pool, 10)
    ages = sorted(record.expires_at - record.opened_at for record in pool.idle())
    assert len(set(ages)) == 10
    assert 80 <= ages[0] <= ages[-1] <= 100


@on_fakes
async def test_an_old_connection_is_replaced_at_checkout_and_at_check_in(server):
    pool = make_pool(server, recycle=10, pool_recycle_jitter=0, pool_idle_timeout=0)
    await idle(pool)
    pool._stop_keeper()
    await asyncio.sleep(11)
    (holder,) = await holding(pool)
    assert holder.driver.number == 2
    await asyncio.sleep(11)
    await holder.give_back()
    await settle()
    assert pool.checkedin() == 0
    assert pool.stats().closed[CloseReason.RECYCLED] == 2
    assert server.open == []


# -- The keeper ------------------------------------------------------------------------------


@on_fakes
async def test_the_keeper_closes_the_only_connection_when_it_was_idle_for_long(server):
    pool = make_pool(server, pool_idle_timeout=10)
    await idle(pool)
    await asyncio.sleep(16)
    assert (pool.checkedin(), server.open) == (0, [])
    assert pool.stats().closed[CloseReason.IDLE] == 1
    assert server.made[0].said_goodbye


@on_fakes
async def test_the_keeper_closes_the_only_connection_when_it_is_old(server):
    pool = make_pool(server, recycle=10, pool_idle_timeout=0)
    await idle(pool)
    await asyncio.sleep(16)
    assert (pool.checkedin(), server.open) == (0, [])


@on_fakes
async def test_the_keeper_closes_from_the_cold_end_down_to_the_minimum(server):
    pool = make_pool(server, pool_size=4, pool_idle_timeout=10, pool_min_idle=2)
    await idle(pool, 4)
    for _ in range(8):
        await asyncio.sleep(1.9)
        await idle(pool)
    assert sorted(driver.number for driver in server.open) == [3, 4]
    pool._stop_keeper()


@on_fakes
async def test_the_keeper_rests_though_the_minimum_has_been_idle_for_long(server):
    looks = []
    tick = keeper._tick

    def counted(reference):
        looks.append(pool.now())
        assert len(looks) < 1000, "the keeper spins"
        tick(reference)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keeper, "_tick", counted)
        pool = make_pool(server, pool_idle_timeout=10, pool_min_idle=1)
        await idle(pool)
        await asyncio.sleep(60)
        pool._stop_keeper()
    assert 1 <= len(looks) <= 120


@on_fakes
async def test_the_keeper_keeps_the_minimum_idle(server):
    pool = make_pool(server, pool_size=3, pool_min_idle=2)
    (holder,) = await holding(pool)
    await asyncio.sleep(3)
    assert pool.checkedin() == 2
    await holder.give_back()
    pool._stop_keeper()


@on_fakes
async def test_the_keeper_sends_heartbeats_on_idle_connections(server):
    pool = make_pool(server, pool_keepalive=10)
    await idle(pool)
    await asyncio.sleep(45)
    assert 3 <= server.made[0].pings <= 4
    assert server.made[0] in server.open
    server.made[0].broken = True
    await asyncio.sleep(16)
    assert (pool.checkedin(), server.open) == (0, [])
    pool._stop_keeper()


@on_fakes
async def test_a_heartbeat_does_not_make_a_cold_connection_a_hot_one(server):
    """Idle connections are taken by their last use, whatever order the heartbeats came back in."""
    pool = make_pool(server, pool_size=3, pool_keepalive=10, pool_idle_timeout=0)
    await idle(pool, 3)
    before = [record.driver_connection.number for record in pool.idle()]
    await asyncio.sleep(8)
    (hot,) = await holding(pool)
    hottest = hot.driver.number
    await hot.give_back()
    await asyncio.sleep(4)
    (caller,) = await holding(pool)
    assert before[-1] == hottest == caller.driver.number
    await caller.give_back()
    pool._stop_keeper()


@on_fakes
async def test_a_long_holder_is_reported_with_its_task_and_where_it_stands(server):
    events = []
    pool = make_pool(server, leak_threshold=5, observers=[events.append], pool_idle_timeout=0)

    async def slow_work():
        proxy = await greenlet_spawn(pool.connect)
        await asyncio.sleep(30)
        await greenlet_spawn(proxy.close)

    await asyncio.create_task(slow_work(), name="the-slow-one")
    reported, returned = (e for e in events if isinstance(e, LongHolder | LongHolderReturned))
    assert 5 <= reported.held <= 10.1
    assert reported.task == "the-slow-one"
    assert "slow_work" in reported.stack
    assert "sleep(30)" in reported.stack
    assert (returned.task, returned.held) == ("the-slow-one", pytest.approx(30))
    assert pool.stats().long_holders == 1


@on_fakes
async def test_a_holder_that_becomes_long_while_another_is_reported_is_not_forgotten(server):
    """A report takes time: what is due meanwhile is looked at right after it."""
    events = []
    pool = make_pool(
        server, pool_size=2, leak_threshold=5, observers=[events.append], pool_idle_timeout=0
    )
    (first,) = await holding(pool)
    await asyncio.sleep(0.1)
    (second,) = await holding(pool)

    def take_time(event):
        if isinstance(event, LongHolder):
            clock = pool._time
            pool._time = lambda: clock() + 0.2

    pool.observers.add(take_time)
    await asyncio.sleep(6)
    assert [e.held for e in events if isinstance(e, LongHolder)] == pytest.approx([5, 5.1])
    await first.give_back()
    await second.give_back()


@on_fakes
async def test_a_long_holder_is_found_when_nothing_was_opened_for_it(server):
    """The keeper had nothing to do before this checkout."""
    events = []
    pool = make_pool(server, leak_threshold=5, observers=[events.append], pool_idle_timeout=0)
    await idle(pool)
    await asyncio.sleep(100)
    (holder,) = await holding(pool)
    await asyncio.sleep(20)
    assert [e.task for e in events if isinstance(e, LongHolder)] == ["holder-0"]
    await holder.give_back()


# -- Dispose and drain -----------------------------------------------------------------------


@on_fakes
async def test_dispose_closes_what_is_idle_side_by_side_and_within_a_bound(server):
    pool = make_pool(server, pool_size=10)
    await idle(pool, 10)
    for driver in server.made:
        driver.frozen = True
    began = asyncio.get_running_loop().time()
    await greenlet_spawn(pool.dispose)
    assert asyncio.get_running_loop().time() - began <= 2.1
    assert server.open == []


@on_fakes
async def test_dispose_closes_what_is_in_use_as_it_comes_back(server):
    pool = make_pool(server, pool_size=2)
    one, two = await holding(pool, 2)
    await greenlet_spawn(pool.dispose)
    await one.give_back()
    await two.give_back()
    await settle()
    assert (server.open, pool.checkedin()) == ([], 0)
    assert pool.stats().closed[CloseReason.DISPOSED] == 2


@on_fakes
async def test_what_waits_during_a_dispose_leaves_no_connection_in_the_old_pool(server):
    """``engine.dispose()`` puts another pool in its place: nobody will come for what is left."""
    pool = make_pool(server)
    (holder,) = await holding(pool)
    (waiter,) = await callers(pool, 1)
    await greenlet_spawn(pool.dispose)
    pool.recreate()
    await holder.give_back()
    await waiter.get()
    await waiter.give_back()
    await settle()
    assert (server.open, pool.checkedin()) == ([], 0)


@on_fakes
async def test_a_cancelled_dispose_closes_all_the_same(server):
    pool = make_pool(server, pool_size=2)
    await idle(pool, 2)
    closed = []
    for driver in server.made:
        driver.frozen = True
    event.listen(pool, "close", lambda *_: closed.append(1))
    task = asyncio.create_task(greenlet_spawn(pool.dispose))
    await asyncio.sleep(0.5)
    task.cancel()
    await asyncio.wait([task])
    await asyncio.sleep(3)
    assert server.open == []
    assert len(closed) == 2


@on_fakes
async def test_a_connect_that_dispose_cancels_before_it_began_keeps_no_slot(server):
    """Its caller gave up in the same turn of the loop in which it asked for a connection."""
    pool = make_pool(server)
    caller = Caller(pool)
    await asyncio.sleep(0)  # it has asked, and its connect has not begun
    caller.task.cancel()
    pool._withdraw(pool._queue.oldest())  # as its cancellation is about to do
    pool.dispose()
    await settle()
    assert pool.stats().opening == 0
    await idle(pool)


@on_fakes
async def test_a_replaced_pool_keeps_nothing_that_came_while_it_was_disposed(server):
    """Neither what was given back before the end of it, nor what comes back afterwards."""
    pool = make_pool(server, pool_size=3)
    await idle(pool, 1)
    server.close_delay = 1.0
    disposing = asyncio.create_task(greenlet_spawn(pool.dispose))
    await settle()
    first, second = await holding(pool, 2)
    await first.give_back()
    assert not disposing.done()
    await disposing
    new = pool.recreate()
    await second.give_back()
    await asyncio.sleep(3)
    assert server.open == []
    assert (pool.checkedin(), new.stats().closed[CloseReason.DISPOSED]) == (0, 3)


@on_fakes
async def test_dispose_keeps_all_settings(server):
    given = {
        "pool_size": 3, "max_overflow": 2, "timeout": 7.0, "use_lifo": False, "pre_ping": False,
        "recycle": 11.0, "pool_recycle_jitter": 0.3, "pool_idle_timeout": 12.0, "pool_min_idle": 1,
        "pool_keepalive": 13.0, "pool_ping_idle": 14.0, "pool_ping_timeout": 15.0,
        "pool_max_waiting": 16, "pool_overload_after": 17.0, "pool_max_connecting": 18,
        "pool_connect_timeout": 18.5,
        "leak_threshold": 19.0, "observers": [print], "echo": False, "logging_name": "mine",
        "reset_on_return": "commit",
    }  # fmt: skip
    pool = make_pool(server, **given)
    state, again = vars(pool), vars(pool.recreate())
    own = {
        "dispatch",
        "_queue",
        "logger",
        "_time",
        "_idle",
        "_held",
        "_connects",
        "_tasks",
        "_take",
        "_line",
        "_replaced",
    }
    different = {name for name in state.keys() | again.keys() if state.get(name) != again.get(name)}
    assert different <= own | {"_invoke_creator"}
    assert again["counters"] is state["counters"]
    assert again["observers"] is state["observers"]


@on_fakes
async def test_drain_waits_for_what_is_in_use_and_refuses_the_rest(server):
    events = []
    pool = make_pool(server, pool_size=2, observers=[events.append])
    one, two = await holding(pool, 2)
    (waiter,) = await callers(pool, 1)
    draining = asyncio.create_task(pool.drain(10))
    await settle()
    assert isinstance(waiter.error, PoolDraining)
    (late,) = await callers(pool, 1)
    assert isinstance(late.error, PoolDraining)
    await asyncio.sleep(1)
    await one.give_back()
    await two.give_back()
    report = await draining
    assert (report.closed, report.terminated, report.refused) == (2, 0, 1)
    assert report.seconds == pytest.approx(1.0, abs=0.01)
    assert server.open == []
    assert reasons(events) == [CloseReason.DRAINED] * 2


@on_fakes
async def test_drain_drops_what_does_not_come_back_in_time(server):
    pool = make_pool(server, pool_size=2)
    one, two = await holding(pool, 2)
    await two.give_back()
    report = await pool.drain(3)
    assert (report.closed, report.terminated) == (1, 1)
    assert report.seconds == pytest.approx(3.0, abs=0.01)
    assert server.open == []
    await one.give_back()
    assert (pool.checkedin(), pool.checkedout()) == (0, 0)


@on_fakes
async def test_drain_twice_at_once(server):
    """Both wait for the same connections and end when they are back."""
    pool = make_pool(server)
    (holder,) = await holding(pool)
    drains = [asyncio.create_task(pool.drain(20)) for _ in range(2)]
    await asyncio.sleep(1)
    await holder.give_back()
    reports = await asyncio.gather(*drains)
    assert [report.seconds for report in reports] == [pytest.approx(1, abs=0.01)] * 2


@on_fakes
async def test_a_drain_during_a_ping_that_fails_opens_nothing(server):
    pool = make_pool(server)
    await idle(pool)
    await asyncio.sleep(5)
    server.made[0].frozen = True
    (pinging,) = await callers(pool, 1)
    report = await pool.drain(5)
    assert report.seconds < 2
    assert isinstance(pinging.error, PoolDraining)
    assert (server.connects, server.open) == (1, [])


@on_fakes
async def test_a_connect_under_way_joins_nothing_when_the_pool_drains(server):
    server.connect_delay = 1.0
    pool = make_pool(server)
    (caller,) = await callers(pool, 1)
    await pool.drain(5)
    assert isinstance(caller.error, PoolDraining)
    assert server.open == []


# -- Loops -----------------------------------------------------------------------------------


def test_a_second_event_loop_is_an_error_that_names_the_remedy():
    server = FakeServer()
    pool = make_pool(server)
    with asyncio.Runner(loop_factory=virtual_loop) as runner:
        runner.run(idle(pool))
        with (
            asyncio.Runner(loop_factory=virtual_loop) as second,
            pytest.raises(WrongEventLoop, match=r"get_engine\(\)"),
        ):
            second.run(greenlet_spawn(pool.connect))
        runner.run(greenlet_spawn(pool.dispose))


def test_a_pool_without_connections_moves_to_another_loop():
    server = FakeServer()
    pool = make_pool(server)
    for _ in range(2):
        with asyncio.Runner(loop_factory=virtual_loop) as runner:
            runner.run(idle(pool))
            runner.run(greenlet_spawn(pool.dispose))
    assert len(server.made) == 2


def test_dispose_when_the_loop_is_closed_drops_the_sockets():
    server = FakeServer()
    pool = make_pool(server, pool_size=2)
    with asyncio.Runner(loop_factory=virtual_loop) as runner:
        runner.run(idle(pool, 2))
    pool.dispose()
    assert (server.open, pool.checkedin()) == ([], 0)


def test_the_next_loop_has_its_own_keeper():
    """What the first loop had in mind died with it."""
    server = FakeServer()
    pool = make_pool(server, pool_idle_timeout=3.0)

    async def leave_none_behind():
        (holder,) = await holding(pool)
        holder.do("detach")
        await holder.give_back()

    async def leave_one_idle():
        await idle(pool)
        await asyncio.sleep(4)

    for work in (leave_none_behind, leave_one_idle):
        with asyncio.Runner(loop_factory=virtual_loop) as runner:
            runner.run(work())
    assert (server.open, pool.checkedin()) == ([], 0)


def test_the_end_of_a_loop_leaves_no_caller_without_an_error():
    """Connects that the loop's end cancels are told as what they are."""
    server = FakeServer()
    server.connect_delay = 5.0
    pool = make_pool(server)
    seen = []

    async def main():
        caller = Caller(pool)
        await settle()
        for task in list(pool._tasks):
            task.cancel()
        await settle()
        seen.append(caller.error)

    on_virtual_time(main)
    assert isinstance(seen[0], PoolTimeout)
    assert str(seen[0]).startswith("QueuePool limit of size")


# -- Time-outs -------------------------------------------------------------------------------


@on_fakes
async def test_a_timeout_says_how_the_pool_stands(server):
    events = []
    pool = make_pool(server, timeout=2, max_overflow=1, observers=[events.append])
    held = await holding(pool, 2)
    server.refusing = True
    (waiter,) = await callers(pool, 1)
    await asyncio.sleep(3)
    message = str(waiter.error)
    assert isinstance(waiter.error, PoolTimeout)
    assert message.startswith(
        "QueuePool limit of size 1 overflow 1 reached, connection timed out, timeout 2.00 "
        "(used=2, idle=0, opening=0, waiting=1; longest holder 2.0 s)"
    )
    (told,) = [e for e in events if isinstance(e, CheckoutTimedOut)]
    assert (told.error, told.waited) == (waiter.error, pytest.approx(2))
    assert pool.stats().timeouts == 1
    for caller in held:
        await caller.give_back()


@on_fakes
async def test_a_timeout_tells_the_last_connect_error(server):
    pool = make_pool(server, timeout=2, pool_size=2, pool_max_connecting=1)
    (holder,) = await holding(pool)
    server.errors = [CannotConnect("port closed")]
    (failed,) = await callers(pool, 1)
    assert isinstance(failed.error, CannotConnect)
    server.hanging = True
    first, second = await callers(pool, 2)
    await asyncio.sleep(3)
    assert "last connect error: CannotConnect: port closed" in str(second.error)
    await holder.give_back()
    await asyncio.sleep(10)
    assert first.error is None or isinstance(first.error, TimeoutError | PoolTimeout)
    if first.holds:
        await first.give_back()


@on_fakes
async def test_a_timeout_of_0_does_not_wait(server):
    pool = make_pool(server, timeout=0)
    (holder,) = await holding(pool)
    (refused,) = await callers(pool, 1)
    assert isinstance(refused.error, PoolTimeout)
    assert refused.ended_at == holder.got_at == 0
    await holder.give_back()
    await idle(pool)


# -- Counters, events, observers -------------------------------------------------------------


@on_fakes
async def test_counters_add_up_what_happened(server):
    server.connect_delay = 0.5
    pool = make_pool(server, timeout=None)
    (holder,) = await holding(pool)
    (waiter,) = await callers(pool, 1)
    await asyncio.sleep(2)
    await holder.give_back()
    await asyncio.sleep(1)
    await waiter.give_back()
    stats = pool.stats()
    assert (stats.checkouts, stats.waits, stats.opened, stats.open_failed) == (2, 2, 1, 0)
    assert stats.open_seconds == pytest.approx(0.5)
    assert stats.wait_seconds == pytest.approx(2.5, abs=0.02)
    assert stats.used_seconds == pytest.approx(3.0, abs=0.02)
    assert (stats.used, stats.idle, stats.opening, stats.waiting) == (0, 1, 0, 0)
    assert (stats.size, stats.limit, stats.utilisation) == (1, 1, 0)


@on_fakes
async def test_every_connection_is_counted_that_sqlalchemy_makes_anew(server):
    """A soft-invalidated one is replaced inside its checkout: opened and closed are true."""
    pool = make_pool(server)
    (holder,) = await holding(pool)
    holder.do("soft")
    await holder.give_back()
    await idle(pool)
    await greenlet_spawn(pool.dispose)
    stats = pool.stats()
    assert stats.opened == len(server.made) == 2
    assert sum(stats.closed.values()) == 2


@on_fakes
async def test_events_tell_the_life_of_a_connection(server):
    events = []
    pool = make_pool(server, observers=[events.append])
    await idle(pool)
    await greenlet_spawn(pool.dispose)
    assert [type(e) for e in events] == [
        ConnectionOpened,
        CheckedOut,
        CheckedIn,
        ConnectionClosed,
    ]
    assert events[-1].reason is CloseReason.DISPOSED


@on_fakes
async def test_an_invalidated_connection_is_told_with_its_reason(server):
    """Declared dead by its user: one event for that, one for the end."""
    events = []
    pool = make_pool(server, observers=[events.append])
    (holder,) = await holding(pool)
    error = ConnectionLost("the statement said so")
    proxy, holder.proxy = holder.proxy, None
    await greenlet_spawn(proxy.invalidate, error)
    assert [e.error for e in events if isinstance(e, ConnectionInvalidated)] == [error]
    assert reasons(events) == [CloseReason.INVALIDATED]


@on_fakes
async def test_a_connection_lost_to_the_garbage_collector_is_counted(server):
    events = []
    pool = make_pool(server, observers=[events.append])
    (holder,) = await holding(pool)
    logging.disable(logging.CRITICAL)
    await holder.give_back("lose")
    logging.disable(logging.NOTSET)
    assert reasons(events) == [CloseReason.GARBAGE_COLLECTED]
    assert (server.open, pool.checkedout()) == ([], 0)


def test_an_observer_that_raises_breaks_nothing(caplog):
    async def main():
        def faulty(event):
            raise RuntimeError("observer")

        seen = []
        pool = make_pool(FakeServer(), observers=[faulty, seen.append])
        await idle(pool)
        await greenlet_spawn(pool.dispose)
        assert len(seen) == 4

    on_virtual_time(main)
    assert "failed on CheckedOut" in caplog.text


# -- Warming up and leaving ------------------------------------------------------------------


@on_fakes
async def test_a_warm_up_ends_with_its_pool(server):
    """A pool that was replaced keeps nothing, and is not filled for ever."""
    pool = make_pool(server, pool_size=3, pool_max_connecting=1)
    server.connect_delay = 0.1
    warming = asyncio.create_task(pool.open(3))
    await settle()
    await greenlet_spawn(pool.dispose)
    pool.recreate()
    async with asyncio.timeout(5):
        await warming
    assert len(server.made) <= 2
    assert server.open == []


@on_fakes
async def test_warm_ups_side_by_side_open_no_more_than_is_kept(server):
    pool = make_pool(server, pool_size=2, max_overflow=3, pool_max_connecting=1)
    server.connect_delay = 0.1
    await asyncio.gather(*(pool.open(5) for _ in range(4)))
    assert (len(server.made), pool.checkedin()) == (2, 2)
    await greenlet_spawn(pool.dispose)


@on_fakes
async def test_a_warm_up_tells_each_failure_once(server):
    pool = make_pool(server, pool_size=3)
    server.errors = [CannotConnect("once")]
    results = await pool.open(3)
    assert sorted(str(result) for result in results) == ["None", "None", "once"]
    assert pool.checkedin() == 2
    await greenlet_spawn(pool.dispose)


@on_fakes
async def test_no_more_is_kept_ready_than_is_kept_at_all(server):
    pool = make_pool(server, pool_size=1, max_overflow=2, pool_min_idle=3)
    await idle(pool)
    await asyncio.sleep(10)
    assert len(server.made) == 1
    await greenlet_spawn(pool.dispose)


@on_fakes
async def test_a_server_that_is_left_gets_nobody_any_more(server):
    """Its idle connections are closed now, those in use when they come back."""
    pool = make_pool(server, pool_size=2)
    one, other = await holding(pool, 2)
    await other.give_back()
    pool.leave_server()
    await one.give_back()
    (next_one,) = await holding(pool)
    await settle()
    assert [driver.said_goodbye for driver in server.made] == [True, True, False]
    await next_one.give_back()


@on_fakes
async def test_nothing_is_kept_ready_while_draining(server):
    """The minimum idle is for a pool that serves."""
    pool = make_pool(server, pool_size=2, pool_min_idle=2)
    (holder,) = await holding(pool)
    draining = asyncio.ensure_future(pool.drain(5))
    await asyncio.sleep(4)
    assert server.connects == 1
    await holder.give_back()
    await draining
    assert server.open == []


@on_fakes
async def test_nothing_is_kept_ready_in_a_pool_that_was_replaced(server):
    """As ``engine.dispose()`` does; who still waits there is served, and that is all."""
    pool = make_pool(server, pool_size=2, pool_min_idle=2)
    server.connect_delay = 1.0
    (late,) = await callers(pool, 1)
    pool.recreate()
    await greenlet_spawn(pool.dispose)
    await late.get()
    await late.give_back()
    await asyncio.sleep(10)
    assert (server.connects, server.open) == (1, [])


@on_fakes
async def test_a_close_that_is_cancelled_before_it_began_drops_the_socket(server):
    pool = make_pool(server)
    (holder,) = await holding(pool)
    pool.dispose()
    spawn = pool._spawn

    def cancelled_at_once(work):
        task = spawn(work)
        task.cancel()
        return task

    pool._spawn = cancelled_at_once
    await holder.give_back()
    await settle()
    assert server.open == []
