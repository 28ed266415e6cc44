"""The engine that an async Python service on PostgreSQL imports instead of writing its own.

Nothing is loaded before it is used; type checkers read ``__init__.pyi``.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

_NAMES = {
    "_version": ("__version__",),
    "engine": ("create_async_engine",),
    "errors": (
        "AuthenticationFailed",
        "CertificateNotTrusted",
        "ConfigurationError",
        "ConnectError",
        "ConnectRefused",
        "ConnectTimeout",
        "ConnectionLost",
        "DatabaseNotFound",
        "DeadlineExceeded",
        "DeadlockDetected",
        "Failure",
        "HostNotFound",
        "IdleInTransactionTimeout",
        "Interrupted",
        "LockTimeout",
        "PasswordUnavailable",
        "PoolDraining",
        "PoolOverloaded",
        "PoolTimeout",
        "ReadOnlyServer",
        "SerializationFailure",
        "ServerNotReady",
        "ServerUnreachable",
        "StalePlan",
        "StartupParameterRefused",
        "StatementTimeout",
        "TLSRefused",
        "TooManyConnections",
        "TransactionAborted",
        "TransactionTimeout",
        "WrongEventLoop",
    ),
    "events": (
        "CheckedIn",
        "CheckedOut",
        "CheckoutRefused",
        "CheckoutTimedOut",
        "CloseReason",
        "ConnectionClosed",
        "ConnectionInvalidated",
        "ConnectionOpenFailed",
        "ConnectionOpened",
        "Event",
        "LongHolder",
        "LongHolderReturned",
        "Observer",
        "OverloadBegan",
        "OverloadEnded",
        "TransactionRetried",
    ),
    "faults": (
        "Fault",
        "FaultKind",
        "Outcome",
        "classify",
    ),
    "lifecycle": (
        "WarmUpReport",
        "drain",
        "observe",
        "pool_stats",
        "warm_up",
    ),
    "options": (
        "EngineOptions",
        "connect_kwargs",
        "engine_options",
    ),
    "pool": (
        "DrainReport",
        "HandoffPool",
        "PoolStats",
    ),
    "registry": (
        "dispose_engines",
        "get_engine",
        "get_sessionmaker",
        "session",
    ),
    "settings": ("DatabaseSettings",),
    "sources": (
        "MisspeltSetting",
        "SettingsWarning",
    ),
    "transactions": ("run_in_transaction",),
}
"""What is public, by the module that has it."""

_ORIGINS = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_ORIGINS)  # noqa: PLE0605 (a list, as it must be)


def __getattr__(name: str) -> Any:
    module = _ORIGINS.get(name)
    if module is not None:
        value = globals()[name] = getattr(import_module(f"poolkit.{module}"), name)
        return value
    if not name.startswith("__") and find_spec(f"poolkit.{name}") is not None:
        return import_module(f"poolkit.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
