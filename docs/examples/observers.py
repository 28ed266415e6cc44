"""Watch an engine's connects: any callable that takes one event is an observer."""

import asyncio

from poolkit import ConnectionOpened, ConnectionOpenFailed, Event, create_async_engine


def watch(event: Event) -> None:
    """Log the connects, and count the failures elsewhere."""
    match event:
        case ConnectionOpened(pooler=pooler):
            print("opened; pooler:", pooler)
        case ConnectionOpenFailed(error=error):
            print("failed:", type(error).__name__)


async def main() -> None:
    """Open one connection."""
    engine = create_async_engine(observers=[watch])
    async with engine.connect():
        pass
    await engine.dispose()


asyncio.run(main())
