"""The pool's metrics, as a reader collects them, beside what the pool and the server know."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import re
import threading
import warnings
import weakref

import logfire
import pytest
from logfire import MetricsOptions
from opentelemetry import metrics as api
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.metrics import _internal as internals
from opentelemetry.sdk.metrics import Histogram, MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.metrics.view import ExponentialBucketHistogramAggregation, View
from readings import OWN, points, read
from sqlalchemy import text
from sqlalchemy.pool import NullPool

from poolkit import (
    PoolOverloaded,
    PoolTimeout,
    create_async_engine,
    drain,
    pool_stats,
    run_in_transaction,
    warm_up,
)
from poolkit.errors import ConnectError
from poolkit.events import CloseReason
from poolkit.faults import CONNECTING
from poolkit.telemetry import metrics
from poolkit.telemetry.attributes import POOL_NAME
from poolkit.telemetry.catalogue import METRICS, SECONDS, Kind
from poolkit.telemetry.meters import PerProvider

ELSEWHERE = {
    "db.client.operation.duration",
    "poolkit.server.connections",
    "poolkit.server.connections.max",
}
"""Metrics that other modules emit."""


@pytest.fixture
def watch(meter_provider):
    """Turns an engine's metrics on."""
    return lambda engine: metrics.install(engine.sync_engine, meter_provider)


@pytest.fixture
def small(make_engine, server, watch):
    """An engine of two connections, with its metrics on."""
    engine = make_engine(
        server.url, pool_size=2, max_overflow=0, pool_timeout=0.05, pool_max_waiting=1
    )
    watch(engine)
    return engine


async def use(engine) -> None:
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))


async def kill_others(connection) -> None:
    await connection.execute(
        text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
    )


