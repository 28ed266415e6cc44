"""The terminal while a live view has it: single keys, signals, and everything put back after."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Self

from rich.live import Live

if sys.platform != "win32":
    import termios
    import tty

_ARROW = re.compile(rb"\x1b(?:[\[O][0-9;]*[A-Za-z~])?")  # and other keys that are no character
_KEYS = 64  # bytes at once


@contextmanager
def keys(pressed: Callable[[str], None], closed: Callable[[], None]) -> Iterator[None]:
    """Tell of each key as it is pressed, and of the terminal's end; nothing is echoed.

    Where standard input is no terminal, and on Windows, no key is told of.
    """
    if sys.platform == "win32" or not sys.stdin.isatty():
        yield
        return
    loop, descriptor = asyncio.get_running_loop(), sys.stdin.fileno()

    def read() -> None:
        try:
            found = os.read(descriptor, _KEYS)
        except OSError:  # hung up
            found = b""
        if not found:
            loop.remove_reader(descriptor)
            closed()
        for key in _ARROW.sub(b"", found).decode(errors="ignore"):
            pressed(key)

    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)
    loop.add_reader(descriptor, read)
    try:
        yield
    finally:
        loop.remove_reader(descriptor)
        with suppress(termios.error):  # hung up
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


@contextmanager
def signals(handlers: dict[str, Callable[[], None]]) -> Iterator[None]:
    """Call these at signals, by name, as far as the platform has them."""
    loop = asyncio.get_running_loop()
    with ExitStack() as ends:
        for name, handler in handlers.items():
            number = getattr(signal, name, None)
            with suppress(NotImplementedError, RuntimeError, ValueError):
                if number is not None:
                    loop.add_signal_handler(number, handler)
                    ends.callback(loop.remove_signal_handler, number)
        yield


class Screen:
    """The alternate screen, which can be left for a while."""

    def __init__(
        self, live: Live, pressed: Callable[[str], None], closed: Callable[[], None]
    ) -> None:
        self._live = live
        self._keys = (pressed, closed)
        self._taken = ExitStack()

    def __enter__(self) -> Self:
        self._taken.enter_context(keys(*self._keys))
        self._taken.enter_context(self._live)
        return self

    def __exit__(self, *_: object) -> None:
        self._taken.close()

    def suspend(self) -> None:
        """Give the terminal back until the process is continued, as for Ctrl-Z."""
        self.__exit__()
        os.kill(os.getpid(), signal.SIGSTOP)
        self.__enter__()
