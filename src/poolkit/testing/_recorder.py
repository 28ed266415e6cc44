"""An observer that remembers."""

from typing import TypeVar

from poolkit.events import Event

_E = TypeVar("_E", bound=Event)


class EventRecorder(list[Event]):
    """An observer that keeps the events that it is told of, oldest first.

    For `observe(engine, recorder)` or `create_async_engine(observers=[recorder])`.
    """

    def __call__(self, event: Event) -> None:
        self.append(event)

    def of(self, kind: type[_E]) -> list[_E]:
        """Those of one kind."""
        return [event for event in self if isinstance(event, kind)]
