"""What is to be done before an event loop ends."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import Any


def before_end(work: Callable[[], Awaitable[None]]) -> AsyncGenerator[None, None]:
    """Have the running event loop do something when it shuts down its asynchronous generators.

    ``asyncio.run``, ``asyncio.Runner`` and the runners of pytest's plugins have it do that before
    they close it; a bare ``loop.close()`` does not.

    Args:
        work: A coroutine function, called once.

    Returns:
        A generator. It must be kept, the loop does not; ``aclose()`` does the work now.
    """
    generator = _waiting(work)
    first: Any = generator.__anext__()
    with suppress(StopIteration):
        first.send(None)  # begun, so that the loop has to end it
    return generator


async def _waiting(work: Callable[[], Awaitable[None]]) -> AsyncGenerator[None, None]:
    try:
        yield
    finally:
        await work()
