"""The package's shape: imports point downward, and nothing heavy is loaded unasked."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import poolkit

SOURCE = Path(poolkit.__file__).parent
LAYERS = (
    {"errors", "moments", "faults", "events", "reports", "loops", "_version"},
    {"url", "tls", "parameters", "sources", "contradictions", "settings"},
    {"scouts", "race", "addresses", "connect_failures", "route", "opening"}
    | {"driver", "connect", "dbapi"},
    {"pool"},
    {
        "options",
        "engine",
        "timeouts",
        "translation",
        "lifecycle",
        "logs",
        "attempts",
        "transactions",
        "sessions",
        "registry",
    },
    {"testing"},
    {"cli", "fastapi", "pytest_plugin", "telemetry"},
)
HEAVY = {"typer", "rich", "logfire", "fastapi", "opentelemetry", "pytest"}
HEAVY |= {"poolkit.testing", "poolkit.cli", "poolkit.fastapi", "poolkit.telemetry"}
LEAVES = {"cli", "fastapi", "pytest_plugin", "telemetry", "testing"}


def layer(module: str) -> int:
    return next(level for level, names in enumerate(LAYERS) if module in names)


def imports(path: Path) -> set[str]:
    """poolkit's own modules that a file imports at run time, by their first name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "poolkit":
            found |= {
                alias.name
                for alias in node.names
                if (SOURCE / alias.name).with_suffix(".py").exists()
            }
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("poolkit."):
            found.add(node.module.split(".")[1])
    return found


def test_every_module_has_its_layer() -> None:
    """A new module is given a place."""
    found = {
        path.stem if path.parent == SOURCE else path.relative_to(SOURCE).parts[0]
        for path in SOURCE.rglob("*.py")
    } - {"__init__"}
    assert found == set().union(*LAYERS)


def test_imports_point_downward() -> None:
    """No module imports one of a higher layer, and nothing imports a leaf."""
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).parts
        module = parts[0].removesuffix(".py")
        if module == "__init__":
            continue
        for imported in imports(path) - {module}:
            assert layer(imported) <= layer(module), f"{path} imports {imported}"


def test_only_the_demo_needs_a_server() -> None:
    """The library does not depend on its test helpers."""
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).parts
        if parts[0].removesuffix(".py") not in LEAVES:
            assert not imports(path) & LEAVES, path


@pytest.mark.parametrize(
    ("statement", "not_needed"),
    [
        ("import poolkit", {"sqlalchemy", "asyncpg", "pydantic", "poolkit.engine"}),
        ("import poolkit.pytest_plugin", {"sqlalchemy", "asyncpg", "pydantic", "poolkit.testing"}),
        ("from poolkit import create_async_engine", HEAVY),
        ("from poolkit import *", HEAVY),
    ],
)
def test_an_import_loads_nothing_it_does_not_need(statement: str, not_needed: set[str]) -> None:
    """No command line, no telemetry, no web framework, no test tool; at first nothing at all."""
    code = f"import sys\n{statement}\nprint(sorted({not_needed!r} & sys.modules.keys()))"
    # Where Logfire is installed, it has pydantic load it.
    env = os.environ | {"PYDANTIC_DISABLE_PLUGINS": "__all__"}
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    assert (printed.stdout.strip(), printed.stderr) == ("[]", "")


def test_the_root_is_curated() -> None:
    """``__all__`` is sorted and names what is there."""
    assert poolkit.__all__ == sorted(poolkit.__all__)
    assert all(hasattr(poolkit, name) for name in poolkit.__all__)
    assert set(poolkit.__all__) <= set(dir(poolkit))


def test_type_checkers_see_the_same_root() -> None:
    """``__init__.pyi`` has the names of ``__init__.py``, from the same modules."""
    tree = ast.parse((SOURCE / "__init__.pyi").read_text())
    stated = {
        alias.name: (node.module or "").removeprefix("poolkit.")
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    listed = [ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign)]
    assert (stated, listed) == (poolkit._ORIGINS, [poolkit.__all__])


def test_a_submodule_is_there_without_an_import_of_its_own() -> None:
    """``import poolkit; poolkit.errors.PoolTimeout``; what is not there is an AttributeError."""
    assert poolkit.errors.PoolTimeout is poolkit.PoolTimeout
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        poolkit.nothing_of_the_kind  # noqa: B018
