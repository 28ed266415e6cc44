"""Two small projects use the plugin as a stranger would, in a plain pytest."""

import shutil
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

PROJECTS = Path(__file__).parent / "example_projects"


@pytest.mark.parametrize(
    ("project", "needs", "passed"),
    [("notes_service", ("fastapi", "httpx", "anyio"), 9), ("mail_worker", ("pytest_asyncio",), 6)],
)
def test_project(pytester, project, needs, passed):
    """Its tests pass, with warnings as errors and a server of its own."""
    for module in needs:
        pytest.importorskip(module)
    shutil.copytree(
        PROJECTS / project,
        pytester.path,
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("__pycache__"),
    )

    done = pytester.runpytest_subprocess("-W", "error", "-p", "no:looptime_plugin")

    done.assert_outcomes(passed=passed)
