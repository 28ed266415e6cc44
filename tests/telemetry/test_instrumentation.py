"""Turning everything on and off, by a call and by the settings."""

from __future__ import annotations

import gc
import subprocess
import sys
import types
import weakref

import pytest
from sqlalchemy import text

from poolkit import ConfigurationError, DatabaseSettings, create_async_engine, telemetry
from poolkit.telemetry import instrument, instrumentation


async def use(engine) -> None:
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1"))


@pytest.fixture
def on(meter_provider, tracer_provider):
    """Instruments an engine for the providers in memory."""
    return lambda engine, **options: instrument(
        engine, meter_provider=meter_provider, tracer_provider=tracer_provider, **options
    )


async def test_on_and_off(make_engine, server, on, measured, exporter) -> None:
    """Metrics and spans; afterwards neither, and the engine is as it was."""
    engine = make_engine(server.url)
    others = list(engine.pool.observers)
    end = on(engine)
    await use(engine)
    assert measured()["db.client.connection.count"] == {"used": 0, "idle": 1}
    assert exporter.get_finished_spans()
    end()
    end()
    exporter.clear()
    await use(engine)
    assert "db.client.connection.count" not in measured()
    assert measured()["db.client.connection.wait_time"] == 1
    assert exporter.get_finished_spans() == ()
    assert list(engine.pool.observers) == others


async def test_twice_is_once(make_engine, server, on, measured, exporter) -> None:
    """Nothing is counted twice, and there is one span of each."""
    engine = make_engine(server.url)
    on(engine)
    on(engine.sync_engine)()
    await use(engine)
    exporter.clear()
    await use(engine)
    now = measured()
    assert now["db.client.connection.wait_time"] == 2
    assert now["db.client.operation.duration"] == {"SELECT": 2}
    assert len(exporter.get_finished_spans()) == 1


async def test_metrics_alone(make_engine, server, on, measured, exporter) -> None:
    """No span."""
    engine = make_engine(server.url)
    on(engine, spans=False)
    await use(engine)
    assert measured()["db.client.operation.duration"] == {"SELECT": 1}
    assert exporter.get_finished_spans() == ()


async def test_an_engine_is_not_kept(server, on) -> None:
    """By anything that is on."""
    engine = create_async_engine(server.url)
    on(engine, server_interval=60)
    await use(engine)
    await engine.dispose()
    reference = weakref.ref(engine.sync_engine)
    del engine
    gc.collect()
    assert reference() is None


class TestTheSettings:
    """What ``create_async_engine`` does with them."""

    @pytest.fixture
    def calls(self, monkeypatch) -> list:
        found: list = []
        monkeypatch.setattr(instrumentation, "instrument", lambda _, **kw: found.append(kw))
        logfire = types.ModuleType("poolkit.telemetry.logfire")
        logfire.install = lambda engine, settings: found.append(settings)
        monkeypatch.setitem(sys.modules, logfire.__name__, logfire)
        return found

    def make(self, **settings):
        given = DatabaseSettings(url=URL, **settings)
        create_async_engine(settings=given)
        return given

    @pytest.mark.parametrize(("mode", "spans"), [("metrics", False), ("full", True)])
    def test_telemetry(self, calls, mode, spans) -> None:
        """Every setting reaches what it steers."""
        self.make(
            telemetry=mode,
            telemetry_slow_checkout=0.5,
            telemetry_parameters=True,
            telemetry_sqlcommenter=True,
            telemetry_server_interval=30,
        )
        assert calls == [
            {
                "spans": spans,
                "slow_checkout": 0.5,
                "parameters": True,
                "sqlcommenter": True,
                "server_interval": 30,
            }
        ]

    def test_off(self, calls) -> None:
        """By default nothing is on."""
        self.make(telemetry_slow_checkout=0.5)
        assert calls == []

    @pytest.mark.parametrize("mode", ["off", "metrics", "full"])
    def test_logfire(self, calls, mode) -> None:
        """Everything goes through it, once."""
        given = self.make(telemetry=mode, logfire_enabled=True)
        assert calls == [given]


URL = "postgresql://u:p@h/d"
BLOCKED = """
import os, sys
os.environ["PYDANTIC_DISABLE_PLUGINS"] = "__all__"  # Logfire's is loaded by pydantic itself

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "opentelemetry":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
import poolkit
try:
    %s
except poolkit.ConfigurationError as error:
    print(error)
"""


@pytest.mark.parametrize(
    "code",
    [
        f"os.environ['DATABASE_TELEMETRY'] = 'metrics'; poolkit.create_async_engine({URL!r})",
        "from poolkit.telemetry import instrument",
    ],
)
def test_without_opentelemetry(code) -> None:
    """A clear error that names the setting and the extra."""
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED % code], capture_output=True, text=True, check=True
    )
    assert "DATABASE_TELEMETRY" in done.stdout
    assert "pip install 'poolkit[telemetry]'" in done.stdout
    assert done.stderr == ""


def test_without_opentelemetry_the_rest_works() -> None:
    """Without telemetry nothing of it is needed; the catalogue never needs it."""
    code = f"import poolkit.telemetry.catalogue as c; poolkit.create_async_engine({URL!r})"
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED % f"{code}; print(len(c.METRICS))"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (int(done.stdout) > 20, done.stderr) == (True, "")


def test_what_is_missing_otherwise_is_not_blamed_on_it(monkeypatch) -> None:
    """A fault of poolkit's own is seen as what it is."""
    monkeypatch.delitem(sys.modules, "poolkit.telemetry.instrumentation")
    monkeypatch.setitem(sys.modules, "poolkit.telemetry.server", None)
    monkeypatch.delattr(telemetry, "server")
    with pytest.raises(ImportError) as caught:
        _ = telemetry.instrument
    assert not isinstance(caught.value, ConfigurationError)


def test_names() -> None:
    """The package offers these two, and no others."""
    assert telemetry.__all__ == ["install", "instrument"]
    with pytest.raises(AttributeError):
        _ = telemetry.nothing
