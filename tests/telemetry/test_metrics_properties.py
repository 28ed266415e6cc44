"""The metrics are the truth, whatever happened: that of the fake driver, and that of the server."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
from collections import Counter

import pytest
from fakes import Caller
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule, run_state_machine_as_test
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from readings import points, read, values
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.util import greenlet_spawn
from test_properties import (  # noqa: F401 (fixtures)
    EXHAUSTIVE,
    SETTLED,
    TURNS,
    PoolMachine,
    own_garbage,
    patient_keeper,
    quiet,
    steps,
)

from poolkit import (
    CheckedIn,
    CheckedOut,
    CheckoutRefused,
    CheckoutTimedOut,
    ConnectionClosed,
    LongHolder,
    OverloadBegan,
    PoolDraining,
    PoolOverloaded,
    PoolTimeout,
)
from poolkit.telemetry import metrics

EXAMPLES = 2_000 if EXHAUSTIVE else 110
PROFILE = settings(
    max_examples=EXAMPLES,
    stateful_step_count=22,
    deadline=None,
    derandomize=not EXHAUSTIVE,
    database=None,
    print_blob=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
HISTOGRAMS = ("create_time", "wait_time", "use_time")
DATABASE = {
    "db.client.connection.pool.name": "fake",
    "db.system.name": "postgresql",
    "server.address": "nowhere",
    "server.port": 5432,
    "db.namespace": "fake",
}


class MeasuredMachine(PoolMachine):
    """The machine of the pool's own test, an engine that replaces its pool, and its metrics."""

    def _note_who_waits(self):
        super()._note_who_waits()
        if not hasattr(self, "reader"):  # the first pool
            self.reader = InMemoryMetricReader()
            self.provider = MeterProvider([self.reader], shutdown_on_exit=False)
            self.instruments = metrics.instruments.of(self.provider)
            self.instruments.add(self.pool, DATABASE)
            self.told: list[object] = []
            self.pool.observers.add(self.told.append)
            self.killed: set[object] = set()

    @rule(turns=TURNS, luck=st.integers(0, 2))
    def dispose_engine(self, turns, luck):
        """As ``Engine.dispose``: the pool is replaced, and what is in use comes back to the old."""
        if luck:
            self.start(self._replace())
            steps["replaced"] += 1
        self.go(turns)

    async def _replace(self):
        old = self.pool
        await greenlet_spawn(old.dispose)
        if self.pool is old:
            self.pool = old.recreate()
            self._note_who_waits()

    @rule(turns=TURNS)
    def off_and_on(self, turns):
        """Turning metrics off changes no count, and there is nothing in between."""
        before = read(self.reader)
        (group,) = self.instruments._groups.values()
        group.sources[0].turn_off()
        off = read(self.reader)
        assert set(off) <= {f"db.client.connection.{name}" for name in HISTOGRAMS}
        group.sources[0].left = None
        assert read(self.reader) == before
        steps["off and on"] += 1
        self.go(turns)

    # -- The truth ---------------------------------------------------------------------------

    def _connects(self):
        tasks = {caller.task for caller in self.callers}
        return [task for task in self.server.connecting if task not in tasks]

    def _with_a_connection(self):
        return [
            caller
            for caller in self.holding()
            if caller.proxy.is_valid and not caller.proxy.is_detached
        ]

    def _is_quiet(self):
        """Nothing is under way at the server: no ping, no rollback, no close."""
        drivers = self.server.made
        leaving = [c for c in self.present() if c.leaving is not None and not c.holds]
        return not leaving and not any(d.closing or d._unanswered for d in drivers)

    @invariant()
    def counts_are_what_was_told(self):
        """At every instant: each event once, with its numbers."""
        found = points(self.reader)
        now = values(found)
        told = Counter(type(event) for event in self.told)
        assert now["db.client.connection.timeouts"] == told[CheckoutTimedOut]
        assert now["poolkit.checkout.refusals"] == told[CheckoutRefused]
        assert now["poolkit.connection.long_holders"] == told[LongHolder]
        assert now["poolkit.pool.overloads"] == told[OverloadBegan]
        closed = Counter(str(e.reason) for e in self.told if isinstance(e, ConnectionClosed))
        assert Counter(now["poolkit.connection.closed"]) == closed
        times = {
            "wait_time": [e.wait + e.ping for e in self.told if isinstance(e, CheckedOut)],
            "use_time": [e.use for e in self.told if isinstance(e, CheckedIn)],
        }
        for name, expected in times.items():
            (point,) = found.get(f"db.client.connection.{name}") or (None,)
            assert (point.count if point else 0) == len(expected)
            assert (point.sum if point else 0) == pytest.approx(sum(expected))
        steps["looks"] += 1

    def _check_counts(self):
        """When nothing is left that could run without time passing."""
        self.loop.run_until_complete(self._turns(SETTLED))  # a timer may have been due just now
        now, server = read(self.reader), self.server
        states = now["db.client.connection.count"]
        made, closed = len(server.made), sum(now["poolkit.connection.closed"].values())
        assert now.get("db.client.connection.create_time", 0) == made
        assert sum(states.values()) == made - closed
        assert now["poolkit.connection.opening"] == len(self._connects())
        assert now["poolkit.connection.pings"] == sum(driver.pings for driver in server.made)
        got = [caller for caller in self.callers if caller.got_at is not None]
        assert now.get("db.client.connection.wait_time", 0) == len(got)
        self._check_those_turned_away(now)
        if self._is_quiet():
            self._check_states(now, states, got)

    def _check_those_turned_away(self, now):
        cancelled = sum(isinstance(c.error, asyncio.CancelledError) for c in self.callers)
        in_vain = sum(_was_in_vain(caller) for caller in self.callers)
        ended = now["poolkit.connection.open_failures"].get("cancelled", 0)  # by dispose
        timeouts = now["db.client.connection.timeouts"]
        assert in_vain - ended <= timeouts <= in_vain + cancelled
        kinds = (PoolOverloaded, PoolDraining)
        refused = sum(isinstance(caller.error, kinds) for caller in self.callers)
        assert refused <= now["poolkit.checkout.refusals"] <= refused + cancelled

    def _check_states(self, now, states, got):
        steps["quiet looks"] += 1
        holding = self._with_a_connection()
        assert states["used"] == len(holding)
        assert now.get("db.client.connection.use_time", 0) == len(got) - len(holding)
        waiting = [caller for caller in self.present() if caller.got_at is None]
        assert now["db.client.connection.pending_requests"] == len(waiting)
        hands = {caller.driver for caller in self.holding()} | {c.detached for c in self.callers}
        idle = [driver for driver in self.server.open if driver not in hands]
        killed = [d for d in self.killed if d not in hands]  # the pool finds out when it looks
        assert len(idle) <= states["idle"] <= len(idle) + len(killed)
        longest = max((self.loop.time() - c.got_at for c in holding), default=0.0)
        check = self.pool._ping_timeout  # it was out of the others' reach during its own check
        assert longest <= now["poolkit.connection.longest_use"] + 1e-6 <= longest + check + 1e-5
        limit = self.pool._limit
        if limit < 1000 and self.pool._queue is not None:
            of_current = sum(c.pool is self.pool for c in holding)
            assert now["poolkit.pool.utilisation"] == of_current / limit

    @invariant()
    def note_who_was_killed(self):
        self.killed |= {driver for driver in self.server.made if driver.closed}

    def teardown(self):
        super().teardown()
        if hasattr(self, "provider"):
            self.provider.shutdown()

    def _nothing_is_left(self):
        super()._nothing_is_left()
        now = read(self.reader)
        assert now["db.client.connection.count"] == {"used": 0, "idle": 0}
        assert sum(now["poolkit.connection.closed"].values()) == len(self.server.made)


