"""DatabaseSettings: sources, defaults, limits, contradictions, all problems in one message."""

import warnings
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError
from pydantic_settings import SettingsError
from sqlalchemy.engine import URL, make_url

from poolkit import ConfigurationError, DatabaseSettings, SettingsWarning, create_async_engine

URL_TEXT = "postgresql://u:s3cret@h:5433/d"

DEFAULTS = {
    "statement_timeout": 10.0,
    "connection_timeout": 10.0,
    "pool_timeout": 10.0,
    "pool_size": 10,
    "max_overflow": 5,
    "pool_max_waiting": None,
    "pool_overload_after": 1.0,
    "pool_max_connecting": 4,
    "pool_recycle": 7200.0,
    "pool_recycle_jitter": 0.1,
    "pool_idle_timeout": 600.0,
    "pool_min_idle": 0,
    "pool_keepalive": 0.0,
    "pool_pre_ping": True,
    "pool_ping_idle": 1.0,
    "pool_ping_timeout": 1.0,
    "pool_use_lifo": True,
    "leak_threshold": 0.0,
    "lock_timeout": 0.0,
    "idle_in_transaction_timeout": 0.0,
    "pooler": "auto",
    "application_name": "tests",
    "echo": False,
    "telemetry": "off",
    "telemetry_slow_checkout": 0.1,
    "telemetry_parameters": False,
    "telemetry_sqlcommenter": False,
    "telemetry_server_interval": 0.0,
    "pool_name": None,
    "logfire_enabled": False,
}


def problems(**arguments: Any) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        DatabaseSettings(**arguments)
    return [detail["msg"] for detail in caught.value.errors()]


@pytest.mark.parametrize(("name", "value"), DEFAULTS.items())
def test_defaults(name: str, value: object) -> None:
    """Each default is the documented one."""
    assert getattr(DatabaseSettings(url=URL_TEXT), name) == value


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("DATABASE_STATEMENT_TIMEOUT", "2.5", 2.5),
        ("DATABASE_CONNECTION_TIMEOUT", "3", 3.0),
        ("DATABASE_POOL_TIMEOUT", "0", 0.0),
        ("DATABASE_POOL_SIZE", "7", 7),
        ("DATABASE_MAX_OVERFLOW", "0", 0),
        ("DATABASE_POOL_MAX_WAITING", "50", 50),
        ("DATABASE_POOL_RECYCLE", "-1", -1.0),
        ("DATABASE_POOL_PRE_PING", "off", False),
        ("DATABASE_POOLER", "session", "session"),
        ("DATABASE_APPLICATION_NAME", "worker", "worker"),
        ("DATABASE_ECHO", "debug", "debug"),
        ("DATABASE_ECHO", "true", True),
        ("DATABASE_TELEMETRY", "full", "full"),
        ("LOGFIRE_ENABLED", "true", True),
    ],
)
def test_reads_the_environment(monkeypatch, variable: str, text: str, value: object) -> None:
    """A variable is read as its field's type."""
    monkeypatch.setenv("DATABASE_URL", URL_TEXT)
    monkeypatch.setenv(variable, text)

    settings = DatabaseSettings()

    assert getattr(settings, variable.removeprefix("DATABASE_").lower()) == value


def test_stronger_sources_win(monkeypatch, tmp_path: Path) -> None:
    """Arguments beat the environment, that beats .env, that beats a secrets directory."""
    (tmp_path / "secrets").mkdir()
    for name in ("url", "pool_size", "max_overflow", "echo", "statement_timeout"):
        value = URL_TEXT if name == "url" else "1"
        (tmp_path / "secrets" / f"database_{name}").write_text(value)
    (tmp_path / ".env").write_text(
        "DATABASE_POOL_SIZE=2\nDATABASE_MAX_OVERFLOW=2\nDATABASE_STATEMENT_TIMEOUT=2\nOTHER=x\n"
    )
    monkeypatch.setenv("DATABASE_POOL_SIZE", "3")
    monkeypatch.setenv("DATABASE_MAX_OVERFLOW", "3")

    settings, origins = DatabaseSettings.with_origins(
        pool_size=4, _secrets_dir=tmp_path / "secrets"
    )

    found = (settings.pool_size, settings.max_overflow, settings.statement_timeout, settings.echo)
    assert found == (4, 3, 2.0, True)
    assert origins == {
        "pool_size": "argument",
        "max_overflow": "environment",
        "statement_timeout": ".env",
        "echo": "secrets directory",
        "url": "secrets directory",
    }


