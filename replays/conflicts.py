"""Deadlocks and serialization conflicts: eight workers who are in each other's way."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from functools import partial

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from poolkit import Event, TransactionRetried, observe, run_in_transaction
from poolkit.testing import PostgresServer
from replays.engines import POOLKIT, make_engine
from replays.ledger import Ground, Ledger
from replays.model import Recorder, Timeline

TITLE = "Deadlocks and serialization conflicts"
STORY = """\
Eight workers do a thousand units of work on four accounts. Half of the units move money between two
accounts and lock them in whichever order they come, so that some wait for each other; the other
half read a balance and write it back at SERIALIZABLE. PostgreSQL ends one of those who are in each
other's way and expects the program to do the work again.

`run_in_transaction` does: the whole unit, in a fresh transaction, after a pause of random length.
Each unit must have been done exactly once. The recipe does each unit once and reports the error,
as code does that has no retries.
"""
UNITS, WORKERS, ACCOUNTS = 1000, 8, 4
START = 1000
IN_BETWEEN = 0.002
"""Seconds that the program has something else to do, with a lock in its hand."""
ATTEMPTS = 20

SERIALIZABLE = "SERIALIZABLE"

AGAIN = "units done again, by kind of fault"
MOST = "attempts at one unit at most"
DONE = "units done exactly once"
SUM = "money that appeared or vanished"
COUNTED = "read-modify-writes lost"
DISAGREE = "units that contradict what was reported"

Unit = Callable[[AsyncConnection], Awaitable[None]]
Doer = Callable[[AsyncEngine, Unit, str | None], Awaitable[None]]


async def run(
    server: PostgresServer,
    contestant: str,
    *,
    patience: float = 60.0,
    units: int = UNITS,
    seed: int = 11,
) -> Timeline:
    """Replay it."""
    ground = await _prepared(server)
    engine = make_engine(contestant, ground.url)
    retried, begun, ledger = Counter[str](), Counter[int](), Ledger()
    if contestant == POOLKIT:
        observe(engine, partial(_count, retried))
    recorder = Recorder(contestant, patience)
    do = _again_if_need_be if contestant == POOLKIT else _once
    work = iter(_units(units, seed, ledger, begun))
    workers = (_work(recorder, engine, ledger, do, work) for _ in range(WORKERS))
    await asyncio.gather(*workers)
    await engine.dispose()
    await _find(recorder.timeline, ground, ledger, retried, begun)
    return recorder.timeline


async def _prepared(server: PostgresServer) -> Ground:
    ground = await Ground.make(server)
    await ground.execute(
        "CREATE TABLE accounts (id int PRIMARY KEY, balance int NOT NULL, counted int NOT NULL)"
    )
    await ground.execute(
        "INSERT INTO accounts SELECT n, $1, 0 FROM generate_series(1, $2) n", START, ACCOUNTS
    )
    # A second as it comes: how long a wait for a lock lasts before the server looks.
    await ground.execute(f"ALTER DATABASE {ground.name} SET deadlock_timeout = '20ms'")
    return ground


def _count(retried: Counter[str], event: Event) -> None:
    if isinstance(event, TransactionRetried):
        retried[str(event.kind)] += 1


def _units(
    many: int, seed: int, ledger: Ledger, begun: Counter[int]
) -> Iterator[tuple[int, Unit, str | None]]:
    chance = random.Random(seed)
    for number in range(many):
        row = ledger.new_row()
        one, other = chance.sample(range(1, ACCOUNTS + 1), 2)
        if number % 2:
            yield row, partial(_count_up, begun, row, one), SERIALIZABLE
        else:
            yield row, partial(_move, begun, row, one, other), None


async def _work(
    recorder: Recorder,
    engine: AsyncEngine,
    ledger: Ledger,
    do: Doer,
    units: Iterator[tuple[int, Unit, str | None]],
) -> None:
    for row, unit, level in units:
        await recorder.request(partial(_reported, ledger, row, partial(do, engine, unit, level)))


async def _reported(ledger: Ledger, row: int, do: Callable[[], Awaitable[None]]) -> None:
    try:
        await do()
    except BaseException as error:
        ledger.failed(row, error)
        raise
    ledger.committed(row)


async def _again_if_need_be(engine: AsyncEngine, unit: Unit, level: str | None) -> None:
    await run_in_transaction(engine, unit, isolation_level=level, attempts=ATTEMPTS)  # type: ignore[arg-type]


async def _once(engine: AsyncEngine, unit: Unit, level: str | None) -> None:
    async with engine.connect() as connection:
        if level is not None:
            await connection.execution_options(isolation_level=level)
        async with connection.begin():
            await unit(connection)


_ADD = text("UPDATE accounts SET balance = balance + :amount WHERE id = :id")
_READ = text("SELECT counted FROM accounts WHERE id = :id")
_WRITE = text("UPDATE accounts SET counted = :counted WHERE id = :id")
_NOTE = text("INSERT INTO written VALUES (:row)")


async def _move(
    begun: Counter[int], row: int, one: int, other: int, connection: AsyncConnection
) -> None:
    begun[row] += 1
    await connection.execute(_ADD, {"id": one, "amount": -1})
    await asyncio.sleep(IN_BETWEEN)
    await connection.execute(_ADD, {"id": other, "amount": 1})
    await connection.execute(_NOTE, {"row": row})


async def _count_up(begun: Counter[int], row: int, one: int, connection: AsyncConnection) -> None:
    begun[row] += 1
    counted = (await connection.execute(_READ, {"id": one})).scalar_one()
    await connection.execute(_WRITE, {"id": one, "counted": counted + 1})
    await connection.execute(_NOTE, {"row": row})


async def _find(
    timeline: Timeline,
    ground: Ground,
    ledger: Ledger,
    retried: Counter[str],
    begun: Counter[int],
) -> None:
    rows = await ground.rows()
    ((balance, counted),) = await ground.fetch("SELECT sum(balance), sum(counted) FROM accounts")
    counting = sum(times for row, times in rows.items() if row % 2 == 0)
    timeline.findings |= {
        AGAIN: ", ".join(f"{many} {kind}" for kind, many in retried.most_common()) or "none",
        MOST: str(max(begun.values())),
        DONE: f"{sum(times == 1 for times in rows.values())} of {len(begun)}",
        SUM: str(balance - START * ACCOUNTS),
        COUNTED: str(counting - counted),
        DISAGREE: ledger.disagreements(rows),
    }
