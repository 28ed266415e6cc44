"""One pooled connection, with what the pool needs to know of it.

The private names of SQLAlchemy that the pool leans on are used here and in ``handoff.py`` only,
and ``tests/pool/test_leaning.py`` fails where one of them changes:

- ``sqlalchemy.pool.base._ConnectionRecord``, made by ``Pool._create_connection``, with a
  ``__init__(pool)`` that connects; its ``needs_gc`` (2.1), which only the garbage collector's
  clean-up reads, and its slot ``fairy_ref`` (2.0), a weak reference to the proxy in the caller's
  hands;
- ``Pool._invalidate(connection, exception, _checkin)``, called when a statement shows that its
  connection is dead;
- ``sqlalchemy.util.concurrency.in_greenlet``.
"""

from __future__ import annotations

import asyncio
import logging
import math
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import sqlalchemy
from sqlalchemy.pool.base import _ConnectionRecord
from sqlalchemy.util import greenlet_spawn

from poolkit.driver import is_ours
from poolkit.errors import causes
from poolkit.faults import session_ended

if TYPE_CHECKING:
    from poolkit.pool.handoff import HandoffPool

_log = logging.getLogger("poolkit.pool")


class PooledRecord(_ConnectionRecord):
    """SQLAlchemy's record of a connection. Times are the event loop's, in seconds.

    Attributes:
        opened_at: When the connect was done.
        expires_at: When it is to be replaced; infinity for never.
        answered_at: When the server was last heard.
        idle_since: When it was last given back.
        taken_at: When it was last given out.
        waited: How long its holder stood in line for it.
        task: The task it was given to, if long holders are watched for.
        reported: Whether it has been reported as held for too long.
        generation: Which ``dispose()`` it belongs before.
        lost: Whether the garbage collector found it.
        invalidated: Whether it was declared dead, and ``error`` why.
        died: Whether the error shows that its session is over.
        open_seconds: How long the connect took; 0 once it has been given back.
    """

    opened_at = 0.0
    expires_at = 0.0
    answered_at = 0.0
    idle_since = 0.0
    taken_at = 0.0
    waited = 0.0
    task: weakref.ref[asyncio.Task[Any]] | None = None
    reported = False
    generation = 0
    lost = False
    invalidated = died = False
    error: BaseException | None = None
    open_seconds = 0.0

    def __init__(self, pool: HandoffPool) -> None:
        self._pool = pool
        try:
            super().__init__(pool)
        except BaseException:
            # A listener failed on a connection that is there; SQLAlchemy 2.0 leaves it open.
            self.terminate()
            raise
        self.driver_is_closed = self._look_up_is_closed()

    def _look_up_is_closed(self) -> Callable[[], bool]:
        """The driver's own method, kept for the one call that each checkout makes."""
        found: Callable[[], bool] = getattr(self.driver_connection, "is_closed", _never)
        return found

    def invalidate(self, e: BaseException | None = None, soft: bool = False) -> None:  # noqa: FBT001, FBT002
        """As SQLAlchemy's; a soft one has the connection replaced when it comes back."""
        if soft:
            self.expires_at = -math.inf
        else:
            self.invalidated = self.dbapi_connection is not None
            self.error = e
            self.died = isinstance(e, Exception) and (
                # Not by driver_is_closed: it may have been invalidated before.
                self._look_up_is_closed()() or session_ended(list(causes(e)))
            )
            self.driver_is_closed = self._is_closed_now
        try:
            super().invalidate(e, soft)
        except BaseException:
            # Cancelled while the peer was told. SQLAlchemy would check the record in now, and
            # leaves that to the garbage collector instead.
            self.dbapi_connection = None
            if self._pool.has_given(self):
                self.checkin(_fairy_was_created=False)
            raise

    def _is_closed_now(self) -> bool:
        """Asked once after an invalidation: SQLAlchemy may have reconnected within the record."""
        if self.dbapi_connection is None:
            return True
        self._pool.renewed(self)
        self.invalidated, self.died, self.error = False, False, None
        self.driver_is_closed = self._look_up_is_closed()
        return self.driver_is_closed()

    @property
    def needs_gc(self) -> bool:
        """SQLAlchemy 2.1 asks when its proxy was collected without having been closed."""
        self.lost = super().needs_gc
        return self.lost

    def is_dead(self) -> bool:
        """Whether the driver knows, without asking, that the connection is gone."""
        if self.dbapi_connection is None:
            return True
        return self.driver_is_closed()

    async def ping(self) -> None:
        """One round trip: no transaction, no prepared statement. Raises what the driver raises."""
        driver: Any = self.driver_connection
        await driver.execute("SELECT 1")

    def session_pid(self) -> int | None:
        """The server process at the other end, if it is known: not behind a pooler."""
        driver = self.driver_connection
        if not is_ours(driver) or driver.pooler != "none":
            return None
        return driver.get_server_pid()

    async def end_sessions(self, pids: Iterable[int]) -> None:
        """Have the server end other sessions of the same user."""
        driver: Any = self.driver_connection
        for pid in pids:
            await driver.execute(f"SELECT pg_terminate_backend({pid:d})")

    def terminate(self) -> None:
        """Drop the socket at once, without waiting for the peer."""
        driver = self.driver_connection
        if driver is None or not hasattr(driver, "terminate"):
            return
        try:
            driver.terminate()
        except RuntimeError:  # the loop is closed: there is nothing left to do it on
            if is_ours(driver):
                driver.shut_socket()

    async def close_within(self, seconds: float) -> None:
        """Take leave of the server, or drop the socket when it does not answer."""
        driver = self.driver_connection
        if driver is None or not hasattr(driver, "terminate"):
            await greenlet_spawn(self.close)
            return
        try:
            await greenlet_spawn(self._tell_close)
            await driver.close(timeout=seconds)
        except Exception:  # noqa: BLE001 (a connection on its way out has nothing more to say)
            driver.terminate()
        finally:
            self._forget_connection()

    def drop_if_open(self) -> None:
        """Drop the socket, unless the connection has been closed."""
        if self.dbapi_connection is not None:
            self.drop()

    def drop(self) -> None:
        """Close without an event loop, or out of a coroutine: the socket is dropped."""
        self._tell_close()
        self.terminate()
        self._forget_connection()

    def _tell_close(self) -> None:
        """The `close` event comes before the close, as SQLAlchemy's."""
        if self._pool.dispatch.close and self.dbapi_connection is not None:
            try:
                self._pool.dispatch.close(self.dbapi_connection, self)
            except Exception:  # noqa: BLE001 (logged; the close goes on)
                _log.exception("a listener of the close event failed")

    def _forget_connection(self) -> None:
        self.finalize_callback.clear()
        self.dbapi_connection = None


def _never() -> bool:
    return False


def _watch_fairy_ref() -> None:
    """On SQLAlchemy 2.0, where the collector's clean-up does not read ``needs_gc``."""
    slot: Any = vars(_ConnectionRecord)["fairy_ref"]

    def put(record: PooledRecord, reference: Any) -> None:
        if reference is None:
            last = getattr(record, "fairy_ref", None)
            # Taken off a proxy that is no more: it was collected without having been closed.
            record.lost = last is not None and last() is None
        slot.__set__(record, reference)

    PooledRecord.fairy_ref = property(slot.__get__, put)  # type: ignore[assignment]


if sqlalchemy.__version__.startswith("2.0."):
    _watch_fairy_ref()