def test_an_empty_variable_is_not_set(monkeypatch) -> None:
    """Compose files pass variables on as empty text."""
    monkeypatch.setenv("DATABASE_POOL_SIZE", "")

    assert DatabaseSettings(url=URL_TEXT).pool_size == 10


def test_another_prefix_for_a_second_database(monkeypatch) -> None:
    """A second database has variables of its own, and messages name them."""
    monkeypatch.setenv("DATABASE_URL", URL_TEXT)
    monkeypatch.setenv("REPORTS_URL", "postgresql://r/reports")
    monkeypatch.setenv("REPORTS_POOL_SIZE", "2")

    settings = DatabaseSettings(_env_prefix="REPORTS_")
    assert (settings.pool_size, str(settings.database_url())) == (2, "postgresql://r/reports")

    monkeypatch.setenv("REPORTS_POOL_SIZE", "none")
    (problem,) = problems(_env_prefix="REPORTS_")
    assert problem.startswith("REPORTS_POOL_SIZE='none'")
    assert DatabaseSettings.variable("url") == "DATABASE_URL"


def test_the_password_from_a_file(monkeypatch, tmp_path: Path) -> None:
    """DATABASE_PASSWORD_FILE is read, without its last newline, also for a URL that has none."""
    (tmp_path / "pw").write_text(" p@ss\n")
    monkeypatch.setenv("DATABASE_URL", "postgresql://u@h/d")
    monkeypatch.setenv("DATABASE_PASSWORD_FILE", str(tmp_path / "pw"))

    settings = DatabaseSettings()

    assert settings.database_url().password == " p@ss"
    assert settings.password == SecretStr(" p@ss")


def test_a_file_that_cannot_be_read(monkeypatch, tmp_path: Path) -> None:
    """A missing file is named with its variable, also by create_async_engine."""
    monkeypatch.setenv("DATABASE_URL_FILE", str(tmp_path / "nowhere"))

    with pytest.raises(SettingsError, match=r"DATABASE_URL_FILE=.*nowhere cannot be read"):
        DatabaseSettings()
    with pytest.raises(ConfigurationError, match="DATABASE_URL_FILE"):
        create_async_engine()


def test_a_value_and_a_file_for_it(monkeypatch, tmp_path: Path) -> None:
    """Giving the same setting twice is refused."""
    monkeypatch.setenv("DATABASE_URL", URL_TEXT)
    monkeypatch.setenv("DATABASE_PASSWORD", "a")
    monkeypatch.setenv("DATABASE_PASSWORD_FILE", str(tmp_path))

    with pytest.raises(
        SettingsError, match="DATABASE_PASSWORD and DATABASE_PASSWORD_FILE are both"
    ):
        DatabaseSettings()


