"""Which user a throwaway server runs as."""

import os
import pwd
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from poolkit.testing._errors import PostgresServerError

# `nobody` first: a `postgres` account may own real clusters that the throwaway one's superuser
# could then read.
_NAMES = ("nobody", "postgres")


@dataclass(frozen=True, slots=True)
class Account:
    """The unprivileged user that a server runs as when we are root."""

    uid: int
    gid: int

    def may_enter(self, directory: Path) -> bool:
        """Whether the user can reach what lies in the directory."""
        path = directory.resolve()
        return all(self._passes(folder.stat()) for folder in (path, *path.parents))

    def take(self, path: Path) -> None:
        """Make the user the owner of a file, or of a directory with all that it holds."""
        for entry in _tree(path):
            os.chown(entry, self.uid, self.gid, follow_symlinks=False)

    def _passes(self, status: os.stat_result) -> bool:
        if status.st_uid == self.uid:
            return bool(status.st_mode & stat.S_IXUSR)
        if status.st_gid == self.gid:
            return bool(status.st_mode & stat.S_IXGRP)
        return bool(status.st_mode & stat.S_IXOTH)


def server_account() -> Account | None:
    """The user to run a server as; None is our own, unless that is root, which PostgreSQL refuses.

    Raises:
        PostgresServerError: We are root and the machine has no unprivileged user to turn to.
    """
    if os.geteuid() != 0:
        return None
    for name in _NAMES:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(entry.pw_uid, entry.pw_gid)
    raise PostgresServerError(
        f"PostgreSQL does not run as root, and there is no user {' or '.join(_NAMES)} to run it as"
    )


def _tree(path: Path) -> Iterator[str]:
    """A path and all below it, a directory after its content so that nobody swaps entries in it."""
    for folder, _, files in os.walk(path, topdown=False):
        yield from (os.path.join(folder, name) for name in files)
        yield folder
    if not path.is_dir():
        yield str(path)
