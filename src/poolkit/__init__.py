"""The engine that an async Python service on PostgreSQL imports instead of writing its own."""

from poolkit._version import __version__
from poolkit.engine import create_async_engine
from poolkit.errors import (
    AuthenticationFailed,
    CertificateNotTrusted,
    ConfigurationError,
    ConnectError,
    ConnectRefused,
    ConnectTimeout,
    DatabaseNotFound,
    HostNotFound,
    PasswordUnavailable,
    ServerNotReady,
    ServerUnreachable,
    StartupParameterRefused,
    StatementTimeout,
    TLSRefused,
    TooManyConnections,
)
from poolkit.events import ConnectionOpened, ConnectionOpenFailed, Event, Observer
from poolkit.options import EngineOptions, engine_options
from poolkit.settings import DatabaseSettings
from poolkit.sources import MisspeltSetting, SettingsWarning

__all__ = [
    "AuthenticationFailed",
    "CertificateNotTrusted",
    "ConfigurationError",
    "ConnectError",
    "ConnectRefused",
    "ConnectTimeout",
    "ConnectionOpenFailed",
    "ConnectionOpened",
    "DatabaseNotFound",
    "DatabaseSettings",
    "EngineOptions",
    "Event",
    "HostNotFound",
    "MisspeltSetting",
    "Observer",
    "PasswordUnavailable",
    "ServerNotReady",
    "ServerUnreachable",
    "SettingsWarning",
    "StartupParameterRefused",
    "StatementTimeout",
    "TLSRefused",
    "TooManyConnections",
    "__version__",
    "create_async_engine",
    "engine_options",
]
