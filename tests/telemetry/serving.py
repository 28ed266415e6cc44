"""One worker of a service: an ASGI application with an engine, served by uvicorn.

    python serving.py app|server

Prints its port and number as a line of JSON. ``app`` has the metrics as a route, ``server`` on the
port ``METRICS_PORT``.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import time
from urllib.parse import parse_qs

import uvicorn

from poolkit import create_async_engine
from poolkit.telemetry import instrument, prometheus

engine = create_async_engine()
instrument(engine, spans=False)
held = []


async def app(scope, receive, send):
    """``/metrics``; ``/hold?n=2`` checks connections out; ``/block?s=5`` blocks the loop."""
    question = {k: v[0] for k, v in parse_qs(scope["query_string"].decode()).items()}
    match scope["path"]:
        case "/metrics":
            await metrics(scope, receive, send)
        case "/hold":
            held.extend([await engine.connect() for _ in range(int(question["n"]))])
            await answer(send)
        case "/block":
            await answer(send)
            time.sleep(float(question["s"]))  # noqa: ASYNC251 (as a careless handler does)


async def answer(send):
    """Say that it was done."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"done"})


async def main() -> None:
    """Serve until the process is ended."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        told = {"port": listening.getsockname()[1], "number": number()}
        print(json.dumps(told), flush=True)  # noqa: T201 (the test reads it)
        config = uvicorn.Config(app, log_level="warning", lifespan="off")
        await uvicorn.Server(config).serve([listening])


def number() -> int | None:
    """Which worker this is."""
    members = prometheus._members()
    return None if members is None else members.number


if sys.argv[1] == "app":
    metrics = prometheus.metrics_app()
else:
    prometheus.start_metrics_server(int(os.environ["METRICS_PORT"]))

if __name__ == "__main__":
    asyncio.run(main())
