"""SQLAlchemy's asyncpg DBAPI module, with the statement cache decided when the connect is done.

Leans on ``AsyncAdapt_asyncpg_dbapi.connect`` taking ``async_creator_fn`` and
``prepared_statement_cache_size``; ``tests/test_driver.py`` fails where that changes.
"""

from __future__ import annotations

from typing import Any

import asyncpg
from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_dbapi
from sqlalchemy.util import await_only

from poolkit.connect import Connector
from poolkit.driver import DriverConnection

_CACHE_ARGUMENTS = ("prepared_statement_cache_size", "prepared_statement_name_func")


class BoundedDbapi(AsyncAdapt_asyncpg_dbapi):
    """The ``module=`` of an engine whose connects go through ``Connector``.

    Only after a connect is it known whether a pooler stands between, and behind one in
    transaction mode SQLAlchemy's own cache must be off, as the driver's is.
    """

    def __init__(self) -> None:
        super().__init__(asyncpg)  # type: ignore[no-untyped-call]

    def connect(self, *args: Any, **kwargs: Any) -> Any:
        """Connect, and adapt the caches to what was found."""
        creator = kwargs.get("async_creator_fn")
        if not isinstance(creator, Connector):
            return super().connect(*args, **kwargs)  # type: ignore[no-untyped-call]
        del kwargs["async_creator_fn"]
        cache = {name: kwargs.pop(name) for name in _CACHE_ARGUMENTS if name in kwargs}
        connection = await_only(creator(*args, **kwargs))
        if connection.pooler == "transaction":
            cache = {"prepared_statement_cache_size": 0}

        async def made() -> DriverConnection:
            return connection

        return super().connect(async_creator_fn=made, **cache)  # type: ignore[no-untyped-call]
