"""Faults that wait for their moment."""

from collections.abc import Callable, Iterator
from typing import Literal, Protocol, Self

from poolkit.testing._dialogue import Message, Sender
from poolkit.testing._moments import Edge, FaultProxyError, Point, Signal

Action = Literal["close", "reset", "freeze", "freeze replies", "hold"]

Call = Callable[[Callable[[], None]], None]
"""Runs a function in the proxy's thread and waits for its end."""


class Holder(Protocol):
    """What holds a message back until it is released."""

    def release(self, trap: "Trap") -> None: ...


class Trap(Signal[Message | None]):
    """A fault that waits for its moment; a signal that gives the message at which it came.

    Made by `cut()`, `freeze_at()` and `hold()`.
    """

    def __init__(
        self,
        point: Point,
        action: Action,
        *,
        connection: int | None = None,
        every: bool = False,
    ) -> None:
        super().__init__(f"{action} {point.told}")
        self.point = point
        self.action: Action = action
        self.connection = connection
        self.every = every
        self.traps: Traps | None = None

    def disarm(self) -> None:
        """Have it happen no more; what has happened stays."""
        if self.traps is not None:
            self.traps.call(self._disarm)

    def concerns(self, connection: int) -> bool:
        return self.connection in {None, connection}

    def limit(self, connection: int, sender: Sender, size: int) -> int | None:  # noqa: ARG002
        """How many of the next bytes are the last; None if all may pass."""
        return None

    def _disarm(self) -> None:
        if self.traps is not None:
            self.traps.disarm(self)


class ByteTrap(Trap):
    """A cut after so many bytes of one side, counted on each connection by itself."""

    def __init__(
        self,
        size: int,
        sender: Sender,
        action: Action,
        *,
        connection: int | None = None,
        every: bool = False,
    ) -> None:
        told = Point("after", lambda _: False, f"after {size} bytes of the {sender}")
        super().__init__(told, action, connection=connection, every=every)
        self._size = size
        self._sender = sender
        self._passed: dict[int, int] = {}

    def limit(self, connection: int, sender: Sender, size: int) -> int | None:
        if sender != self._sender or not self.concerns(connection):
            return None
        passed = self._passed.get(connection, 0)
        self._passed[connection] = passed + size
        return self._size - passed if passed + size >= self._size else None


class Hold(Trap):
    """A trap that holds a message, and all behind it, until `release()`.

    As a context manager it is released at the end of the block.
    """

    def __init__(self, point: Point, *, connection: int | None = None, every: bool = False) -> None:
        super().__init__(point, "hold", connection=connection, every=every)
        self.holders: list[Holder] = []

    def release(self) -> None:
        """Let go what is held, and hold nothing more."""
        if self.traps is not None:
            self.traps.call(self.let_go)

    def let_go(self) -> None:
        """`release()`, in the proxy's thread."""
        self._disarm()
        holders, self.holders = self.holders, []
        for holder in holders:
            holder.release(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Traps:
    """Those that are armed; used in the proxy's thread."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self._armed: list[Trap] = []
        self._holds: list[Hold] = []

    def arm(self, trap: Trap) -> None:
        trap.traps = self
        self._armed.append(trap)
        if isinstance(trap, Hold):
            self._holds.append(trap)

    def disarm(self, trap: Trap) -> None:
        if trap in self._armed:
            self._armed.remove(trap)

    def clear(self) -> None:
        """Disarm all, and release what is held."""
        self._armed.clear()
        holds, self._holds = self._holds, []
        for hold in holds:
            hold.let_go()

    def springing(self, edge: Edge, message: Message, met: set[Trap]) -> Iterator[Trap]:
        """Those whose moment a message is, less those that it has met; each is told once."""
        for trap in tuple(self._armed):
            fits = trap.point.edge == edge and trap.concerns(message.connection)
            if fits and trap not in met and trap.point.fits(message):
                met.add(trap)
                self._spend(trap)
                yield trap

    def limit(self, connection: int, sender: Sender, size: int) -> tuple[Trap, int] | None:
        """The trap that lets pass only so many of the next bytes."""
        for trap in tuple(self._armed):
            room = trap.limit(connection, sender, size)
            if room is not None:
                self._spend(trap)
                return trap, room
        return None

    def fail(self, connection: int, error: FaultProxyError) -> bool:
        """Give up those that wait for a message of a connection; whether there were any."""
        concerned = [
            trap
            for trap in self._armed
            if trap.concerns(connection) and not isinstance(trap, ByteTrap)
        ]
        for trap in concerned:
            self._armed.remove(trap)
            trap.fail(error)
        return bool(concerned)

    def stop(self, error: FaultProxyError) -> None:
        """End all waiting."""
        for trap in self._armed:
            trap.fail(error)
        self.clear()

    def _spend(self, trap: Trap) -> None:
        if not trap.every:
            self._armed.remove(trap)
