"""engine_options: settings to SQLAlchemy's arguments, without a network."""

import ssl
from typing import Any

import asyncpg
import pytest
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import create_async_engine as sqlalchemys_own
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool, StaticPool

from poolkit import (
    ConfigurationError,
    DatabaseSettings,
    EngineOptions,
    HandoffPool,
    connect_kwargs,
    engine_options,
)

URL = "postgresql://u:s3cret@h:5433/d"


def options(url: str = URL, *, settings: dict[str, Any] | None = None, **kwargs) -> EngineOptions:
    return engine_options(DatabaseSettings(url=url, **(settings or {})), **kwargs)


def connect_args(url: str = URL, **kwargs) -> dict[str, Any]:
    return options(url, **kwargs).kwargs["connect_args"]


def test_the_defaults() -> None:
    """The production profile, with nothing said."""
    url, kwargs = options()

    assert url.render_as_string() == "postgresql+asyncpg://u:***@h:5433/d"
    pool = {name: value for name, value in kwargs.items() if name not in ("connect_args", "module")}
    assert pool == {
        "echo": False,
        "pool_size": 10,
        "max_overflow": 5,
        "pool_timeout": 10.0,
        "pool_recycle": 7200.0,
        "pool_pre_ping": True,
        "pool_use_lifo": True,
        "pool_max_waiting": None,
        "pool_overload_after": 1.0,
        "pool_max_connecting": 4,
        "pool_connect_timeout": 10.0,
        "pool_recycle_jitter": 0.1,
        "pool_idle_timeout": 600.0,
        "pool_min_idle": 0,
        "pool_keepalive": 0.0,
        "pool_ping_idle": 1.0,
        "pool_ping_timeout": 1.0,
        "leak_threshold": 0.0,
        "pool_name": None,
        "poolclass": HandoffPool,
        "observers": kwargs["connect_args"]["async_creator_fn"].observers,
    }
    args = kwargs["connect_args"]
    assert (args["timeout"], args["command_timeout"], args["ssl"]) == (10.0, 11.0, "prefer")
    assert args["server_settings"] == {"application_name": "tests", "statement_timeout": "10000"}
    assert not {"statement_cache_size", "prepared_statement_cache_size"} & args.keys()


def test_the_callers_arguments_win() -> None:
    """SQLAlchemy's own arguments win over the settings, and None stays None."""
    kwargs = options(pool_size=3, pool_timeout=None, pool_recycle=-1, pool_pre_ping=False).kwargs

    assert (kwargs["pool_size"], kwargs["pool_timeout"]) == (3, None)
    assert (kwargs["pool_recycle"], kwargs["pool_pre_ping"]) == (-1, False)


def test_connect_args_are_merged_key_by_key() -> None:
    """One connect argument, or one server setting, leaves the others as they are."""
    args = connect_args(
        connect_args={"timeout": 3, "server_settings": {"jit": "off", "application_name": "x"}},
        server_settings={"work_mem": "8MB", "jit": "on"},
    )

    assert args["timeout"] == 3
    assert args["command_timeout"] == 11.0
    assert args["server_settings"] == {
        "application_name": "x",
        "statement_timeout": "10000",
        "work_mem": "8MB",
        "jit": "off",
    }


@pytest.mark.parametrize(
    ("settings", "own", "server", "client"),
    [
        ({}, {}, "10000", 11.0),
        ({"statement_timeout": 2.5}, {}, "2500", 3.5),
        ({"statement_timeout": 0}, {}, "0", None),
        ({"statement_timeout": 0.0001}, {}, "1", 1.0001),
        ({}, {"command_timeout": 30}, "10000", 30),
        ({}, {"command_timeout": None}, "10000", None),
        ({}, {"command_timeout": 0}, "10000", None),
        ({}, {"server_settings": {"statement_timeout": "2min"}}, "120000", 121.0),
        ({}, {"server_settings": {"statement_timeout": 0}}, "0", None),
        ({}, {"server_settings": {"statement_timeout": None}}, "0", None),
    ],
)
def test_the_two_statement_timeouts(settings, own, server, client) -> None:
    """The client waits 1 s longer than the server allows; an explicit None or 0 is off."""
    args = connect_args(settings=settings, connect_args=own)

    assert args["server_settings"]["statement_timeout"] == server
    assert args["command_timeout"] == pytest.approx(client, rel=1e-3) if client else not client


