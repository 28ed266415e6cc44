"""From settings to the arguments of SQLAlchemy's ``create_async_engine``, without a network."""

from __future__ import annotations

import inspect
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import SecretStr
from sqlalchemy.engine import URL
from sqlalchemy.pool import Pool

from poolkit import tls
from poolkit.connect import STARTUP_SAFE, Connector
from poolkit.contradictions import cache_problems
from poolkit.dbapi import BoundedDbapi
from poolkit.driver import (
    BACKSTOP_MARGIN,
    MET_WITHOUT_TRANSACTION,
    assignment,
    autocommit_refused,
    milliseconds,
)
from poolkit.errors import ConfigurationError
from poolkit.events import Observer, Observers
from poolkit.parameters import UrlParameters, parse_duration
from poolkit.pool import HandoffPool
from poolkit.settings import DatabaseSettings
from poolkit.tls import TLSOptions
from poolkit.url import DEFAULT_PORT, DatabaseUrl

Password = str | SecretStr | Callable[[], str | Awaitable[str]]


class EngineOptions(NamedTuple):
    """What to hand to SQLAlchemy: ``create_async_engine(options.url, **options.kwargs)``."""

    url: URL
    kwargs: dict[str, Any]


def engine_options(
    settings: DatabaseSettings,
    *,
    password: Password | None = None,
    server_settings: Mapping[str, Any] | None = None,
    observers: Sequence[Observer] = (),
    **engine_kwargs: Any,
) -> EngineOptions:
    """The URL and keyword arguments for SQLAlchemy's own ``create_async_engine``.

    Opens no connection; reads certificate files. A plain engine made from it has the pool
    settings, TLS, the bounded and retried connect and the pooler's profile;
    ``poolkit.create_async_engine`` adds ``StatementTimeout`` and per-statement limits.

    Args:
        settings: The configuration.
        password: In place of the settings' own: a string, or a callable, sync or async, asked at
            every physical connect.
        server_settings: PostgreSQL settings for every session, such as ``{"jit": "off"}``.
        observers: Told of every event of the connects and of the pool.
        engine_kwargs: SQLAlchemy's own; they win over the settings. ``connect_args``, and the
            ``server_settings`` in it, are merged key by key.

    Raises:
        ConfigurationError: Something cannot be honoured; names it and the remedy.
    """
    watching = Observers(observers)  # shared by the connects and the pool
    url = settings.database_url()
    found = settings.url_parameters()
    own_args = dict(engine_kwargs.pop("connect_args", None) or {})
    session = _session(settings, found, {**(server_settings or {}), **_pop_settings(own_args)})
    driver = _with_both_caches(found.driver | own_args)
    _check_driver(driver, settings.pooler, engine_kwargs.get("isolation_level"), session)
    statement_limit = parse_duration(session["statement_timeout"])
    options, context = _tls(driver.pop("ssl", None), found.tls)
    connect_args: dict[str, Any] = {
        **_location(url),
        "timeout": settings.connection_timeout,
        "ssl": options.mode if options.mode in ("allow", "prefer") else context or False,
        **({"direct_tls": True} if options.direct else {}),
        **driver,
        "server_settings": session,
        "command_timeout": _backstop(driver, statement_limit),
    }
    secret = _revealed(driver.get("password", password))
    if callable(secret):
        connect_args["password"] = secret
    elif secret is not None:  # in the URL it is masked wherever it is shown
        connect_args.pop("password", None)
        url = url.with_password(secret)
    if settings.pooler == "transaction":
        connect_args |= {"prepared_statement_cache_size": 0, "statement_cache_size": 0}
    connect_args.setdefault(
        "async_creator_fn",
        Connector(
            pooler=settings.pooler,
            keepalive=found.keepalive,
            tls=context,
            shuffle_hosts=found.shuffle_hosts,
            session_limit=statement_limit,
            caches_wanted=_wants_caches(driver),
            observers=watching,
        ),
    )
    pool = _pool_defaults(settings, engine_kwargs, connect_args.get("timeout"), watching)
    defaults = _engine_defaults(settings) | pool
    if engine_kwargs.get("poolclass", 0) is None:
        del engine_kwargs["poolclass"]  # as to SQLAlchemy: the default
    return EngineOptions(
        url.sqlalchemy(), defaults | engine_kwargs | {"connect_args": connect_args}
    )


