"""Where settings come from, which source wins, and what is warned about on the way."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, cast

from pydantic import Secret
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsError,
)

from poolkit.errors import ConfigurationError
from poolkit.url import parse_url

PARTS = frozenset({"host", "port", "user", "name"})

_OTHER_NAMES = {
    "uri": "url",
    "dsn": "url",
    "hostname": "host",
    "username": "user",
    "pass": "password",
    "pwd": "password",
    "db": "name",
    "dbname": "name",
    "database": "name",
}
"""What other libraries call some of the settings; too short to be found by likeness."""

_SHORT = 4
"""Letters up to which one slip changes much of a name."""

ENVIRONMENT, DOTENV, PARAMETERS = "environment", ".env", "the URL's parameters"
"""Origins of values; each other one is a file's or an argument's."""

PREFIX = "DATABASE_"
prefix: ContextVar[str] = ContextVar("prefix", default=PREFIX)
"""The prefix of the settings under construction; messages name variables by it."""

_origins: ContextVar[dict[str, str] | None] = ContextVar("origins", default=None)


class SettingsWarning(UserWarning):
    """The environment holds something that was not taken as it may have been meant."""


class MisspeltSetting(SettingsWarning):
    """A variable is near a setting's name; the message has the likely one."""


@contextmanager
def recording() -> Iterator[dict[str, str]]:
    """While it is open, the origin of each value is written into the dictionary it gives."""
    found: dict[str, str] = {}
    token = _origins.set(found)
    try:
        yield found
    finally:
        _origins.reset(token)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``; did you mean ...?`` if a known name is near."""
    near = _nearest(name.lower(), known)
    return f"; did you mean {near}?" if near else ""


def _nearest(name: str, known: Iterable[str]) -> str | None:
    if name in _OTHER_NAMES:
        return _OTHER_NAMES[name]
    cutoff = 0.65 if len(name) <= _SHORT else 0.75
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=cutoff)
    return near[0] if near else None


def _has_password(url: object) -> bool:
    text = url.get_secret_value() if isinstance(url, Secret) else url
    try:
        return parse_url(str(text)).password is not None
    except ConfigurationError:
        return False


class Layered(PydanticBaseSettingsSource):
    """All sources as one, so that a URL and its parts win or lose together."""

    def __init__(
        self,
        settings_cls: type[BaseSettings],
        *,
        argument: PydanticBaseSettingsSource,
        environment: PydanticBaseSettingsSource,
        dotenv: PydanticBaseSettingsSource,
        secrets: PydanticBaseSettingsSource,
        url_fields: Callable[[object], dict[str, Any]],
    ) -> None:
        super().__init__(settings_cls)
        self._argument = argument
        self._environment = cast("EnvSettingsSource", environment)
        self._dotenv = cast("EnvSettingsSource", dotenv)
        self._secrets = secrets
        self._url_fields = url_fields

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:  # noqa: ARG002, D102
        return None, field_name, False  # part of the interface; __call__ does all the work

    def __call__(self) -> dict[str, Any]:
        """The merged values; records origins and warns about misspelt variables."""
        prefix.set(self._environment.env_prefix)
        values: dict[str, Any] = {}
        origins = _origins.get()
        for origin, found in self._layers():
            url = found.get("url") if "url" not in values else None
            for name, value in self._admitted(found, values).items():
                values[name] = value
                if origins is not None:
                    origins[name] = origin
            if "url" in values and values["url"] is url:
                for name, value in self._url_fields(url).items():
                    if values.setdefault(name, value) is value and origins is not None:
                        origins.setdefault(name, PARAMETERS)
        self._warn_misspelt(self._environment.env_vars, "the environment")
        self._warn_misspelt(self._dotenv.env_vars, ".env")
        return values

    def _layers(self) -> Iterator[tuple[str, dict[str, Any]]]:
        yield "argument", self._argument()
        for label, source in ((ENVIRONMENT, self._environment), (DOTENV, self._dotenv)):
            found = self._known(source())
            self._drop_service_link(found)
            yield label, found
            yield f"file named in {label}", self._from_files(source.env_vars, found)
        yield "secrets directory", self._known(self._secrets())

    def _admitted(self, found: dict[str, Any], so_far: Mapping[str, Any]) -> dict[str, Any]:
        """What a weaker source may add: no parts to a stronger URL, no URL to stronger parts."""
        barred = set(so_far)
        if "url" in so_far:
            barred |= PARTS
            if _has_password(so_far["url"]):
                barred.add("password")
        if PARTS & so_far.keys():
            barred.add("url")
        return {name: value for name, value in found.items() if name not in barred}

    def _known(self, found: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in found.items() if k in self.settings_cls.model_fields}

    def _from_files(self, variables: Mapping[str, str | None], set_too: Mapping[str, Any]) -> Any:
        values = {}
        for name in self.settings_cls.model_fields:
            variable = f"{self._environment.env_prefix}{name}_file".lower()
            path = variables.get(variable)
            if not path:
                continue
            if name in set_too:
                direct = variable.removesuffix("_file")
                raise SettingsError(
                    f"{direct.upper()} and {variable.upper()} are both set: unset one of them"
                )
            values[name] = _read(variable.upper(), path)
        return values

    def _drop_service_link(self, found: dict[str, Any]) -> None:
        """Kubernetes sets ``DATABASE_PORT=tcp://...`` in every pod if a service is so named."""
        if str(found.get("port", "")).startswith("tcp://"):
            warnings.warn(
                f"DATABASE_PORT={found.pop('port')} is Kubernetes' link to a service named"
                " `database`, and is ignored: set enableServiceLinks: false in the pod",
                SettingsWarning,
                stacklevel=2,
            )

    def _warn_misspelt(self, variables: Mapping[str, str | None], where: str) -> None:
        start = self._environment.env_prefix.lower()
        known = {name.lower() for name in self.settings_cls.model_fields}
        files = {f"{name}_file" for name in known}
        for variable in variables:
            name = variable.lower().removeprefix(start)
            if not start or name == variable.lower() or name in known | files:
                continue
            near = _nearest(name, known | files)
            if near:
                warnings.warn(
                    f"{variable.upper()} in {where} is not a setting; did you mean"
                    f" {start.upper()}{near.upper()}?",
                    MisspeltSetting,
                    stacklevel=2,
                )


def _read(variable: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SettingsError(f"{variable}={path} cannot be read: {reason}") from None
