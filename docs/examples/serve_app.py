"""An application for several worker processes: each has an engine, from its lifespan on."""

from fastapi import FastAPI
from sqlalchemy import text

from poolkit.fastapi import SessionDep, lifespan

app = FastAPI(lifespan=lifespan(drain_timeout=5))


@app.post("/orders/{amount}")
async def add_order(amount: int, session: SessionDep) -> int:
    inserted = "INSERT INTO orders (amount) VALUES (:amount) RETURNING id"
    return int(await session.scalar(text(inserted), {"amount": amount}) or 0)
