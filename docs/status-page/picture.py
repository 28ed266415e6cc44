"""The pictures of the status page: an application in trouble, served for real, seen by Chromium.

Run: ``python docs/status-page/picture.py``. It needs ``chromium`` on the path, and FastAPI.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import uvicorn
from fastapi import FastAPI
from sqlalchemy import text

from poolkit import create_async_engine
from poolkit.fastapi import install
from poolkit.settings import DatabaseSettings
from poolkit.testing import FaultProxy, postgres

HERE = Path(__file__).parent
PICTURES = {
    "light.png": ("1180,1580", "/poolkit", ()),
    "dark.png": ("1180,1580", "/poolkit", ("--blink-settings=preferredColorScheme=0",)),
    "phone.png": ("500,2160", "/poolkit", ()),
    "ready.png": ("520,70", "/health/ready", ()),
}
CALM, BUSY, FULL = 45.0, 60.0, 12.0
"""Seconds."""


async def main(seconds: float) -> None:
    """Serve, make trouble, and take the pictures."""
    with postgres() as server:
        async with FaultProxy(server) as proxy, served(proxy.url) as base:
            await trouble(base, proxy, seconds)


@asynccontextmanager
async def served(url: str) -> AsyncIterator[str]:
    """The application, by uvicorn."""
    settings = DatabaseSettings(
        url=url,
        pool_size=8,
        max_overflow=2,
        pool_timeout=3,
        statement_timeout=2,
        leak_threshold=5,
        pool_name="orders",
    )
    engine = create_async_engine(settings=settings)
    app, over = FastAPI(), asyncio.Event()
    install(app, engine=engine, status_page=True)

    @app.get("/slow/{milliseconds}")
    async def work(milliseconds: int) -> str:
        async with engine.connect() as connection:
            await connection.execute(text("SELECT pg_sleep(:s)"), {"s": milliseconds / 1000})
        return "done"

    @app.get("/export")
    async def export() -> str:
        asyncio.current_task().set_name("nightly export")
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
            await over.wait()
        return "done"

    config = uvicorn.Config(app, port=0, log_level="error", lifespan="off")
    uvicorn_server = uvicorn.Server(config)
    serving = asyncio.create_task(uvicorn_server.serve())
    while not uvicorn_server.started:  # noqa: ASYNC110 (it has no event for that)
        await asyncio.sleep(0.05)
    port = uvicorn_server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        over.set()
        uvicorn_server.should_exit = True
        await serving
        await engine.dispose()


async def trouble(base: str, proxy: FaultProxy, scale: float) -> None:
    """Calm, then a restart of the database, then more callers than connections."""
    limits = httpx.Limits(max_connections=200)
    async with httpx.AsyncClient(base_url=base, timeout=30, limits=limits) as client:
        await client.get("/poolkit/data")
        await load(client, 3, CALM * scale)
        proxy.refuse()
        for connection in proxy.connections:
            connection.reset()
        await load(client, 3, 4 * scale)
        proxy.accept()
        await load(client, 14, BUSY * scale)
        await asyncio.gather(*(client.get("/slow/5000") for _ in range(3)))
        held = [asyncio.create_task(client.get("/export")) for _ in range(2)]
        await asyncio.sleep(0.2)
        pressed = asyncio.create_task(load(client, 40, FULL * scale + 60, 600))
        await asyncio.sleep(FULL * scale)
        for name, (size, path, options) in PICTURES.items():
            await picture(base + path, HERE / name, size, options)
        pressed.cancel()
        for task in held:
            task.cancel()
        await asyncio.gather(pressed, *held, return_exceptions=True)


async def load(client: httpx.AsyncClient, callers: int, seconds: float, work: int = 40) -> None:
    """So many callers, one request after the other."""
    ends = time.monotonic() + seconds

    async def caller() -> None:
        while time.monotonic() < ends:
            with contextlib.suppress(httpx.HTTPError):
                await client.get(f"/slow/{work}")
            await asyncio.sleep(0.02)

    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(caller())


async def picture(url: str, to: Path, size: str, options: tuple[str, ...]) -> None:
    """What Chromium shows of it after some seconds."""
    chromium = shutil.which("chromium") or sys.exit("chromium is not on the path")
    process = await asyncio.create_subprocess_exec(
        chromium,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--window-size={size}",
        "--virtual-time-budget=4000",
        f"--screenshot={to}",
        *options,
        url,
        stderr=asyncio.subprocess.DEVNULL,
    )
    await process.wait()


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0))