def test_the_other_server_side_timeouts() -> None:
    """They are sent if set, and 0 leaves the server's own."""
    session = connect_args(settings={"lock_timeout": 2, "idle_in_transaction_timeout": 30})[
        "server_settings"
    ]
    assert session["lock_timeout"] == "2000"
    assert session["idle_in_transaction_session_timeout"] == "30000"


def test_the_poolclass_gets_what_it_takes() -> None:
    """Pools that have no size are given none; they still recycle and check."""
    assert "pool_size" not in options(poolclass=NullPool).kwargs
    assert "pool_timeout" not in options(poolclass=StaticPool).kwargs
    assert options(poolclass=NullPool).kwargs["pool_recycle"] == 7200.0
    assert options(poolclass=AsyncAdaptedQueuePool).kwargs["pool_size"] == 10


@pytest.mark.parametrize("poolclass", [None, NullPool, StaticPool, AsyncAdaptedQueuePool])
def test_sqlalchemy_takes_them(poolclass) -> None:
    """The result goes straight into SQLAlchemy's own create_async_engine."""
    own = {"poolclass": poolclass} if poolclass else {}
    url, kwargs = options(**own)
    engine = sqlalchemys_own(url, **kwargs)
    assert isinstance(engine.pool, poolclass or HandoffPool)


def test_recycle_off() -> None:
    """0 in the settings is SQLAlchemy's -1."""
    assert options(settings={"pool_recycle": 0}).kwargs["pool_recycle"] == -1


@pytest.mark.parametrize(
    ("query", "kind"),
    [("sslmode=disable", bool), ("sslmode=prefer", str), ("sslmode=require", ssl.SSLContext)],
)
def test_tls(query: str, kind: type) -> None:
    """`disable` is no TLS, `prefer` and `allow` are decided at the connect, others are a context."""
    assert isinstance(connect_args(f"{URL}?{query}")["ssl"], kind)


def test_channel_binding_is_met_by_verify_full() -> None:
    """Neon's channel_binding=require is never dropped."""
    context = connect_args(URL + "?sslmode=require&channel_binding=require")["ssl"]
    assert context.check_hostname
    assert context.verify_mode is ssl.CERT_REQUIRED


def test_the_callers_ssl_wins() -> None:
    """A context, True, False or a mode in connect_args takes the URL's place."""
    own = ssl.create_default_context()
    assert connect_args(connect_args={"ssl": own})["ssl"] is own
    assert connect_args(connect_args={"ssl": True})["ssl"].check_hostname
    assert connect_args(URL + "?sslmode=require", connect_args={"ssl": False})["ssl"] is False
    assert connect_args(connect_args={"ssl": "require"})["ssl"].verify_mode is ssl.CERT_NONE


def test_several_hosts_and_sockets() -> None:
    """They are given to the driver as lists; the URL shows them too."""
    args = connect_args("postgresql://u@a:1,b/d?target_session_attrs=read-write")
    assert (args["host"], args["port"]) == (["a", "b"], [1, None])
    assert args["target_session_attrs"] == "read-write"
    assert connect_args("postgresql:///d?host=/run/pg&port=1")["host"] == "/run/pg"


@pytest.mark.parametrize("given", [{"password": "t0ken"}, {"connect_args": {"password": "t0ken"}}])
def test_a_password_as_text_is_masked(given) -> None:
    """It goes into the URL, where every repr hides it."""
    made = options("postgresql://u@h/d", **given)
    assert made.url.password == "t0ken"
    assert "t0ken" not in repr(made)


def test_a_password_callable_is_asked_later() -> None:
    """It is handed on, not called."""

    def ask() -> str:
        raise AssertionError

    assert connect_args(password=ask)["password"] is ask


def test_a_transaction_pooler_has_no_caches() -> None:
    """Both statement caches are off."""
    args = connect_args(settings={"pooler": "transaction"})
    assert (args["statement_cache_size"], args["prepared_statement_cache_size"]) == (0, 0)


