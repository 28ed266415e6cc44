"""LISTEN that outlives restarts and half-open sockets, and misses nothing."""

import asyncio
import logging
import random
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress

import asyncpg
from sqlalchemy import text

from poolkit import DatabaseSettings, classify, connect_kwargs, session

HEARTBEAT = 10.0  # seconds of silence until the server is asked whether it is there
PATIENCE = 5.0  # seconds that its answer may take
MOST_WAITING = 1000  # payloads; beyond that, what is in the table counts
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 30.0  # seconds before another attempt, at random up to these

log = logging.getLogger(__name__)


async def listen(
    channel: str,
    handle: Callable[[str], Awaitable[None]],
    catch_up: Callable[[], Awaitable[None]],
) -> None:
    """Until cancelled, handle each payload; after each connect, catch up on what was missed."""
    limit = FIRST_PAUSE
    while True:
        try:
            connection = await asyncpg.connect(**connect_kwargs(DatabaseSettings()))
            try:
                payloads = await subscribe(connection, channel)
                await catch_up()  # after LISTEN, so that nothing falls between the two
                limit = FIRST_PAUSE
                while True:
                    await handle(await next_of(payloads, connection))
            finally:
                connection.terminate()  # waits for nobody
        except Exception as error:
            if not passes(error):
                raise
            log.warning("the listener on %s was cut off: %s", channel, type(error).__name__)
        await asyncio.sleep(random.uniform(0, limit))  # noqa: S311 (no secret)
        limit = min(2 * limit, LONGEST_PAUSE)


def passes(error: Exception) -> bool:
    """Whether another attempt may mend it; a wrong password and a bug in the handler stay."""
    fault = classify(error)
    ours = isinstance(error, ConnectionError | TimeoutError)
    return ours or fault.retryable or fault.connection_lost


async def subscribe(connection: asyncpg.Connection, channel: str) -> asyncio.Queue[str | None]:
    """Send LISTEN; the payloads come into the queue, and None when the connection has ended."""
    payloads: asyncio.Queue[str | None] = asyncio.Queue()

    def notified(_connection: object, _pid: int, _channel: str, payload: object) -> None:
        if payloads.qsize() < MOST_WAITING:
            payloads.put_nowait(str(payload))
        else:  # they come faster than they are handled: begin again, by catching up
            connection.terminate()

    connection.add_termination_listener(lambda _: payloads.put_nowait(None))
    await connection.add_listener(channel, notified)
    return payloads


async def next_of(payloads: asyncio.Queue[str | None], connection: asyncpg.Connection) -> str:
    """The next payload, however long it takes, from a server that is there."""
    while True:
        try:
            payload = await asyncio.wait_for(payloads.get(), HEARTBEAT)
        except TimeoutError:
            if not connection.is_closed():  # else the queue says so next
                await connection.execute("SELECT 1", timeout=PATIENCE)
            continue
        if payload is None:
            raise ConnectionError("the connection has ended")
        return payload


async def do_job(number: str) -> None:
    """Once, however often it is announced and however many listeners there are."""
    async with session() as opened:
        undone = "SELECT what FROM jobs WHERE id = :id AND NOT done FOR UPDATE SKIP LOCKED"
        what = await opened.scalar(text(undone), {"id": int(number)})
        if what is not None:
            print("doing", what)
            await opened.execute(
                text("UPDATE jobs SET done = true WHERE id = :id"), {"id": int(number)}
            )


async def do_what_was_missed() -> None:
    """Everything that is not done, announced or not."""
    async with session() as opened:
        numbers = await opened.scalars(text("SELECT id FROM jobs WHERE NOT done ORDER BY id"))
    for number in numbers:
        await do_job(str(number))


async def main() -> None:
    """A worker process, until SIGTERM."""
    listening = asyncio.ensure_future(listen("jobs", do_job, do_what_was_missed))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, listening.cancel)
    with suppress(asyncio.CancelledError):
        await listening


# The rest only shows that it works.
async def show() -> None:
    """A job from before there was a listener, and one that is announced."""
    async with session() as opened:
        await opened.execute(
            text("CREATE TABLE jobs (id serial, what text, done boolean DEFAULT false)")
        )
        await opened.execute(text("INSERT INTO jobs (what) VALUES ('what was missed')"))
    worker = asyncio.create_task(main())
    await until("SELECT count(*) = 1 FROM jobs WHERE done")
    async with session() as opened:
        await opened.execute(
            text(
                "WITH job AS (INSERT INTO jobs (what) VALUES ('what was announced') RETURNING id)"
                " SELECT pg_notify('jobs', id::text) FROM job"
            )
        )
    await until("SELECT count(*) = 2 FROM jobs WHERE done")
    worker.cancel()
    await worker


async def until(asked: str) -> None:
    async with session() as opened:
        while not await opened.scalar(text(asked)):  # noqa: ASYNC110 (it happens at the server)
            await asyncio.sleep(0.02)


if __name__ == "__main__":
    asyncio.run(show())