def connect_kwargs(
    settings: DatabaseSettings,
    *,
    password: Password | None = None,
    server_settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The keyword arguments for asyncpg's own ``connect``, as for a LISTEN or a COPY.

    The same address, TLS, timeouts and application name as the engine's; without its retries and
    its detection of poolers. Opens no connection; reads certificate files.

    Args:
        settings: The configuration.
        password: In place of the settings' own: a string, or a callable, sync or async.
        server_settings: PostgreSQL settings for the session, such as ``{"jit": "off"}``.

    Raises:
        ConfigurationError: Something cannot be honoured; names it and the remedy.
    """
    url, kwargs = engine_options(settings, password=password, server_settings=server_settings)
    arguments = url.translate_connect_args(username="user") | kwargs["connect_args"]
    if settings.pooler == "transaction":  # which refuses the others
        session = arguments["server_settings"]
        arguments["server_settings"] = {k: session[k] for k in session.keys() & STARTUP_SAFE}
    if isinstance(arguments.get("port"), list):
        arguments["port"] = [port or DEFAULT_PORT for port in arguments["port"]]
    return {name: value for name, value in arguments.items() if name not in _SQLALCHEMYS_OWN}


_SQLALCHEMYS_OWN = frozenset(
    {"async_creator_fn", "prepared_statement_cache_size", "prepared_statement_name_func"}
)
"""Connect arguments that its dialect takes out before it calls asyncpg."""


def _pop_settings(connect_args: dict[str, Any]) -> dict[str, Any]:
    return dict(connect_args.pop("server_settings", None) or {})


def _session(
    settings: DatabaseSettings, found: UrlParameters, own: Mapping[str, Any]
) -> dict[str, str]:
    """PostgreSQL's settings for every session; the caller's own win over the URL's."""
    merged = {
        "application_name": settings.application_name,
        "statement_timeout": milliseconds(settings.statement_timeout),
    }
    if settings.lock_timeout:
        merged["lock_timeout"] = milliseconds(settings.lock_timeout)
    if settings.idle_in_transaction_timeout:
        merged["idle_in_transaction_session_timeout"] = milliseconds(
            settings.idle_in_transaction_timeout
        )
    merged |= found.server_settings
    for name, value in own.items():
        if value is not None:
            merged[name] = str(value)
        elif name == "statement_timeout":
            merged[name] = "0"  # an explicit None is off, not the default
        else:
            merged.pop(name, None)
    try:
        merged["statement_timeout"] = milliseconds(parse_duration(merged["statement_timeout"]))
    except ValueError as error:
        raise ConfigurationError(f"server_settings: statement_timeout={error}") from None
    for name, value in merged.items():
        assignment(name, value)  # refuses what is no setting's name
    return merged


def _check_driver(
    driver: dict[str, Any], pooler: str, isolation_level: Any, session: Mapping[str, str]
) -> None:
    def variable(field: str) -> str:
        return f"DATABASE_{field}".upper()

    for problem in cache_problems(driver, pooler, variable):
        raise ConfigurationError(problem)
    if pooler != "transaction":
        return
    if driver.get("prepared_statement_name_func"):
        raise ConfigurationError(
            "prepared_statement_name_func contradicts DATABASE_POOLER=transaction: named"
            " statements stay on the pooler's server connections for ever. Leave it out"
        )
    lost = session.keys() - STARTUP_SAFE - MET_WITHOUT_TRANSACTION
    if isolation_level == "AUTOCOMMIT" and lost:
        raise autocommit_refused(lost)


def _with_both_caches(driver: dict[str, Any]) -> dict[str, Any]:
    """The two caches are one setting: where one is off, so is the other."""
    sizes = ("statement_cache_size", "prepared_statement_cache_size")
    off = any(driver.get(name) == 0 for name in sizes)
    return (dict.fromkeys(sizes, 0) if off else {}) | driver


def _wants_caches(driver: Mapping[str, Any]) -> bool:
    return any(
        driver.get(name)
        for name in (
            "statement_cache_size",
            "prepared_statement_cache_size",
            "prepared_statement_name_func",
        )
    )


def _tls(own: Any, asked: TLSOptions) -> tuple[TLSOptions, ssl.SSLContext | None]:
    """The mode and the shared context; ``connect_args["ssl"]`` wins over the URL."""
    if isinstance(own, ssl.SSLContext):
        return TLSOptions(mode="require", direct=asked.direct), own
    if own is not None:
        mode = {True: "verify-full", False: "disable"}.get(own, own)
        asked = TLSOptions(mode=str(mode), root=asked.root, certificate=asked.certificate)
    options = tls.resolve(asked)
    return options, tls.create_context(options)


def _location(url: DatabaseUrl) -> dict[str, Any]:
    """Several hosts and sockets, as the driver takes them; one TCP host is in the URL itself."""
    if len(url.addresses) == 1:
        (address,) = url.addresses
        if not address.is_socket:
            return {}
        return {"host": address.host} | ({"port": address.port} if address.port else {})
    if not url.addresses:
        return {}
    return {
        "host": [address.host for address in url.addresses],
        "port": [address.port for address in url.addresses],
    }


def _backstop(driver: Mapping[str, Any], statement_limit: float) -> float | None:
    """The client's own limit; the caller's wins, and there None and 0 both mean none."""
    if "command_timeout" in driver:
        return driver["command_timeout"] or None
    return statement_limit + BACKSTOP_MARGIN if statement_limit else None


def _revealed(password: Password | None) -> Any:
    return password.get_secret_value() if isinstance(password, SecretStr) else password


def _engine_defaults(settings: DatabaseSettings) -> dict[str, Any]:
    return {"echo": settings.echo, "module": BoundedDbapi()}


def _pool_defaults(
    settings: DatabaseSettings,
    own: Mapping[str, Any],
    connect_timeout: float | None,
    observers: Observers,
) -> dict[str, Any]:
    """What the settings say of the pool, as far as the pool in use takes it."""
    if own.get("pool") is not None:
        return {}
    poolclass: type[Pool] = own.get("poolclass") or HandoffPool
    values = {
        "pool_size": settings.pool_size,
        "max_overflow": settings.max_overflow,
        "pool_timeout": settings.pool_timeout,
        "pool_use_lifo": settings.pool_use_lifo,
        "pool_recycle": settings.pool_recycle or -1,
        "pool_pre_ping": settings.pool_pre_ping,
        "pool_max_waiting": settings.pool_max_waiting,
        "pool_overload_after": settings.pool_overload_after,
        "pool_max_connecting": settings.pool_max_connecting,
        "pool_connect_timeout": connect_timeout or 0.0,
        "pool_recycle_jitter": settings.pool_recycle_jitter,
        "pool_idle_timeout": settings.pool_idle_timeout,
        "pool_min_idle": settings.pool_min_idle,
        "pool_keepalive": settings.pool_keepalive,
        "pool_ping_idle": settings.pool_ping_idle,
        "pool_ping_timeout": settings.pool_ping_timeout,
        "leak_threshold": settings.leak_threshold,
        "pool_name": settings.pool_name,
        "observers": observers,
    }
    accepted = {
        name
        for cls in poolclass.__mro__
        for name in inspect.signature(vars(cls).get("__init__", Pool.__init__)).parameters
        if cls is not object
    }
    return {"poolclass": poolclass} | {
        name: value
        for name, value in values.items()
        if name in accepted or name.removeprefix("pool_") in accepted
    }
