"""One FastAPI application under uvicorn: poolkit's sessions beside the usual ``get_db``."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec

import asyncpg

from benchmarks.model import Chart, Row, Section, Spread, ratios, rotated
from benchmarks.web_load import get, load
from benchmarks.web_names import AUTOCOMMIT, BARE, SESSION, SIZE, USUAL
from poolkit.testing import PostgresServer

NAMES = (SESSION, AUTOCOMMIT, USUAL, BARE)
ENDPOINTS = {"/orm/7": "ORM get", "/core/7": "Core SELECT"}
SCHEMA = """
DROP TABLE IF EXISTS items;
CREATE TABLE items (
    id integer PRIMARY KEY, name text NOT NULL, colour text NOT NULL, price integer NOT NULL,
    stock integer NOT NULL
);
INSERT INTO items SELECT n, 'item ' || n, 'green', n * 10, n FROM generate_series(1, 100) AS n;
"""
LEAST = 1.0
LEAST_OF_AUTOCOMMIT = 1.3
SHUTDOWN = 10.0
"""Seconds that a process is given to end."""


@dataclass(slots=True)
class Found:
    """For each contestant a figure for each round.

    Attributes:
        throughput: Requests a second.
        cpu: Microseconds of the server process for each request.
    """

    throughput: dict[str, list[float]] = field(default_factory=lambda: {n: [] for n in NAMES})
    cpu: dict[str, list[float]] = field(default_factory=lambda: {n: [] for n in NAMES})


async def run(server: PostgresServer, *, quick: bool) -> Section:
    """Measure, the contestants in turns, each in a process of its own."""
    if not (find_spec("fastapi") and find_spec("uvicorn")):
        return Section("A web application", "FastAPI or uvicorn is not installed.", [], [], [])
    await _create_table(server.url)
    async with AsyncExitStack() as stack:
        ports = {
            name: await stack.enter_async_context(_serving(server.url, name)) for name in NAMES
        }
        rounds, requests = (3, 100) if quick else (21, 300)
        found = await _measure(ports, rounds, requests)
    return _section(found, rounds, requests)


async def _create_table(url: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(SCHEMA)
    finally:
        await connection.close()


@asynccontextmanager
async def _serving(url: str, name: str) -> AsyncIterator[int]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.web_app", name),
        env=os.environ | {"DATABASE_URL": url, **_POOL},
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        yield int(await process.stdout.readline())
    finally:
        await _end(process)


_POOL = {"DATABASE_POOL_SIZE": str(SIZE), "DATABASE_MAX_OVERFLOW": "0"}


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
    try:
        async with asyncio.timeout(SHUTDOWN):
            await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()


async def _measure(ports: Mapping[str, int], rounds: int, requests: int) -> dict[str, Found]:
    found = {path: Found() for path in ENDPOINTS}
    for turn in range(-1, rounds):  # the first warms up and is not counted
        for path, figures in found.items():
            for name in rotated(list(ports), turn):
                port = ports[name]
                await load(port, path, clients=SIZE, requests=5 * SIZE)  # hot again
                before = await _cpu(port)
                seconds = await load(port, path, clients=SIZE, requests=requests)
                cpu = await _cpu(port) - before
                if turn >= 0:
                    figures.throughput[name].append(requests / seconds)
                    figures.cpu[name].append(cpu * 1e6 / requests)
    return found


async def _cpu(port: int) -> float:
    return float(json.loads(await get(port, "/cpu")))


# -- What was found ------------------------------------------------------------------------------


def _section(found: Mapping[str, Found], rounds: int, requests: int) -> Section:
    return Section(
        title="A web application",
        method=(
            "One FastAPI application with two endpoints, a row by `session.get` and the same by a"
            f" Core SELECT, under uvicorn ({_with_what()}) in one process for each contestant,"
            f" asked by {SIZE} clients on kept connections from another process; pools of {SIZE}."
            " `get_db` is the usual dependency: `async with sessions() as session: yield session;"
            " await session.commit()` on SQLAlchemy's own engine, with `pool_pre_ping` as tutorials"
            " have it, and without; it has no limit on any statement's time, poolkit has."
            f" {rounds} rounds of {requests} requests, the contestants in turns in every"
            " round; ratios are of neighbours in a round. CPU is the server process's for each"
            " request: the clients and PostgreSQL share the machine's cores, so that this is the"
            " figure which depends on them least."
        ),
        rows=[row for path, what in ENDPOINTS.items() for row in _rows(what, found[path])],
        header=["endpoint", "contestant", "requests a second", "/ get_db", "CPU", "CPU / get_db"],
        figures=[line for path, what in ENDPOINTS.items() for line in _lines(what, found[path])],
        charts=[
            Chart(
                "Requests a second of a FastAPI application, as a ratio to get_db",
                "ratio",
                list(ENDPOINTS.values()),
                {
                    name: [ratios(f.throughput[name], f.throughput[USUAL]) for f in found.values()]
                    for name in NAMES
                },
                line=1.0,
            )
        ],
    )


def _with_what() -> str:
    names = [name for name in ("uvloop", "httptools") if find_spec(name)]
    return f"with {' and '.join(names)}" if names else "without uvloop and httptools"


def _rows(what: str, found: Found) -> Sequence[Row]:
    return [
        _row(what, found, SESSION, USUAL, LEAST),
        _row(what, found, SESSION, BARE, None),
        _row(what, found, AUTOCOMMIT, USUAL, LEAST_OF_AUTOCOMMIT),
        _row(what, found, AUTOCOMMIT, BARE, None),
    ]


def _row(what: str, found: Found, ours: str, theirs: str, least: float | None) -> Row:
    ratio = ratios(found.throughput[ours], found.throughput[theirs])
    cpu = ratios(found.cpu[ours], found.cpu[theirs])
    return Row(
        f"requests a second of a FastAPI application, {what}: {ours} / {theirs}",
        f"{ratio.show(3)}; CPU of a request {cpu.show(3)}",
        f"{theirs}: {Spread.of(found.throughput[theirs]).show(0)}",
        "" if least is None else f"at least {least}",
        None if least is None else ratio.median >= least,
    )


def _lines(what: str, found: Found) -> list[list[str]]:
    return [
        [
            what,
            name,
            Spread.of(found.throughput[name]).show(0),
            ratios(found.throughput[name], found.throughput[USUAL]).show(3),
            Spread.of(found.cpu[name]).show(0, "us"),
            ratios(found.cpu[name], found.cpu[USUAL]).show(3),
        ]
        for name in NAMES
    ]
