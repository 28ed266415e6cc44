"""The settings with everything that was noticed while they were read."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_settings import SettingsError

from poolkit.errors import ConfigurationError
from poolkit.settings import DatabaseSettings
from poolkit.sources import MisspeltSetting

BAD_SETTINGS = (ValueError, SettingsError, OSError)
"""What reading the settings may raise: pydantic's errors and ours are ``ValueError``s, as is a
``.env`` that is not UTF-8; one that may not be read is an ``OSError``."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What the sources gave.

    Attributes:
        settings: None if they are bad.
        origins: Where each value that is not a default came from.
        error: Why they are bad.
        doubts: Names that look misspelt; one sentence each.
    """

    settings: DatabaseSettings | None
    origins: Mapping[str, str]
    error: ConfigurationError | None
    doubts: Sequence[str]


def load(prefix: str, url: str | None = None) -> Loaded:
    """Read the settings as ``create_async_engine`` would."""
    arguments: dict[str, Any] = {"_env_prefix": prefix} | ({} if url is None else {"url": url})
    settings: DatabaseSettings | None = None
    origins: Mapping[str, str] = {}
    error: ConfigurationError | None = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MisspeltSetting)
        try:
            settings, origins = DatabaseSettings.with_origins(**arguments)
        except BAD_SETTINGS as problem:
            error = _problem(problem)
    doubts = [str(c.message) for c in caught if issubclass(c.category, MisspeltSetting)]
    return Loaded(settings, origins, error, list(dict.fromkeys(doubts)))


def _problem(error: Exception) -> ConfigurationError:
    """What ``create_async_engine`` raises for it; names the file where its reader does not."""
    if isinstance(error, ValidationError):
        details = error.errors(include_url=False, include_input=False)
        return ConfigurationError("\n".join(detail["msg"] for detail in details))
    if isinstance(error, UnicodeDecodeError):
        return ConfigurationError(".env is not UTF-8 text: save it as UTF-8")
    if isinstance(error, OSError):
        return ConfigurationError(f"{error.filename or '.env'} cannot be read: {error.strerror}")
    return ConfigurationError(str(error))