class TestAddress:
    """The URL and the parts in its place."""

    def test_parts(self, monkeypatch) -> None:
        """Parts are raw: nothing in them needs escaping."""
        for name, value in {
            "HOST": "db", "PORT": "6543", "USER": "me@x", "PASSWORD": "p@s:/s%?#", "NAME": "a/b",
        }.items():  # fmt: skip
            monkeypatch.setenv(f"DATABASE_{name}", value)

        url = DatabaseSettings().database_url().sqlalchemy()

        assert url == URL.create("postgresql+asyncpg", "me@x", "p@s:/s%?#", "db", 6543, "a/b")

    def test_several_hosts_in_parts(self) -> None:
        """DATABASE_HOST takes a list, with ports or without."""
        url = DatabaseSettings(host="a,b:2", port=1, name="d").database_url()
        assert str(url) == "postgresql://a:1,b:2/d"

    def test_missing(self) -> None:
        """Nothing set: the message names the variable, shows an example and the other way."""
        (problem,) = problems()
        assert problem.startswith("DATABASE_URL is not set: set it to postgresql://user:password@")
        assert "DATABASE_HOST" in problem

    def test_parts_that_contradict_the_url(self) -> None:
        """Parts that say something else than the URL are refused, one sentence each."""
        found = problems(url=URL_TEXT, host="other", port=1, user="x", name="y", password="z")
        assert [sentence.split()[0] for sentence in found] == [
            f"DATABASE_{name}" for name in ("HOST", "PORT", "USER", "NAME", "PASSWORD")
        ]
        assert not any("s3cret" in sentence for sentence in found)

    def test_parts_that_agree_with_the_url(self) -> None:
        """Platforms that set both are welcome."""
        DatabaseSettings(url=URL_TEXT, host="h", port=5433, user="u", name="d", password="s3cret")

    def test_an_argument_outweighs_what_the_environment_says_otherwise(self, monkeypatch) -> None:
        """A URL given as an argument wins over parts in the environment, and the reverse."""
        monkeypatch.setenv("DATABASE_HOST", "elsewhere")
        monkeypatch.setenv("DATABASE_NAME", "other")
        monkeypatch.setenv("DATABASE_PASSWORD", "another")
        assert DatabaseSettings(url=URL_TEXT).database_url().addresses[0].host == "h"
        assert DatabaseSettings(url=URL_TEXT).database_url().password == "s3cret"
        assert DatabaseSettings(url="postgresql://h/d").database_url().password == "another"
        monkeypatch.delenv("DATABASE_PASSWORD")
        monkeypatch.setenv("DATABASE_URL", URL_TEXT)
        monkeypatch.delenv("DATABASE_HOST")
        monkeypatch.delenv("DATABASE_NAME")
        assert str(DatabaseSettings(host="x", name="y").database_url()) == "postgresql://x/y"

    def test_kubernetes_service_link(self, monkeypatch) -> None:
        """A service called `database` puts DATABASE_PORT=tcp://... into every pod."""
        monkeypatch.setenv("DATABASE_URL", URL_TEXT)
        monkeypatch.setenv("DATABASE_PORT", "tcp://10.0.0.1:5432")
        with pytest.warns(SettingsWarning, match="enableServiceLinks"):
            settings = DatabaseSettings()
        assert settings.port is None

    @pytest.mark.parametrize("given", [make_url(URL_TEXT), SecretStr(URL_TEXT), URL_TEXT])
    def test_kinds_of_url(self, given: object) -> None:
        """A URL may be text, a secret or SQLAlchemy's object."""
        settings = DatabaseSettings(url=given)
        assert settings.database_url().password == "s3cret"


class TestUrlParameters:
    """A URL's parameters speak for settings, unless a stronger source does."""

    URL = URL_TEXT + "?connect_timeout=3&options=-c%20statement_timeout=4s&application_name=a"

    def test_they_fill_in(self) -> None:
        """connect_timeout, options and application_name become settings, with their origin."""
        settings, origins = DatabaseSettings.with_origins(url=self.URL)

        found = (settings.connection_timeout, settings.statement_timeout, settings.application_name)
        assert found == (3.0, 4.0, "a")
        assert settings.pool_timeout == 3.0
        assert origins["connection_timeout"] == "the URL's parameters"

    def test_a_variable_wins_over_the_urls_own(self, monkeypatch) -> None:
        """The variable is the more specific of the two."""
        monkeypatch.setenv("DATABASE_URL", self.URL)
        monkeypatch.setenv("DATABASE_CONNECTION_TIMEOUT", "8")
        assert DatabaseSettings().connection_timeout == 8.0

    def test_an_argument_url_wins_over_variables(self, monkeypatch) -> None:
        """What the caller writes wins over the environment, parameters included."""
        monkeypatch.setenv("DATABASE_CONNECTION_TIMEOUT", "8")
        assert DatabaseSettings(url=self.URL).connection_timeout == 3.0


