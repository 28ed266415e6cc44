"""``create_async_engine``: SQLAlchemy's own engine, made from the environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from pydantic import SecretStr, ValidationError
from pydantic_settings import SettingsError
from sqlalchemy.engine import URL
from sqlalchemy.ext import asyncio as sqlalchemy_asyncio
from sqlalchemy.ext.asyncio import AsyncEngine

from poolkit import logs, timeouts, translation
from poolkit.errors import ConfigurationError
from poolkit.events import Observer
from poolkit.options import Password, engine_options
from poolkit.settings import DatabaseSettings


def create_async_engine(
    url: str | URL | SecretStr | None = None,
    *,
    settings: DatabaseSettings | None = None,
    observers: Sequence[Observer] = (),
    password: Password | None = None,
    server_settings: Mapping[str, Any] | None = None,
    **engine_kwargs: Any,
) -> AsyncEngine:
    """Make an engine; opens no connection yet.

    Without arguments everything is read from ``DATABASE_*``. What is returned is SQLAlchemy's
    plain ``AsyncEngine``.

    Args:
        url: In place of ``DATABASE_URL``; the other variables still apply.
        settings: In place of the environment, which is then not read.
        observers: Told of every event of the connects and of the pool.
        password: A string, or a callable, sync or async, asked at every physical connect; for
            tokens that rotate.
        server_settings: PostgreSQL settings for every session, such as ``{"jit": "off"}``.
        engine_kwargs: SQLAlchemy's own arguments; they win over the environment.
            ``connect_args``, and the ``server_settings`` in it, are merged key by key.

    Raises:
        ConfigurationError: Something is missing, malformed, contradictory or cannot be honoured;
            lists every problem with the setting and the remedy. It is both SQLAlchemy's
            ``ArgumentError`` and a ``ValueError``.
    """
    if settings is not None and url is not None:
        raise ConfigurationError("give either url or settings: the settings hold a URL already")
    settings = settings if settings is not None else read_environment(url)[0]
    made = engine_options(
        settings,
        password=password,
        server_settings=server_settings,
        observers=observers,
        **engine_kwargs,
    )
    engine = sqlalchemy_asyncio.create_async_engine(made.url, **made.kwargs)
    timeouts.install(engine.sync_engine)
    translation.install(engine.sync_engine, made.kwargs["connect_args"])
    logs.install(engine.sync_engine, made.kwargs["connect_args"]["async_creator_fn"])
    if settings.telemetry != "off" or settings.logfire_enabled:
        # A leaf above this layer: named, not imported, so that nobody loads it unasked.
        import_module("poolkit.telemetry").install(engine, settings)
    return engine


def read_environment(
    url: str | URL | SecretStr | None = None,
) -> tuple[DatabaseSettings, dict[str, str]]:
    """The settings, and where each value that is no default came from.

    Raises:
        ConfigurationError: Every problem that there is.
    """
    arguments: dict[str, Any] = {} if url is None else {"url": url}
    try:
        return DatabaseSettings.with_origins(**arguments)
    except ValidationError as error:
        problems = [detail["msg"] for detail in error.errors(include_url=False)]
        raise ConfigurationError("\n".join(problems)) from None
    except SettingsError as error:
        raise ConfigurationError(str(error)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the .env file cannot be read: {error}") from None
