"""The same on uvloop, whose sockets and TLS are its own."""

import asyncio

import pytest
from sqlalchemy import text

from poolkit import StatementTimeout, create_async_engine

uvloop = pytest.importorskip("uvloop")


@pytest.mark.parametrize("query", ["sslmode=disable", "sslmode=prefer", "sslmode=verify-full"])
def test_connects_and_keeps_its_limits(tls_server, query: str) -> None:
    """TCP keepalive, TLS and both timeouts work."""

    async def main() -> None:
        url = f"{tls_server.url}?{query}&sslrootcert={tls_server.ca_file}"
        engine = create_async_engine(url)
        async with engine.connect() as connection:
            with pytest.raises(StatementTimeout):
                await connection.execute(
                    text("SELECT pg_sleep(60)"), execution_options={"statement_timeout": 0.1}
                )
        hasty = create_async_engine(url, connect_args={"command_timeout": 0.1})
        async with hasty.connect() as connection:
            with pytest.raises(StatementTimeout):
                await connection.execute(text("SELECT pg_sleep(60)"))
        await engine.dispose()
        await hasty.dispose()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
