"""``DatabaseSettings``: every ``DATABASE_*`` variable, its type, its default and its limits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    Secret,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from sqlalchemy.engine import URL

from poolkit import contradictions, sources
from poolkit.errors import ConfigurationError
from poolkit.parameters import UrlParameters, read_parameters
from poolkit.url import DatabaseUrl, parse_hosts, parse_url

Pooler = Literal["auto", "none", "session", "transaction"]
Telemetry = Literal["off", "metrics", "full"]

NAME_LIMIT = 63  # bytes that PostgreSQL keeps of an application_name (NAMEDATALEN - 1)
SECRET_FIELDS = frozenset({"url", "password"})


class SecretUrl(Secret[str]):
    """A database URL whose repr masks the password and shows the rest."""

    def _display(self) -> str:
        try:
            return str(parse_url(self.get_secret_value()))
        except ConfigurationError:
            return "**********"


def _as_url_text(value: object) -> object:
    if isinstance(value, URL):
        return value.render_as_string(hide_password=False)
    return value.get_secret_value() if isinstance(value, SecretStr) else value


def _program_name() -> str:
    """The script's or the module's name, as ``pg_stat_activity`` should show it."""
    path = Path(sys.argv[0] if sys.argv and sys.argv[0] not in ("", "-c") else "python")
    name = path.parent.name if path.name == "__main__.py" else path.name.removesuffix(".py")
    return name.encode()[:NAME_LIMIT].decode(errors="ignore") or "python"


_UNLIMITED = frozenset({"pool_size", "max_overflow"})
"""Fields whose lowest values mean unlimited to SQLAlchemy."""


def _none_is_off(value: object) -> object:
    return 0.0 if value is None else value


Seconds = Annotated[float, BeforeValidator(_none_is_off), Field(ge=0, allow_inf_nan=False)]
SecondsAbove0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class DatabaseSettings(BaseSettings):
    """What the engine is made from, read from the environment and checked as a whole.

    Each field is the variable ``DATABASE_`` + its name in capitals. Sources, strongest first:
    keyword arguments, the environment, files named by ``DATABASE_<NAME>_FILE``, ``.env``, a
    ``secrets_dir``; a URL's own parameters rank just below the source of the URL.
    ``DatabaseSettings(_env_prefix="REPORTS_")``
    reads a second database's. Frozen and hashable. Durations are seconds.

    Raises:
        pydantic.ValidationError: A ``ValueError`` that lists every problem at once, each with the
            variable, its value (never a password) and what to do.
    """

    model_config = SettingsConfigDict(
        env_prefix="DATABASE_",
        env_file=".env",
        env_file_encoding="utf-8",
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        validate_default=True,
    )
    without_prefix: ClassVar[frozenset[str]] = frozenset({"logfire_enabled"})

    url: Annotated[SecretUrl, BeforeValidator(_as_url_text)] | None = Field(
        default=None,
        description="The database: `postgres://`, `postgresql://` or `postgresql+asyncpg://` with"
        " any of libpq's parameters. Required, unless the parts below are given.",
    )
    host: str | None = Field(
        default=None,
        min_length=1,
        description="In place of the URL: host name, address, or directory of a Unix socket;"
        " several separated by commas.",
    )
    port: int | None = Field(
        default=None, ge=1, le=65535, description="In place of the URL: port; none means 5432."
    )
    user: str | None = Field(
        default=None, min_length=1, description="In place of the URL: the role to log in as."
    )
    password: SecretStr | None = Field(
        default=None,
        description="The password, raw: nothing in it needs escaping. Also for a URL that has"
        " none. `DATABASE_PASSWORD_FILE` names a file to read it from.",
    )
    name: str | None = Field(
        default=None,
        min_length=1,
        description="In place of the URL: the database; none means the user's name.",
    )
    statement_timeout: Seconds = Field(
        default=10.0,
        description="Seconds a statement may run. Enforced by the server (SQLSTATE 57014, the"
        " connection is kept); the client stops waiting 1 s later, for the case that the network"
        " is dead. 0 is off, on both sides.",
    )
    connection_timeout: SecondsAbove0 = Field(
        default=10.0,
        description="Seconds to establish one connection, all addresses, attempts and pauses"
        " counted in. There is no off.",
    )
    pool_timeout: Seconds = Field(
        default_factory=lambda data: data.get("connection_timeout", 10.0),
        description="Seconds to wait for a free connection when all are in use. 0 does not wait."
        " Default: the same as `DATABASE_CONNECTION_TIMEOUT`.",
    )
    pool_size: int = Field(
        default=10,
        ge=1,
        description="Connections that are kept. 0, which SQLAlchemy takes as unlimited, is"
        " refused.",
    )
    max_overflow: int = Field(
        default=5,
        ge=0,
        description="Connections beyond the pool size, closed when they come back. -1, which"
        " SQLAlchemy takes as unlimited, is refused.",
    )
    pool_max_waiting: int | None = Field(
        default=None,
        ge=1,
        description="Callers that may wait for a connection; more are refused at once. None, the"
        " default, is no limit.",
    )
    pool_overload_after: Seconds = Field(
        default=1.0,
        description="Seconds that the first in line has waited when the queue turns to newest"
        " first, until it is empty again; sooner, if callers are seen to give up sooner. 0 is"
        " always first come, first served.",
    )
    pool_max_connecting: int = Field(
        default=4, ge=1, description="Connects that may be under way at once, per pool."
    )
    pool_recycle: float = Field(
        default=7200.0,
        ge=-1,
        allow_inf_nan=False,
        description="Seconds of age at which a connection is replaced. 0 or -1 is off.",
    )
    pool_recycle_jitter: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        allow_inf_nan=False,
        description="Fraction by which each connection's own lifetime is shortened at random, so"
        " that they do not expire together. 0 is off.",
    )
    pool_idle_timeout: Seconds = Field(
        default=600.0,
        description="Seconds after which an idle connection above `DATABASE_POOL_MIN_IDLE` is"
        " closed, in the background. 0 is off.",
    )
    pool_min_idle: int = Field(
        default=0,
        ge=0,
        description="Idle connections to keep ready, at most `DATABASE_POOL_SIZE`.",
    )
    pool_keepalive: Seconds = Field(
        default=0.0,
        description="Seconds between heartbeats of an idle connection, in the background; less"
        " than `DATABASE_POOL_RECYCLE`. 0 is off.",
    )
    pool_pre_ping: bool = Field(
        default=True, description="Whether a connection that was idle is checked before use."
    )
    pool_ping_idle: Seconds = Field(
        default=1.0,
        description="Seconds of idleness after which a connection is checked before use. 0 checks"
        " at every checkout.",
    )
    pool_ping_timeout: SecondsAbove0 = Field(
        default_factory=lambda data: min(1.0, data.get("connection_timeout", 10.0)),
        description="Seconds that the check may take; at most `DATABASE_CONNECTION_TIMEOUT`."
        " Default: 1, or the connection timeout if that is shorter.",
    )
    pool_use_lifo: bool = Field(
        default=True,
        description="Whether the most recently used idle connection is taken first, so that the"
        " others can age out.",
    )
    leak_threshold: Seconds = Field(
        default=0.0,
        description="Seconds after which a connection still in use is reported, with its holder's"
        " task and stack. 0 is off.",
    )
    lock_timeout: Seconds = Field(
        default=0.0,
        description="Seconds that a statement may wait for a lock (SQLSTATE 55P03), less than"
        " `DATABASE_STATEMENT_TIMEOUT`. 0 leaves the server's own.",
    )
    idle_in_transaction_timeout: Seconds = Field(
        default=0.0,
        description="Seconds that a session may sit idle in a transaction before the server ends"
        " it. 0 leaves the server's own.",
    )
    pooler: Pooler = Field(
        default="auto",
        description="What stands between us and the server: `none`, `session` or `transaction`"
        " (PgBouncer's pool modes). `auto` finds out at the first connect, and takes any pooler"
        " for one in transaction mode.",
    )
    application_name: str = Field(
        default_factory=_program_name,
        min_length=1,
        description="Shown in `pg_stat_activity`, at most 63 bytes. Default: the program's name.",
    )
    echo: bool | Literal["debug"] = Field(
        default=False, description="As SQLAlchemy: log every statement; `debug` logs rows too."
    )
    telemetry: Telemetry = Field(
        default="off",
        description="`metrics` for the pool's metrics, `full` for statement spans besides.",
    )
    telemetry_slow_checkout: Seconds = Field(
        default=0.1,
        description="Seconds that a caller has to wait for a connection for the wait to become a"
        " span of its own. 0: every checkout is one.",
    )
    telemetry_parameters: bool = Field(
        default=False,
        description="Record statements' parameters and literals in spans. They may be secrets.",
    )
    telemetry_sqlcommenter: bool = Field(
        default=False,
        description="Append the span's `traceparent` to each statement as a comment, for the"
        " server's log. Every text is then new to the statement caches.",
    )
    telemetry_server_interval: Seconds = Field(
        default=0.0,
        description="Seconds between looks at how many connections the server has, of its"
        " `max_connections`. 0 is off.",
    )
    pool_name: str | None = Field(
        default=None,
        min_length=1,
        description="The pool's name in metrics. Default: `host:port/database`.",
    )
    logfire_enabled: bool = Field(
        default=False,
        validation_alias="logfire_enabled",
        description="Statement spans, pool metrics and pool events to Logfire.",
    )

    @classmethod
    def settings_customise_sources(  # noqa: D102 (pydantic-settings' own hook)
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (
            sources.Layered(
                settings_cls,
                argument=init_settings,
                environment=env_settings,
                dotenv=dotenv_settings,
                secrets=file_secret_settings,
                url_fields=_url_fields,
            ),
        )

    @classmethod
    def variable(cls, field: str, prefix: str | None = None) -> str:
        """The name of a field's environment variable."""
        if field in cls.without_prefix:
            return field.upper()
        return f"{sources.prefix.get() if prefix is None else prefix}{field}".upper()

    @classmethod
    def with_origins(cls, **arguments: Any) -> tuple[Self, dict[str, str]]:
        """The settings, and for each field that is not a default, where its value came from."""
        with sources.recording() as origins:
            return cls(**arguments), origins

    @model_validator(mode="wrap")
    @classmethod
    def _check_all(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Report bad fields and contradictions between the good ones together."""
        try:
            return cls._checked(data, handler)
        finally:
            sources.prefix.set(sources.PREFIX)  # no longer under construction

    @classmethod
    def _checked(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            settings, problems = handler(data), {}
        except ValidationError as error:
            problems = cls._field_problems(error)
            try:
                settings = handler({k: v for k, v in data.items() if k not in problems})
            except ValidationError:
                raise _combined(cls, list(problems.values())) from None
        sentences = list(problems.values())
        sentences += contradictions.find(settings, unknown=frozenset(problems), of=cls.variable)
        if sentences:
            raise _combined(cls, sentences)
        return settings

    @classmethod
    def _field_problems(cls, error: ValidationError) -> dict[str, str]:
        return {
            str(detail["loc"][0]): cls._sentence(str(detail["loc"][0]), dict(detail))
            for detail in error.errors(include_url=False)
            if detail["type"] != "default_factory_not_called"  # follows from another problem
        }

    @classmethod
    def _sentence(cls, name: str, detail: dict[str, Any]) -> str:
        field = cls.model_fields.get(name)
        if field is None:
            return f"{name!r} is not a setting{sources.did_you_mean(name, cls.model_fields)}"
        shown = "" if name in SECRET_FIELDS else f"={detail['input']!r}"
        meaning = f"{detail['msg'][0].lower()}{detail['msg'][1:]}"
        remedy = f"the default is {field.default}"
        if field.default is None or field.default_factory is not None:
            remedy = "leave it out for the default"
        elif name in _UNLIMITED and detail["type"] == "greater_than_equal":
            remedy = f"unlimited only moves the outage to the server, and {remedy}"
        return f"{cls.variable(name)}{shown}: {meaning}; {remedy}"

    def database_url(self) -> DatabaseUrl:
        """The URL, or the parts put together, with the password filled in."""
        if self.url is not None:
            url = parse_url(self.url.get_secret_value())
        else:
            addresses = parse_hosts(self.host or "", self.port)
            url = DatabaseUrl(addresses=addresses, user=self.user, database=self.name)
        if url.password is not None or self.password is None:
            return url
        return url.with_password(self.password.get_secret_value())

    def url_parameters(self) -> UrlParameters:
        """What the URL's parameters ask for."""
        return read_parameters(self.database_url().query)


def _url_fields(text: object) -> dict[str, Any]:
    """The fields for which the URL itself speaks; none if it is malformed (reported later)."""
    try:
        value = _as_url_text(text)
        secret = value.get_secret_value() if isinstance(value, Secret) else value
        return read_parameters(parse_url(str(secret)).query).settings
    except ConfigurationError:
        return {}


def _combined(cls: type[BaseSettings], sentences: list[str]) -> ValidationError:
    details = [
        InitErrorDetails(type=PydanticCustomError("setting", "{s}", {"s": s}), loc=(), input=None)
        for s in sentences
    ]
    return ValidationError.from_exception_data(cls.__name__, details, hide_input=True)
