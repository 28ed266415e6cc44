"""Write poolkit's log lines as JSON: each has its numbers as fields of their own."""

import asyncio
import contextlib
import json
import logging
import sys

from poolkit import PoolTimeout, create_async_engine


class Json(logging.Formatter):
    """As python-json-logger and its like do it: whatever `extra` holds becomes a field."""

    usual = set(vars(logging.makeLogRecord({}))) | {"message"}

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        found = {"level": record.levelname, "logger": record.name, "text": record.getMessage()}
        extra = {k: v for k, v in vars(record).items() if k not in self.usual}
        return json.dumps(found | extra, default=str)


handler = logging.StreamHandler(sys.stdout)
handler.setFormatter(Json())
logging.basicConfig(handlers=[handler], level=logging.WARNING)


async def main() -> None:
    """Have callers wait in vain."""
    engine = create_async_engine(pool_size=1, max_overflow=0, pool_timeout=0.2)
    async with engine.connect():
        for _ in range(3):
            with contextlib.suppress(PoolTimeout):
                await engine.connect()
    await engine.dispose()


asyncio.run(main())