async def until(condition, seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


class TestWhatIsEmitted:
    """Names, kinds, units and attributes."""

    async def test_all_of_the_catalogue(self, small, reader) -> None:
        """As it says, and nothing else, from the first use on."""
        await use(small)
        data = reader.get_metrics_data()
        (resource,) = data.resource_metrics
        (scope,) = resource.scope_metrics
        assert scope.scope.name == "poolkit"
        found = {metric.name: metric for metric in scope.metrics}
        assert found.keys() == METRICS.keys() - ELSEWHERE
        for name, metric in found.items():
            wanted = METRICS[name]
            assert (metric.unit, metric.description) == (wanted.unit, wanted.description)
            assert _kind(metric.data) is wanted.kind
            for point in metric.data.data_points:
                assert set(point.attributes) == OWN | set(wanted.attributes)

    async def test_the_pools_attributes(self, make_engine, server, watch, reader) -> None:
        """By the conventions; the name is the settings', or the address and the database."""
        named = make_engine(settings={"url": server.url, "pool_name": "orders"})
        watch(named)
        plain = make_engine(server.url)
        watch(plain)
        database = {
            "db.system.name": "postgresql",
            "server.address": "127.0.0.1",
            "server.port": server.port,
            "db.namespace": named.url.database,
        }
        found = [dict(p.attributes) for p in points(reader)["db.client.connection.max"]]
        name = "db.client.connection.pool.name"
        address = f"127.0.0.1:{server.port}/{plain.url.database}"
        assert found == [{name: "orders", **database}, {name: address, **database}]

    async def test_bounds_of_histograms(self, small, reader) -> None:
        """Seconds, not the SDK's milliseconds."""
        await use(small)
        for name in ("create_time", "wait_time", "use_time"):
            (point,) = points(reader)[f"db.client.connection.{name}"]
            assert tuple(point.explicit_bounds) == SECONDS

    async def test_values_under_logfires_views(self, make_engine, server) -> None:
        """Its histograms are exponential, whatever bounds are advised; count and sum are right."""
        reader = InMemoryMetricReader()
        view = View(instrument_type=Histogram, aggregation=ExponentialBucketHistogramAggregation())
        provider = MeterProvider([reader], views=[view])
        engine = make_engine(server.url)
        metrics.install(engine.sync_engine, provider)
        for _ in range(3):
            async with engine.connect():
                await asyncio.sleep(0.01)
        (point,) = points(reader)["db.client.connection.use_time"]
        assert not hasattr(point, "explicit_bounds")
        assert (point.count, point.sum) == (3, pytest.approx(pool_stats(engine).used_seconds))
        buckets = point.positive
        base = 2 ** (2**-point.scale)
        for index, count in enumerate(buckets.bucket_counts):
            if count:
                low = base ** (buckets.offset + index)
                assert point.min / base <= low <= point.max
        assert sum(buckets.bucket_counts) == 3
        assert read(reader)["db.client.connection.count"] == {"used": 0, "idle": 1}
        provider.shutdown()

    async def test_through_logfire(self, make_engine, server, capfire) -> None:
        """Its own provider, which forgets what nobody holds, and may be configured anew."""
        engine = make_engine(settings={"url": server.url, "pool_name": "in Logfire"})
        end = metrics.install(engine.sync_engine, None)
        gc.collect()
        await use(engine)
        found = {
            metric["name"]: [
                point
                for point in metric["data"]["data_points"]
                if point["attributes"].get(POOL_NAME) == "in Logfire"  # others may have been here
            ]
            for metric in capfire.get_collected_metrics()
        }
        assert METRICS.keys() - ELSEWHERE <= found.keys()
        states = found["db.client.connection.count"]
        assert sorted(point["value"] for point in states) == [0, 1]
        (waits,) = found["db.client.connection.wait_time"]
        assert waits["count"] == 1
        assert "positive" in waits

        reader = InMemoryMetricReader()
        options = MetricsOptions(additional_readers=[reader])
        logfire.configure(send_to_logfire=False, console=False, metrics=options)
        await use(engine)
        now = read(reader, pool="in Logfire")
        assert now["db.client.connection.count"] == {"used": 0, "idle": 1}
        assert now["db.client.connection.wait_time"] == 1
        end()


def _kind(data) -> Kind:
    kind = type(data).__name__
    if kind == "Sum":
        return Kind.COUNTER if data.is_monotonic else Kind.UP_DOWN_COUNTER
    return {"Gauge": Kind.GAUGE, "Histogram": Kind.HISTOGRAM}[kind]


class TestStates:
    """What is read from the pool."""

    async def test_used_idle_and_utilisation(self, small, measured) -> None:
        """Of two connections, by how many are in callers' hands."""
        async with small.connect():
            now = measured()
            assert now["db.client.connection.count"] == {"used": 1, "idle": 0}
            assert now["poolkit.pool.utilisation"] == 0.5
            async with small.connect():
                assert measured()["poolkit.pool.utilisation"] == 1.0
        now = measured()
        assert now["db.client.connection.count"] == {"used": 0, "idle": 2}
        assert now["poolkit.pool.utilisation"] == 0.0

    async def test_limits(self, make_engine, server, watch, measured) -> None:
        """The pool's size, its minimum and its most."""
        watch(make_engine(settings={"url": server.url, "pool_min_idle": 3}))
        now = measured()
        limits = [now[f"db.client.connection.{name}"] for name in ("idle.max", "idle.min", "max")]
        assert limits == [10, 3, 15]

    @pytest.mark.parametrize(
        ("given", "absent"),
        [({"max_overflow": -1}, {"max"}), ({"pool_size": 0}, {"max", "idle.max"})],
    )
    async def test_unlimited(self, make_engine, server, watch, measured, given, absent) -> None:
        """There is no most, and no fraction of it."""
        watch(make_engine(server.url, **given))
        now = measured()
        missing = METRICS.keys() - ELSEWHERE - now.keys()
        histograms = {n for n, metric in METRICS.items() if metric.kind is Kind.HISTOGRAM}
        assert missing - histograms == {
            "poolkit.pool.utilisation",
            *(f"db.client.connection.{name}" for name in absent),
        }

    async def test_who_waits_and_for_how_long(self, make_engine, server, watch, reader) -> None:
        """Pending, overloaded, opening and the longest use, while it lasts."""
        engine = make_engine(
            server.url, pool_size=1, max_overflow=0, pool_timeout=5, pool_overload_after=0.05
        )
        watch(engine)
        opening = asyncio.create_task(use(engine))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        now = read(reader)
        assert now["poolkit.connection.opening"] == 1
        assert now["db.client.connection.pending_requests"] == 1
        await opening
        async with engine.connect():
            waiting = [asyncio.create_task(use(engine)) for _ in range(3)]
            await asyncio.sleep(0.1)  # real: for longer than pool_overload_after
            now = read(reader)
            assert now["db.client.connection.pending_requests"] == 3
            assert now["poolkit.connection.opening"] == 0
            assert 0.1 <= now["poolkit.connection.longest_use"] < 5
            pending = asyncio.create_task(use(engine))
        overloaded = []
        engine.pool.observers.add(lambda _: overloaded.append(read(reader)))
        await asyncio.gather(*waiting, pending)
        assert max(each["poolkit.pool.overloaded"] for each in overloaded) == 1
        now = read(reader)
        assert now["poolkit.pool.overloaded"] == 0
        assert now["poolkit.pool.overloads"] == 1
        assert now["db.client.connection.pending_requests"] == 0
        assert now["poolkit.connection.longest_use"] == 0

    async def test_read_from_another_thread(self, small, reader) -> None:
        """As a periodic exporter does, while connections come and go; nothing fails."""
        found, logged, over = [], [], threading.Event()
        handler = logging.Handler()
        handler.emit = logged.append
        logging.getLogger("opentelemetry").addHandler(handler)

        def export() -> None:
            while not over.is_set():
                found.append(read(reader))

        thread = threading.Thread(target=export)
        thread.start()
        try:
            for _ in range(300):
                await use(small)
                if len(found) > 20:
                    break
        finally:
            over.set()
            await asyncio.to_thread(thread.join)
            logging.getLogger("opentelemetry").removeHandler(handler)
        assert logged == []
        assert all(sum(each["db.client.connection.count"].values()) <= 2 for each in found)

    def test_a_loop_that_is_closed(self, server, meter_provider, measured) -> None:
        """Its engine is read as ever, from outside of any loop."""
        engine = create_async_engine(server.url)
        metrics.install(engine.sync_engine, meter_provider)
        asyncio.run(use(engine))
        assert measured()["db.client.connection.count"] == {"used": 0, "idle": 1}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # asyncio's, of the dead loop
            asyncio.run(engine.dispose())
            gc.collect()
        now = measured()
        assert now["db.client.connection.count"] == {"used": 0, "idle": 0}
        assert now["poolkit.connection.closed"]["disposed"] == 1


class TestCounts:
    """What is added up, with its reasons."""

    async def test_timeouts_and_refusals(self, small, measured) -> None:
        """Who waited in vain, and who was turned away at once."""
        async with small.connect(), small.connect():
            waiting = asyncio.create_task(use(small))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            with pytest.raises(PoolOverloaded):
                await use(small)
            with pytest.raises(PoolTimeout):
                await waiting
        now = measured()
        assert now["db.client.connection.timeouts"] == 1
        assert now["poolkit.checkout.refusals"] == 1
        assert now["db.client.connection.wait_time"] == 2

    async def test_failed_connects_by_kind(self, make_engine, watch, measured) -> None:
        """What went wrong; kinds that a connect may fail with are there before they happen."""
        given = {"url": "postgresql://u:p@127.0.0.1:1/d", "connection_timeout": 0.3}
        engine = make_engine(settings={**given, "pool_ping_timeout": 0.1})
        watch(engine)
        before = measured()["poolkit.connection.open_failures"]
        assert set(before) == {kind.value for kind in CONNECTING}
        assert set(before.values()) == {0}
        with pytest.raises(ConnectError):
            await use(engine)
        after = measured()["poolkit.connection.open_failures"]
        assert {kind: n for kind, n in after.items() if n} == {"connect_refused": 1}
        assert "db.client.connection.create_time" not in measured()

    async def test_pings(self, make_engine, server, watch, measured) -> None:
        """Checks before use, and those that found the connection dead."""
        engine = make_engine(server.url, pool_ping_idle=0)
        watch(engine)
        await use(engine)
        await use(engine)
        now = measured()
        assert (now["poolkit.connection.pings"], now["poolkit.connection.ping_failures"]) == (1, 0)

    async def test_retries(self, small, measured) -> None:
        """Of whole transactions."""
        done = []

        async def work(connection):
            done.append(1)
            if len(done) == 1:
                await connection.execute(text("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$"))

        await run_in_transaction(small, work)
        assert measured()["poolkit.transaction.retries"] == 1

    async def test_long_holders(self, make_engine, server, watch, measured) -> None:
        """Those that were reported."""
        engine = make_engine(settings={"url": server.url, "leak_threshold": 0.05})
        watch(engine)
        async with engine.connect():
            await until(lambda: pool_stats(engine).long_holders)
        assert measured()["poolkit.connection.long_holders"] == 1

    async def test_every_reason_is_there(self, small, measured) -> None:
        """As 0 before the first, so that it is seen as a rise."""
        expected = {reason.value: 0 for reason in CloseReason}
        assert measured()["poolkit.connection.closed"] == expected

    async def test_what_was_counted_before(self, make_engine, server, watch, measured) -> None:
        """Counts are the engine's, from its beginning; times are from now on."""
        engine = make_engine(server.url)
        async with engine.connect() as connection:
            await connection.invalidate()
        watch(engine)
        now = measured()
        assert now["poolkit.connection.closed"]["invalidated"] == 1
        assert "db.client.connection.use_time" not in now


class TestTimes:
    """What is measured as it happens."""

    async def test_create_wait_and_use(self, small, reader) -> None:
        """One of each per connection or checkout, with the times the pool knows."""
        for _ in range(3):
            async with small.connect():
                await asyncio.sleep(0.01)
        found = {name: each[0] for name, each in points(reader).items() if each}
        stats = pool_stats(small)
        times = {
            name: (
                found[f"db.client.connection.{name}"].count,
                found[f"db.client.connection.{name}"].sum,
            )
            for name in ("create_time", "wait_time", "use_time")
        }
        assert times["create_time"][0] == 1
        assert 0 < times["create_time"][1] <= stats.open_seconds
        assert times["wait_time"] == (3, pytest.approx(stats.wait_seconds))
        assert times["use_time"] == (3, pytest.approx(stats.used_seconds))

    async def test_a_ping_is_waited_for(self, make_engine, server, watch, reader) -> None:
        """A caller's wait has the check of its connection in it."""
        engine = make_engine(server.url, pool_ping_idle=0)
        await use(engine)
        watch(engine)
        await use(engine)
        (point,) = points(reader)["db.client.connection.wait_time"]
        assert point.sum == pytest.approx(pool_stats(engine).ping_seconds, rel=0.5)
        assert point.sum > 0

    async def test_warm_up(self, small, measured) -> None:
        """Connections that no caller asked for were opened, too."""
        await warm_up(small)
        now = measured()
        assert now["db.client.connection.create_time"] == 2
        assert "db.client.connection.wait_time" not in now


class TestTheEndsOfConnections:
    """The counts are right whatever ended one."""

    async def test_detach(self, small, measured) -> None:
        """It is the caller's, and none of the pool's."""
        connection = await small.connect()
        raw = await connection.get_raw_connection()
        await connection.run_sync(lambda _: raw.detach())
        now = measured()
        assert now["db.client.connection.count"] == {"used": 0, "idle": 0}
        assert now["poolkit.connection.closed"]["detached"] == 1
        assert now["db.client.connection.use_time"] == 1
        await connection.close()
        now = measured()
        assert now["db.client.connection.count"] == {"used": 0, "idle": 0}
        assert now["db.client.connection.use_time"] == 1

    async def test_lost_to_the_garbage_collector(self, small, measured) -> None:
        """Nobody has it any more."""
        connection = await small.connect()
        assert measured()["db.client.connection.count"] == {"used": 1, "idle": 0}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            del connection
            gc.collect()
        now = measured()
        assert now["db.client.connection.count"] == {"used": 0, "idle": 0}
        assert now["poolkit.connection.closed"]["garbage_collected"] == 1
        assert now["db.client.connection.use_time"] == 1

    async def test_a_server_kill(self, small, make_engine, server, measured) -> None:
        """Found dead at its next use, or in mid-statement."""
        await warm_up(small)
        other = make_engine(server.url)
        async with other.connect() as connection:
            await kill_others(connection)
        await until(lambda: all(record.is_dead() for record in small.pool.idle()))
        await use(small)
        now = measured()
        assert now["db.client.connection.count"] == {"used": 0, "idle": 1}
        assert now["poolkit.connection.closed"]["lost"] == 2
        assert now["db.client.connection.create_time"] == 3

    async def test_dispose_with_connections_in_use(self, small, measured) -> None:
        """They count until they come back; the new pool's count beside them."""
        async with small.connect():
            await use(small)
            await small.dispose()
            now = measured()
            assert now["db.client.connection.count"] == {"used": 1, "idle": 0}
            assert now["db.client.connection.max"] == 2
            assert now["poolkit.pool.utilisation"] == 0
            async with small.connect():
                now = measured()
                assert now["db.client.connection.count"] == {"used": 2, "idle": 0}
                assert now["db.client.connection.max"] == 2
                assert now["poolkit.pool.utilisation"] == 0.5
                assert now["poolkit.connection.longest_use"] > 0
        now = measured()
        assert now["db.client.connection.count"] == {"used": 0, "idle": 1}
        assert now["poolkit.connection.closed"]["disposed"] == 2

    async def test_of_many_pools_that_were_replaced(self, small, measured) -> None:
        """None that has a connection in use is forgotten, and no other is kept."""
        connections = []
        for _ in range(3):
            connections.append(await small.connect())
            await small.dispose()
        gc.collect()
        assert measured()["db.client.connection.count"] == {"used": 3, "idle": 0}
        for connection in connections:
            await connection.close()
        assert measured()["db.client.connection.count"] == {"used": 0, "idle": 0}
        connections.clear()
        del connection

        def is_alone() -> bool:
            gc.collect()
            return [each() for each in small.pool.lineage if each() is not None] == [small.pool]

        await until(is_alone)
        await small.dispose()
        assert len(small.pool.lineage) == 2

    async def test_drain(self, small, measured) -> None:
        """Nothing is left, and that is said."""
        await warm_up(small)
        await drain(small)
        now = measured()
        assert now["db.client.connection.count"] == {"used": 0, "idle": 0}
        assert now["poolkit.connection.closed"]["drained"] == 2


class TestSeveralEngines:
    """Each under its name; those with the same are one."""

    async def test_with_names_of_their_own(self, make_engine, server, watch, reader) -> None:
        """Apart."""
        one = make_engine(settings={"url": server.url, "pool_name": "one"})
        two = make_engine(settings={"url": server.url, "pool_name": "two"})
        watch(one)
        watch(two)
        async with one.connect():
            assert read(reader, pool="one")["db.client.connection.count"]["used"] == 1
            assert read(reader, pool="two")["db.client.connection.count"]["used"] == 0

    async def test_with_the_same_name(self, make_engine, server, watch, measured) -> None:
        """Added up, limits too."""
        one, two = make_engine(server.url), make_engine(server.url, pool_size=1, max_overflow=0)
        watch(one)
        watch(two)
        async with one.connect() as connection, two.connect():
            now = measured()
            assert now["db.client.connection.count"] == {"used": 2, "idle": 0}
            assert now["db.client.connection.max"] == 16
            assert now["poolkit.pool.utilisation"] == 2 / 16
            await connection.invalidate()
        now = measured()
        assert now["poolkit.connection.closed"]["invalidated"] == 1
        assert now["db.client.connection.wait_time"] == 2

    async def test_with_the_same_name_and_other_databases(
        self, make_engine, server, watch, reader
    ) -> None:
        """Apart, by their attributes."""
        given = {"url": server.url, "pool_name": "same"}
        watch(make_engine(settings=given))
        watch(make_engine(settings={**given, "url": server.url.rpartition("/")[0] + "/other"}))
        assert len(points(reader)["db.client.connection.max"]) == 2

    async def test_one_of_them_unlimited(self, make_engine, server, watch, measured) -> None:
        """Then so are they together."""
        watch(make_engine(server.url))
        watch(make_engine(server.url, max_overflow=-1))
        assert "db.client.connection.max" not in measured()

    def test_one_after_the_other(self, server, meter_provider, measured) -> None:
        """Each of its own loop, and gone: what they counted stays, and does not pile up."""

        async def main() -> None:
            engine = create_async_engine(server.url)
            metrics.install(engine.sync_engine, meter_provider)
            async with engine.connect() as connection:
                await connection.invalidate()
            await engine.dispose()

        for turn in range(1, 4):
            asyncio.run(main())
            gc.collect()
            now = measured()
            assert now["poolkit.connection.closed"]["invalidated"] == turn
            assert now["db.client.connection.create_time"] == turn
            assert "db.client.connection.count" not in now  # there is no pool
        (group,) = metrics.instruments.of(meter_provider)._groups.values()
        assert len(group.sources) == 1


class TestOnAndOff:
    """Once is enough, and off is off."""

    async def test_twice_is_once(self, small, watch, measured) -> None:
        """No double counting; the second end ends nothing."""
        watch(small)()
        await use(small)
        now = measured()
        assert now["db.client.connection.count"] == {"used": 0, "idle": 1}
        assert now["db.client.connection.wait_time"] == 1

    async def test_off(self, make_engine, server, watch, measured) -> None:
        """Nothing more of this engine; nobody is told of its checkouts."""
        engine = make_engine(server.url)
        others = list(engine.pool.observers)
        end = watch(engine)
        await use(engine)
        end()
        await use(engine)
        now = measured()
        assert now == {
            "db.client.connection.create_time": 1,
            "db.client.connection.wait_time": 1,
            "db.client.connection.use_time": 1,
        }
        assert list(engine.pool.observers) == others
        assert engine.pool._on_checkout == []

    async def test_on_again(self, make_engine, server, watch, measured) -> None:
        """Counts go on where they are, never backwards; an old end ends nothing."""
        engine = make_engine(server.url)
        ends = []
        for turn in range(1, 4):
            ends.append(watch(engine))
            async with engine.connect() as connection:
                await connection.invalidate()
            assert measured()["poolkit.connection.closed"]["invalidated"] == turn
            assert measured()["db.client.connection.use_time"] == turn
            if turn < 3:
                ends[-1]()
        ends[0]()
        assert "db.client.connection.count" in measured()

    async def test_off_for_one_of_two(self, make_engine, server, watch, measured) -> None:
        """Its part of the counts stays, or the sum would go backwards."""
        one, two = make_engine(server.url), make_engine(server.url)
        end, _ = watch(one), watch(two)
        for engine in (one, two):
            async with engine.connect() as connection:
                await connection.invalidate()
        end()
        async with one.connect() as connection:
            now = measured()
            assert now["poolkit.connection.closed"]["invalidated"] == 2
            assert now["db.client.connection.count"] == {"used": 0, "idle": 0}
            await connection.invalidate()
        assert measured()["poolkit.connection.closed"]["invalidated"] == 2
        watch(one)
        assert measured()["poolkit.connection.closed"]["invalidated"] == 3

    async def test_two_providers(self, make_engine, server, watch, measured) -> None:
        """Each has everything."""
        engine, second = make_engine(server.url), InMemoryMetricReader()
        watch(engine)
        provider = MeterProvider([second])
        end = metrics.install(engine.sync_engine, provider)
        await use(engine)
        assert read(second) == measured()
        end()
        assert "db.client.connection.count" in measured()
        provider.shutdown()

    async def test_the_global_provider_set_afterwards(
        self, make_engine, server, monkeypatch
    ) -> None:
        """As applications do: engines at import, providers later. Nothing is there twice."""
        monkeypatch.setattr(internals, "_METER_PROVIDER", None)
        monkeypatch.setattr(internals, "_PROXY_METER_PROVIDER", internals._ProxyMeterProvider())
        monkeypatch.setattr(internals, "_METER_PROVIDER_SET_ONCE", api._internal.Once())
        # There is one stand-in in a process; tests before this one may have made theirs known.
        monkeypatch.setattr(metrics, "instruments", PerProvider(metrics.Instruments))
        early, late = make_engine(server.url), make_engine(server.url)
        metrics.install(early.sync_engine, None)
        reader = InMemoryMetricReader()
        provider = MeterProvider([reader])
        api.set_meter_provider(provider)
        metrics.install(late.sync_engine, None)
        metrics.install(late.sync_engine, provider)
        for engine in (early, late):
            await use(engine)
        now = read(reader)
        assert now["db.client.connection.count"] == {"used": 0, "idle": 2}
        assert now["db.client.connection.wait_time"] == 2
        provider.shutdown()

    async def test_an_engine_is_not_kept(self, server, watch, measured) -> None:
        """Neither it nor its pool, by its metrics."""
        engine = create_async_engine(server.url)
        watch(engine)
        await use(engine)
        await engine.dispose()
        references = [weakref.ref(engine.sync_engine), weakref.ref(engine.pool)]
        del engine
        gc.collect()
        assert [each() for each in references] == [None, None]
        assert measured()["poolkit.connection.closed"]["disposed"] == 1

    async def test_a_provider_is_not_kept(self, make_engine, server) -> None:
        """Nor what was made for it, once its metrics are off."""
        provider = MeterProvider([InMemoryMetricReader()])
        metrics.install(make_engine(server.url).sync_engine, provider)()
        reference = weakref.ref(metrics.instruments.of(provider))
        provider.shutdown()
        del provider
        gc.collect()
        metrics.instruments.of(NoOpMeterProvider())
        gc.collect()
        assert reference() is None

    async def test_another_pool(self, make_engine, server, watch, measured, caplog) -> None:
        """One warning that says what to do, and no metrics of it."""
        engine = make_engine(server.url, poolclass=NullPool)
        watch(engine)()
        await use(engine)
        (record,) = [r for r in caplog.records if r.name == "poolkit.telemetry"]
        assert re.search("NullPool.*leave out poolclass=", record.getMessage())
        assert server.password not in record.getMessage()
        assert measured() == {}


def test_values_are_finite(reader, measured) -> None:
    """Of a pool that was never used."""
    engine = create_async_engine("postgresql://u:p@127.0.0.1:1/d")
    end = metrics.install(engine.sync_engine, None)
    assert all(math.isfinite(v) for v in measured().values() if not isinstance(v, dict))
    end()
