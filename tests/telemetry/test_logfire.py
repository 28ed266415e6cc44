"""Spans, metrics and events to Logfire."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import logfire
import pytest
import sqlalchemy
from logfire.testing import CaptureLogfire, TestExporter
from opentelemetry.instrumentation.asyncpg import AsyncPGInstrumentor
from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from sqlalchemy import text

from poolkit import (
    CheckoutRefused,
    ConnectionClosed,
    ConnectionLost,
    LongHolder,
    PoolOverloaded,
    PoolTimeout,
)
from poolkit.events import CloseReason
from poolkit.telemetry import logfire as ours
from poolkit.telemetry import others

OLD_SQLALCHEMY = sqlalchemy.__version__.startswith("2.0.")
EVENT = "poolkit.event"
PARAMETER = "a-parameter-that-nobody-may-see"
SELECT = text("SELECT current_database()")


@pytest.fixture
def on(make_engine, server, capfire):
    """Makes engines that send to Logfire."""

    def make(**settings):
        return make_engine(settings={"url": server.url, "logfire_enabled": True} | settings)

    return make


@pytest.fixture(autouse=True)
def _leave_logging_alone() -> Iterator[None]:
    yield
    for name in ("poolkit.pool", "poolkit.connect", "poolkit.connections", "poolkit.transactions"):
        logging.getLogger(name).filters.clear()


def spans(capfire: CaptureLogfire) -> list[dict[str, Any]]:
    found = capfire.exporter.exported_spans_as_dict(
        include_instrumentation_scope=True, parse_json_attributes=True
    )
    return [span for span in found if span["attributes"].get("logfire.span_type") != "pending_span"]


def events(capfire: CaptureLogfire, name: str) -> list[dict[str, Any]]:
    return [s["attributes"] for s in spans(capfire) if s["attributes"].get(EVENT) == name]


def level(attributes: dict[str, Any]) -> str:
    numbers = {5: "debug", 9: "info", 13: "warn", 17: "error"}
    return numbers[attributes["logfire.level_num"]]


def of_statements(capfire: CaptureLogfire) -> list[str]:
    """The scopes of the spans that the test's statement became."""
    return [
        span["instrumentation_scope"]
        for span in spans(capfire)
        if str(SELECT)
        in (span["attributes"].get("db.query.text"), span["attributes"].get("db.statement"))
    ]


# -- What is sent ------------------------------------------------------------------------------


async def test_the_setting_is_all_it_takes(on, capfire) -> None:
    """Spans, metrics and events, each to Logfire."""
    engine = on()
    async with engine.connect() as connection:
        await connection.execute(SELECT)
        metrics = {metric["name"] for metric in capfire.get_collected_metrics()}
    await engine.dispose()

    assert of_statements(capfire) == ["poolkit"]
    assert {"db.client.connection.count", "db.client.operation.duration"} <= metrics
    (opened,) = events(capfire, "connection_opened")
    assert level(opened) == "debug"
    assert opened["poolkit.pooler"] == "none"


async def test_a_pool_timeout_is_an_error_with_the_pools_state(on, capfire) -> None:
    """It is there to be queried, not only to be read."""
    engine = on(pool_size=1, max_overflow=0, pool_timeout=0.05, pool_name="main")
    async with engine.connect():
        with pytest.raises(PoolTimeout) as caught:
            await engine.connect()

    (sent,) = events(capfire, "checkout_timed_out")
    assert level(sent) == "error"
    state = {name: sent[f"poolkit.{name}"] for name in ("used", "idle", "opening", "waiting")}
    assert state == {"used": 1, "idle": 0, "opening": 0, "waiting": 1}
    assert sent["poolkit.limit"] == 1
    assert sent["poolkit.longest_use"] >= 0.05
    assert sent["poolkit.waited"] == pytest.approx(0.05, abs=0.5)
    assert sent["db.client.connection.pool.name"] == "main"
    assert sent["exception.message"] == caught.value.args[0]
    assert sent["logfire.msg"].startswith("checkout timed out after 0.1 s: used 1 of 1, idle 0")
    assert sent["logfire.msg_template"].startswith("checkout timed out after {poolkit.waited:.1f}")


