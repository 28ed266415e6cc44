"""A script: one asyncio.run, limits of its own, and no traceback where the database is away."""

import asyncio
from typing import Annotated

import typer
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from poolkit import DatabaseSettings, session

app = typer.Typer()


async def count_up(rows: int) -> int:
    """Insert row by row, in one transaction."""
    settings = DatabaseSettings(application_name="count-up", statement_timeout=300, pool_size=1)
    async with session(settings) as opened:
        await opened.execute(text("CREATE TEMPORARY TABLE counted (n int) ON COMMIT DROP"))
        with typer.progressbar(range(rows)) as progress:
            for n in progress:
                await opened.execute(text("INSERT INTO counted VALUES (:n)"), {"n": n})
        return int(await opened.scalar(text("SELECT count(*) FROM counted")) or 0)


@app.command()
def main(rows: Annotated[int, typer.Option(min=1)] = 10) -> None:
    """Count up in the database."""
    try:
        typer.echo(asyncio.run(count_up(rows)))
    except (SQLAlchemyError, ValueError) as error:  # settings that will not do are ValueErrors
        typer.echo(error, err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
