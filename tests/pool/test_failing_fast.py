"""While the database is down nobody waits for what cannot come, and all find out when it is back."""

import asyncio
import gc
import weakref

import pytest
from fakes import CannotConnect, callers, holding, idle, make_pool, on_fakes, settle
from sqlalchemy.util import greenlet_spawn

from poolkit.errors import AuthenticationFailed, PoolDraining
from poolkit.pool import circuit

IN_A_ROW = circuit.FAILURES_IN_A_ROW


def go_down(server, takes=1.0):
    server.refusing, server.connect_delay = True, takes


def come_back(server):
    server.refusing, server.connect_delay = False, 0.0


async def fail_in_a_row(pool, n=IN_A_ROW):
    for _ in range(n):
        (caller,) = await callers(pool, 1)
        with pytest.raises(CannotConnect):
            await caller.get()


async def seconds_to_fail(pool):
    loop = asyncio.get_running_loop()
    began = loop.time()
    (caller,) = await callers(pool, 1)
    with pytest.raises(CannotConnect) as raised:
        await caller.get()
    return loop.time() - began, raised.value


@on_fakes
async def test_after_two_failures_in_a_row_callers_fail_at_once(server):
    """With what the last connect failed with, and a note that says why it was not tried."""
    pool = make_pool(server, pool_size=5)
    go_down(server)
    await fail_in_a_row(pool)
    took, error = await seconds_to_fail(pool)
    assert took < 0.01
    assert "2 connects in a row have failed" in error.__notes__[0]
    pool.dispose()


@on_fakes
async def test_one_failure_is_bad_luck(server):
    pool = make_pool(server)
    go_down(server)
    await fail_in_a_row(pool, IN_A_ROW - 1)
    took, error = await seconds_to_fail(pool)
    assert took == pytest.approx(1, abs=0.01)
    assert not hasattr(error, "__notes__")
    pool.dispose()


@on_fakes
async def test_a_success_ends_the_row(server):
    pool = make_pool(server, recycle=1)
    go_down(server)
    await fail_in_a_row(pool, IN_A_ROW - 1)
    come_back(server)
    await idle(pool)
    await asyncio.sleep(2)
    go_down(server)
    await fail_in_a_row(pool, IN_A_ROW - 1)
    took, _ = await seconds_to_fail(pool)
    assert took == pytest.approx(1, abs=0.01)
    pool.dispose()


@on_fakes
async def test_those_in_line_fail_with_the_second(server):
    """They would have to connect, too. Connects that were under way together count as one."""
    pool = make_pool(server, pool_size=10, pool_max_connecting=4)
    go_down(server)
    waiting = await callers(pool, 20)
    await asyncio.sleep(1.99)
    assert [caller.done for caller in waiting] == [True] * 4 + [False] * 16
    assert server.connects == 8
    await asyncio.sleep(0.02)
    assert all(isinstance(caller.error, CannotConnect) for caller in waiting)
    assert len({id(caller.error) for caller in waiting}) == 20
    pool.dispose()


@on_fakes
async def test_one_probe_at_a_time_goes_on_while_callers_ask(server):
    pool = make_pool(server, pool_size=10)
    go_down(server)
    await fail_in_a_row(pool)
    for _ in range(100):
        await asyncio.sleep(0.1)
        await seconds_to_fail(pool)
        assert len(server.connecting) <= 1
    assert 7 <= server.connects - IN_A_ROW <= 10  # each takes a second, and pauses are short
    pool.dispose()


@on_fakes
async def test_the_first_success_opens_the_way(server):
    """Within half a second of the return, whoever asks, and the probe's connection is used."""
    pool = make_pool(server, pool_size=10)
    go_down(server, takes=0.11)
    await fail_in_a_row(pool)
    await asyncio.sleep(5)
    made = len(server.made)
    come_back(server)
    await asyncio.sleep(0.4)
    held = await holding(pool, 10)
    assert (made, len(server.made)) == (0, 10)
    for caller in held:
        await caller.give_back()


@on_fakes
async def test_a_pool_of_one_fails_fast_too(server):
    """The probe takes its only slot, and nobody waits for that."""
    pool = make_pool(server)
    go_down(server)
    await fail_in_a_row(pool)
    await asyncio.sleep(0.3)
    assert len(server.connecting) == 1
    took, _ = await seconds_to_fail(pool)
    assert took < 0.01
    pool.dispose()


@on_fakes
async def test_who_may_be_served_by_another_waits(server):
    """As where the server takes no more connections, and those that are there do their work."""
    pool = make_pool(server, pool_size=2, pool_max_connecting=1)
    (holder,) = await holding(pool)
    go_down(server)
    failing = await callers(pool, 1)
    await asyncio.sleep(1.01)
    await holder.give_back()
    (holder,) = await holding(pool)
    failing += await callers(pool, 1)
    await asyncio.sleep(1.1)
    assert all(caller.done for caller in failing)
    assert pool._connects.circuit.is_open
    (waiting,) = await callers(pool, 1)
    await asyncio.sleep(1)
    await holder.give_back()
    assert waiting.holds
    await waiting.give_back()
    pool.dispose()


