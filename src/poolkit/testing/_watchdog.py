"""Runs one PostgreSQL server for as long as the process that asked for it lives.

Not imported: `_guard` starts it as a script, `python -I -S _watchdog.py SPEC`, in a session of its
own, so that neither Ctrl-C nor the owner's SIGKILL ends it before it has ended the server and
removed what belongs to it. Standard library only, and little of it: it starts in 20 ms.

Each line on stdin is a JSON command, answered by one JSON line with the state of the child:
`["run", program, argument...]`, `["stop", mode]` or `["status"]`. The end of stdin, or of the
owner (a forked child of it may hold stdin open), is the end of everything.
"""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import IO, TypedDict

_OWNER_CHECK_SECONDS = 0.5

# PostgreSQL's own signals, mildest first, with the seconds that each is given. At the immediate
# one the server itself kills backends that have not gone after 5 s.
_STOPS = {
    "fast": [(signal.SIGINT, 30.0), (signal.SIGQUIT, 10.0)],
    "immediate": [(signal.SIGQUIT, 10.0)],
}


class Spec(TypedDict):
    """What the owner says once, at the start; `uid` and `gid` are None for its own."""

    owner: int
    run_dir: str
    log: str
    remove: list[str]
    uid: int | None
    gid: int | None


class Child:
    """The one process that runs at a time: initdb, then the server."""

    def __init__(self, spec: Spec, log: IO[bytes]) -> None:
        self._spec = spec
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._exit_code: int | None = 0

    def run(self, argv: list[str]) -> None:
        """Start a program; one that cannot be executed counts as ended with a shell's code 127."""
        try:
            self._process = subprocess.Popen(
                argv,
                cwd=self._spec["run_dir"],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                user=self._spec["uid"],
                group=self._spec["gid"],
                extra_groups=None if self._spec["uid"] is None else [],
            )
        except OSError as error:
            self._process, self._exit_code = None, 127
            self._log.write(f"{argv[0]}: {error.strerror}\n".encode())

    def stop(self, mode: str) -> None:
        """End the program, with SIGKILL if nothing else does."""
        if self._process is None:
            return
        for signum, seconds in _STOPS[mode]:
            self._process.send_signal(signum)
            self._process.send_signal(signal.SIGCONT)  # a test may have stopped it with SIGSTOP
            if self._ends_within(seconds):
                return
        self._process.kill()
        self._process.wait()

    def state(self) -> dict[str, int | None]:
        if self._process is None:
            return {"pid": None, "exit_code": self._exit_code}
        return {"pid": self._process.pid, "exit_code": self._process.poll()}

    def _ends_within(self, seconds: float) -> bool:
        assert self._process is not None
        deadline = time.monotonic() + seconds
        while self._process.poll() is None:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True


def commands(owner: int) -> Iterator[list[str]]:
    """The owner's commands, until it closes the pipe or is gone."""
    unfinished = b""
    while os.getppid() == owner:
        if not select.select([0], [], [], _OWNER_CHECK_SECONDS)[0]:
            continue
        chunk = os.read(0, 65536)
        if not chunk:
            return
        *lines, unfinished = (unfinished + chunk).split(b"\n")
        yield from map(json.loads, lines)


def obey(child: Child, command: list[str]) -> None:
    verb, *arguments = command
    if verb == "run":
        child.run(arguments)
    elif verb == "stop":
        child.stop(arguments[0])
    answer(child)


def answer(child: Child) -> None:
    os.write(1, json.dumps(child.state()).encode() + b"\n")


def remove(path: str) -> None:
    """Remove a directory into which a process that was just killed may still have written."""
    for _ in range(50):
        shutil.rmtree(path, ignore_errors=True)
        if not os.path.lexists(path):
            return
        time.sleep(0.1)


def main() -> None:
    spec: Spec = json.loads(sys.argv[1])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    # Made here, not by the owner: it never exists without someone to remove it. Another user,
    # if the server runs as one, may pass through it but not change it.
    os.mkdir(spec["run_dir"], 0o700)
    if spec["uid"] is not None:
        os.chmod(spec["run_dir"], 0o711)
    try:
        with open(spec["log"], "ab", buffering=0) as log:
            serve(spec, Child(spec, log))
    finally:
        for path in spec["remove"]:
            remove(path)


def serve(spec: Spec, child: Child) -> None:
    try:
        answer(child)
        for command in commands(spec["owner"]):
            obey(child, command)
    except BrokenPipeError:
        pass  # the owner went before it read the answer
    finally:
        child.stop("immediate")


if __name__ == "__main__":
    main()
