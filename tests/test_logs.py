"""What an engine's events are to those who have no telemetry."""

import asyncio
import contextlib
import gc
import logging
import re
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import looptime
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine as sqlalchemy_create_async_engine
from sqlalchemy.pool import NullPool

from poolkit import (
    CheckedIn,
    CheckedOut,
    CheckoutRefused,
    CheckoutTimedOut,
    CloseReason,
    ConnectError,
    ConnectionClosed,
    ConnectionInvalidated,
    ConnectionLost,
    ConnectionOpened,
    ConnectionOpenFailed,
    FaultKind,
    HandoffPool,
    LongHolder,
    LongHolderReturned,
    OverloadBegan,
    OverloadEnded,
    PoolDraining,
    PoolOverloaded,
    PoolTimeout,
    SerializationFailure,
    TransactionRetried,
    drain,
    logs,
    observe,
    run_in_transaction,
)
from poolkit.errors import Attempt, AuthenticationFailed, PasswordUnavailable
from poolkit.reports import Report
from poolkit.testing import FaultProxy

STATE = {"used", "idle", "opening", "waiting", "limit", "longest_use"}
FAILED = {"error", "error_type", "sqlstate"}
PASSWORD = "hunter2-is-a-password"
PARAMETER = "a-parameter-that-nobody-may-see"


@pytest.fixture(autouse=True)
def _everything(caplog) -> None:
    caplog.set_level(logging.DEBUG, "poolkit")


def told(caplog, event: str) -> list[logging.LogRecord]:
    return [r for r in caplog.records if getattr(r, "poolkit_event", None) == event]


def extras(record: logging.LogRecord) -> set[str]:
    names = {name for name in vars(record) if name.startswith("poolkit_")}
    return {name.removeprefix("poolkit_") for name in names} - {"event", "pool"}


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


# -- The lines ---------------------------------------------------------------------------------


async def test_a_pool_timeout_is_an_error_with_the_pools_state(make_engine, server, caplog) -> None:
    """Alerts need no parsing; the caller that timed out counts as waiting, as in its error."""
    engine = make_engine(
        settings={"url": server.url, "pool_size": 1, "max_overflow": 0, "pool_timeout": 0.05}
    )
    async with engine.connect():
        with pytest.raises(PoolTimeout) as caught:
            await engine.connect()

    (record,) = told(caplog, "checkout_timed_out")
    assert (record.name, record.levelname) == ("poolkit.pool", "ERROR")
    assert extras(record) == {"waited", "held_back"} | STATE | FAILED
    state = [getattr(record, f"poolkit_{name}") for name in ("used", "idle", "opening", "waiting")]
    assert state == [1, 0, 0, 1]
    assert record.poolkit_limit == 1
    assert record.poolkit_longest_use >= 0.05
    assert record.poolkit_error == caught.value.args[0]
    assert record.getMessage().startswith("checkout timed out after 0.1 s: used 1 of 1, idle 0,")


async def test_an_unlimited_pool_has_no_limit_in_its_lines(engine, caplog) -> None:
    """Its number is not there, and in JSON it is null."""
    state = {"used": 2, "idle": 0, "opening": 0, "waiting": 1, "limit": None, "longest_use": 0.0}
    event = CheckoutTimedOut(0.5, PoolTimeout("full"))

    logs.reports.of_pool(event, "db", state).write()

    assert "used 2, idle 0" in caplog.records[-1].getMessage()


@pytest.mark.parametrize("draining", [False, True])
async def test_a_refusal_is_a_warning(make_engine, server, caplog, draining) -> None:
    """It says whether the line is too long or the service is on its way out."""
    engine = make_engine(
        settings={"url": server.url, "pool_size": 1, "max_overflow": 0, "pool_max_waiting": 1}
    )
    if draining:
        await drain(engine, 0)
        with pytest.raises(PoolDraining):
            await engine.connect()
    else:
        async with engine.connect():
            first = asyncio.ensure_future(engine.connect().__aenter__())
            await until(lambda: engine.pool.stats().waiting == 1)
            with pytest.raises(PoolOverloaded):
                await engine.connect()
        await (await first).close()

    (record,) = told(caplog, "checkout_refused")
    assert (record.name, record.levelname) == ("poolkit.pool", "WARNING")
    assert extras(record) == {"kind", "held_back"} | STATE | FAILED
    assert record.poolkit_kind == ("pool_draining" if draining else "pool_overloaded")


