"""Several worker processes behind one port: whichever is asked for the metrics asks the others.

Each worker has a number, the lowest that is free: it holds a lock on ``worker-N.lock``, which the
kernel frees when the process ends, so numbers are reused and series stay few. It answers on the
Unix socket ``worker-N.sock``, from a thread, so that a blocked event loop does not hide it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import selectors
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from pathlib import Path

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily

from poolkit.errors import ConfigurationError
from poolkit.telemetry.families import Collect, ForkSafeLock, decode, encode, merge

if sys.platform != "win32":
    import fcntl

VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
LABEL = "worker"
PATIENCE = 1.0
"""Seconds that a worker may take to answer another."""

_log = logging.getLogger("poolkit.telemetry")
_SOCKET = re.compile(r"worker-(\d+)\.sock")
_LONGEST_PATH = 103  # bytes of a Unix socket's path: Linux takes 107, others 103
_CHUNK = 1 << 16

_changing = ForkSafeLock()


class Workers:
    """The worker processes that share a directory, seen from one of them.

    Args:
        directory: Where they meet; one for each service.
        local: Collects the metrics of this process.
    """

    def __init__(self, directory: Path, local: Collect) -> None:
        self._directory = directory
        self._local = local
        self._seat: _Seat | None = None
        self._wanted = False
        self._serving = False
        _everyone.add(self)

    @property
    def number(self) -> int | None:
        """This process' own; None before it joins."""
        return None if self._seat is None else self._seat.number

    def join(self, *, serving: bool = False) -> None:
        """Become one of the workers, unless this process is one already.

        Args:
            serving: Whether this process is seen to serve requests: it is no mere parent of those
                that do.

        Raises:
            ConfigurationError: The directory cannot be used.
        """
        with _changing:
            self._wanted = True
            self._serving = self._serving or serving
            if self._seat is None:
                self._seat = _Seat(self._directory, self._answer)
                self._seat.start()

    def leave(self) -> None:
        """Give the number back."""
        with _changing:
            if self._seat is not None:
                self._seat.end()
                self._seat = None

    def collect(self) -> list[Metric]:
        """All workers' metrics, each sample with its worker's number; asks all others at once."""
        own, deadline = self.number, time.monotonic() + PATIENCE
        numbers = [number for number in self._numbers() if number != own]
        answers: dict[int, list[Metric]] = {}
        with ThreadPoolExecutor(max(1, len(numbers)), "poolkit-ask") as threads:
            asked = {n: threads.submit(self._ask, n, deadline) for n in numbers}
            if own is not None:
                answers[own] = list(self._local())
        answers |= {n: a for n, future in asked.items() if (a := _result(future)) is not None}
        unanswered = sum(self._is_running(n) for n in numbers if n not in answers)
        by_worker = [({LABEL: str(n)}, answers[n]) for n in sorted(answers)]
        return merge([*by_worker, ({}, _about(len(answers), unanswered))])

    def before_fork(self) -> None:
        """Leave no thread that holds a lock, or that Python would warn of."""
        if self._seat is not None:
            self._seat.pause()

    def after_fork_in_parent(self) -> None:
        """Go on, unless this process only makes the workers, as gunicorn's master does."""
        if self._seat is None:
            return
        if self._serving or not _before_any_loop():
            self._seat.start()
        else:
            self.leave()

    def after_fork_in_child(self) -> None:
        """Be a worker of its own."""
        if self._seat is not None:
            self._seat.forget()
        self._seat, self._serving = None, False
        if self._wanted:
            try:
                self.join()
            except (ConfigurationError, OSError):
                _log.exception("this worker's metrics cannot be had from the others")

    def _answer(self) -> bytes:
        return encode(self._local())

    def _numbers(self) -> list[int]:
        names = (_SOCKET.fullmatch(path.name) for path in self._directory.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def _ask(self, number: int, deadline: float) -> list[Metric]:
        path = _socket_path(self._directory, number)
        if path.stat().st_uid not in {os.geteuid(), self._directory.stat().st_uid}:
            raise PermissionError(f"{path} is another user's")
        with socket.socket(socket.AF_UNIX) as asking:
            asking.settimeout(_left(deadline))
            asking.connect(str(path))
            return decode(b"".join(_chunks(asking, deadline)))

    def _is_running(self, number: int) -> bool:
        """Whether the worker is still there; what a dead one has left behind is removed."""
        held = hold(_lock_path(self._directory, number))
        if held is None:
            return True
        _socket_path(self._directory, number).unlink(missing_ok=True)
        os.close(held)
        return False


class _Seat:
    """A number, and the socket and the thread that answer for it."""

    def __init__(self, directory: Path, answer: Callable[[], bytes]) -> None:
        self._answer = answer
        prepare(directory)
        self.number, self._lock = _take_number(directory)
        try:
            self._path = _socket_path(directory, self.number)
            self._socket = _listen(self._path)
        except BaseException:
            os.close(self._lock)
            raise
        self._wake, self._woken = socket.socketpair()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._serve, name="poolkit-worker", daemon=True)
        self._thread.start()

    def pause(self) -> None:
        """Stop the thread; who asks meanwhile waits in line."""
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            self._wake.send(b".")
            thread.join(2 * PATIENCE)

    def end(self) -> None:
        """Give the number back; the socket goes first, while it is still ours."""
        self.pause()
        self._path.unlink(missing_ok=True)
        self.forget()

    def forget(self) -> None:
        """Close what a forked child has inherited; its parent keeps all of it."""
        for inherited in (self._socket, self._wake, self._woken):
            inherited.close()
        os.close(self._lock)

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select()]
                if self._woken in ready:
                    self._woken.recv(1)
                    return
                self._serve_one()

    def _serve_one(self) -> None:
        try:
            asking, _ = self._socket.accept()
        except OSError:
            time.sleep(PATIENCE / 10)  # out of descriptors: not again at once
            return
        with asking:
            try:
                answer = self._answer()
            except Exception:  # noqa: BLE001 (the collectors are anybody's)
                _log.exception("the metrics of this worker could not be collected")
                return
            with suppress(OSError):  # it has stopped listening
                asking.settimeout(PATIENCE)
                asking.sendall(answer)


