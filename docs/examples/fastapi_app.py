"""FastAPI: one engine for the life of the application, one session for each request."""

from fastapi import FastAPI
from sqlalchemy import text

from poolkit.fastapi import AutocommitSessionDep, SessionDep, lifespan

app = FastAPI(lifespan=lifespan())


@app.put("/notes/{name}")
async def write(name: str, session: SessionDep) -> str:
    insert = text("INSERT INTO notes VALUES (:name) ON CONFLICT DO NOTHING")
    await session.execute(insert, {"name": name})
    return name  # committed before the answer is sent


@app.get("/notes")
async def read(session: AutocommitSessionDep) -> list[str]:
    return list(await session.scalars(text("SELECT name FROM notes")))


# The rest only shows that it works.
async def main() -> None:
    """Ask the application, without a network between."""
    import httpx  # noqa: PLC0415

    from poolkit import session  # noqa: PLC0415

    transport = httpx.ASGITransport(app)
    async with (
        lifespan()(app),
        httpx.AsyncClient(transport=transport, base_url="http://app") as client,
    ):
        async with session() as opened:
            await opened.execute(text("CREATE TABLE notes (name text)"))
        print((await client.put("/notes/first")).json())
        print((await client.get("/notes")).json())
        async with session() as opened:
            await opened.execute(text("DROP TABLE notes"))


if __name__ == "__main__":
    import asyncio

    asyncio.run(main())
