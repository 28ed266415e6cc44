"""What a source of ``poolkit top`` is, and what it gives to be shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import RenderableType

from poolkit.cli import output


@dataclass(frozen=True, slots=True)
class Frame:
    """Where a view is drawn.

    Attributes:
        width: Columns.
        height: Lines that it may take; None is as many as it needs.
        ascii_only: Whether the terminal knows no other characters.
        everything: Whether what is idle is wanted, too.
    """

    width: int
    height: int | None
    ascii_only: bool
    everything: bool


class Look(Protocol):
    """What one look at a source gave."""

    @property
    def title(self) -> str:
        """What was looked at."""
        ...

    def draw(self, frame: Frame) -> RenderableType:
        """The view, no higher than the frame."""
        ...

    def as_json(self, *, everything: bool) -> dict[str, Any]:
        """The same for a machine."""
        ...


class Source(Protocol):
    """Something that can be looked at again and again."""

    async def look(self) -> Look:
        """Look once; bounded in time. Whatever it raises is told, and it is tried again."""
        ...

    async def close(self) -> None:
        """Let go of what it holds."""
        ...


class SourceError(Exception):
    """A source gave nothing; the message is a sentence for the user."""


def failure(error: Exception) -> output.Failure:
    """What went wrong with a source, as the user reads it."""
    if isinstance(error, SourceError):
        return output.Failure(type(error).__name__, [str(error)])
    return output.failure(error)