def _was_in_vain(caller: Caller) -> bool:
    own = (PoolOverloaded, PoolDraining)
    return isinstance(caller.error, PoolTimeout) and not isinstance(caller.error, own)


@pytest.mark.filterwarnings("ignore:The garbage collector:sqlalchemy.exc.SAWarning")
@pytest.mark.usefixtures("own_garbage", "patient_keeper", "quiet")
def test_on_the_fake_driver(record_property):
    """After every step of thousands, the metrics equal what the driver and the callers know."""
    steps.clear()
    run_state_machine_as_test(MeasuredMachine, settings=PROFILE)
    summary = ", ".join(f"{name} {count}" for name, count in steps.most_common())
    record_property("pool steps", summary)
    assert steps["looks"] >= 1500
    assert steps["quiet looks"] >= 400
    assert steps["replaced"] >= 10


STEPS = 40
SESSIONS = text("SELECT count(*) FROM pg_stat_activity WHERE application_name = :name")
KILL = text(
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE application_name = :name ORDER BY random() LIMIT :most"
)


class Holder:
    """Connections in use, and what becomes of them."""

    def __init__(self, engine, name: str, chance: random.Random) -> None:
        self.engine, self.name, self.chance = engine, name, chance
        self.held: list = []
        self.detached: list = []

    async def step(self, watcher) -> None:
        what = self.chance.choice(
            "take take take use use give give invalidate detach lose kill dispose crowd".split()
        )
        await getattr(self, what)(watcher)

    async def take(self, _) -> None:
        if len(self.held) + 1 < self.engine.pool.limit():
            self.held.append(await self.engine.connect())

    async def use(self, _) -> None:
        for connection in list(self.held):
            try:
                await connection.execute(text("SELECT 1"))
            except DBAPIError:  # it was killed
                self.held.remove(connection)
                await connection.close()

    async def give(self, _) -> None:
        if self.held:
            await self.any().close()

    async def invalidate(self, _) -> None:
        if self.held:
            connection = self.any()
            await connection.invalidate()
            await connection.close()

    async def detach(self, _) -> None:
        if self.held:
            connection = self.any()
            raw = await connection.get_raw_connection()
            await connection.run_sync(lambda _: raw.detach())
            self.detached.append(connection)

    async def lose(self, _) -> None:
        if self.held:
            self.any()

    async def kill(self, watcher) -> None:
        async with watcher.connect() as connection:
            await connection.execute(KILL, {"name": self.name, "most": self.chance.randint(1, 3)})

    async def dispose(self, _) -> None:
        await self.engine.dispose()

    async def crowd(self, _) -> None:
        """More than there is room for, some of whom do not wait."""

        async def call(seconds: float) -> None:
            with contextlib.suppress(TimeoutError, DBAPIError):
                async with asyncio.timeout(seconds), self.engine.connect() as connection:
                    await connection.execute(text("SELECT pg_sleep(0.005)"))

        await asyncio.gather(*(call(self.chance.choice([0.002, 0.01, 5.0])) for _ in range(12)))

    def any(self):
        return self.held.pop(self.chance.randrange(len(self.held)))

    async def settle(self) -> None:
        """Have every connection that is lost or dead found out."""
        gc.collect()
        await self.use(None)
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(self.engine.pool.checkedin()):  # each is looked at
                await stack.enter_async_context(self.engine.connect())
        for connection in list(self.detached):
            try:
                await connection.execute(text("SELECT 1"))
            except DBAPIError:
                self.detached.remove(connection)
                await connection.close()


