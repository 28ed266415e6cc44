"""What becomes of a waiter when the connect before it fails."""

from __future__ import annotations

import asyncio
from typing import Any, NoReturn

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from benchmarks.engines import POOLKIT, STOCK
from benchmarks.fake import fake_engine
from benchmarks.model import Row, Section, Spread
from poolkit.pool import HandoffPool
from poolkit.testing import PostgresServer

SIZE = 4
CALLERS = 8
PATIENCE = 4.0
LIMIT = 0.010


class _FailingServer:
    """Refuses each connect after a while, and notes when they began and ended."""

    def __init__(self, after: float) -> None:
        self.after = after
        self.began: list[float] = []
        self.failed: list[float] = []

    async def __call__(self, *_: Any, **__: Any) -> NoReturn:
        clock = asyncio.get_running_loop().time
        self.began.append(clock())
        await asyncio.sleep(self.after)
        self.failed.append(clock())
        raise ConnectionResetError("as the benchmark wants it")

    def delays(self) -> list[float]:
        """From each failure to the connect that took its place; the first ones took nobody's."""
        first = sum(began < self.failed[0] for began in self.began)
        return [b - f for b, f in zip(self.began[first:], self.failed, strict=False)]


async def run(_: PostgresServer, *, quick: bool) -> Section:
    """Eight callers on a pool of four, all of whose connects fail."""
    found: dict[str, list[float]] = {POOLKIT: [], STOCK: []}
    idle: dict[str, int] = {POOLKIT: 0, STOCK: 0}
    after = 0.3 if quick else 1.0
    patience = 1.5 if quick else PATIENCE
    for _ in range(1 if quick else 2):
        for name, poolclass in ((POOLKIT, HandoffPool), (STOCK, None)):
            server = _FailingServer(after)
            options = {"pool_size": SIZE, "max_overflow": 0, "pool_timeout": patience}
            engine = fake_engine(poolclass, server, **options)
            await asyncio.gather(*(_caller(engine) for _ in range(CALLERS)))
            found[name] += server.delays()
            idle[name] += CALLERS - len(server.began)
            await engine.dispose()
    return _section(found, idle, after)


async def _caller(engine: AsyncEngine) -> None:
    try:
        async with engine.connect():
            pass
    except (OSError, SQLAlchemyError):
        pass


def _section(found: dict[str, list[float]], idle: dict[str, int], after: float) -> Section:
    shown = {name: _show(found[name], idle[name]) for name in found}
    ours = found[POOLKIT]
    return Section(
        title="A waiter behind a failed connect",
        method=(
            f"{CALLERS} callers on a pool of {SIZE}+0, every connect of which fails after"
            f" {after:g} s. Timed is from a failure to the connect of a waiter that takes its"
            " place."
        ),
        rows=[
            Row(
                "a waiter behind a failed connect starts its own after",
                shown[POOLKIT],
                f"{STOCK}: {shown[STOCK]}",
                f"at most {LIMIT * 1000:g} ms ({STOCK}: never)",
                bool(ours) and not idle[POOLKIT] and max(ours) <= LIMIT,
            )
        ],
        header=["contestant", "delay"],
        figures=[[name, text] for name, text in shown.items()],
    )


def _show(delays: list[float], idle: int) -> str:
    never = f"never ({idle} waiters, until their timeout)" if idle else ""
    if not delays:
        return never or "no waiter"
    spread = Spread.of([1000 * delay for delay in delays]).show(2, "ms")
    return f"{spread}, worst {1000 * max(delays):.2f}" + (f"; {never}" if never else "")
