"""TLS with a verified server, on a throwaway PostgreSQL with an authority of its own."""

import asyncio

from sqlalchemy import text

from poolkit import CertificateNotTrusted, create_async_engine
from poolkit.testing import postgres

ENCRYPTED = text("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")


async def main() -> None:
    """Connect without and with the authority's certificate."""
    async with postgres(tls=True) as server:
        engine = create_async_engine(f"{server.url}?sslmode=verify-full")
        try:
            await engine.connect()
        except CertificateNotTrusted as error:
            print(type(error).__name__, "after", error.attempts, "attempt")
        await engine.dispose()

        url = f"{server.url}?sslmode=verify-full&sslrootcert={server.ca_file}"
        engine = create_async_engine(url)
        async with engine.connect() as connection:
            print("encrypted:", await connection.scalar(ENCRYPTED))
        await engine.dispose()


asyncio.run(main())
