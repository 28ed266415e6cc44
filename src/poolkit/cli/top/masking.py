"""Text from elsewhere, made fit for a terminal, and statements without what may be secret."""

from __future__ import annotations

from poolkit.telemetry.sql import read


def plain(text: str) -> str:
    """In one line, free of whatever a terminal would take for a command."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def masked(statement: str) -> str:
    """A statement without its literals and comments, in one line."""
    return plain(read(statement, parameterised=False).text)