async def test_a_lost_connection_is_a_warning(on, make_engine, server, capfire) -> None:
    """Said by its scope to come from poolkit."""
    engine, other = on(), make_engine(settings={"url": server.url})
    async with engine.connect() as connection:
        pid = await connection.scalar(text("SELECT pg_backend_pid()"))
        async with other.connect() as killer:
            await killer.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
        with pytest.raises(ConnectionLost):
            await connection.execute(SELECT)

    (sent,) = events(capfire, "connection_lost")
    assert level(sent) == "warn"
    assert sent["poolkit.close.reason"] == "lost"
    (scope,) = {s["instrumentation_scope"] for s in spans(capfire) if EVENT in s["attributes"]}
    assert scope == "logfire.poolkit"


async def test_words_like_auth_and_session_are_not_redacted(on, capfire) -> None:
    """Where a database is told of, they are names; and a stack or an error is kept whole."""
    engine = on()
    observers = engine.pool.observers
    observers.notify(LongHolder(6.0, "task", "async with session.begin():"))
    observers.notify(CheckoutRefused(PoolOverloaded("the password is not shown here")))
    observers.notify(ConnectionClosed(CloseReason.LOST, 1.0))

    (held,) = events(capfire, "long_holder")
    assert held["exception.stacktrace"] == "async with session.begin():"
    assert held["logfire.msg"] == "connection held for 6.0 s by task task"
    (refused,) = events(capfire, "checkout_refused")
    assert refused["exception.message"] == "the password is not shown here"
    assert not any("logfire.scrubbed" in span["attributes"] for span in spans(capfire))


async def test_repetitions_are_held_back(on, capfire) -> None:
    """As in the logs."""
    engine = on()
    for _ in range(5):
        engine.pool.observers.notify(CheckoutRefused(PoolOverloaded("full")))

    assert len(events(capfire, "checkout_refused")) == 1


async def test_an_event_belongs_to_its_callers_trace(on, capfire) -> None:
    """A request that timed out shows why."""
    engine = on(pool_size=1, max_overflow=0, pool_timeout=0.05)
    async with engine.connect():
        with logfire.span("request"), pytest.raises(PoolTimeout):
            await engine.connect()

    (request,) = [span for span in spans(capfire) if span["name"] == "request"]
    (sent,) = [s for s in spans(capfire) if s["attributes"].get(EVENT) == "checkout_timed_out"]
    assert sent["parent"]["span_id"] == request["context"]["span_id"]


async def test_two_engines_and_two_instances(on, make_engine, server, capfire) -> None:
    """Settings know the default instance; another is given by hand."""
    exporter = TestExporter()
    own = logfire.configure(
        local=True,
        send_to_logfire=False,
        console=False,
        additional_span_processors=[SimpleSpanProcessor(exporter)],
    )
    first, second = on(pool_name="first"), make_engine(settings={"url": server.url})
    end = ours.instrument(second, own)
    for engine in (first, second):
        async with engine.connect() as connection:
            await connection.execute(SELECT)
    end()
    async with second.connect() as connection:
        await connection.execute(SELECT)

    assert of_statements(capfire) == ["poolkit"]
    sent = exporter.exported_spans_as_dict()
    assert [span["name"] for span in sent if "SELECT" in span["name"]] == ["SELECT"]
    assert len(events(capfire, "connection_opened")) == 1


# -- Secrets -----------------------------------------------------------------------------------


