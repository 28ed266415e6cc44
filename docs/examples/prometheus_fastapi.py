"""FastAPI: the pool's metrics at /metrics, with DATABASE_TELEMETRY=metrics."""

from fastapi import FastAPI

from poolkit import get_engine
from poolkit.fastapi import lifespan
from poolkit.telemetry.prometheus import metrics_app

app = FastAPI(lifespan=lifespan())
app.add_route("/metrics", metrics_app())  # type: ignore[arg-type]


# The rest only shows that it works.
async def main() -> None:
    """Ask as Prometheus does, without a network between."""
    import httpx  # noqa: PLC0415

    transport = httpx.ASGITransport(app)
    async with lifespan()(app), httpx.AsyncClient(transport=transport) as client:
        async with get_engine().connect():
            found = (await client.get("http://app/metrics")).text
        for line in found.splitlines():
            name, labels, value = line.partition("{")[0], *line.rpartition(" ")[::2]
            if name == "db_client_connection_count":
                print(name, "used" if '"used"' in labels else "idle", value)


if __name__ == "__main__":
    import asyncio

    asyncio.run(main())
