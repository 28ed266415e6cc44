"""What can be done to connections through the proxy, and read from them."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from poolkit.testing._core import Core
from poolkit.testing._dialogue import Message, Sender
from poolkit.testing._link import Link
from poolkit.testing._moments import At, FaultProxyError, Moment, Signal, executes, point
from poolkit.testing._thread import LoopThread
from poolkit.testing._traps import Action, ByteTrap, Hold, Trap

_T = TypeVar("_T")
_TrapT = TypeVar("_TrapT", bound=Trap)


class Faults:
    """What can be done to connections: all of a proxy's, or one."""

    _core: Core | None
    _thread: LoopThread
    _number: int | None

    # The network.

    @property
    def latency(self) -> float:
        """Seconds of a round trip; bytes are delayed by half of it each way, in order, not slowed.

        The TCP handshake is the kernel's, and not delayed.
        """
        return self._do(lambda core: core.line_of(self._number).latency)

    @latency.setter
    def latency(self, seconds: float) -> None:
        if not seconds >= 0:
            raise ValueError(f"latency is in seconds, 0 or more: {seconds}")
        self._do(lambda core: core.set_line(self._number, latency=seconds))

    @property
    def bandwidth(self) -> float | None:
        """Bytes per second that pass in each direction of each connection; None is unlimited."""
        return self._do(lambda core: core.line_of(self._number).bandwidth)

    @bandwidth.setter
    def bandwidth(self, rate: float | None) -> None:
        if rate is not None and not rate > 0:
            raise ValueError(
                f"bandwidth is in bytes per second, above 0; None is unlimited: {rate}"
            )
        self._do(lambda core: core.set_line(self._number, bandwidth=rate))

    # Now.

    def freeze(self, *, replies_only: bool = False) -> None:
        """Let nothing through any more on the connections that there are, as a dead network would.

        Neither side gets a FIN or a RST. What is sent meanwhile is kept for `thaw()`. The proxy's
        kernel goes on acknowledging it, so that TCP_USER_TIMEOUT and TCP keepalive see no fault.

        Args:
            replies_only: What clients send still reaches the server; its replies do not come.
        """
        self._each(lambda link: link.freeze(replies_only=replies_only))

    def thaw(self) -> None:
        """Let frozen connections go on; those that met `silence()` or `sleep()` stay dead."""
        self._each(Link.thaw)

    def close(self) -> None:
        """Close the connections that there are, towards both sides: a client reads their end."""
        self._each(lambda link: link.end(reset=False))

    def reset(self) -> None:
        """Reset the connections that there are: a client sees ConnectionResetError."""
        self._each(lambda link: link.end(reset=True))

    # At a moment.

    def cut(
        self,
        *,
        before: Moment | None = None,
        after: Moment | None = None,
        after_bytes: int | None = None,
        sender: Sender = "server",
        reset: bool = False,
        every: bool = False,
    ) -> Trap:
        """Close a connection at a moment; once, for the first connection that comes to it.

        With `before="COMMIT"` the statement does not reach the server; with `after="COMMIT"` the
        server has executed it and the client does not learn of it. With a message, such as
        `At("ReadyForQuery")`, the two mean before and after it is relayed.

        Args:
            before: A statement or a message; see `Moment`.
            after: A statement or a message.
            after_bytes: Instead, so many bytes from one side, counted on each connection from now.
            sender: The side whose bytes are counted.
            reset: By RST instead of FIN.
            every: Each time, not only once.

        Raises:
            FaultProxyError: A connection is encrypted, so that its messages cannot be told apart.
        """
        action: Action = "reset" if reset else "close"
        if after_bytes is None:
            return self._arm(
                Trap(point(before, after), action, connection=self._number, every=every)
            )
        if before is not None or after is not None:
            raise TypeError("give one of before=, after= and after_bytes=")
        trap = ByteTrap(after_bytes, sender, action, connection=self._number, every=every)
        return self._arm(trap)

    def freeze_at(
        self,
        *,
        before: Moment | None = None,
        after: Moment | None = None,
        replies_only: bool = False,
        every: bool = False,
    ) -> Trap:
        """`freeze()` a connection at a moment, as `cut()` cuts it."""
        action: Action = "freeze replies" if replies_only else "freeze"
        return self._arm(Trap(point(before, after), action, connection=self._number, every=every))

    def hold(
        self, *, before: Moment | None = None, after: Moment | None = None, every: bool = False
    ) -> Hold:
        """Hold a connection at a moment until `release()`; only the direction that comes to it.

        `await` what is returned, or `wait()` for it, to know that the moment has come.
        """
        return self._arm(Hold(point(before, after), connection=self._number, every=every))

    # What was seen.

    @property
    def messages(self) -> list[Message]:
        """The messages so far, or since `forget()`, as they came; at most the last 100,000."""
        return self._do(lambda core: core.record.of(self._number))

    @property
    def statements(self) -> list[str]:
        """The SQL that clients had executed so far, or since `forget()`, as it came."""
        return self._do(lambda core: core.record.statements(self._number))

    @property
    def round_trips(self) -> int:
        """Times that the server answered what a client had sent, since `forget()`."""
        return self._do(lambda core: core.trips_of(self._number))

    def seen(self, moment: Moment) -> Signal[Message]:
        """The first message that fits, since `forget()` or still to come.

        Args:
            moment: A statement that a client has executed, or any message.

        Raises:
            FaultProxyError: A connection is encrypted, so that its messages cannot be told apart.
        """
        fits = moment.matches if isinstance(moment, At) else executes(moment)
        return self._do(lambda core: core.seen(fits, self._number, repr(moment)))

    def _arm(self, trap: _TrapT) -> _TrapT:
        self._do(lambda core: core.arm(trap))
        return trap

    def _each(self, act: Callable[[Link], None]) -> None:
        def on_links(core: Core) -> None:
            for link in core.present(self._number):
                act(link)

        self._do(on_links)

    def _do(self, work: Callable[[Core], _T]) -> _T:
        core = self._core
        if core is None:
            raise FaultProxyError("the proxy is not running: use it inside its with block")
        return self._thread.call(partial(work, core))


class ProxiedConnection(Faults):
    """One connection through a `FaultProxy`; its faults concern no other.

    Attributes:
        number: Counted from 1, in the order in which the proxy accepted them.
    """

    def __init__(self, core: Core, thread: LoopThread, number: int) -> None:
        self._core = core
        self._thread = thread
        self._number = number
        self.number = number

    def __repr__(self) -> str:
        return f"<ProxiedConnection {self.number}>"
