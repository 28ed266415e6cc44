"""Fixtures for pytest, there once poolkit is installed: a PostgreSQL to test on, and its faults."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from poolkit.testing import FaultProxy, PostgresServer

# What the fixtures need is imported in them: every test run loads this module.


@pytest.fixture(scope="session")
def poolkit_postgres() -> Iterator[PostgresServer]:
    """A throwaway PostgreSQL for the whole test run; see `poolkit.testing.postgres`."""
    from poolkit.testing import postgres  # noqa: PLC0415

    with postgres() as server:
        yield server


@pytest.fixture
def poolkit_faults(poolkit_postgres: PostgresServer) -> Iterator[FaultProxy]:
    """A `poolkit.testing.FaultProxy` before `poolkit_postgres`, new for each test."""
    from poolkit.testing import FaultProxy  # noqa: PLC0415

    with FaultProxy(poolkit_postgres) as proxy:
        yield proxy
