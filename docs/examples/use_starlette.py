"""Starlette: one engine for the life of the application, one transaction for each request."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from poolkit import classify, drain, get_engine, session, warm_up


@asynccontextmanager
async def lifespan(_app: Starlette) -> AsyncIterator[None]:
    engine = get_engine()
    await warm_up(engine, 1)
    yield
    await drain(engine, timeout=20)
    await engine.dispose()  # ready for the next start on this loop, as in tests


async def database(_request: Request) -> Response:
    async with session() as opened:
        name = await opened.scalar(text("SELECT current_database()"))
    return JSONResponse(name)  # after the block: what is answered is committed


async def on_error(_request: Request, error: Exception) -> Response:
    status = classify(error).http_status
    if status < HTTPStatus.SERVICE_UNAVAILABLE:  # nothing that passes by itself
        raise error
    return Response(status_code=status, headers={"Retry-After": "1"})


app = Starlette(
    routes=[Route("/database", database)],
    lifespan=lifespan,
    exception_handlers={SQLAlchemyError: on_error},
)


# The rest only shows that it works.
async def main() -> None:
    """Ask the application, without a network between."""
    import httpx  # noqa: PLC0415

    transport = httpx.ASGITransport(app)
    async with lifespan(app), httpx.AsyncClient(transport=transport) as client:
        print((await client.get("http://app/database")).json())


if __name__ == "__main__":
    import asyncio

    asyncio.run(main())