async def test_overload_has_a_beginning_and_an_end(make_engine, server, caplog) -> None:
    """The first is a warning, the second is not."""
    engine = make_engine(
        settings={
            "url": server.url,
            "pool_size": 1,
            "max_overflow": 0,
            "pool_overload_after": 0.02,
        }
    )
    async with engine.connect():
        waiting = [asyncio.ensure_future(engine.connect().__aenter__()) for _ in range(2)]
        await until(lambda: engine.pool.stats().waiting == 2)
        await asyncio.sleep(0.05)
    while waiting:
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for each in done:
            waiting.remove(each)
            await each.result().close()

    (began,), (ended,) = told(caplog, "overload_began"), told(caplog, "overload_ended")
    assert (began.name, began.levelname, ended.levelname) == ("poolkit.pool", "WARNING", "INFO")
    assert extras(began) == {"held_back"} | STATE
    assert extras(ended) == {"lasted", "held_back"} | STATE


async def test_a_failed_connect_is_an_error_and_the_next_one_a_recovery(
    make_engine, server, caplog
) -> None:
    """The recovery says how long it took and how many connects failed."""
    with FaultProxy(server) as proxy:
        engine = make_engine(
            settings={"url": f"{proxy.url}?sslmode=disable", "connection_timeout": 0.2}
        )
        proxy.refuse()
        with pytest.raises(ConnectError) as caught:
            await engine.connect()
        proxy.accept()
        async with engine.connect():
            pass
        await engine.dispose()

    (failed,), (recovered,) = told(caplog, "connect_failed"), told(caplog, "connect_recovered")
    (opened,) = told(caplog, "connection_opened")
    assert {r.name for r in (failed, recovered, opened)} == {"poolkit.connect"}
    levels = [r.levelname for r in (failed, recovered, opened)]
    assert levels == ["ERROR", "INFO", "DEBUG"]
    assert failed.getMessage() == caught.value.args[0]
    assert extras(failed) == {"kind", "address", "duration", "attempts", "held_back"} | FAILED
    assert extras(recovered) == {"address", "failures", "lasted", "held_back"}
    assert extras(opened) == {"address", "duration", "attempts", "pooler"}
    assert (failed.poolkit_kind, recovered.poolkit_failures) == ("connect_refused", 1)
    assert recovered.poolkit_lasted < 10


async def test_a_pool_that_is_not_poolkits_has_its_connects_logged(
    make_engine, server, caplog
) -> None:
    """The connect is poolkit's all the same."""
    engine = make_engine(settings={"url": server.url}, poolclass=NullPool)
    async with engine.connect():
        pass

    (opened,) = told(caplog, "connection_opened")
    assert opened.poolkit_pool.endswith(f"/{engine.url.database}")


async def test_a_lost_connection_is_a_warning(make_engine, server, caplog) -> None:
    """It says how the server ended it; a close that is meant is for those who debug."""
    engine = make_engine(settings={"url": server.url, "pool_name": "main"})
    other = make_engine(settings={"url": server.url})
    async with engine.connect() as connection:
        pid = await connection.scalar(text("SELECT pg_backend_pid()"))
        async with other.connect() as killer:
            await killer.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
        with pytest.raises(ConnectionLost):
            await connection.execute(text("SELECT 1"))
    await engine.dispose()
    await other.dispose()

    (lost,) = told(caplog, "connection_lost")
    assert (lost.name, lost.levelname) == ("poolkit.connections", "WARNING")
    assert extras(lost) == {"kind", "age", "held_back"} | FAILED
    assert (lost.poolkit_kind, lost.poolkit_pool) == ("lost", "main")
    assert lost.getMessage().startswith("connection lost after 0.")
    (closed,) = told(caplog, "connection_closed")
    assert (closed.name, closed.levelname) == ("poolkit.connections", "DEBUG")
    assert extras(closed) == {"kind", "age"} | FAILED
    assert closed.poolkit_kind == "disposed"


