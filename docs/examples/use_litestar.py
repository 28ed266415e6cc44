"""Litestar: one engine for the life of the application, one session for each request."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus

from litestar import Litestar, Request, Response, get
from litestar.di import NamedDependency, Provide
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from poolkit import classify, drain, get_engine, session, warm_up


@asynccontextmanager
async def lifespan(_app: Litestar) -> AsyncIterator[None]:
    engine = get_engine()
    await warm_up(engine, 1)
    yield
    await drain(engine, timeout=20)
    await engine.dispose()  # ready for the next start on this loop, as in tests


async def db_session() -> AsyncIterator[AsyncSession]:
    async with session() as opened:  # committed before the response is made
        yield opened


@get("/database")
async def database(db_session: NamedDependency[AsyncSession]) -> str:
    return str(await db_session.scalar(text("SELECT current_database()")))


def on_error(_request: Request, error: SQLAlchemyError) -> Response:
    status = classify(error).http_status
    if status < HTTPStatus.SERVICE_UNAVAILABLE:  # nothing that passes by itself
        raise error
    return Response({"status_code": status}, status_code=status, headers={"Retry-After": "1"})


app = Litestar(
    route_handlers=[database],
    dependencies={"db_session": Provide(db_session)},
    lifespan=[lifespan],
    exception_handlers={SQLAlchemyError: on_error},
)


# The rest only shows that it works.
async def main() -> None:
    """Ask the application, without a network between."""
    import logging  # noqa: PLC0415

    import httpx  # noqa: PLC0415

    logging.disable(logging.INFO)  # Litestar turns it on
    transport = httpx.ASGITransport(app)
    async with app.lifespan(), httpx.AsyncClient(transport=transport) as client:
        print((await client.get("http://app/database")).text)


if __name__ == "__main__":
    import asyncio

    asyncio.run(main())