async def test_no_password_and_no_parameter_is_sent(on, capfire) -> None:
    """Not in errors either, whose detail quotes rows."""
    engine = on(pool_size=1, max_overflow=0, pool_timeout=0.01)
    async with engine.connect() as connection:
        await connection.execute(text("CREATE TEMP TABLE t (id int, name text UNIQUE)"))
        insert = text("INSERT INTO t VALUES (1, :name)")
        await connection.execute(insert, {"name": PARAMETER})
        await connection.commit()
        for statement in (insert, text("SELECT CAST(CAST(:name AS text) AS int)")):
            with pytest.raises(sqlalchemy.exc.DBAPIError, match=PARAMETER):
                await connection.execute(statement, {"name": PARAMETER})
            await connection.rollback()
        await connection.invalidate(ValueError(PARAMETER))
        await connection.execute(text(f"SELECT '{PARAMETER}'"))
        with pytest.raises(PoolTimeout):
            await engine.connect()
    await engine.dispose()

    everything = str([span.to_json() for span in capfire.exporter.exported_spans])
    everything += json.dumps(capfire.get_collected_metrics())
    everything += str([log.to_json() for log in capfire.log_exporter.get_finished_logs()])
    assert "23505" in everything
    assert PARAMETER not in everything
    assert engine.url.password
    assert engine.url.password not in everything


# -- Logfire's own configuration ---------------------------------------------------------------

SCRIPT = """
import asyncio, logging, sys
import logfire
from sqlalchemy import text
from poolkit import create_async_engine

async def main():
    logging.basicConfig(stream=sys.stdout, level="INFO", format="%(name)s: %(message)s")
    engine = create_async_engine()
    {before}
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 42"))
    {after}
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 43"))
    await engine.dispose()

asyncio.run(main())
"""


