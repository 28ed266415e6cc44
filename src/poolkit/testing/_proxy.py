"""A proxy before a PostgreSQL server that makes the network and the server fail at will."""

from collections.abc import Callable
from types import TracebackType
from typing import Self

from poolkit.testing._core import Core
from poolkit.testing._moments import Signal
from poolkit.testing._proxied import Faults, ProxiedConnection
from poolkit.testing._record import ProxyStats
from poolkit.testing._thread import LoopThread
from poolkit.testing._upstream import Server, rewritten, upstream


class FaultProxy(Faults):
    """A TCP proxy before a PostgreSQL server, with faults that are set while it runs.

    It runs in a thread of its own from the beginning of a `with` or `async with` block to its
    end, whatever event loop the test has. Its methods return when they have taken effect and may
    be called from any thread. Without a fault it is transparent, TLS and cancel requests included.

    Args:
        server: A server of `postgres()`, a `postgresql://` URL, a host and a port, or the path
            of a Unix socket.
        host: The address to listen on; 127.0.0.2 makes another host on Linux.
        port: The port to listen on; None picks a free one.
        refuse_encryption: Tell clients that the server has no TLS, so that messages can be read
            and `sslmode=prefer` goes on without.

    Raises:
        ValueError: The URL is none of PostgreSQL's, or names several servers.
        OSError: On entry: the address cannot be listened on.
    """

    def __init__(
        self,
        server: Server,
        *,
        host: str = "127.0.0.1",
        port: int | None = None,
        refuse_encryption: bool = False,
    ) -> None:
        self._upstream = upstream(server)
        self._address = (host, port)
        self._refuse_encryption = refuse_encryption
        self._thread = LoopThread("poolkit-fault-proxy")
        self._core = None
        self._number = None

    def __repr__(self) -> str:
        place = "not running" if self._core is None else f"{self.host}:{self.port}"
        return f"<FaultProxy {place}>"

    def __enter__(self) -> Self:
        if self._core is not None:
            raise RuntimeError("this FaultProxy is already entered: make another")
        self._thread.start()
        try:
            self._core = self._thread.call(self._make)
        except BaseException:
            self._thread.stop()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        core, self._core = self._core, None
        if core is None:
            return
        self._thread.run(core.stop())
        self._thread.stop()
        for failure in (*self._thread.errors, core.failure):
            if failure is not None and exc is None:
                raise failure

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.__exit__(exc_type, exc, traceback)

    # Where it is.

    @property
    def host(self) -> str:
        """The address that it listens on."""
        return self._running.listener.host

    @property
    def port(self) -> int:
        """The port that it listens on, the same over `refuse()` and `accept()`."""
        return self._running.listener.port

    @property
    def url(self) -> str:
        """The server's URL by way of the proxy: user, password, database and options stay."""
        return self.through(self._upstream.url)

    def through(self, url: str) -> str:
        """Another URL of the same server, by way of the proxy; one of `create_database()`, say."""
        return rewritten(url, self.host, self.port)

    # New connections.

    def refuse(self) -> None:
        """Stop listening: a new client sees ConnectionRefusedError; connections go on."""
        self._do(lambda core: core.set_door("refusing"))

    def silence(self) -> None:
        """Accept new connections and never answer them, not even later; others go on."""
        self._do(lambda core: core.set_door("silent"))

    def sleep(self, wake_after: float | None = None) -> None:
        """Be a server that has been suspended, as serverless databases are.

        The connections that there are freeze for good. New ones are accepted, held, and answered
        on waking.

        Args:
            wake_after: Seconds until it wakes by itself; None waits for `wake()`.
        """
        self._do(lambda core: core.sleep(wake_after))

    def wake(self) -> None:
        """End `sleep()`."""
        self.accept()

    def accept(self) -> None:
        """Take new connections again, after `refuse()`, `silence()` or `sleep()`."""
        self._do(lambda core: core.set_door("open"))

    def heal(self) -> None:
        """End all faults, disarm all traps, release what is held; what is dead stays dead."""
        self._do(Core.heal)

    # What is there.

    @property
    def connections(self) -> list[ProxiedConnection]:
        """The connections whose client is there, oldest first."""
        return self._do(
            lambda core: [
                ProxiedConnection(core, self._thread, link.number)
                for link in core.present()
                if not link.client_gone
            ]
        )

    @property
    def stats(self) -> ProxyStats:
        """Its connections, round trips and bytes."""
        return self._do(Core.stats)

    def until(self, condition: Callable[[ProxyStats], bool]) -> Signal[ProxyStats]:
        """The first statistics, now or later, for which a condition holds.

        `await proxy.until(lambda stats: stats.open == 0)`, or `.wait()` in sync code.
        """
        return self._do(lambda core: core.until(condition))

    def forget(self) -> None:
        """Empty `messages` and `statements`, and count `round_trips` from 0; `stats` goes on."""
        self._do(Core.forget)

    @property
    def _running(self) -> Core:
        return self._do(lambda core: core)

    def _make(self) -> Core:
        host, port = self._address
        return Core(
            self._upstream,
            host,
            port,
            refuse_encryption=self._refuse_encryption,
            call=self._thread.call,
        )