def _result(future: Future[list[Metric]]) -> list[Metric] | None:
    """None if there was no answer, whatever the reason; the gauge tells how often."""
    try:
        return future.result()
    except (OSError, ValueError) as error:
        _log.debug("a worker did not answer: %r", error)
        return None


def _about(answered: int, unanswered: int) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "poolkit_workers", "Worker processes whose metrics are here.", value=answered
    )
    yield GaugeMetricFamily(
        "poolkit_workers_unanswered",
        "Worker processes that run and did not answer in time: their metrics are missing here.",
        value=unanswered,
    )


def _chunks(asking: socket.socket, deadline: float) -> Iterator[bytes]:
    while True:
        asking.settimeout(_left(deadline))
        chunk = asking.recv(_CHUNK)
        if not chunk:
            return
        yield chunk


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _socket_path(directory: Path, number: int) -> Path:
    return directory / f"worker-{number}.sock"


def _lock_path(directory: Path, number: int) -> Path:
    return directory / f"worker-{number}.lock"


def prepare(directory: Path) -> None:
    """Make sure that workers can meet there.

    Raises:
        ConfigurationError: They cannot.
    """
    if sys.platform == "win32":
        raise ConfigurationError(f"{VARIABLE} is set, and workers need Unix sockets: unset it")
    longest = os.fsencode(_socket_path(directory, 9999))
    if len(longest) > _LONGEST_PATH:
        raise ConfigurationError(
            f"{VARIABLE}={directory} is {len(longest) - _LONGEST_PATH} bytes too long for the Unix"
            " sockets in it: choose a shorter one, such as /run/app/metrics"
        )
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"{VARIABLE}={directory} is no directory and cannot be made one ({error.strerror}):"
            " make it, for this user to write to"
        ) from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ConfigurationError(
            f"{VARIABLE}={directory} cannot be written to: give it to the user of the workers"
        )


def hold(path: Path) -> int | None:
    """The descriptor that holds the lock on a file as long as it is open; None if another does."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(path, flags, 0o600)
    try:
        _hand_over(path)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _take_number(directory: Path) -> tuple[int, int]:
    """The lowest number that nobody has, and the descriptor that holds its lock."""
    for number in count():
        descriptor = hold(_lock_path(directory, number))
        if descriptor is None:
            continue
        # Whoever tidied the directory up may have removed a lock that is held.
        if not _is_heard(_socket_path(directory, number)):
            return number, descriptor
        os.close(descriptor)
    raise AssertionError


def _is_heard(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as trying, suppress(OSError):
        trying.setblocking(False)
        trying.connect(str(path))
        return True
    return False


def _listen(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX)
    try:
        listening.setblocking(False)
        listening.bind(str(path))
        path.chmod(0o700)  # before it listens: until then, nobody gets in
        _hand_over(path)
        listening.listen()
    except BaseException:
        listening.close()
        raise
    return listening


def _hand_over(path: Path) -> None:
    """Started as root, the workers may be about to become the directory's owner."""
    owner = path.parent.stat()
    if os.geteuid() == 0 != owner.st_uid:
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def _before_any_loop() -> bool:
    if threading.current_thread() is not threading.main_thread():
        return False
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return True
    return False


_everyone: weakref.WeakSet[Workers] = weakref.WeakSet()


def _before_fork() -> None:
    for workers in list(_everyone):
        workers.before_fork()


def _after_fork_in_parent() -> None:
    for workers in list(_everyone):
        workers.after_fork_in_parent()


def _after_fork_in_child() -> None:
    for workers in list(_everyone):
        workers.after_fork_in_child()


# After the locks' own, which are thus taken once no thread of ours may need them.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
