"""The documentation is true: examples run, outputs are as shown, links and names exist."""

import builtins
import os
import re
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy.exc

import poolkit
import poolkit.testing
from poolkit import errors
from poolkit.settings import DatabaseSettings
from poolkit.testing import postgres

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
EXAMPLES = sorted((DOCS / "examples").glob("*.py"))
PARTS = sorted((DOCS / "examples").glob("*/**/*.py"))  # of a project; tests/recipes runs it

NEEDS = {"fastapi_app.py": ("fastapi", "httpx"), "test_orders.py": ("pytest_asyncio",)}
NEEDS |= {"test_faults.py": ("pytest_asyncio",)}
NEEDS |= {"test_fastapi_orders.py": ("fastapi", "httpx", "anyio")}
NEEDS |= {"fastapi_streaming.py": ("fastapi", "httpx")}
NEEDS |= {"prometheus_fastapi.py": ("fastapi", "httpx", "prometheus_client")}
NEEDS |= dict.fromkeys(("answer_faults.py", "status_page.py"), ("fastapi", "httpx"))
NEEDS |= {"prometheus_server.py": ("prometheus_client",)}
NEEDS |= {"use_logfire.py": ("logfire",)}
NEEDS |= {"use_sqlmodel.py": ("sqlmodel",), "use_starlette.py": ("starlette", "httpx")}
NEEDS |= {"sqlmodel_fastapi.py": ("sqlmodel", "fastapi", "httpx"), "write_scripts.py": ("typer",)}
NEEDS |= {
    "use_litestar.py": ("litestar", "httpx"),
    "use_advanced_alchemy.py": ("advanced_alchemy",),
}
NEEDS |= {"export_metrics.py": ("opentelemetry.sdk",)}
NEEDS |= {"serve_app.py": ("fastapi",), "gunicorn_conf.py": ("gunicorn", "uvicorn_worker")}
NEEDS |= {"celery_tasks.py": ("celery",)}
EXTRA_ENVIRONMENT = {"first_engine.py": {"DATABASE_STATEMENT_TIMEOUT": "1"}}
EXTRA_ENVIRONMENT |= {"use_logfire.py": {"LOGFIRE_ENABLED": "true"}}
EXTRA_ENVIRONMENT |= {"prometheus_fastapi.py": {"DATABASE_TELEMETRY": "metrics"}}
EXTRA_ENVIRONMENT |= {"prometheus_server.py": {"DATABASE_TELEMETRY": "metrics"}}
NOT_OURS = {
    "DATABASE_CONNECTION_POOL_URL",
    "DATABASE_POOL_SZE",
    "DATABASE_USERNAME",
}  # others', misspelt
MAKE_FAULTS = {
    f"{name}.py" for name in ("connect_errors", "handle_faults", "shut_down", "throwaway", "tls")
}
MAKE_FAULTS |= {"answer_faults.py"}
LONGEST_LOOSE_SNIPPET = 2


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def without_code(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture(scope="module")
def database_url():
    with postgres() as server:
        yield f"{server.url}?sslmode=disable"


def run(example: Path, url: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """As a reader would: a script by itself, tests by pytest; no settings but the URL."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DATABASE_", "PG", "PYTEST"))}
    command = [sys.executable, str(example)]
    if example.name.startswith("test_"):
        config = cwd / "pytest.ini"
        config.write_text("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
        command[1:] = ["-m", "pytest", "-q", "-c", str(config), "-p", "no:cacheprovider"]
        command.append(str(example))
    kept["PYTHONDONTWRITEBYTECODE"] = "1"
    return subprocess.run(
        command,
        env=kept | {"DATABASE_URL": url} | EXTRA_ENVIRONMENT.get(example.name, {}),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def shown_outputs(example: str) -> list[str]:
    """What the pages show as the example's output."""
    block = re.compile(rf"<!-- output: {re.escape(example)} -->\n```text\n(.*?)```", re.DOTALL)
    return [shown for page in PAGES for shown in block.findall(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_example_runs_and_prints_what_its_page_shows(example, database_url, tmp_path):
    """Each example exits with 0 and prints what the pages show, `...` standing for anything."""
    for module in NEEDS.get(example.name, ()):
        pytest.importorskip(module)

    done = run(example, database_url, tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    # Where an example makes a fault, poolkit's log line of it is there.
    assert not re.search(r"Traceback|Warning", done.stderr), done.stderr
    assert done.stderr == "" or example.name in MAKE_FAULTS, done.stderr
    for shown in shown_outputs(example.name):
        pattern = re.escape(shown).replace(re.escape("..."), r"[^\n]*")
        assert re.fullmatch(pattern, done.stdout), done.stdout


def test_the_generated_parts_are_up_to_date():
    """`docs/generate.py --check` finds nothing to change."""
    done = subprocess.run(
        [sys.executable, str(DOCS / "generate.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr


def test_generation_does_not_depend_on_the_environment(tmp_path):
    """Whoever has `DATABASE_*` or a `.env` of their own generates the same pages."""
    (tmp_path / ".env").write_text("DATABASE_POOL_SIZE=3\n")
    done = subprocess.run(
        [sys.executable, str(DOCS / "generate.py"), "--check"],
        env=os.environ | {"DATABASE_POOL_SIZE": "7", "PGSSLMODE": "verify-ca"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["example", "output"])
def test_each_example_named_in_a_page_exists(kind):
    """The comments that mark examples and outputs name files that are there."""
    mark = re.compile(rf"<!-- {kind}: (\S+) -->")
    named = {name for page in PAGES for name in mark.findall(page.read_text(encoding="utf-8"))}

    files = {str(file.relative_to(DOCS / "examples")) for file in (*EXAMPLES, *PARTS)}
    assert named <= files


def test_each_example_is_in_a_page():
    """No example file is left over."""
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)

    assert [e.name for e in EXAMPLES if f"<!-- example: {e.name} -->" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_python_of_more_than_two_lines_is_an_example(page):
    """A snippet that is not run is at most two lines long."""
    text = re.sub(r"<!-- example: \S+ -->\n```python.*?```", "", page.read_text(), flags=re.DOTALL)

    for snippet in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        lines = [line for line in snippet.splitlines() if line]
        assert len(lines) <= LONGEST_LOOSE_SNIPPET, snippet


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_relative_links_resolve(page):
    """Each link to a file leads to a file, and its anchor to a heading."""
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.is_file(), link
        assert not anchor or anchor in anchors(file), link


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *EXAMPLES], ids=page_id)
def test_variables_exist(page):
    """Each `DATABASE_*` variable in the pages is a setting, or the file form of one."""
    known = {DatabaseSettings.variable(name) for name in DatabaseSettings.model_fields}
    known |= {f"{name}_FILE" for name in known} | NOT_OURS
    named = set(re.findall(r"\bDATABASE_[A-Z_]+[A-Z]\b", page.read_text(encoding="utf-8")))

    assert named <= known


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_urls_in_text_blocks_are_accepted(page):
    """Each connection string that a page shows is taken as it stands."""
    for block in re.findall(r"```text\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for url in re.findall(r"^postgres(?:ql)?://\S+$", block, re.MULTILINE):
            assert DatabaseSettings(url=url).database_url().addresses, url


def test_pages_name_no_place_of_this_machine():
    """No page or example holds the path of the directory that it is in."""
    for page in [*PAGES, *EXAMPLES]:
        assert str(ROOT) not in page.read_text(encoding="utf-8"), page


@pytest.mark.parametrize("name", [*poolkit.__all__, *poolkit.testing.__all__])
def test_public_names_are_in_the_api_reference(name):
    """Each public name is in the reference."""
    assert f"`{name}`" in (DOCS / "reference" / "api.md").read_text(encoding="utf-8")


def error_tree() -> list[tuple[int, str, str]]:
    """Depth, name and further parent of each line of the tree in the reference of errors."""
    page = (DOCS / "reference" / "errors.md").read_text(encoding="utf-8")
    tree = re.findall(r"```text\n(.*?)```", page, re.DOTALL)[0]
    lines = re.findall(r"^( *)(\w+)(?: +also (\S+))?$", tree, re.MULTILINE)
    return [(len(indent) // 4, name, also) for indent, name, also in lines]


def test_all_errors_are_in_the_tree():
    """The tree in the reference names every exception once."""
    assert sorted(name for _, name, _ in error_tree()) == sorted(errors.__all__)


def test_the_tree_of_errors_is_true():
    """Each exception has the parents that the reference gives it."""
    elsewhere = {"ssl.SSLCertVerificationError": ssl.SSLCertVerificationError}
    elsewhere |= {"socket.gaierror": socket.gaierror}
    above = [sqlalchemy.exc.SQLAlchemyError, sqlalchemy.exc.SQLAlchemyError]
    for depth, name, also in error_tree():
        error = getattr(errors, name)
        assert issubclass(error, above[depth])
        if also:
            assert issubclass(error, elsewhere.get(also) or getattr(builtins, also))
        above[depth + 1 :] = [error]


def test_check_prints_the_lines_that_its_page_shows(database_url):
    """Each line of the page's sample of `poolkit check` has its like in the real output."""
    pytest.importorskip("typer")
    pytest.importorskip("rich")
    page = (DOCS / "how-to" / "check-a-deployment.md").read_text(encoding="utf-8")
    sample = re.findall(r"```text\n(.*?)```", page, re.DOTALL)[0]

    done = subprocess.run(
        [sys.executable, "-m", "poolkit.cli", "check"],
        env=os.environ | {"DATABASE_URL": database_url, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert shape(done.stdout) == shape(sample)


def shape(text: str) -> list[str]:
    """The lines without what differs from server to server: addresses, names and numbers."""
    lines = [line.rstrip() for line in text.strip().splitlines()][1:]
    return [re.sub(r"[\d.]+( (ms|us|s)\b)?", "N", line) for line in lines]
