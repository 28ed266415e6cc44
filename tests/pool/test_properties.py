"""Whatever happens in whatever order: no slot lost, nobody stranded, counts true, turns kept.

A machine that hypothesis drives lets callers and faults happen to one pool on a virtual clock,
settled or in the midst of things, and compares the pool with what the fake driver knows after
each step. ``POOLKIT_EXHAUSTIVE=1`` runs many more steps, each time others.
"""

import asyncio
import gc
import logging
import os
import sys
from collections import Counter

import pytest
from fakes import Caller, FakeServer, make_pool, virtual_loop
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy.util import greenlet_spawn

from poolkit.pool import HandoffPool, keeper

EXHAUSTIVE = bool(os.environ.get("POOLKIT_EXHAUSTIVE"))
EXAMPLES, LENGTH = (2_000, 100) if EXHAUSTIVE else (290, 80)
PROFILE = settings(
    max_examples=EXAMPLES,
    stateful_step_count=LENGTH,
    deadline=None,
    derandomize=not EXHAUSTIVE,
    database=None,
    print_blob=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)

SETTLED = 24
"""Turns of the event loop, or more, until nothing is left to run without time passing."""

TURNS = st.sampled_from([0, 0, 1, 2, 3, 5, SETTLED, SETTLED, SETTLED])
PICK = st.integers(0, 7)
PAUSES = st.sampled_from([0.05, 0.3, 1.0, 1.0, 2.5, 6.0, 31.0])

steps: Counter[str] = Counter()
unheard: list[list[object]] = []
"""What each machine's event loop was told when the machine had ended."""