@on_fakes
async def test_a_cold_start_is_waited_for_in_order(server):
    """A server that sleeps answers within the connect's time: nothing has failed."""
    pool = make_pool(server, pool_size=5)
    server.connect_delay = 8.0
    waiting = await callers(pool, 30)
    for _ in range(30):
        caller = waiting.pop(0)
        await caller.get()
        await caller.give_back()


@on_fakes
async def test_a_refusal_that_costs_no_time_does_not_count(server):
    """Nor one that the server itself gives."""
    pool = make_pool(server)
    server.refusing = True
    for error in [None] * 5 + [AuthenticationFailed] * 5:
        server.connect_delay = 1.0 if error else 0.0
        if error:
            server.errors = [error.__new__(error)]
        (caller,) = await callers(pool, 1)
        await asyncio.wait([caller.task])
        assert isinstance(caller.error, error or CannotConnect)
        assert not pool._connects.circuit.is_open
    pool.dispose()


@on_fakes
async def test_probing_ends_when_nobody_asks(server):
    """And the next caller connects, as the first did."""
    pool = make_pool(server)
    go_down(server)
    await fail_in_a_row(pool)
    await asyncio.sleep(circuit.UNASKED + 3)
    connects = server.connects
    await asyncio.sleep(100)
    assert server.connects == connects
    come_back(server)
    (holder,) = await holding(pool)
    await holder.give_back()


@on_fakes
async def test_dispose_ends_the_probing(server):
    pool = make_pool(server)
    go_down(server)
    await fail_in_a_row(pool)
    await asyncio.sleep(0.5)
    pool.dispose()
    await settle()
    connects = server.connects
    await asyncio.sleep(20)
    assert (server.connects, server.connecting) == (connects, [])


@on_fakes
async def test_probing_does_not_keep_a_pool_alive(server):
    pool = make_pool(server)
    go_down(server)
    await fail_in_a_row(pool)
    gone = weakref.ref(pool)
    del pool
    for _ in range(100):  # between two probes
        await asyncio.sleep(0.05)
        gc.collect()
        if gone() is None:
            break
    assert gone() is None
    connects = server.connects
    await asyncio.sleep(5)
    assert server.connects == connects


@on_fakes
async def test_the_minimum_idle_is_left_to_the_probe(server):
    pool = make_pool(server, pool_size=3, pool_min_idle=3)
    await idle(pool)
    go_down(server)
    for driver in server.open:
        driver.kill()
    await asyncio.sleep(10)
    assert len(server.connecting) <= 1
    come_back(server)
    await asyncio.sleep(3)
    assert pool.checkedin() == 3
    pool.dispose()
    await asyncio.sleep(3)


@on_fakes
async def test_dispose_has_who_waits_connect_anew(server):
    """The past is forgotten, and nobody is left waiting for a connection in use alone."""
    pool = make_pool(server, pool_size=2, pool_max_connecting=1, timeout=None)
    (holder,) = await holding(pool)
    go_down(server)
    failing = await callers(pool, 1)
    await asyncio.sleep(1.01)
    await holder.give_back()
    (holder,) = await holding(pool)
    failing += await callers(pool, 1)
    await asyncio.sleep(1.1)
    assert all(caller.done for caller in failing)
    (waiting,) = await callers(pool, 1)
    assert pool._connects.circuit.is_open
    assert not waiting.done
    while server.connecting:  # until a pause of the probing
        await asyncio.sleep(0.001)
    come_back(server)
    pool.dispose()
    await settle()
    assert waiting.holds
    for caller in (holder, waiting):
        await caller.give_back()


@on_fakes
async def test_who_tries_again_at_once_does_not_keep_the_loop_for_itself(server):
    """In a loop around a checkout that fails at once, others get a turn: probes above all."""
    pool = make_pool(server, pool_size=5, pool_max_waiting=0)
    go_down(server)
    await fail_in_a_row(pool)
    turns = []
    asyncio.get_running_loop().call_soon(turns.append, "probe")
    with pytest.raises(CannotConnect):
        await greenlet_spawn(pool.connect)
    assert turns == ["probe"]

    pool.dispose()
    come_back(server)
    await idle(pool, 1)
    await pool.drain(1)
    asyncio.get_running_loop().call_soon(turns.append, "another")
    with pytest.raises(PoolDraining):
        await greenlet_spawn(pool.connect)
    assert turns == ["probe", "another"]
