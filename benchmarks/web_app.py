"""The application that is measured: ``python -m benchmarks.web_app CONTESTANT``.

Prints its port, and serves until it is terminated.
"""

import argparse
import contextlib
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Annotated, Any
from urllib.parse import urlsplit

import uvicorn
from fastapi import APIRouter, Depends, FastAPI
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from benchmarks.web_names import AUTOCOMMIT, SESSION, SIZE, USUAL


class Base(DeclarativeBase):
    """Of the models."""


class Item(Base):
    """What is read."""

    __tablename__ = "items"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    colour: Mapped[str]
    price: Mapped[int]
    stock: Mapped[int]


def make_app(name: str) -> FastAPI:
    """The same endpoints on the contestant's sessions."""
    if name in {SESSION, AUTOCOMMIT}:
        from poolkit import fastapi  # noqa: PLC0415 (the others do without)

        return _with_endpoints(FastAPI(lifespan=fastapi.lifespan()), getattr(fastapi, name))
    return _with_endpoints(FastAPI(), _by_hand(pre_ping=name == USUAL))


def _by_hand(*, pre_ping: bool) -> Any:
    """As it stands in tutorials."""
    url = urlsplit(os.environ["DATABASE_URL"])._replace(scheme="postgresql+asyncpg").geturl()
    engine = create_async_engine(url, pool_size=SIZE, max_overflow=0, pool_pre_ping=pre_ping)
    sessions = async_sessionmaker(engine, expire_on_commit=False)

    async def get_db() -> AsyncIterator[AsyncSession]:
        async with sessions() as session:
            yield session
            await session.commit()

    return Annotated[AsyncSession, Depends(get_db)]


def _with_endpoints(app: FastAPI, session_dep: Any) -> FastAPI:
    router = APIRouter()

    @router.get("/orm/{key}")
    async def orm(key: int, session: session_dep) -> dict[str, Any]:
        item = await session.get(Item, key)
        return {"id": item.id, "name": item.name, "colour": item.colour, "price": item.price}

    @router.get("/core/{key}")
    async def core(key: int, session: session_dep) -> dict[str, Any]:
        columns = select(Item.id, Item.name, Item.colour, Item.price)
        return dict((await session.execute(columns.where(Item.id == key))).mappings().one())

    @router.get("/cpu")
    async def cpu() -> float:
        return time.process_time()

    app.include_router(router)
    return app


def main() -> None:
    """Serve, with what uvicorn finds installed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.web_app", description=__doc__)
    parser.add_argument("name")
    app = make_app(parser.parse_args().name)
    config = uvicorn.Config(app, log_level="warning", access_log=False)
    # uvicorn ends by the signal that it was sent; here that is no failure.
    signal.signal(signal.SIGTERM, lambda *_: None)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        print(listening.getsockname()[1], flush=True)
        with _profiled(os.environ.get("PROFILE")):
            uvicorn.Server(config).run([listening])


@contextmanager
def _profiled(file: str | None) -> Iterator[None]:
    """Where the time goes, written to the file."""
    if file is None:
        yield
        return
    import cProfile  # noqa: PLC0415 (for those who ask)

    profile = cProfile.Profile()
    with contextlib.ExitStack() as stack:
        stack.callback(profile.dump_stats, file)
        with profile:
            yield


if __name__ == "__main__":
    main()