class PoolMachine(RuleBasedStateMachine):
    """One pool, its callers, and the truth about them."""

    @initialize(
        pool_size=st.sampled_from([1, 1, 2, 2, 3, 5, 0]),
        max_overflow=st.sampled_from([0, 0, 1, 2, -1]),
        timeout=st.sampled_from([0, 0.5, 3.0, 3.0, None]),
        use_lifo=st.booleans(),
        pool_max_waiting=st.sampled_from([None, None, 1, 3]),
        pool_overload_after=st.sampled_from([0, 1.0]),
        pool_max_connecting=st.sampled_from([1, 2, 4]),
        recycle=st.sampled_from([-1, -1, 5.0]),
        pool_idle_timeout=st.sampled_from([0, 3.0]),
        pool_min_idle=st.sampled_from([0, 0, 1, 2]),
        pool_keepalive=st.sampled_from([0, 2.0]),
        leak_threshold=st.sampled_from([0, 2.0]),
        pool_ping_idle=st.sampled_from([0, 1.0]),
        observed=st.booleans(),
    )
    def begin(self, observed, **drawn):
        gc.collect()
        gc.freeze()  # a collection then looks only at what this machine made
        self.loop = virtual_loop()
        self.unheard = heard = []
        self.loop.set_exception_handler(lambda _, what: heard.append(what))
        self.server = FakeServer()
        self.events: list[object] = []
        self.pool: HandoffPool = make_pool(
            self.server,
            **drawn,
            observers=[self.events.append] if observed else [],
        )
        self.limit = self.pool._limit
        self.callers: list[Caller] = []
        self.numbers: dict[object, float] = {}  # of tasks and waiters, in the order of arrival
        self.stood_in_line: set[object] = set()
        self.arrived = 0
        self.faults: list[str] = []
        self.background: list[asyncio.Task] = []
        self.settled = True
        self.killed_now: set[object] = set()
        self._note_who_waits()

    def _note_who_waits(self):
        admit, hand_over = self.pool._admit, self.pool._hand_over

        def noting(waiter, *, first):
            admit(waiter, first=first)
            self.arrived += 1  # it may have had a dead connection to clear away before
            number = self.arrived
            if first:
                number = min(
                    [number, *(self.numbers[w] - 1e-6 for w in self.live() if w != waiter)]
                )
            self.numbers[waiter] = number
            self.stood_in_line.add(asyncio.current_task())

        def watched(record):
            overloaded, before = self.pool.stats().overloaded, self.live()
            hand_over(record)
            overloaded |= self.pool.stats().overloaded
            steps["hand-over"] += 1
            if overloaded:
                steps["hand-over, overloaded"] += 1
                return  # any order will do: the rule is not repeated here
            line = set(self.live())
            served = [self.numbers[w] for w in before if w not in line]
            if served != sorted(self.numbers[w] for w in before)[: len(served)]:
                self.faults.append("somebody in line was overtaken")

        self.pool._admit, self.pool._hand_over = noting, watched

    # -- What can be seen ------------------------------------------------------------------

    def live(self):
        """The callers in line who have not gone."""
        return [w for w in self.pool._queue.in_turn() if not w.future.done()]

    def holding(self):
        return [caller for caller in self.callers if caller.holds]

    def present(self):
        return [caller for caller in self.callers if not caller.done]

    def got(self, caller):
        """Look at each connection that is handed out."""
        driver = caller.driver
        if len(driver.holders) > 1:
            self.faults.append(f"{driver} is in two hands")
        known_dead = driver.closed and driver not in self.killed_now
        if known_dead and not self.pool._draining:
            self.faults.append(f"{driver} was handed out dead")
        if caller.task not in self.stood_in_line:  # overloaded or not
            overtaken = [w for w in self.live() if self.numbers[w] < self.numbers[caller.task]]
            if overtaken:
                self.faults.append(f"{caller.name} passed by {len(overtaken)} in line")

    # -- What makes it go on ---------------------------------------------------------------

    def go(self, turns):
        steps["steps"] += 1
        self.settled = turns == SETTLED
        if turns:
            self.loop.run_until_complete(self._turns(turns))
        if self.settled:
            self.killed_now.clear()

    async def _turns(self, turns):
        for _ in range(turns):
            await asyncio.sleep(0)
        while turns == SETTLED and self.loop._ready:
            await asyncio.sleep(0)

    def pick(self, among, number):
        return among[number % len(among)]

    def start(self, work):
        self.background.append(self.loop.create_task(work))

    # -- Callers ---------------------------------------------------------------------------

    def _arrive(self):
        caller = Caller(self.pool, f"caller-{self.arrived}", self.loop)
        self.arrived += 1
        self.numbers[caller.task] = self.arrived
        caller.on_checkout = self.got
        self.callers.append(caller)
        steps["checkout"] += 1

    @rule(many=st.integers(3, 9), seconds=st.sampled_from([0.2, 0.6, 1.2]), leave=st.integers(0, 4))
    def rush(self, many, seconds, leave):
        """More than can be served, for a while; then what is in use comes back, at once."""
        for _ in range(many):
            self._arrive()
        self._pause(seconds)
        leaving = [c for c in self.present() if not c.holds][:leave]
        back = self.holding()
        if leave % 2:  # they go after the connection was given back, and before anybody heard of it
            for caller in back:
                caller.do("close")
        for caller in leaving:
            caller.cancel()
        if not leave % 2:
            for caller in back:
                caller.do("close")
        steps["rush"] += 1
        self.go(SETTLED)

    @rule(turns=TURNS, many=st.sampled_from([1, 1, 1, 2, 4]))
    def arrive(self, turns, many):
        for _ in range(many):
            self._arrive()
        self.go(turns)

    @rule(
        who=PICK,
        what=st.sampled_from(
            ["close", "close", "close", "invalidate", "soft", "detach", "lose", "begin"]
        ),
        turns=TURNS,
    )
    def order(self, who, what, turns):
        if self.holding():
            self.pick(self.holding(), who).do(what)
            steps[what] += 1
        else:
            self._arrive()
        self.go(turns)

    @rule(who=PICK, turns=TURNS)
    def cancel(self, who, turns):
        if self.present():
            self.pick(self.present(), who).cancel()
            steps["cancel"] += 1
        else:
            self._arrive()
        self.go(turns)

    @rule(who=PICK, turns=TURNS)
    def statement_shows_loss(self, who, turns):
        """What SQLAlchemy does when a statement fails with a disconnect."""
        proxy = self.pick(self.holding(), who).proxy if self.holding() else None
        if proxy is not None and proxy.is_valid and not proxy.is_detached:
            self.loop.call_soon(self.pool._invalidate, proxy, ConnectionError("lost"))
            self.loop.run_until_complete(self._turns(1))
            steps["invalidate pool"] += 1
        self.go(turns)

    # -- Time and the world ----------------------------------------------------------------

    @rule(seconds=PAUSES)
    def time_passes(self, seconds):
        self.loop.run_until_complete(self._turns(SETTLED))
        self.killed_now.clear()  # who had been granted one of them has it by now
        self.loop.run_until_complete(asyncio.sleep(seconds))
        steps["time passes"] += 1
        self.go(SETTLED)

    @rule(
        how=st.sampled_from(
            "well well slow refusing hanging down down down fails_once slow_ping no_ping".split()
        )
    )
    def the_server_does(self, how):
        server = self.server
        server.refusing, server.hanging = how in ("refusing", "down"), how == "hanging"
        server.connect_delay = 0.4 if how in ("slow", "down", "fails_once") else 0.0
        server.ping_delay = {"slow_ping": 0.5, "no_ping": 3.0}.get(how, 0.0)
        server.rollback_delay = 0.2 if how == "slow" else 0.0
        server.close_delay = {"slow": 0.2, "no_ping": 5.0}.get(how, 0.0)
        server.errors[:] = [OSError("just now")] if how == "fails_once" else []
        steps[f"server: {how}"] += 1
        self.go(0)

    @rule(who=PICK, how=st.sampled_from(["kill", "kill", "freeze", "break"]), turns=TURNS)
    def connection_suffers(self, who, how, turns):
        driver = self.pick(self.server.open, who) if self.server.open else None
        if driver is None:
            how = "nothing to kill"
        elif how == "kill":
            driver.kill()
            self.killed_now.add(driver)
        elif how == "freeze":
            driver.frozen = True
        else:
            driver.broken = True
        steps[how] += 1
        self.go(turns)

    @rule(turns=TURNS)
    def garbage_is_collected(self, turns):
        """At no other time: what it finds must not depend on what ran before this machine."""
        gc.collect()
        steps["garbage collection"] += 1
        self.go(turns)

    # -- The pool's owner ------------------------------------------------------------------

    @rule(turns=TURNS, luck=st.integers(0, 3))
    def dispose(self, turns, luck):
        if luck == 2:
            self.start(greenlet_spawn(self.pool.dispose))
            steps["dispose"] += 1
        self.go(turns)

    @rule(turns=TURNS, wanted=st.integers(1, 6))
    def warm_up(self, turns, wanted):
        self.start(self.pool.open(wanted))
        steps["warm-up"] += 1
        self.go(turns)

    @rule(turns=TURNS, timeout=st.sampled_from([0, 0.5, 3.0]), luck=st.integers(0, 9))
    def drain(self, turns, timeout, luck):
        if luck == 6:
            self.start(self.pool.drain(timeout))
            steps["drain"] += 1
        self.go(turns)

    # -- What must hold --------------------------------------------------------------------

    @invariant()
    def at_every_instant(self):
        assert self.faults == []
        assert self.unheard == []
        pool = self.pool
        stats = pool.stats()
        steps["open circuit"] += pool._connects.circuit.is_open
        assert stats.used + stats.idle + stats.opening <= self.limit
        assert stats.opening <= pool._max_connecting
        records = [*pool.idle(), *pool.held()]
        assert len(set(records)) == len(records)
        idle = {record.driver_connection for record in pool.idle()}
        assert None not in idle, "counted as idle, and there is no connection"
        for caller in self.holding():
            assert caller.driver.holders == [caller]
            assert caller.driver not in idle

    @invariant()
    def when_nothing_is_in_motion(self):
        if not self.settled:
            return
        pool, live = self.pool, self.live()
        assert len(pool._queue) == len(live), "somebody in line has gone"
        assert not (live and pool.checkedin()), "somebody waits beside an idle connection"
        if live and pool._connects.circuit.is_open:
            steps["waiting beside an open circuit"] += 1
            left = [w for w in live if w.opening is None]
            assert not (left and pool._connects.is_hopeless()), "somebody waits for nothing"
        elif live and pool._connects.may_begin():
            assert len(pool._connects.under_way) >= len(live), "somebody is stranded"
        self._check_times(live)
        self._check_counts()

    def _check_times(self, live):
        timeout, now = self.pool._timeout, self.loop.time()
        for waiter in live:
            in_time = timeout is None or now - waiter.since <= timeout + 0.001
            assert in_time or waiter.opening in self.pool._connects.under_way, (
                "waits beyond its time"
            )

    def _check_counts(self):
        pool, server = self.pool, self.server
        tasks = {caller.task for caller in self.callers}
        own = [task for task in server.connecting if task not in tasks]
        assert len(pool._connects.under_way) == len(own), f"connects under way: {own}"
        pooled = {record.driver_connection for record in [*pool.idle(), *pool.held()]}
        # A detached one that fails to roll back is left open by SQLAlchemy, whatever the pool.
        others = {d for caller in self.callers for d in (caller.detached, caller.leaving)}
        leaked = [d for d in server.open if not d.closing and d not in pooled and d not in others]
        assert leaked == [], "open, and nobody knows of it"
        for caller in self.holding():
            if caller.proxy.is_valid and not caller.proxy.is_detached:
                assert caller.proxy._connection_record in pool._held

    def teardown(self):
        if not hasattr(self, "loop"):
            return
        try:
            if not self.faults and sys.exc_info()[0] is None:
                self._everything_is_given_back()
        finally:
            self._end()

    def _everything_is_given_back(self):
        server, pool = self.server, self.pool
        server.refusing = server.hanging = False
        server.connect_delay = server.ping_delay = server.close_delay = 0.0
        server.errors.clear()
        for driver in server.open:
            if driver.frozen:  # as TCP_USER_TIMEOUT does
                driver.kill()
                self.killed_now.add(driver)
        for caller in self.present():
            caller.do("close")
        self._pause(40)
        assert [c for c in self.callers if not c.done] == [], "a caller that never ends"
        assert [task for task in self.background if not task.done()] == []
        self.at_every_instant()
        self.when_nothing_is_in_motion()
        assert (pool.checkedout(), len(pool._queue), len(pool._connects.under_way)) == (0, 0, 0)
        if not pool._draining:
            self._every_slot_serves()
        self._nothing_is_left()

    def _every_slot_serves(self):
        slots = int(self.limit) if self.limit < 100 else 12
        before = len(self.callers)
        for _ in range(slots):
            self._arrive()
            self._pause(3)
            self.at_every_instant()
        errors = [c.error for c in self.callers[before:] if not c.holds]
        assert errors == [], "a slot was lost"
        assert self.pool.checkedout() == slots
        for caller in self.callers[before:]:
            caller.do("close")
        self._pause(0.01)

    def _nothing_is_left(self):
        self.start(self.pool.drain(1))
        self._pause(10)
        for caller in self.callers:
            if caller.detached is not None:
                caller.detached.terminate()  # left open, as in _check_counts()
        assert self.server.open == []
        assert self.background[-1].done()
        assert asyncio.all_tasks(self.loop) == set()
        assert self.faults == []
        assert self.unheard == []

    def _pause(self, seconds):
        self.loop.run_until_complete(self._turns(SETTLED))
        self.killed_now.clear()  # who had been granted one of them has it by now
        self.loop.run_until_complete(asyncio.sleep(seconds))
        self.loop.run_until_complete(self._turns(SETTLED))
        self.settled = True

    def _end(self):
        self.pool._stop_keeper()
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        if tasks:
            self.loop.run_until_complete(asyncio.wait(tasks, timeout=30))
        for task in self.background:
            if task.done() and not task.cancelled():
                task.exception()
        self.loop.close()
        self.unheard[:] = []
        unheard.append(self.unheard)
        steps["machines"] += 1


