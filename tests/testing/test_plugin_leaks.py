"""``poolkit_no_leaks`` fails the test that left a connection out, and says who took it."""

from types import SimpleNamespace

import pytest

from poolkit import pytest_plugin

pytest_plugins = ["pytester"]

CODE = """
    import asyncio, pytest
    from sqlalchemy import text
    from sqlalchemy.ext.asyncio import create_async_engine
    from poolkit import session

    kept = []

    @pytest.fixture(autouse=True)
    def _url(poolkit_environ): ...

    @pytest.fixture(scope="module")
    def of_the_module(poolkit_settings):
        runner = asyncio.Runner()
        engine = create_async_engine(poolkit_settings.database_url().sqlalchemy())
        connection = runner.run(_begun(engine))
        yield
        runner.run(connection.close())
        runner.run(engine.dispose())
        runner.close()

    async def _begun(engine):
        return await engine.connect()

    async def test_nothing_left(poolkit_session, poolkit_engine, of_the_module):
        await poolkit_session.execute(text("SELECT 1"))
        async with poolkit_engine.connect(), session() as own:
            await own.execute(text("SELECT 1"))

    async def test_kept(poolkit_engine):
        async def forgetful():
            kept.append(await poolkit_engine.connect())
        await asyncio.create_task(forgetful(), name="the culprit")

    async def test_forgotten(poolkit_engine):
        await (await poolkit_engine.connect()).execute(text("SELECT 1"))

    async def test_of_another_engine(poolkit_settings):
        engine = create_async_engine(poolkit_settings.database_url().sqlalchemy())
        kept.append(await engine.connect())
        await engine.dispose()

    async def test_nothing_left_after_that(poolkit_session):
        await poolkit_session.execute(text("SELECT 1"))
"""

CONFIG = """
[pytest]
asyncio_mode = auto
asyncio_default_fixture_loop_scope = session
asyncio_default_test_loop_scope = session
filterwarnings = ignore
"""


@pytest.mark.parametrize("how", ["ini", "usefixtures"])
def test_the_right_tests_fail(pytester, server, monkeypatch, how):
    """Kept, forgotten, or of another engine; not what a fixture of more tests holds."""
    monkeypatch.setenv("POOLKIT_URL", server.url)
    pytester.makefile(".ini", pytest=CONFIG + ("poolkit_no_leaks = true" if how == "ini" else ""))
    mark = "    pytestmark = pytest.mark.usefixtures('poolkit_no_leaks')\n"
    pytester.makepyfile(CODE + (mark if how == "usefixtures" else ""))

    done = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-p", "no:looptime_plugin")

    done.assert_outcomes(passed=5, errors=3)
    done.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_kept*",
            "the test left a connection out*",
            "*taken at *test_the_right_tests_fail.py:*, in forgetful by the task 'the culprit'",
            "*ERROR at teardown of test_forgotten*",
            "*taken at *, in test_forgotten by the task *",
            "*ERROR at teardown of test_of_another_engine*",
        ]
    )


@pytest.mark.parametrize(
    ("ini", "fixtures", "watched"),
    [(False, [], False), (False, ["poolkit_no_leaks"], True), (True, [], True)],
)
def test_nothing_is_watched_unasked(ini, fixtures, watched):
    """Without the fixture and the option a leak is nobody's business."""
    registered = []
    manager = SimpleNamespace(register=lambda plugin, name: registered.append(name))
    config = SimpleNamespace(getini=lambda _: ini, pluginmanager=manager)

    pytest_plugin.pytest_collection_modifyitems(config, [SimpleNamespace(fixturenames=fixtures)])

    assert bool(registered) is watched