@pytest.mark.parametrize("name", ["statement_cache_size", "prepared_statement_cache_size"])
def test_one_cache_off_turns_the_other_off(name: str) -> None:
    """One alone decodes rows wrongly after a column's type changes."""
    args = connect_args(connect_args={name: 0})
    assert (args["statement_cache_size"], args["prepared_statement_cache_size"]) == (0, 0)


@pytest.mark.parametrize(
    ("settings", "kwargs", "says"),
    [
        ({}, {"connect_args": {"statement_cache_size": 0, "prepared_statement_cache_size": 5}}, "one setting"),
        ({"pooler": "transaction"}, {"connect_args": {"statement_cache_size": 5}}, "DATABASE_POOLER"),
        (
            {"pooler": "transaction"},
            {"connect_args": {"prepared_statement_name_func": str}},
            "prepared_statement_name_func",
        ),
        ({"pooler": "transaction", "lock_timeout": 1}, {"isolation_level": "AUTOCOMMIT"}, "lock_timeout"),
        (
            {"pooler": "transaction"},
            {"isolation_level": "AUTOCOMMIT", "server_settings": {"search_path": "a"}},
            "search_path",
        ),
        ({}, {"server_settings": {"a; drop table x": "1"}}, "not the name of a PostgreSQL setting"),
        ({}, {"server_settings": {"statement_timeout": "soon"}}, "statement_timeout='soon'"),
        ({}, {"connect_args": {"ssl": "sometimes"}}, "'sometimes' is not one of"),
    ],
)  # fmt: skip
def test_refuses_what_cannot_work(settings, kwargs, says) -> None:
    """Arguments against the pooler's mode, and malformed ones, when the engine is made."""
    with pytest.raises(ConfigurationError, match=says):
        options(settings=settings, **kwargs)


def test_no_poolclass_is_the_default_one() -> None:
    """None is what SQLAlchemy takes as not given."""
    assert options(poolclass=None).kwargs["poolclass"] is HandoffPool


# -- connect_kwargs ------------------------------------------------------------------------------


async def test_raw_asyncpg_gets_what_the_engine_has(tls_server):
    """TLS, timeouts, application name and the session's settings."""
    settings = DatabaseSettings(
        url=f"{tls_server.url}?sslmode=verify-full&sslrootcert={tls_server.ca_file}",
        application_name="listener",
        statement_timeout=7,
    )

    connection = await asyncpg.connect(**connect_kwargs(settings, server_settings={"jit": "off"}))
    shown = [
        await connection.fetchval(f"SHOW {name}")
        for name in ("application_name", "statement_timeout", "jit")
    ]
    encrypted = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
    assert (*shown, await connection.fetchval(encrypted)) == ("listener", "7s", "off", True)
    await connection.close()


async def test_raw_asyncpg_takes_a_password_callable_and_a_socket(server):
    async def password():
        return server.password

    settings = DatabaseSettings(url=server.socket_url)
    connection = await asyncpg.connect(**connect_kwargs(settings, password=password))
    assert await connection.fetchval("SELECT 1") == 1
    await connection.close()


async def test_raw_asyncpg_takes_several_hosts(server):
    """The first refuses, the second answers; one has no port of its own."""
    url = make_url(server.url).set(host=None, port=None)
    settings = DatabaseSettings(
        url=url.update_query_dict({"host": f"127.0.0.1:1,127.0.0.1:{server.port}"})
    )
    connection = await asyncpg.connect(**connect_kwargs(settings))
    await connection.close()

    several = connect_kwargs(DatabaseSettings(url="postgresql://u:p@h1:1,h2/d"))
    assert (several["host"], several["port"]) == (["h1", "h2"], [1, 5432])


def test_what_a_pooler_refuses_is_left_out():
    """PgBouncer takes the application name only."""
    settings = DatabaseSettings(url="postgresql://u@h/d", pooler="transaction")

    found = connect_kwargs(settings)

    assert found["server_settings"].keys() == {"application_name"}
    assert found["statement_cache_size"] == 0