def run(server, code: str, **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LOGFIRE", "PYTEST"))}
    kept |= {"DATABASE_URL": server.url, "LOGFIRE_ENABLED": "true", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_it_is_configured_if_nobody_has(server) -> None:
    """At the first connect, without a question and without a token; it is said."""
    printed = run(server, SCRIPT.format(before="", after=""))
    assert "poolkit.telemetry: logfire.configure() had not been called" in printed
    assert printed.count("SELECT") == 2


def test_the_programs_configuration_wins(server) -> None:
    """Before the first connect, ours is not made; after it, theirs takes its place."""
    quiet = "logfire.configure(send_to_logfire=False, console=False)"
    printed = run(server, SCRIPT.format(before=quiet, after=""))
    assert (printed.count("SELECT"), "had not been called" in printed) == (0, False)
    printed = run(server, SCRIPT.format(before="", after=quiet))
    assert (printed.count("SELECT 4"), printed.count("SELECT")) == (0, 1)


def test_what_the_environment_forbids_is_not_sent(server) -> None:
    """A token that is there is not used against LOGFIRE_SEND_TO_LOGFIRE."""
    code = SCRIPT.format(
        before="", after="print('sends', logfire.DEFAULT_LOGFIRE_INSTANCE.config.send_to_logfire)"
    )
    environment = {"LOGFIRE_TOKEN": "x", "LOGFIRE_SEND_TO_LOGFIRE": "false"}
    assert "sends False" in run(server, code, **environment)


def test_a_configuration_that_fails_breaks_nothing(server, tmp_path) -> None:
    """The program has its connection, and a line that says why there is no telemetry."""
    (tmp_path / "logfire_credentials.json").write_text("nonsense")
    code = SCRIPT.format(before="", after="await engine.dispose()")
    printed = run(server, code, LOGFIRE_CREDENTIALS_DIR=str(tmp_path))
    assert printed.count("Logfire could not be configured") == 1
    assert "observer" not in printed


@pytest.mark.parametrize("missing", ["logfire", "opentelemetry"])
def test_without_the_sdk_the_error_names_the_extra(server, missing) -> None:
    """At start-up, not at the first query."""
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from poolkit import create_async_engine, ConfigurationError\n"
        "try: create_async_engine()\n"
        "except ConfigurationError as error: print(error)\n"
    )
    printed = run(server, code, PYDANTIC_DISABLE_PLUGINS="__all__")
    assert "LOGFIRE_ENABLED" in printed
    assert "'poolkit[logfire]'" in printed


def test_a_line_is_not_shown_twice(server) -> None:
    """Where logging has no handler, its last resort does not repeat what Logfire shows."""
    code = SCRIPT.replace("    logging.basicConfig", "    #").format(
        before="""
    from poolkit import CheckoutRefused, PoolOverloaded
    import logfire
    logfire.configure(send_to_logfire=False)
    engine.pool.observers.notify(CheckoutRefused(PoolOverloaded("full")))
""",
        after="",
    )
    assert run(server, code).count("checkout refused") == 1


async def test_what_logging_sends_to_logfire_is_not_sent_twice(on, capfire) -> None:
    """With Logfire's handler, the log line is the event."""
    engine = on(pool_size=1)
    handler = logfire.LogfireLoggingHandler()
    logging.getLogger("poolkit").addHandler(handler)
    try:
        engine.pool.observers.notify(CheckoutRefused(PoolOverloaded("full")))
    finally:
        logging.getLogger("poolkit").removeHandler(handler)

    (sent,) = [s for s in spans(capfire) if "checkout refused" in s["name"]]
    assert sent["attributes"]["poolkit_used"] == 0


def test_what_poolkit_writes_can_be_spared_from_redaction() -> None:
    """A table may be called sessions; what the program writes is redacted all the same."""
    exporter = TestExporter()
    instance = logfire.configure(
        local=True,
        send_to_logfire=False,
        console=False,
        scrubbing=logfire.ScrubbingOptions(callback=ours.keep_names),
        additional_span_processors=[SimpleSpanProcessor(exporter)],
    )
    instance.log("info", "x", {"db.query.summary": "SELECT sessions", "note": "my password"})

    (span,) = exporter.exported_spans
    assert span.attributes["db.query.summary"] == "SELECT sessions"
    assert span.attributes["note"].startswith("[Scrubbed")


def test_what_is_leant_on() -> None:
    """Logfire says by this whether it has been configured."""
    assert logfire.configure(local=True, send_to_logfire=False, console=False).config._initialized
    assert logfire.Logfire(config=type(logfire.DEFAULT_LOGFIRE_INSTANCE.config)())
    assert not type(logfire.DEFAULT_LOGFIRE_INSTANCE.config)()._initialized


# -- Other instrumentations --------------------------------------------------------------------


@pytest.fixture
def instrumentors(capfire) -> Iterator[None]:
    """Whatever is instrumented is so no more afterwards."""
    yield
    for instrumentor in (SQLAlchemyInstrumentor(), AsyncPGInstrumentor()):
        if instrumentor.is_instrumented_by_opentelemetry:
            instrumentor.uninstrument()
    sys.modules.pop(ours._CALLED, None)


def turn_on(which: str, engine=None) -> None:
    if which == "asyncpg":
        logfire.instrument_asyncpg()
    elif engine is None:
        logfire.instrument_sqlalchemy()
    else:
        logfire.instrument_sqlalchemy(engine)


@pytest.mark.usefixtures("instrumentors")
@pytest.mark.parametrize("when", ["before the engine", "after the engine", "after a connect"])
@pytest.mark.parametrize("which", ["sqlalchemy", "asyncpg"])
async def test_a_statement_is_one_span(on, capfire, caplog, which, when) -> None:
    """Whoever instruments first, and whichever works on these versions; and it is said."""
    if when == "before the engine":
        turn_on(which)
    engine = on()
    if when == "after a connect":
        async with engine.connect():
            pass
    if when != "before the engine":
        turn_on(which, engine)
    async with engine.connect() as one, engine.connect() as other:
        await one.execute(SELECT)
        await other.execute(SELECT)

    theirs = which == "sqlalchemy" and OLD_SQLALCHEMY
    assert of_statements(capfire) == [others.SQLALCHEMY if theirs else "poolkit"] * 2
    said = [r.getMessage() for r in caplog.records if r.name == "poolkit.telemetry"]
    assert len(said) == 1
    assert said[0].startswith(f"logfire.instrument_{which}()")
    assert ("does nothing" in said[0]) == (which == "sqlalchemy" and not OLD_SQLALCHEMY)
    assert any(said[0] in span["name"] for span in spans(capfire))


@pytest.mark.usefixtures("instrumentors")
async def test_of_nothing_instrumented_nothing_is_said(on, caplog) -> None:
    """The instrumentations may be installed, and loaded."""
    engine = on()
    async with engine.connect() as connection:
        await connection.execute(SELECT)
    await asyncio.sleep(0)

    assert [r for r in caplog.records if r.name == "poolkit.telemetry"] == []
