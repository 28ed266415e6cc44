"""An event loop in a thread of its own, driven from any other."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from poolkit.testing._moments import FaultProxyError

_T = TypeVar("_T")


class LoopThread:
    """Runs an event loop from `start()` to `stop()`.

    Attributes:
        errors: What went wrong inside, and nobody was there to be told.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self.errors: list[BaseException] = []

    def start(self) -> None:
        # Not the policy's loop: a test may have set one whose clock is virtual.
        self._loop = asyncio.SelectorEventLoop()
        self._loop.set_exception_handler(self._failed)
        self._thread = threading.Thread(target=self._run, args=(self._loop,), name=self._name)
        self._thread.daemon = True
        self._thread.start()

    def call(self, function: Callable[[], _T]) -> _T:
        """Run a function in the thread, and return when it has."""
        if threading.current_thread() is self._thread:
            return function()
        return self.run(_called(function))

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine in the thread to its end."""
        loop = self._loop
        if loop is None:
            work.close()
            raise FaultProxyError("the proxy is not running: use it inside its with block")
        future: Future[_T] = asyncio.run_coroutine_threadsafe(work, loop)
        return future.result()

    def stop(self) -> None:
        loop, thread = self._loop, self._thread
        if loop is None or thread is None:
            return
        self._loop = None
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

    def _failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, Exception) and not isinstance(error, OSError):
            self.errors.append(error)
        loop.default_exception_handler(context)

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        loop.run_forever()


async def _called(function: Callable[[], _T]) -> _T:
    return function()
