"""One PostgreSQL server of ours: its directory, its settings, its start and its stop."""

import os
import re
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from poolkit.testing._account import Account, server_account
from poolkit.testing._binaries import find_binaries
from poolkit.testing._certificates import make_certificates
from poolkit.testing._errors import PostgresServerError
from poolkit.testing._guard import StopMode, Watchdog
from poolkit.testing._template import Template

HOST = "127.0.0.1"
USER = "postgres"

# The longest path of a Unix socket is 107 bytes on Linux and 103 elsewhere.
_LONGEST_BASE = 103 - len("/poolkit-0123456789/socket/.s.PGSQL.65535")

# Below every system's usual ephemeral range: while a server is stopped, no outgoing connection
# takes its port.
_PORTS = range(15_000, 32_000)
_PORT_ATTEMPTS = 20

_LINES_OF_LOG = 20

# Nothing here has to survive the machine, only the server: what was written stays written.
_SETTINGS: Mapping[str, str | int | float] = {
    "listen_addresses": HOST,
    "fsync": "off",
    "full_page_writes": "off",
}
_OURS = {"port", "listen_addresses", "unix_socket_directories", "ssl", "data_directory"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What `postgres()` was asked for, less an existing server's URL."""

    version: int | None
    bin_dir: Path | None
    tls: bool
    settings: Mapping[str, str | int | float]
    port: int | None
    start_timeout: float

    def __post_init__(self) -> None:
        for name in self.settings:
            if not re.fullmatch(r"[A-Za-z_][\w.$]*", name):
                raise ValueError(f"server_settings: {name!r} is not the name of a setting")
            if name.lower() in _OURS:
                raise ValueError(f"server_settings: {name} is set by postgres() itself")


class Cluster:
    """A server, its data and the watchdog that ends both with us.

    The directory is passed through by the server's user, and only `data` and `socket` in it are
    that user's: as root, we write nowhere that another user could redirect.

    Args:
        plan: What was asked for.
        abandoned: Set by another thread to give up a start.
    """

    def __init__(self, plan: Plan, abandoned: threading.Event) -> None:
        self.binaries = find_binaries(bin_dir=plan.bin_dir, version=plan.version, tls=plan.tls)
        self.port = 0
        self.password = ""
        self._plan = plan
        self._abandoned = abandoned
        self._account = server_account()
        self._run_dir = _base(self._account) / f"poolkit-{secrets.token_hex(5)}"
        self.data_dir = self._run_dir / "data"
        self.socket_dir = self._run_dir / "socket"
        self.ca_file = self._run_dir / "ca.pem" if plan.tls else None
        self._initdb_arguments = _initdb_arguments(self.binaries.version)
        self._template = Template(self.binaries, self._initdb_arguments)
        self._watchdog = Watchdog(
            self._run_dir, self._template.staging, self._account, self.binaries.env
        )
        try:
            self._prepare()
            self._first_start()
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Start the server and wait until it takes connections; nothing if it runs.

        Raises:
            PostgresServerError: It ended, or took longer than the start timeout.
        """
        if self._runs():
            return
        server = self.binaries.program("postgres")
        self._watchdog.run([server, "-D", str(self.data_dir), "-c", f"port={self.port}"])
        self._await("did not start", self._is_ready)

    def stop(self, mode: StopMode) -> None:
        """Stop the server and wait until it has gone; nothing if it does not run."""
        self._watchdog.stop(mode)

    def close(self) -> None:
        """End the server and remove all that it left."""
        self._watchdog.close()

    def log(self) -> str:
        return self._watchdog.log.read_text(errors="replace")

    def _prepare(self) -> None:
        if self._account is not None and not self.binaries.run_as(self._account):
            self.binaries = self.binaries.copied_to(self._run_dir / "install")
        self.socket_dir.mkdir(mode=0o700)
        self._initialise()
        self._configure()
        if self.ca_file is not None:
            self._certify(self.ca_file)
        self._hand_over(self.data_dir, self.socket_dir)

    def _initialise(self) -> None:
        password = self._template.copy_to(self.data_dir)
        if password is None:
            password = secrets.token_urlsafe(24)
            self._initdb(password)
            self._template.store(self.data_dir, password)
        self.password = password

    def _initdb(self, password: str) -> None:
        self.data_dir.mkdir(mode=0o700)
        secret = self._run_dir / "password"
        secret.touch(mode=0o600)
        secret.write_text(password)
        self._hand_over(self.data_dir, secret)
        program = self.binaries.program("initdb")
        place = ["-D", str(self.data_dir), "--pwfile", str(secret)]
        self._watchdog.run([program, *place, *self._initdb_arguments])
        self._await("could not initialise its data", self._has_succeeded)
        secret.unlink()
        os.chown(self.data_dir, os.geteuid(), os.getegid())  # ours while we go on writing in it

    def _configure(self) -> None:
        settings = {
            **_SETTINGS,
            "unix_socket_directories": str(self.socket_dir),
            "ssl": "on" if self._plan.tls else "off",
            **self._plan.settings,
        }
        with (self.data_dir / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = {_quoted(str(value))}\n" for name, value in settings.items())

    def _certify(self, ca_file: Path) -> None:
        made = make_certificates()
        ca_file.write_bytes(made.ca)
        key = self.data_dir / "server.key"
        key.touch(mode=0o600)
        key.write_bytes(made.key)
        (self.data_dir / "server.crt").write_bytes(made.chain)

    def _hand_over(self, *paths: Path) -> None:
        if self._account is not None:
            for path in paths:
                self._account.take(path)

    def _first_start(self) -> None:
        for _ in range(_PORT_ATTEMPTS):
            self.port = _free_port() if self._plan.port is None else self._plan.port
            try:
                return self.start()
            except PostgresServerError:
                if self._plan.port is not None or _is_free(self.port):
                    raise
        raise PostgresServerError(f"no free port in {_PORT_ATTEMPTS} attempts")

    def _await(self, failure: str, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self._plan.start_timeout
        while not done():
            if self._watchdog.state().exit_code is not None and not done():
                raise self._failed(failure)
            if time.monotonic() > deadline:
                self.stop("immediate")
                raise self._failed(f"{failure} within {self._plan.start_timeout:g} s")
            if self._abandoned.wait(0.003):
                raise self._failed("was abandoned while it started")

    def _runs(self) -> bool:
        state = self._watchdog.state()
        return state.pid is not None and state.exit_code is None

    def _has_succeeded(self) -> bool:
        return self._watchdog.state().exit_code == 0

    def _is_ready(self) -> bool:
        # As pg_ctl does: the eighth line is the server's status. The first is its PID, which
        # tells a file left by a killed server from this one's.
        try:
            text = (self.data_dir / "postmaster.pid").read_text()
        except FileNotFoundError:
            return False
        match text.splitlines():
            case [pid, _, _, _, _, _, _, status, *_]:
                return status.strip() == "ready" and int(pid) == self._watchdog.state().pid
            case _:
                return False  # not yet written to the end

    def _failed(self, what: str) -> PostgresServerError:
        tail = "\n".join(self.log().splitlines()[-_LINES_OF_LOG:])
        return PostgresServerError(
            f"PostgreSQL {self.binaries.version_string} {what}. The end of its log:\n{tail}"
        )


def _initdb_arguments(version: int) -> list[str]:
    arguments = ["-U", USER, "-A", "scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync"]
    # Some builds default to ICU, or have none; the option is new in 15.
    return [*arguments, "--locale-provider=libc"] if version >= 15 else arguments


def _base(account: Account | None) -> Path:
    """The temporary directory, or a shorter or more accessible one."""
    for directory in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        path = Path(directory)
        fits = len(str(path).encode()) <= _LONGEST_BASE
        if fits and path.is_dir() and (account is None or account.may_enter(path)):
            return path
    raise PostgresServerError("no temporary directory has a short path that the server can enter")


def _free_port() -> int:
    for _ in range(1000):
        # Not `random`: test runs seed it, and parallel ones would all draw the same ports.
        port = secrets.choice(_PORTS)
        if _is_free(port):
            return port
    raise PostgresServerError(f"no free port in {_PORTS.start}-{_PORTS.stop - 1}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace("'", "''").replace("\n", "\\n")
    return f"'{escaped}'"
