"""A hot standby: a copy of one of our servers that follows it."""

import os
import shutil
import threading

from poolkit.testing._cluster import USER, Cluster, Plan
from poolkit.testing._errors import PostgresServerError


class Standby(Cluster):
    """A server whose data is another's, copied by pg_basebackup and kept up to date.

    Args:
        primary: The server to follow.
        start_timeout: The longest wait for the copy, and for the start, in seconds.
        abandoned: Set by another thread to give up.
    """

    def __init__(self, primary: Cluster, start_timeout: float, abandoned: threading.Event) -> None:
        self._primary = primary
        plan = Plan(
            version=None,
            bin_dir=primary.binaries.bin_dir,
            tls=primary.ca_file is not None,
            settings={},
            port=None,
            start_timeout=start_timeout,
        )
        super().__init__(plan, abandoned)

    def _initialise(self) -> None:
        self.password = self._primary.password
        program = self.binaries.program("pg_basebackup")
        if not os.access(program, os.X_OK):
            raise PostgresServerError(f"a standby needs pg_basebackup: there is no {program}")
        self.data_dir.mkdir(mode=0o700)
        self._hand_over(self.data_dir)
        # Named in primary_conninfo, and so kept.
        secret = self._run_dir / "pgpass"
        secret.touch(mode=0o600)
        secret.write_text(f"*:*:*:{USER}:{self.password}\n")
        self._hand_over(secret)
        source = (
            f"host='{self._primary.socket_dir}' port={self._primary.port} user={USER} "
            f"passfile='{secret}'"
        )
        place = ["-D", str(self.data_dir), "-d", source]
        how = ["--write-recovery-conf", "--checkpoint=fast", "--no-sync"]
        self._watchdog.run([program, *place, *how])
        self._await("could not copy its primary", self._has_succeeded)
        os.chown(self.data_dir, os.geteuid(), os.getegid())  # ours while we go on writing in it

    def _certify(self, ca_file: os.PathLike[str]) -> None:
        """The certificate has come with the copy."""
        assert self._primary.ca_file is not None
        shutil.copyfile(self._primary.ca_file, ca_file)
