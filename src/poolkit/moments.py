"""When an error happened: while connecting, in a transaction, at COMMIT, or in AUTOCOMMIT.

An error's traceback shows it, whichever engine it comes from. Leans on ``Engine.raw_connection``,
``Connection._commit_impl``, ``Connection._is_autocommit_isolation`` and on what ``do_execute``
calls its statement; ``tests/test_classify.py`` fails where that changes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum, auto
from types import FrameType, TracebackType

from sqlalchemy import Connection, Engine


class Moment(Enum):
    """What was under way when an error happened."""

    CONNECT = auto()
    """Waiting for a connection or making one."""
    TRANSACTION = auto()
    """In an explicit transaction before its COMMIT, or at ROLLBACK."""
    COMMIT = auto()
    AUTOCOMMIT = auto()


_COMMITS = re.compile(
    r"(?:\s|--[^\n]*(?:\n|\Z)|/\*.*?\*/)*(?:COMMIT|END|PREPARE\s+TRANSACTION)\b",
    re.IGNORECASE | re.DOTALL,
)
_RAW_CONNECTION = Engine.raw_connection.__code__
_COMMIT = Connection._commit_impl.__code__  # noqa: SLF001


def commits(statement: str | None) -> bool:
    """Whether a statement is a COMMIT, of either phase, that the program itself wrote."""
    return statement is not None and _COMMITS.match(statement) is not None


def moment_of(traceback: TracebackType | None) -> Moment | None:
    """What the frames were about; None if they were not in the database's code."""
    frames = list(_frames(traceback))
    if any(_connects(frame) for frame in frames):
        return Moment.CONNECT
    if any(_commits(frame) for frame in frames):
        return Moment.COMMIT
    locals_ = (frame.f_locals.get("self") for frame in frames)
    connection = next((found for found in locals_ if isinstance(found, Connection)), None)
    if connection is None:
        return None
    # It is invalidated by now; what it was asked to be still stands.
    autocommit = connection._is_autocommit_isolation()  # noqa: SLF001
    return Moment.AUTOCOMMIT if autocommit else Moment.TRANSACTION


def _frames(traceback: TracebackType | None) -> Iterator[FrameType]:
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def _connects(frame: FrameType) -> bool:
    return (
        frame.f_code is _RAW_CONNECTION
        or frame.f_globals.get("__name__") == "asyncpg.connect_utils"
    )


def _commits(frame: FrameType) -> bool:
    if frame.f_code is _COMMIT:
        return True
    statement = frame.f_locals.get("statement")
    return (
        frame.f_code.co_name.startswith("do_execute")
        and isinstance(statement, str)
        and commits(statement)
    )
