"""The owner's end of the watchdog."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from poolkit.testing._account import Account
from poolkit.testing._errors import PostgresServerError

StopMode = Literal["fast", "immediate"]

_SCRIPT = Path(__file__).with_name("_watchdog.py")


@dataclass(frozen=True, slots=True)
class ChildState:
    """The watchdog's child: `exit_code` is None while it runs."""

    pid: int | None
    exit_code: int | None


class Watchdog:
    """A process that owns a directory and runs programs in it, and that outlives us to clean up.

    Args:
        run_dir: The directory that it makes at the start and removes at the end.
        staging: A directory that need not exist and is removed at the end too.
        account: The user that the programs run as; None is our own.
        env: The programs' environment.
    """

    def __init__(
        self, run_dir: Path, staging: Path, account: Account | None, env: Mapping[str, str]
    ) -> None:
        self.log = run_dir / "postgres.log"
        self._lock = threading.Lock()
        spec = {
            "owner": os.getpid(),
            "run_dir": str(run_dir),
            "log": str(self.log),
            "remove": [str(run_dir), str(staging)],
            "uid": None if account is None else account.uid,
            "gid": None if account is None else account.gid,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_SCRIPT), json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
            env=env,
        )
        self._answer()

    def run(self, argv: Sequence[str]) -> None:
        """Start a program; the one before must have ended."""
        self._ask("run", *argv)

    def stop(self, mode: StopMode) -> None:
        """End the program and wait for its end, which comes within 40 s."""
        self._ask("stop", mode)

    def state(self) -> ChildState:
        return self._ask("status")

    def close(self) -> None:
        """End the program, the directory and the watchdog itself."""
        with self._process:
            pass

    def _ask(self, *command: str) -> ChildState:
        assert self._process.stdin is not None
        with self._lock:
            try:
                self._process.stdin.write(json.dumps(command).encode() + b"\n")
            except (BrokenPipeError, ValueError) as error:  # ValueError: closed by us
                raise PostgresServerError("the throwaway PostgreSQL is over") from error
            return self._answer()

    def _answer(self) -> ChildState:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PostgresServerError(f"the throwaway PostgreSQL's watchdog has died ({_SCRIPT})")
        return ChildState(**json.loads(line))