@pytest.fixture
def own_garbage():
    """Garbage is collected when the machine says so, and only what came to be since."""
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


@pytest.fixture
def quiet():
    """The thousands of connections that are lost on purpose are not logged."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def patient_keeper(monkeypatch):
    """A keeper that spins would stop a virtual clock: it is stopped itself, and that is heard."""
    looks: Counter[float] = Counter()
    tick = keeper._tick

    def counted(reference):
        pool = reference()
        if pool is not None:
            moment = (id(pool), pool.now())
            looks[moment] += 1
            assert looks[moment] < 20, "the keeper spins"
        tick(reference)

    monkeypatch.setattr(keeper, "_tick", counted)


@pytest.mark.filterwarnings("ignore:The garbage collector:sqlalchemy.exc.SAWarning")
@pytest.mark.timeout(0 if EXHAUSTIVE else 300)
def test_whatever_happens(own_garbage, patient_keeper, quiet, record_property):
    """The invariants hold after each of thousands of steps in any order."""
    steps.clear()
    unheard.clear()
    run_state_machine_as_test(PoolMachine, settings=PROFILE)
    gc.collect()
    assert [what for what in unheard if what] == []
    summary = ", ".join(f"{name} {count}" for name, count in steps.most_common())
    record_property("pool steps", summary)
    assert steps["steps"] >= 20_000