class TestSecrecy:
    """The password appears in no repr, dump or error."""

    def test_reprs(self) -> None:
        """Neither the URL's nor the part's."""
        settings = DatabaseSettings(url="postgresql://u@h/d", password="s3cret")
        other = DatabaseSettings(url=URL_TEXT)
        for text in (repr(settings), str(settings), repr(other), str(other.url)):
            assert "s3cret" not in text
        assert "s3cret" not in repr(other.model_dump())
        assert "s3cret" not in other.model_dump_json()
        assert "postgresql://u:***@h:5433/d" in repr(other)

    @pytest.mark.parametrize(
        "arguments",
        [
            {"url": "postgresql://u:s3cret@h:x/d"},
            {"url": "mysql://u:s3cret@h/d"},
            {"url": URL_TEXT, "password": ["s3cret"]},
            {"url": {"a": "s3cret"}},
            {"url": URL_TEXT, "password": "s3cret-other"},
        ],
    )
    def test_errors(self, arguments: dict[str, Any]) -> None:
        """Whatever is wrong, the message does not repeat it."""
        with pytest.raises(ValidationError) as caught:
            DatabaseSettings(**arguments)
        assert "s3cret" not in str(caught.value)
        assert "s3cret" not in repr(caught.value.errors())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"pool_size": 0}, "DATABASE_POOL_SIZE=0.*unlimited"),
        ({"pool_size": "x"}, "DATABASE_POOL_SIZE='x'.*valid integer.*; the default is 10"),
        ({"max_overflow": -1}, "DATABASE_MAX_OVERFLOW=-1.*unlimited"),
        ({"pool_keepalive": 7200}, "DATABASE_POOL_KEEPALIVE=7200 is not below DATABASE_POOL_RECYCLE=7200"),
        ({"pool_min_idle": 11}, "DATABASE_POOL_MIN_IDLE=11 is above DATABASE_POOL_SIZE=10"),
        ({"pool_ping_timeout": 3, "connection_timeout": 2}, "DATABASE_POOL_PING_TIMEOUT=3 is above"),
        ({"lock_timeout": 10}, "DATABASE_LOCK_TIMEOUT=10 is not below DATABASE_STATEMENT_TIMEOUT=10"),
        ({"statement_timeout": -1}, "DATABASE_STATEMENT_TIMEOUT=-1.*greater than or equal to 0"),
        ({"statement_timeout": "soon"}, "DATABASE_STATEMENT_TIMEOUT='soon'.*valid number"),
        ({"statement_timeout": float("inf")}, "DATABASE_STATEMENT_TIMEOUT=inf.*finite"),
        ({"connection_timeout": 0}, "DATABASE_CONNECTION_TIMEOUT=0.*greater than 0"),
        ({"pool_recycle_jitter": 1}, "DATABASE_POOL_RECYCLE_JITTER=1.*less than 1"),
        ({"pool_max_waiting": 0}, "DATABASE_POOL_MAX_WAITING=0"),
        ({"pooler": "pgbouncer"}, "DATABASE_POOLER='pgbouncer'.*'transaction'"),
        ({"telemetry": "on"}, "DATABASE_TELEMETRY='on'"),
        ({"application_name": "x" * 64}, "DATABASE_APPLICATION_NAME=.*63 bytes"),
        ({"pool_timout": 3}, "'pool_timout' is not a setting; did you mean pool_timeout?"),
        ({"url": URL_TEXT + "?foo=1"}, "DATABASE_URL: the parameter 'foo' is unknown"),
        ({"url": URL_TEXT + "?sslmode=disable&channel_binding=require"}, "channel_binding=require contradicts"),
        ({"url": URL_TEXT + "?statement_cache_size=0&prepared_statement_cache_size=9"}, "are one setting"),
        ({"url": URL_TEXT + "?statement_cache_size=9", "pooler": "transaction"}, "contradicts DATABASE_POOLER"),
        ({"url": URL_TEXT + "?statement_cache_size=9&pgbouncer=true"}, "contradicts DATABASE_POOLER"),
    ],
)  # fmt: skip
def test_refuses(arguments: dict[str, Any], says: str) -> None:
    """Each bad value and each contradiction: which setting, which value, why."""
    with pytest.raises(ValidationError, match=says):
        DatabaseSettings(**{"url": URL_TEXT} | arguments)


