"""URL parameters: each is honoured, or refused by name."""

import re

import pytest

from poolkit.parameters import Keepalive, parse_duration, read_parameters, split_options
from poolkit.tls import TLSOptions

LIBPQ = """
    service user password passfile channel_binding connect_timeout dbname host hostaddr port
    client_encoding options application_name fallback_application_name keepalives keepalives_idle
    keepalives_interval keepalives_count tcp_user_timeout sslmode sslnegotiation sslcompression
    sslcert sslkey sslcertmode sslpassword sslrootcert sslcrl sslcrldir sslsni requirepeer
    require_auth min_protocol_version max_protocol_version ssl_min_protocol_version
    ssl_max_protocol_version gssencmode krbsrvname gsslib gssdelegation replication
    target_session_attrs load_balance_hosts servicefile
""".split()
IN_THE_URL_ITSELF = {"user", "password", "dbname", "host", "port"}


@pytest.mark.parametrize("name", sorted(set(LIBPQ) - IN_THE_URL_ITSELF))
def test_knows_every_parameter_of_libpq(name: str) -> None:
    """None of libpq's parameters is called unknown."""
    assert not any("unknown" in problem for problem in read_parameters({name: "x"}).problems)


@pytest.mark.parametrize(
    ("query", "where", "expected"),
    [
        ({"connect_timeout": "3"}, "settings", {"connection_timeout": 3.0}),
        ({"timeout": "2.5"}, "settings", {"connection_timeout": 2.5}),
        ({"application_name": "a"}, "settings", {"application_name": "a"}),
        ({"fallback_application_name": "f"}, "settings", {"application_name": "f"}),
        (
            {"application_name": "a", "fallback_application_name": "f"},
            "settings",
            {"application_name": "a"},
        ),
        ({"pgbouncer": "true"}, "settings", {"pooler": "transaction"}),
        ({"pgbouncer": "false"}, "settings", {}),
        ({"options": "-c statement_timeout=2s"}, "settings", {"statement_timeout": 2.0}),
        ({"options": "-c lock_timeout=500"}, "settings", {"lock_timeout": 0.5}),
        (
            {"options": "-c idle_in_transaction_session_timeout=1min"},
            "settings",
            {"idle_in_transaction_timeout": 60.0},
        ),
        ({"options": "-csearch_path=app,public"}, "server_settings", {"search_path": "app,public"}),
        ({"options": "--jit=off -c work_mem=8MB"}, "server_settings", {"jit": "off", "work_mem": "8MB"}),
        ({"options": "endpoint=ep-cool-1"}, "server_settings", {"options": "endpoint=ep-cool-1"}),
        ({"client_encoding": "UTF8"}, "server_settings", {}),
        ({"target_session_attrs": "read-write"}, "driver", {"target_session_attrs": "read-write"}),
        ({"statement_cache_size": "0"}, "driver", {"statement_cache_size": 0}),
        ({"command_timeout": "30"}, "driver", {"command_timeout": 30.0}),
        ({"passfile": "/p"}, "driver", {"passfile": "/p"}),
        ({"load_balance_hosts": "random"}, "shuffle_hosts", True),
        ({"sslmode": "verify-ca"}, "tls", TLSOptions(mode="verify-ca")),
        ({"ssl": "require"}, "tls", TLSOptions(mode="require")),
        ({"ssl": "true"}, "tls", TLSOptions(mode="require")),
        ({"ssl": "false"}, "tls", TLSOptions(mode="disable")),
        ({"sslnegotiation": "direct"}, "tls", TLSOptions(direct=True)),
        ({"sslcertmode": "disable"}, "tls", TLSOptions(send_certificate=False)),
        ({"channel_binding": "require"}, "tls", TLSOptions(channel_binding="require")),
        (
            {"keepalives_idle": "9", "keepalives_interval": "8", "keepalives_count": "7"},
            "keepalive",
            Keepalive(idle=9, interval=8, count=7),
        ),
        ({"keepalives": "0", "tcp_user_timeout": "2500"}, "keepalive", Keepalive(enabled=False, user_timeout=2.5)),
        ({"gssencmode": "prefer", "sslcompression": "0", "sslsni": "1"}, "problems", []),
    ],
)  # fmt: skip
def test_honours(query: dict[str, str], where: str, expected: object) -> None:
    """Each parameter lands where it takes effect."""
    found = read_parameters(query)

    assert getattr(found, where) == expected
    assert found.problems == []


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ({"foo": "1"}, "'foo' is unknown"),
        ({"SSLMODE": "require"}, "'SSLMODE' is unknown"),
        ({"schema": "app"}, "'schema' is unknown.*search_path"),
        ({"connection_limit": "5"}, "DATABASE_POOL_SIZE"),
        ({"statement_timeout": "5"}, "DATABASE_STATEMENT_TIMEOUT"),
        ({"sslmode": "no-verify"}, "'no-verify' is not one of disable, .*verify-full"),
        ({"ssl": "maybe"}, "ssl='maybe'"),
        ({"ssl": "true", "sslmode": "disable"}, "contradicts"),
        ({"connect_timeout": "soon"}, "connect_timeout='soon' is not a number"),
        ({"connect_timeout": "0"}, "every wait has an end"),
        ({"statement_cache_size": "many"}, "statement_cache_size='many'"),
        ({"command_timeout": "-1"}, "command_timeout='-1'"),
        ({"channel_binding": "maybe"}, "channel_binding='maybe'"),
        ({"target_session_attrs": "leader"}, "'leader' is not one of"),
        ({"gssencmode": "require"}, "gssencmode=require cannot be honoured"),
        ({"require_auth": "scram-sha-256"}, "'require_auth' cannot be honoured"),
        ({"requirepeer": "postgres"}, "'requirepeer' cannot be honoured"),
        ({"hostaddr": "10.0.0.1"}, "'hostaddr' cannot be honoured"),
        ({"replication": "database"}, "replication=database cannot be honoured"),
        ({"client_encoding": "latin1"}, "UTF8 only"),
        ({"min_protocol_version": "3.2"}, "protocol 3.0"),
        ({"keepalives_idle": "1.5"}, "keepalives_idle='1.5'"),
        ({"options": "-c statement_timeout=soon"}, "'soon' is not a PostgreSQL duration"),
        ({"prepared_statement_name_func": "x"}, "pass it in connect_args"),
    ],
)
def test_refuses_by_name(query: dict[str, str], says: str) -> None:
    """What is unknown, malformed or beyond the driver is refused and named; nothing is dropped."""
    (problem,) = read_parameters(query).problems
    assert re.search(says, problem)


