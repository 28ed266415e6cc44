"""Whose engines are replayed: poolkit's as it comes, and the recipe that is found everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from benchmarks.engines import recipe_arguments
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

import poolkit
from poolkit import DatabaseSettings

POOLKIT = "poolkit"
RECIPE = "SQLAlchemy, common recipe"
CONTESTANTS = (POOLKIT, RECIPE)


def make_engine(contestant: str, url: str, **settings: Any) -> AsyncEngine:
    """An engine with the pool settings given, everything else as it comes."""
    if contestant == POOLKIT:
        return poolkit.create_async_engine(settings=DatabaseSettings(url=url, **settings))  # type: ignore[arg-type]
    return create_async_engine(
        urlsplit(url)._replace(scheme="postgresql+asyncpg").geturl(),
        pool_pre_ping=True,
        pool_size=settings.get("pool_size", 10),
        max_overflow=settings.get("max_overflow", 5),
        pool_timeout=settings.get("pool_timeout", 30),
        connect_args=_recipe(settings),
    )


def _recipe(settings: Mapping[str, Any]) -> dict[str, Any]:
    arguments = recipe_arguments()
    if "connection_timeout" in settings:
        arguments["timeout"] = settings["connection_timeout"]
    return arguments