def test_reports_everything_at_once() -> None:
    """Malformed values and contradictions between the others come in one message."""
    found = problems(
        url="mysql://h/d", pool_size=0, statement_timeout=-1, pool_keepalive=9999, poll_size=3
    )

    assert [sentence.split("=")[0].split()[0] for sentence in found] == [
        "DATABASE_STATEMENT_TIMEOUT",
        "DATABASE_POOL_SIZE",
        "'poll_size'",
        "DATABASE_URL:",
        "DATABASE_POOL_KEEPALIVE",
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        {"connection_timeout": 0.3},
        {"pool_recycle": 60},
        {"statement_timeout": 0.1},
        {"pool_recycle": 0, "pool_keepalive": 9999},
        {"pool_size": 1, "max_overflow": 0},
        {"statement_timeout": 0, "lock_timeout": 60},
    ],
)
def test_accepts_one_setting_changed_alone(arguments: dict[str, Any]) -> None:
    """No default stands in the way of a sensible value of another setting."""
    DatabaseSettings(url=URL_TEXT, **arguments)


def test_none_is_off() -> None:
    """An explicit None for a duration is off, not the default."""
    assert DatabaseSettings(url=URL_TEXT, statement_timeout=None).statement_timeout == 0


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("DATABASE_POOL_SISE", "DATABASE_POOL_SIZE"),
        ("DATABASE_STATMENT_TIMEOUT", "DATABASE_STATEMENT_TIMEOUT"),
        ("DATABASE_PASSWORD_FIEL", "DATABASE_PASSWORD_FILE"),
        ("DATABASE_URI", "DATABASE_URL"),
        ("DATABASE_ULR", "DATABASE_URL"),
    ],
)
def test_warns_about_a_misspelt_variable(monkeypatch, variable: str, meant: str) -> None:
    """A variable near a known name is warned about with the likely name."""
    monkeypatch.setenv(variable, "1")
    with pytest.warns(SettingsWarning, match=f"{variable} in the environment.*{meant}"):
        DatabaseSettings(url=URL_TEXT)


def test_warns_about_a_misspelt_variable_in_the_env_file(tmp_path: Path) -> None:
    """The .env file is watched like the environment."""
    (tmp_path / ".env").write_text("DATABASE_POOL_SISE=3\n")
    with pytest.warns(SettingsWarning, match=r"DATABASE_POOL_SISE in \.env"):
        DatabaseSettings(url=URL_TEXT)


def test_leaves_strangers_alone(monkeypatch) -> None:
    """Variables of other tools that share the prefix are no business of ours."""
    for name in ("DATABASE_SERVICE_HOST", "DATABASE_REPLICA_REGION", "DATABASE_PORT_5432_TCP"):
        monkeypatch.setenv(name, "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DatabaseSettings(url=URL_TEXT)


def test_frozen_and_hashable() -> None:
    """Equal settings are one key; nothing can be changed afterwards."""
    one, two = DatabaseSettings(url=URL_TEXT), DatabaseSettings(url=URL_TEXT)
    assert {one: 1}[two] == 1
    assert one != DatabaseSettings(url=URL_TEXT, pool_size=9)
    with pytest.raises(ValidationError, match="frozen"):
        one.pool_size = 3


@pytest.mark.parametrize(
    ("argv0", "name"),
    [
        ("/srv/worker.py", "worker"),
        ("/usr/bin/uvicorn", "uvicorn"),
        ("/x/mypackage/__main__.py", "mypackage"),
        ("-c", "python"),
        ("", "python"),
        ("x" * 90, "x" * 63),
    ],
)
def test_the_program_names_itself(monkeypatch, argv0: str, name: str) -> None:
    """The application name is the script's or the module's, cut to what PostgreSQL keeps."""
    monkeypatch.setattr("sys.argv", [argv0])
    assert DatabaseSettings(url=URL_TEXT).application_name == name


def test_every_field_is_described() -> None:
    """The reference page is made from the descriptions."""
    for name, field in DatabaseSettings.model_fields.items():
        assert field.description, name
