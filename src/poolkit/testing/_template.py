"""Initialised data directories kept for later starts: a copy takes a tenth of what initdb does."""

import contextlib
import hashlib
import json
import logging
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from secrets import token_hex

from poolkit.testing._binaries import Binaries

_logger = logging.getLogger(__name__)


class Template:
    """A data directory in the user's cache, with the password that was set when it was made.

    All of the user's throwaway servers of one version therefore share a password. Without a
    usable cache directory nothing is kept and nothing fails.

    Args:
        binaries: What made the data directory, or will.
        arguments: How: those of initdb.
    """

    def __init__(self, binaries: Binaries, arguments: Sequence[str]) -> None:
        server = Path(binaries.program("postgres"))
        identity = [binaries.version_string, server.stat().st_size, platform.machine(), *arguments]
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
        root = _cache_root()
        self._path = root / f"postgres-{binaries.version}-{digest}"
        self.staging = root / f".staging-{token_hex(6)}"

    def copy_to(self, data_dir: Path) -> str | None:
        """Fill a data directory and return its password; None if there is no sound template."""
        try:
            about = json.loads((self._path / "about.json").read_text())
            # As root with another's HOME, the cache may be that user's: do not rely on it.
            if self._path.stat().st_uid == os.geteuid():
                _copy(self._path / "data", data_dir)
                # A power failure soon after store() may have left truncated files.
                if _size(data_dir) == about["size"]:
                    return str(about["password"])
        except (OSError, ValueError) as error:
            _logger.debug("no template of a data directory: %s", error)
        shutil.rmtree(data_dir, ignore_errors=True)
        return None

    def store(self, data_dir: Path, password: str) -> None:
        """Keep a data directory that no server has used, whole or not at all."""
        try:
            self.staging.mkdir(mode=0o700, parents=True)
            fresh = self.staging / "fresh"
            fresh.mkdir()
            _copy(data_dir, fresh / "data")
            about = {"password": password, "size": _size(data_dir)}
            (fresh / "about.json").write_text(json.dumps(about))
            with contextlib.suppress(FileNotFoundError):
                self._path.rename(self.staging / "replaced")
            fresh.rename(self._path)
        except OSError as error:
            _logger.debug("the data directory is not kept as a template: %s", error)
        shutil.rmtree(self.staging, ignore_errors=True)


def _cache_root() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "poolkit"


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, copy_function=shutil.copyfile, symlinks=True)


def _size(directory: Path) -> int:
    return sum(
        os.stat(os.path.join(folder, name)).st_size
        for folder, _, files in os.walk(directory)
        for name in files
    )
