"""FastAPI: database faults as HTTP answers, and health endpoints."""

import httpx
from fastapi import FastAPI
from sqlalchemy import text

from poolkit.fastapi import SessionDep, install, lifespan

app = FastAPI(lifespan=lifespan())
install(app)


@app.get("/slow")
async def slow(session: SessionDep) -> None:
    await session.execute(text("SET LOCAL statement_timeout = 100"))
    await session.execute(text("SELECT pg_sleep(5)"))


# The rest only shows that it works.
async def main() -> None:
    """Ask the application, without a network between."""
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://app") as client,
    ):
        for path in ("/slow", "/health/live", "/health/ready"):
            answer = await client.get(path)
            print(answer.status_code, answer.text)


if __name__ == "__main__":
    import asyncio

    asyncio.run(main())