def test_lists_every_problem() -> None:
    """Several bad parameters are all reported."""
    assert len(read_parameters({"foo": "1", "sslmode": "x", "connect_timeout": "y"}).problems) == 3


@pytest.mark.parametrize(
    ("text", "settings", "rest"),
    [
        ("", {}, ""),
        ("-c a=1", {"a": "1"}, ""),
        ("-ca=1 --b-c=2", {"a": "1", "b_c": "2"}, ""),
        (r"-c search_path=a,\ b", {"search_path": "a, b"}, ""),
        ("endpoint=ep-1 -c a=1", {"a": "1"}, "endpoint=ep-1"),
        ("-B 10", {}, "-B 10"),
        ("-c", {}, "-c"),
        ("-c geqo", {}, "-c geqo"),
    ],
)
def test_splits_options(text: str, settings: dict[str, str], rest: str) -> None:
    """Settings are taken out of ``options`` as the server reads them; the rest is kept."""
    assert split_options(text) == (settings, rest)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1500", 1.5), ("1500ms", 1.5), ("2s", 2.0), ("1 min", 60.0), ("1h", 3600.0), ("0", 0.0), ("1.5s", 1.5)],
)  # fmt: skip
def test_reads_postgresql_durations(text: str, seconds: float) -> None:
    """A bare number is milliseconds."""
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "1 fortnight", "-5"])
def test_refuses_what_is_no_duration(text: str) -> None:
    """Text is not taken for a number."""
    with pytest.raises(ValueError, match="not a PostgreSQL duration"):
        parse_duration(text)