async def test_a_cancelled_caller_is_no_fault_of_the_servers(make_engine, server, caplog) -> None:
    """Its connection is dropped, which is worth no warning."""
    engine = make_engine(settings={"url": server.url})
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.2), engine.connect() as connection:
            await connection.execute(text("SELECT pg_sleep(30)"))

    (lost,) = told(caplog, "connection_lost")
    assert (lost.levelname, lost.poolkit_kind) == ("INFO", "invalidated")


async def test_a_retry_is_logged_once(engine, caplog) -> None:
    """By those who retry, whatever the engine is."""

    async def work(connection) -> None:
        if not told(caplog, "transaction_retried"):
            await connection.execute(
                text("DO $$ BEGIN RAISE EXCEPTION 'made up' USING ERRCODE = '40001'; END $$")
            )

    await run_in_transaction(engine, work)

    (record,) = told(caplog, "transaction_retried")
    assert (record.name, record.levelname) == ("poolkit.transactions", "INFO")
    assert extras(record) == {"attempt", "pause", "kind"} | FAILED


async def test_long_holders_are_logged_for_every_handoff_pool(server, caplog) -> None:
    """The setting asks for it, with SQLAlchemy's own engine too."""
    engine = sqlalchemy_create_async_engine(
        server.url.replace("postgresql://", "postgresql+asyncpg://"),
        poolclass=HandoffPool,
        leak_threshold=0.05,
        pool_name="plain",
    )
    async with engine.connect():
        await until(lambda: told(caplog, "long_holder"))
    await engine.dispose()

    (held,), (back,) = told(caplog, "long_holder"), told(caplog, "long_holder_returned")
    assert {(r.name, r.levelname) for r in (held, back)} == {("poolkit.pool", "WARNING")}
    assert extras(held) == {"held", "task", "stack"}
    assert extras(back) == {"held", "task"}
    assert (held.poolkit_pool, "until" in held.poolkit_stack) == ("plain", True)


async def test_long_holders_are_logged_once_by_the_factorys_engine(
    make_engine, server, caplog
) -> None:
    """The observer leaves them to the pool."""
    engine = make_engine(settings={"url": server.url, "leak_threshold": 0.05})
    async with engine.connect():
        await until(lambda: told(caplog, "long_holder"))

    (held,) = told(caplog, "long_holder")
    assert held.poolkit_pool.endswith(f"/{engine.url.database}")
    assert len(told(caplog, "long_holder_returned")) == 1


async def test_the_reference_is_true(engine) -> None:
    """Each line's logger, level and fields are as its page says, and no line is left out."""
    written: list[Report] = []
    told_of = logs.Reporter(engine.sync_engine, written.append)
    error = PoolOverloaded("full")
    for event in (
        CheckoutTimedOut(1.0, error),
        CheckoutRefused(error),
        OverloadBegan(1),
        OverloadEnded(1.0),
        LongHolder(1.0, "task", "stack"),
        LongHolderReturned(1.0, "task"),
        refused(),
        ConnectionOpened("db:5432", 1.0, 1, "none"),
        ConnectionClosed(CloseReason.LOST, 1.0),
        ConnectionClosed(CloseReason.IDLE, 1.0),
        TransactionRetried(1, 0.1, FaultKind.DEADLOCK, error),
    ):
        told_of(event)

    real = {
        (r.event, r.logger, logging.getLevelName(r.level)): set(r.values) - {"pool"}
        for r in written
    }
    assert real == documented()


def documented() -> dict[tuple[str, str, str], set[str]]:
    page = (Path(__file__).parents[1] / "docs" / "reference" / "logs.md").read_text()
    found = {}
    for row in re.findall(r"^\| `(\w+)` \| `([\w.]+)` \| ([A-Z]+) \| (.+) \|$", page, re.MULTILINE):
        event, logger, level, besides = row
        names = {name.strip("` ") for name in besides.split(",")}
        names |= STATE if "state" in names else set()
        names |= FAILED if "error" in names else set()
        found[event, logger, level] = names - {"state"}
    return found


