"""A token that expires, as RDS IAM's and Azure's: got when a connect needs it, and kept."""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from sqlalchemy import make_url, text
from tenacity import retry, stop_after_attempt, wait_random_exponential

from poolkit import create_async_engine

PAUSE = 5.0  # seconds without another attempt, where one has failed and the old token still serves

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Token:
    """What the service issues; `expires` as in `time.time()`."""

    value: str = field(repr=False)
    expires: float


class TokenCache:
    """A password for poolkit: the token, renewed by the first connect that finds it old."""

    def __init__(self, get: Callable[[], Token], *, early: float = 60.0) -> None:
        """Keep what `get`, which may block, returns, until so many seconds before it expires."""
        self._get = get
        self._early = early
        self._token = Token("", 0.0)
        self._renew_at = 0.0
        self._renewing = threading.Lock()  # of threads: it serves every event loop of the process

    async def __call__(self) -> str:
        """The token, for one connect."""
        if time.time() >= self._renew_at:
            await asyncio.to_thread(self._renew)
        return self._token.value

    def _renew(self) -> None:
        with self._renewing:
            if time.time() < self._renew_at:
                return  # another connect has renewed it, while this one waited
            try:
                self._token = self._get()
                self._renew_at = self._token.expires - self._early
            except Exception as error:
                if time.time() >= self._token.expires:
                    raise
                # The type only: the text may hold what was sent.
                log.warning("no new token, the old one still serves: %s", type(error).__name__)
                self._renew_at = min(time.time() + PAUSE, self._token.expires)


@retry(stop=stop_after_attempt(3), wait=wait_random_exponential(0.1), reraise=True)
def get_token() -> Token:
    """Stand in for the client of the service that issues tokens; give the real one a timeout."""
    print("asked for a token")
    password = make_url(os.environ["DATABASE_URL"]).password
    return Token(str(password), expires=time.time() + 900)


async def main() -> None:
    """Open two connections; the second finds the first's token."""
    engine = create_async_engine(password=TokenCache(get_token))
    async with engine.connect() as first, engine.connect() as second:
        await first.execute(text("SELECT 1"))
        await second.execute(text("SELECT 1"))
    await engine.dispose()


if __name__ == "__main__":
    asyncio.run(main())
