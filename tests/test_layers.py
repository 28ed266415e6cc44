"""The package's shape: imports point downward, and nothing heavy is loaded unasked."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import poolkit

SOURCE = Path(poolkit.__file__).parent
LAYERS = (
    {"errors", "moments", "faults", "events", "reports", "_version"},
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
    {"cli", "pytest_plugin", "telemetry"},
)
LEAVES = {"cli", "pytest_plugin", "telemetry", "testing"}


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


def test_importing_poolkit_loads_nothing_it_does_not_need() -> None:
    """No command line, no telemetry, no web framework, no test tool."""
    code = (
        "import sys, poolkit; print([name for name in ('typer', 'rich', 'logfire', 'fastapi',"
        " 'opentelemetry', 'pytest', 'poolkit.testing', 'poolkit.cli') if name in sys.modules])"
    )
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