# -- What it costs, and leaves alone -----------------------------------------------------------


async def test_a_checkout_makes_no_event_for_the_logs(engine) -> None:
    """Hot checkouts stay free."""
    observers = engine.pool.observers
    assert (observers.wanting(CheckedOut), observers.wanting(CheckedIn)) == ([], [])
    assert len(observers.wanting(CheckoutTimedOut)) == 1


async def test_the_engine_is_not_kept_alive() -> None:
    """Nor is the reporter, by the timer of what it holds back."""
    engine = create_engine("postgresql+psycopg://h/db")
    reporter = logs.Reporter(engine, Report.write)
    reporter(refused())
    gone = weakref.ref(engine), weakref.ref(reporter)
    del engine
    gc.collect()
    assert gone[0]() is None
    del reporter
    gc.collect()
    assert gone[1]() is None


def test_nothing_is_printed_and_no_handler_installed_at_import() -> None:
    """What to do with the lines is the program's to say."""
    code = (
        "import logging, poolkit; print([name for name, each in"
        " logging.root.manager.loggerDict.items() if name.startswith('poolkit')"
        " and getattr(each, 'handlers', [])], logging.root.handlers)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert (printed.stdout.strip(), printed.stderr) == ("[] []", "")


# -- Secrets -----------------------------------------------------------------------------------


def refused(error: Exception | None = None) -> ConnectionOpenFailed:
    error = error or ConnectError(Attempt("db:5432", 3, 1.0), OSError("no"))
    return ConnectionOpenFailed("db:5432", 1.0, 3, error)


def secret_errors() -> Iterator[Exception]:
    """Errors as the driver raises them, with values of the program's in their text."""
    for kind in (asyncpg.UniqueViolationError, asyncpg.SerializationError):
        error = kind(f"the value {PARAMETER}")
        error.detail = f"Key (email)=({PARAMETER}) already exists."
        yield error
    yield asyncpg.DataError(f"invalid input for query argument $1: {PARAMETER!r}")
    yield ValueError(PARAMETER)


@pytest.mark.parametrize("error", list(secret_errors()), ids=lambda error: type(error).__name__)
def test_no_parameter_is_logged(error, caplog) -> None:
    """An error's own words are told only where they can hold none."""
    wrapped = SerializationFailure(f"SELECT {PARAMETER}", {"x": PARAMETER}, error)
    reporter = logs.Reporter(create_engine("postgresql+psycopg://h/db"), Report.write)
    for each in (error, wrapped):
        reporter(ConnectionInvalidated(each))
        reporter(ConnectionClosed(CloseReason.INVALIDATED, 1.0))
        reporter(TransactionRetried(1, 0.1, FaultKind.SERIALIZATION_FAILURE, each))
        reporter(refused(each))

    assert len(caplog.records) >= 4
    assert all(PARAMETER not in str(vars(record)) for record in caplog.records)
    assert any(type(error).__name__ in record.getMessage() for record in caplog.records)


async def test_no_password_is_logged(make_engine, server, caplog) -> None:
    """Not the URL's, and nothing that a callable says when it fails."""

    def password() -> str:
        raise RuntimeError(PASSWORD)

    engine = make_engine(server.url, password=password)
    with pytest.raises(PasswordUnavailable):
        await engine.connect()
    engine = make_engine(server.url, password=PASSWORD)
    with pytest.raises(AuthenticationFailed):
        await engine.connect()
    engine = make_engine(server.url)
    async with engine.connect():
        pass

    assert [r.poolkit_kind for r in told(caplog, "connect_failed")] == [
        "connect_failed",
        "authentication_failed",
    ]
    assert all(engine.url.password not in str(vars(record)) for record in caplog.records)
    assert all(PASSWORD not in str(vars(record)) for record in caplog.records)


async def test_what_a_password_callable_says_is_in_no_message(make_engine, server) -> None:
    """Nor in that of callers who then wait in vain, which has the last connect's error."""

    def password() -> str:
        raise RuntimeError(PASSWORD)

    engine = make_engine(server.url, password=password)
    with pytest.raises(PasswordUnavailable):
        await engine.connect()

    message = engine.pool._describe("connection timed out")
    assert message.endswith("last connect error: the password callable raised RuntimeError)")


# -- Repetitions -------------------------------------------------------------------------------


def on_virtual_time(main) -> None:
    loop = looptime.patch_event_loop(asyncio.new_event_loop())
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(main())


def reporter(**settings) -> tuple[logs.Reporter, list[tuple[float, Report]]]:
    """A reporter, and what it reports when."""
    written: list[tuple[float, Report]] = []

    def write(report: Report) -> None:
        report.write()
        written.append((round(logs._now(), 1), report))

    engine = create_engine("postgresql+psycopg://h/db")
    made = logs.Reporter(engine, write, **settings)
    made.engine = engine  # kept for the test
    return made, written


def test_a_storm_is_one_line_at_once_and_one_in_each_interval() -> None:
    """No count is lost: the line at the storm's end stands for all that were held back."""
    made, written = reporter(interval=10)

    async def storm() -> None:
        for _ in range(25):  # one a second
            made(refused())
            await asyncio.sleep(1)
        await asyncio.sleep(100)
        made(refused())

    on_virtual_time(storm)

    began = written[0][0]
    shown = [(at - began, report.values["held_back"]) for at, report in written]
    assert [held_back for _, held_back in shown] == [0, 8, 9, 4, 0]
    assert [round(at) for at, _ in shown] == [0, 10, 20, 30, 125]
    messages = [report.message % report.values for _, report in written[:2]]
    assert messages[1] == f"{messages[0]} (and 8 more since the last such line)"


def test_other_faults_are_not_held_back_with_it() -> None:
    """Each kind has its own first line."""
    made, written = reporter()

    async def several() -> None:
        made(refused())
        made(refused(AuthenticationFailed(Attempt("db:5432", 1, 0.1), OSError("no"))))
        made(ConnectionClosed(CloseReason.LOST, 1.0))
        made(ConnectionClosed(CloseReason.GARBAGE_COLLECTED, 1.0))

    on_virtual_time(several)

    assert len(written) == 4


def test_what_cannot_storm_is_not_held_back() -> None:
    """Lines for those who debug are complete, and so is every long holder's stack."""
    made, written = reporter()

    async def several() -> None:
        for _ in range(3):
            made(ConnectionOpened("db:5432", 0.1, 1, "none"))
            made(ConnectionClosed(CloseReason.IDLE, 1.0))
            made(LongHolder(1.0, "task", "stack"))
            made(LongHolderReturned(1.0, "task"))

    on_virtual_time(several)

    assert len(written) == 12


def test_without_an_event_loop_the_next_line_has_the_count(monkeypatch) -> None:
    """As in the garbage collector's thread, or after the loop that was to end the interval."""
    made, written = reporter(interval=10)
    now = 0.0
    monkeypatch.setattr(logs.time, "monotonic", lambda: now)
    for _ in range(4):
        made(ConnectionClosed(CloseReason.GARBAGE_COLLECTED, 1.0))
    now = 11.0
    made(ConnectionClosed(CloseReason.GARBAGE_COLLECTED, 1.0))

    assert [report.values["held_back"] for _, report in written] == [0, 3]


async def test_two_engines_do_not_hold_back_each_others_lines(make_engine, server, caplog) -> None:
    """Each has its own first line, under its own name."""
    for name in ("one", "two"):
        engine = make_engine(
            settings={"url": server.url, "pool_name": name, "pool_size": 1}, max_overflow=0
        )
        async with engine.connect():
            engine.pool._timeout = 0
            for _ in range(2):
                with pytest.raises(PoolTimeout):
                    await engine.connect()

    assert [r.poolkit_pool for r in told(caplog, "checkout_timed_out")] == ["one", "two"]


async def test_an_observer_that_ends_its_watch_leaves_the_logs_on(engine, caplog) -> None:
    """They are one observer among others."""
    observe(engine, lambda event: None)()
    engine.pool.observers.notify(CheckoutRefused(PoolOverloaded("full")))

    assert len(told(caplog, "checkout_refused")) == 1
