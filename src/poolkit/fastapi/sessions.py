"""Sessions that end with their handler."""

from __future__ import annotations

from typing import Any, NoReturn

from sqlalchemy import Connection
from sqlalchemy import exc as sa_exc
from sqlalchemy.orm import Session

from poolkit.sessions import NotingSession


def ended(what: str) -> NoReturn:
    """Say that something was used after the handler's end."""
    raise sa_exc.ResourceClosedError(
        f"this {what} ended with its handler. What runs after the response has begun (a streaming"
        " generator, a background task) opens its own: poolkit.session(). To hold on to the"
        " handler's until everything is sent, use Depends(..., scope='request')"
    )


class HandlerSession(NotingSession):
    """A session that cannot be used after its end."""

    _has_ended = False

    def close(self) -> None:
        """As always, and for good."""
        super().close()
        self._has_ended = True

    def get_bind(self, *args: Any, **kwargs: Any) -> Any:
        """The engine."""
        if self._has_ended:
            ended("session")
        return super().get_bind(*args, **kwargs)


class AutocommitSession(Session):
    """A session whose statements are committed each by itself, on one connection to its end."""

    _has_ended = False
    _connection: Connection | None = None

    def close(self) -> None:
        """As always, for good, and the connection too."""
        super().close()
        self._has_ended = True
        if self._connection is not None:
            self._connection.close()

    def get_bind(self, *args: Any, **kwargs: Any) -> Any:
        """The connection, taken at the first use."""
        if self._has_ended:
            ended("session")
        if self._connection is None:
            engine: Any = super().get_bind(*args, **kwargs)
            # An engine with this option would listen to each of its connections, which costs more.
            self._connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        return self._connection
