"""Celery tasks that run async code, on one event loop for each worker process."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from celery import Celery
from celery.signals import worker_process_shutdown
from sqlalchemy import text

from poolkit import session

T = TypeVar("T")

app = Celery("tasks")
runner = asyncio.Runner()  # has a loop from the first task on: after the fork, one for each process


@worker_process_shutdown.connect
def close(**_: Any) -> None:
    """End what is left; the loop's engine is drained with it."""
    runner.close()


def run(work: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run`, and the connections stay for the next task."""
    return runner.run(work)


@app.task
def add_order(amount: int) -> int:
    """A task is sync: Celery calls it, and gets its result."""
    return run(_add_order(amount))


async def _add_order(amount: int) -> int:
    async with session() as opened:
        inserted = "INSERT INTO orders (amount) VALUES (:amount) RETURNING id"
        return int(await opened.scalar(text(inserted), {"amount": amount}) or 0)


# The rest only shows that it works.
async def make_table() -> None:
    async with session() as opened:
        await opened.execute(text("CREATE TABLE orders (id serial, amount int)"))


if __name__ == "__main__":
    run(make_table())
    print([add_order(amount) for amount in (5, 7)])
    close()
