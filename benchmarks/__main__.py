"""``python -m benchmarks``: all in one run, one table, and the pages."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
import time
from pathlib import Path

from benchmarks import (
    cold,
    cpu,
    crowd,
    dispose,
    failing,
    goodput,
    latency,
    report,
    roundtrips,
    telemetry,
    waits,
    web,
)
from benchmarks.model import Benchmark, Section
from poolkit.testing import PostgresServer, postgres

BENCHMARKS: dict[str, Benchmark] = {
    "roundtrips": roundtrips.run,
    "latency": latency.run,
    "cpu": cpu.run,
    "telemetry": telemetry.run,
    "web": web.run,
    "waits": waits.run,
    "failing": failing.run,
    "cold": cold.run,
    "goodput": goodput.run,
    "crowd": crowd.run,
    "dispose": dispose.run,
}
PAGES = Path(__file__).parent.parent / "docs" / "benchmarks"
LONGEST = 180.0  # seconds for one benchmark; none comes near unless something hangs


def main() -> int:
    """Run what was asked for; the exit status says whether it ran, not what it found."""
    arguments = _arguments()
    for name in list(os.environ):
        if name.startswith(("DATABASE_", "PG")):
            del os.environ[name]
    names = [name for name in BENCHMARKS if not arguments.only or name in arguments.only]
    began = time.monotonic()
    with postgres() as server:
        sections = asyncio.run(_run(server, names, quick=arguments.quick))
        version = server.version_string
    report.show(sections)
    took = time.monotonic() - began
    print(f"\n{took:.0f} s")
    directory = arguments.output
    if directory is None and not arguments.quick and not arguments.only:
        directory = PAGES
    if directory is not None:
        report.write(sections, directory, postgres=version, took=took)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under a minute, rough figures")
    parser.add_argument(
        "--only", action="append", choices=list(BENCHMARKS), help="one of them; may be repeated"
    )
    parser.add_argument(
        "--output", type=Path, help="where to write; docs/benchmarks after a run of everything"
    )
    return parser.parse_args()


def _ignore(_loop: asyncio.AbstractEventLoop, _context: object) -> None:
    pass


async def _run(server: PostgresServer, names: list[str], *, quick: bool) -> dict[str, Section]:
    # Abandoned statements and vanished peers, which are the point of some, are no news.
    asyncio.get_running_loop().set_exception_handler(_ignore)
    logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)
    sections = {}
    for name in names:
        print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
        began = time.monotonic()
        async with asyncio.timeout(LONGEST):
            sections[name] = await BENCHMARKS[name](server, quick=quick)
        print(f"{time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    return sections


if __name__ == "__main__":
    sys.exit(main())
