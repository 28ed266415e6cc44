"""The pytest plugin: its fixtures are there for whoever has poolkit installed."""

import pytest

pytest_plugins = ["pytester"]

CONFIG = """
[pytest]
filterwarnings = error
asyncio_mode = {mode}
asyncio_default_fixture_loop_scope = function
"""


def passes(pytester: pytest.Pytester, code: str, *, passed: int, mode: str = "auto") -> None:
    pytester.makefile(".ini", pytest=CONFIG.format(mode=mode))
    pytester.makepyfile(code)
    run = pytester.runpytest_subprocess("-q", "-p", "no:cacheprovider", "-p", "no:looptime_plugin")
    run.assert_outcomes(passed=passed)


@pytest.mark.parametrize("scope", ["function", "session"])
def test_the_fixtures_work_in_async_tests(pytester, scope):
    """One server for the run, one proxy for each test, on whatever loop."""
    code = f"""
        import asyncpg, pytest
        pytestmark = pytest.mark.asyncio(loop_scope="{scope}")

        @pytest.mark.parametrize("_", [1, 2])
        async def test_faults(poolkit_postgres, poolkit_faults, _):
            connection = await asyncpg.connect(poolkit_faults.url)
            assert connection.get_settings().server_version
            assert poolkit_faults.stats.accepted == 1
            poolkit_faults.reset()
            with pytest.raises((OSError, asyncpg.PostgresConnectionError)):
                await connection.execute("SELECT 1")
            assert poolkit_faults.url != poolkit_postgres.url
    """
    passes(pytester, code, passed=2, mode="strict")


def test_the_fixtures_work_in_anyio_and_sync_tests(pytester):
    """anyio's plugin runs the loop, or nothing does."""
    pytest.importorskip("anyio")
    code = """
        import socket, asyncpg, pytest

        @pytest.fixture
        def anyio_backend():
            return "asyncio"

        @pytest.mark.anyio
        async def test_anyio(poolkit_faults):
            connection = await asyncpg.connect(poolkit_faults.url)
            hold = poolkit_faults.hold(before="SELECT 1")
            hold.release()
            assert await connection.fetchval("SELECT 1") == 1
            await connection.close()

        def test_sync(poolkit_faults):
            poolkit_faults.refuse()
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((poolkit_faults.host, poolkit_faults.port))
    """
    passes(pytester, code, passed=2, mode="strict")


def test_an_unused_plugin_loads_no_test_helpers(pytester):
    """Every test run loads the plugin; only its users pay for what it brings."""
    code = """
        import sys

        def test_nothing_is_loaded():
            assert "poolkit.pytest_plugin" in sys.modules
            heavy = {"sqlalchemy", "asyncpg", "pydantic", "pydantic_settings", "greenlet"}
            assert heavy & sys.modules.keys() == set()
            assert [name for name in sys.modules if name.startswith("poolkit.")] == [
                "poolkit.pytest_plugin"
            ]
    """
    pytester.makepyfile(code)
    run = pytester.runpytest_subprocess(
        "-p", "no:cacheprovider", "-p", "no:looptime_plugin", "-p", "no:logfire"
    )
    run.assert_outcomes(passed=1)


def test_the_plugin_needs_no_other_plugin(pytester, server):
    """Without pytest-asyncio and anyio the fixtures are there for what runs loops by itself."""
    code = """
        import asyncio, sys
        from sqlalchemy import text

        def test_sync(poolkit_session):
            assert asyncio.run(poolkit_session.scalar(text("SELECT 1"))) == 1
            assert {"pytest_asyncio", "anyio"} & sys.modules.keys() == set()
    """
    pytester.makepyfile(code)
    run = pytester.runpytest_subprocess(
        "-W", "error", "-p", "no:cacheprovider", "-p", "no:looptime_plugin", "-p", "no:logfire",
        "-p", "no:asyncio", "-p", "no:anyio", f"--poolkit-url={server.url}",
    )  # fmt: skip
    run.assert_outcomes(passed=1)
