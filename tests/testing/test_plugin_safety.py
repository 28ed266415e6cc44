"""The plugin's fixtures write to servers of this machine only, unless told otherwise."""

from types import SimpleNamespace

import pytest

from poolkit import pytest_plugin
from poolkit.testing._local import remote_host
from poolkit.url import parse_url

pytest_plugins = ["pytester"]

LOCAL = (
    "localhost",
    "LOCALHOST",
    "127.0.0.1",
    "127.8.0.2",
    "[::1]",
    "%2Ftmp",
    "",
    "localhost,[::1]",
)
REMOTE = ("db", "postgres", "db.example.com", "10.0.0.3", "192.168.0.1", "localhost.example.com")


@pytest.mark.parametrize("host", LOCAL)
def test_local(host):
    """The loopback addresses, their name, and Unix sockets."""
    assert remote_host(parse_url(f"postgresql://u:p@{host}/x")) is None


@pytest.mark.parametrize("host", REMOTE)
def test_remote(host):
    """Any other name or address, and one of them among several."""
    assert remote_host(parse_url(f"postgresql://u:p@{host}/x")) == host
    assert remote_host(parse_url(f"postgresql://u:p@localhost,{host}/x")) == host


def config(*, option: bool = False, ini: bool = False) -> SimpleNamespace:
    return SimpleNamespace(getoption=lambda _: option, getini=lambda _: ini)


@pytest.mark.parametrize(
    ("given", "variable", "allowed"),
    [
        (config(), None, False),
        (config(option=True), None, True),
        (config(ini=True), None, True),
        (config(), "1", True),
        (config(), "0", False),
        (config(), "", False),
    ],
)
def test_allowing(given, variable, allowed, monkeypatch):
    """By the command line, the configuration, or the environment."""
    if variable is not None:
        monkeypatch.setenv("POOLKIT_ALLOW_REMOTE", variable)
    assert pytest_plugin._allows_remote(given) is allowed


def test_every_fixture_that_would_connect_refuses(pytester):
    """Neither an overridden poolkit_settings nor a URL; and the password is nowhere."""
    pytester.makepyfile(
        test_settings="""
            import pytest
            from poolkit import DatabaseSettings

            @pytest.fixture
            def poolkit_settings():
                return DatabaseSettings(url="postgresql://me:s3cret@db.example.com/live")

            def test_engine(poolkit_engine): ...
            def test_session(poolkit_session): ...
            def test_sessionmaker(poolkit_sessionmaker): ...
            def test_dependency(poolkit_get_session): ...
            def test_events(poolkit_events): ...
            def test_database(poolkit_database): ...
            def test_environ(poolkit_environ): ...
        """,
        test_url="""
            def test_server(poolkit_postgres): ...
            def test_faults(poolkit_faults): ...
            def test_settings(poolkit_settings): ...
        """,
    )

    done = pytester.runpytest_subprocess(
        "--showlocals", "-p", "no:cacheprovider", "-p", "no:looptime_plugin",
        "--poolkit-url=postgresql://me:s3cret@other.example.com/live",
    )  # fmt: skip

    done.assert_outcomes(errors=10)
    text = done.stdout.str()
    assert text.count("poolkit_settings names the host db.example.com, which is not this") >= 7
    assert text.count("--poolkit-url (or POOLKIT_URL, poolkit_url) names the host other.") >= 3
    assert "--poolkit-allow-remote" in text
    assert "POOLKIT_ALLOW_REMOTE=1" in text
    assert "s3cret" not in text.replace("--poolkit-url=postgresql://me:s3cret", "")


def test_what_is_shown_to_whoever_asks(pytester):
    """``pytest --help`` has a group, ``--fixtures`` a sentence for each."""
    shown = pytester.runpytest_subprocess("--help").stdout
    shown.fnmatch_lines(["poolkit: tests on a real PostgreSQL:", "*--poolkit-url=URL*"])
    shown.fnmatch_lines(["*--poolkit-allow-remote*"])

    fixtures = pytester.runpytest_subprocess("--fixtures").stdout.str()
    public = [name for name in vars(pytest_plugin) if name.startswith("poolkit_")]
    assert len(public) >= 12
    for name in public:
        assert f"\n{name} " in fixtures, name
    assert "no docstring available" not in "".join(
        line for line in fixtures.splitlines() if "poolkit" in line
    )
