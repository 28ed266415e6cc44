"""``python -m replays``: all of them, for each contestant, and the pages."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.metadata
import logging
import os
import platform
import time
from pathlib import Path
from types import ModuleType

from poolkit.testing import PostgresServer, postgres
from replays.engines import CONTESTANTS
from replays.model import Timeline
from replays.page import Replayed, as_lines, write

NAMES = (
    "listener",
    "sleeper",
    "dead",
    "bad_address",
    "zombies",
    "restart",
    "lost_commit",
    "cancel_storm",
    "conflicts",
)
PAGES = Path(__file__).parent.parent / "docs" / "replays"
LONGEST = 300.0
"""Seconds for one run; none comes near unless something hangs."""


def main() -> int:
    """Run what was asked for."""
    arguments = _arguments()
    for name in list(os.environ):
        if name.startswith(("DATABASE_", "PG")):
            del os.environ[name]
    logging.disable(logging.CRITICAL)  # connections are lost on purpose, by the hundred
    with postgres() as server:
        replayed = [_replay(name, server) for name in arguments.only or NAMES]
        version = server.version_string
    write(replayed, arguments.output, where=_where(version))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m replays", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=NAMES, help="these replays, no others")
    parser.add_argument("--output", type=Path, default=PAGES, help="where to write the pages")
    return parser.parse_args()


def _replay(name: str, server: PostgresServer) -> Replayed:
    module = importlib.import_module(f"replays.{name}")
    timelines = [asyncio.run(_run(module, server, contestant)) for contestant in CONTESTANTS]
    replayed = Replayed(name, module.TITLE, module.STORY, timelines)
    for line in as_lines([replayed]):
        print("  ".join(f"{cell:<18}" for cell in line.values()).rstrip(), flush=True)
    return replayed


async def _run(module: ModuleType, server: PostgresServer, contestant: str) -> Timeline:
    async with asyncio.timeout(LONGEST):
        timeline: Timeline = await module.run(server, contestant)
    return timeline


def _where(postgres_version: str) -> str:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("sqlalchemy", "asyncpg")]
    return (
        f"Written by `make replays` on {time.strftime('%Y-%m-%d')}: Python"
        f" {platform.python_version()}, {', '.join(versions)}, PostgreSQL {postgres_version},"
        f" {os.cpu_count()} cores, everything on 127.0.0.1. The tests of the project run poolkit's"
        " part and hold it to this."
    )


if __name__ == "__main__":
    raise SystemExit(main())