@pytest.mark.usefixtures("own_garbage")
@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.filterwarnings("ignore:The garbage collector:sqlalchemy.exc.SAWarning")
async def test_on_postgresql(seed, make_engine, server, meter_provider, reader) -> None:
    """Used and idle are the sessions that the server has of it, detached ones apart."""
    name = f"metrics {seed}"
    given = {"url": server.url, "application_name": name, "pool_ping_idle": 0.0}
    engine = make_engine(settings=given, pool_size=3, max_overflow=3)
    watcher = make_engine(server.url)
    metrics.install(engine.sync_engine, meter_provider)
    told: list[object] = []
    engine.pool.observers.add(told.append)
    holder = Holder(engine, name, random.Random(seed))

    for _ in range(STEPS):
        await holder.step(watcher)
        async with asyncio.timeout(10):
            while True:
                await holder.settle()
                async with watcher.connect() as connection:
                    sessions = await connection.scalar(SESSIONS, {"name": name})
                now = Counter(read(reader))
                states = now["db.client.connection.count"]
                held, detached = len(holder.held), len(holder.detached)
                if sum(states.values()) + detached == sessions and states["used"] == held:
                    break  # and no check is under way
        opened = now["db.client.connection.create_time"]
        assert sum(states.values()) == opened - sum(now["poolkit.connection.closed"].values())
        counted = Counter(type(event) for event in told)
        assert now["db.client.connection.wait_time"] == counted[CheckedOut]
        assert now["db.client.connection.use_time"] == counted[CheckedIn]
        assert counted[CheckedOut] - counted[CheckedIn] == held

    for connection in holder.held + holder.detached:
        await connection.close()
