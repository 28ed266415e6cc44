"""FastAPI: a status page of the pool, for those who may see it."""

import secrets
from typing import Annotated

import httpx
from fastapi import Depends, FastAPI, HTTPException
from fastapi.security import HTTPBasic, HTTPBasicCredentials

from poolkit.fastapi import install, lifespan

PASSWORD = "from your settings"  # noqa: S105


def require_admin(given: Annotated[HTTPBasicCredentials, Depends(HTTPBasic())]) -> None:
    if not secrets.compare_digest(given.password.encode(), PASSWORD.encode()):
        raise HTTPException(401, headers={"WWW-Authenticate": "Basic"})


app = FastAPI(lifespan=lifespan())
install(app, status_page="/ops/pool", status_guard=Depends(require_admin))


# The rest only shows that it works.
async def main() -> None:
    """Ask the application, without a network between."""
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://app") as client,
    ):
        print((await client.get("/ops/pool")).status_code)
        print((await client.get("/ops/pool", auth=("me", PASSWORD))).status_code)
        found = (await client.get("/ops/pool/data", auth=("me", PASSWORD))).json()
        print(found["state"]["used"], "of", found["state"]["limit"], "in use")


if __name__ == "__main__":
    import asyncio

    asyncio.run(main())
