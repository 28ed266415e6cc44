"""The connector's rules, with the driver's connect replaced and time virtual."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable
from typing import Any

import asyncpg
import looptime
import pytest

from poolkit import (
    AuthenticationFailed,
    CertificateNotTrusted,
    ConnectError,
    ConnectionOpened,
    ConnectionOpenFailed,
    ConnectRefused,
    ConnectTimeout,
    DatabaseNotFound,
    HostNotFound,
    PasswordUnavailable,
    ServerNotReady,
    ServerUnreachable,
    StartupParameterRefused,
    TLSRefused,
    TooManyConnections,
    scouts,
)
from poolkit.addresses import REMEMBERED, SILENT
from poolkit.connect import LONGEST_PAUSE, SECOND_CHANCE, Connector
from poolkit.scouts import SCOUTING

REFUSED = ConnectionRefusedError(111, "Connect call failed")


class FakeConnection:
    """As much of a driver connection as the connector touches."""

    pooler = "none"
    terminated = False

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self.executed: list[str] = []

    def set_keepalive(self, _: object) -> None: ...

    def set_up(self, *, pooler: str, session_limit: float, transaction_settings: dict) -> None:
        self.pooler, self.transaction_settings = pooler, transaction_settings

    def get_server_pid(self) -> int:
        return 7

    async def execute(self, query: str) -> str:
        self.executed.append(query)
        return "SELECT 1"

    def terminate(self) -> None:
        self.terminated = True


class Held(float):
    """Seconds that a server, having answered at once, takes for the rest."""


class FakeDriver:
    """``asyncpg.connect`` that does what a script says: an exception, a delay or a success."""

    def __init__(self, script: Callable[[int, dict[str, Any]], Any]) -> None:
        self.script = script
        self.times: list[float] = []
        self.calls: list[dict[str, Any]] = []
        self.made: list[FakeConnection] = []
        self.under_way = self.most_under_way = 0

    async def connect(self, **arguments: Any) -> FakeConnection:
        self.times.append(asyncio.get_running_loop().time())
        self.calls.append(arguments)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            step = self.script(len(self.calls), arguments)
            if isinstance(step, Held):
                await asyncio.sleep(0.01)
                arguments["loop"]._answered()
            if isinstance(step, float):
                await asyncio.sleep(step)
            elif isinstance(step, BaseException):
                raise step
        finally:
            self.under_way -= 1
        self.made.append(FakeConnection(arguments))
        return self.made[-1]

    @property
    def routes(self) -> list[str]:
        """The IP addresses tried, in order."""
        return [call["loop"]._endpoint[0] for call in self.calls]

    @property
    def kept(self) -> int:
        return sum(not connection.terminated for connection in self.made)


@pytest.fixture
def names() -> dict[str, list[str]]:
    """What the resolver knows; a name that is not in it has one address, made of its letters."""
    return {}


@pytest.fixture
def resolve(names):
    """Stands in for a loop's ``getaddrinfo``."""

    async def resolve(host, port, **_):
        addresses = names.get(host, [f"10.0.0.{ord(host[0])}"])
        if isinstance(addresses, BaseException):
            raise addresses
        if isinstance(addresses, float):
            await asyncio.sleep(addresses)
            addresses = ["10.1.1.1"]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in addresses]

    return resolve


@pytest.fixture
def run(monkeypatch, resolve):
    """Call a connector on a virtual clock: (result or error, driver, seconds, events).

    ``scout`` says whether something answers now, and None takes for ever to say so.
    """

    def runner(script, *, connector=None, scout=lambda _: None, **arguments):
        driver = FakeDriver(script)
        monkeypatch.setattr(asyncpg, "connect", driver.connect)

        async def offers_tls(endpoint):
            answer = scout(endpoint)
            if answer is None:
                await asyncio.sleep(1000)
            if isinstance(answer, BaseException):
                raise answer
            return answer

        monkeypatch.setattr(scouts, "offers_tls", offers_tls)
        events: list[object] = []
        connector = connector or Connector(pooler="none")
        connector.observers = [events.append]

        async def main():
            loop = asyncio.get_running_loop()
            started = loop.time()
            given = {"timeout": 10, "host": "h", "port": 1, "ssl": False} | arguments
            try:
                result = await connector(**given)
            except Exception as error:  # noqa: BLE001
                result = error
            seconds = loop.time() - started
            for _ in range(10):
                await asyncio.sleep(0)
            assert asyncio.all_tasks() == {asyncio.current_task()}
            assert (driver.under_way, driver.kept) == (0, isinstance(result, FakeConnection))
            return result, driver, seconds, events

        def loop_factory():
            loop = looptime.patch_event_loop(asyncio.new_event_loop())
            loop.getaddrinfo = resolve
            return loop

        with asyncio.Runner(loop_factory=loop_factory) as loop:
            return loop.run(main())

    return runner


def pg(sqlstate: str) -> asyncpg.PostgresError:
    return asyncpg.PostgresError.new({"C": sqlstate, "M": "the server's words", "S": "FATAL"})


TRANSIENT = [
    (REFUSED, ConnectRefused),
    (ConnectionResetError(104, "reset"), ServerUnreachable),
    (OSError("Multiple exceptions"), ServerUnreachable),
    (FileNotFoundError(2, "no socket"), ServerUnreachable),
    (socket.gaierror(-2, "Name or service not known"), HostNotFound),
    (asyncpg.ConnectionDoesNotExistError("closed in the middle"), ServerUnreachable),
    (pg("53300"), TooManyConnections),
    (pg("57P01"), ServerNotReady),
    (pg("57P03"), ServerNotReady),
    (asyncpg.exceptions.TargetServerAttributeNotMatched("no"), ServerNotReady),
]
PERMANENT = [
    (pg("28P01"), AuthenticationFailed),
    (pg("28000"), AuthenticationFailed),
    (pg("3D000"), DatabaseNotFound),
    (pg("08P01"), StartupParameterRefused),
    (pg("42704"), ConnectError),
    (PermissionError(13, "socket"), ServerUnreachable),
    (ssl.SSLCertVerificationError(1, "self-signed"), CertificateNotTrusted),
    (ssl.SSLError(1, "handshake"), TLSRefused),
    (asyncpg.InterfaceError("bad argument"), ConnectError),
]


def name(value: object) -> str | None:
    if isinstance(value, type):
        return value.__name__
    return getattr(value, "sqlstate", None) or type(value).__name__


@pytest.mark.parametrize(("cause", "expected"), TRANSIENT, ids=name)
def test_transient_failures_are_retried_inside_the_bound(run, cause, expected) -> None:
    """They go on until the total time has gone, and then say what the last cause was."""
    error, driver, seconds, events = run(lambda *_: cause)

    assert type(error) is expected
    assert 10 - LONGEST_PAUSE <= seconds <= 10
    assert error.attempts == len(driver.calls) > 10
    assert error.orig is cause
    assert error.__cause__ is cause
    assert events == [ConnectionOpenFailed("h:1", error.elapsed, error.attempts, error)]


@pytest.mark.parametrize(("cause", "expected"), PERMANENT, ids=name)
def test_permanent_failures_fail_at_once(run, cause, expected) -> None:
    """Another attempt would end the same."""
    error, driver, seconds, _ = run(lambda *_: cause)

    assert type(error) is expected
    assert (seconds, len(driver.calls)) == (0, 1)


@pytest.mark.parametrize(("cause", "expected"), TRANSIENT[:1] + PERMANENT[6:7])
def test_errors_are_what_was_raised_before(run, cause, expected) -> None:
    """Code that catches the operating system's error, or SQLAlchemy's, goes on working."""
    error, *_ = run(lambda *_: cause, timeout=0.1)

    assert isinstance(error, type(cause))
    assert isinstance(error, ConnectError)
    assert error.errno == cause.errno


def test_the_message_says_what_was_tried(run) -> None:
    """Address, attempts, time, cause and remedy."""
    error, *_ = run(lambda *_: pg("28P01"))

    assert str(error) == (
        "cannot connect to h:1 (1 attempt in 0.0 s): the server's words (SQLSTATE 28P01)."
        " Check the user and the password (DATABASE_USER, DATABASE_PASSWORD, DATABASE_URL)"
    )
    assert error.sqlstate == "28P01"


def test_success_after_failures(run) -> None:
    """A server that comes up in time is connected to, and the event counts the attempts."""
    connection, driver, seconds, events = run(lambda n, _: REFUSED if n < 6 else None)

    assert isinstance(connection, FakeConnection)
    assert len(driver.calls) == 6
    assert seconds < 5 * LONGEST_PAUSE
    assert events == [ConnectionOpened("h:1", seconds, 6, "none")]


def test_pauses_grow_and_are_jittered(run, monkeypatch) -> None:
    """The longest possible pause doubles from 50 ms to 250 ms; each is drawn below it."""
    highest: list[float] = []

    def draw(low: float, high: float) -> float:
        assert low == 0
        highest.append(high)
        return high

    monkeypatch.setattr("random.uniform", draw)
    _, driver, *_ = run(lambda n, _: REFUSED if n < 7 else None)

    assert highest == [0.05, 0.1, 0.2, 0.25, 0.25, 0.25]
    pauses = [b - a for a, b in zip(driver.times, driver.times[1:], strict=False)]
    assert pauses == pytest.approx(highest)


def test_a_silent_server(run) -> None:
    """One attempt that never ends is ended at the bound."""
    error, driver, seconds, _ = run(lambda *_: 1000.0, timeout=3)

    assert type(error) is ConnectTimeout
    assert isinstance(error, TimeoutError)
    assert (seconds, len(driver.calls)) == (3, 1)
    assert "DATABASE_CONNECTION_TIMEOUT" in str(error)


def test_an_attempt_cut_short_does_not_hide_the_cause(run) -> None:
    """Refused again and again, and the last attempt had no time: it is still a refusal."""
    error, *_ = run(lambda n, _: REFUSED if n < 4 else 1000.0, timeout=0.6)
    assert type(error) is ConnectRefused
    error, *_ = run(lambda n, _: REFUSED if n < 4 else 1000.0, timeout=5)
    assert type(error) is ConnectTimeout


HOSTS = {"host": ["a", "b", "c"], "port": [1, 1, 1]}


def test_a_silent_host_is_passed_over(run) -> None:
    """Two silent hosts of three delay the third by a fraction of a second each, and go on."""
    connection, driver, seconds, events = run(
        lambda _, arguments: None if arguments["host"] == "c" else 1000.0, timeout=9, **HOSTS
    )
    assert isinstance(connection, FakeConnection)
    assert [call["host"] for call in driver.calls] == ["a", "b", "c"]
    assert seconds == pytest.approx(2 * SILENT, abs=0.02)
    assert events == [ConnectionOpened("c:1", seconds, 3, "none")]


def test_a_host_that_has_answered_has_a_fair_share(run) -> None:
    """It is waking up, or at its limits: the next is tried when the share of the time is over."""
    connection, driver, seconds, _ = run(
        lambda _, arguments: None if arguments["host"] == "c" else Held(1000.0), timeout=9, **HOSTS
    )
    assert isinstance(connection, FakeConnection)
    assert driver.times == pytest.approx([0, 3, 6], abs=0.02)
    assert seconds == pytest.approx(6, abs=0.02)


def test_a_silent_host_may_still_win(run) -> None:
    """It was slow, the next is slower: the first connection counts, the other is cancelled."""
    connection, driver, seconds, _ = run(
        lambda _, arguments: 0.5 if arguments["host"] == "a" else 5.0, **HOSTS
    )
    assert (connection.arguments["host"], seconds) == ("a", pytest.approx(0.5))
    assert len(driver.calls) == 2


def test_two_at_the_same_moment(run) -> None:
    """Both are connected in the same turn of the loop: one is kept, one closed."""
    _, driver, *_ = run(
        lambda _, arguments: 2.0 if arguments["host"] == "a" else 2.0 - SILENT, **HOSTS
    )
    assert driver.kept == 1


class TestAName:
    """One name may have several addresses, and each is tried by itself."""

    @pytest.fixture(autouse=True)
    def _three(self, names) -> None:
        names["h"] = ["10.0.0.1", "10.0.0.2", "10.0.0.3"]

    @staticmethod
    def one_bad(_, arguments):
        return 1000.0 if arguments["loop"]._endpoint[0] == "10.0.0.1" else None

    def test_a_silent_address_delays_nobody_twice(self, run) -> None:
        """The first connect passes over it, the next ones begin elsewhere."""
        connector = Connector(pooler="none")
        _, first, seconds, _ = run(self.one_bad, connector=connector)
        assert (first.routes, seconds) == (
            ["10.0.0.1", "10.0.0.2"],
            pytest.approx(SILENT, abs=0.02),
        )
        connector.reputation._bad_until = dict.fromkeys(connector.reputation._bad_until, 1e9)
        _, second, seconds, _ = run(self.one_bad, connector=connector)
        assert (second.routes, seconds) == (["10.0.0.2"], 0)

    def test_the_driver_is_told_the_name(self, run) -> None:
        """TLS and the password file go by the name."""
        _, driver, *_ = run(self.one_bad)
        assert [call["host"] for call in driver.calls] == ["h", "h"]

    def test_a_refusal_moves_on_at_once(self, run) -> None:
        """All three in one round, with no pause."""
        _, driver, seconds, _ = run(lambda n, _: REFUSED if n < 3 else None)
        assert (driver.routes, seconds) == (["10.0.0.1", "10.0.0.2", "10.0.0.3"], 0)

    def test_all_bad(self, run) -> None:
        """Then all are tried anyway, close together, and the one that is back is found."""
        connector = Connector(pooler="none")
        run(lambda *_: 1000.0, connector=connector, timeout=2)
        connector.reputation._bad_until = dict.fromkeys(connector.reputation._bad_until, 1e9)
        _, driver, seconds, _ = run(
            lambda _, arguments: 1000.0 if arguments["loop"]._endpoint[0] != "10.0.0.3" else None,
            connector=connector,
        )
        assert len(driver.calls) == 3
        assert seconds < SILENT

    def test_forgotten(self, run) -> None:
        """After a while, and after a success."""
        connector = Connector(pooler="none")

        def script(n, arguments):
            return REFUSED if n < 3 else None

        run(script, connector=connector)
        assert set(connector.reputation._bad_until) == {("10.0.0.1", 1), ("10.0.0.2", 1)}
        assert max(connector.reputation._bad_until.values()) == pytest.approx(REMEMBERED, abs=0.1)
        run(lambda _, arguments: REFUSED if arguments["loop"]._endpoint[0] > "10.0.0.2" else None,
            connector=connector)  # fmt: skip
        assert ("10.0.0.1", 1) not in connector.reputation._bad_until

    def test_names_that_take_long(self, run, names) -> None:
        """Of several hosts, one that resolves slowly does not hold up the other."""
        names["a"] = 1000.0
        connection, _, seconds, _ = run(
            lambda _, arguments: None if arguments["host"] == "b" else 1000.0,
            host=["a", "b"],
            port=[1, 1],
        )
        assert connection.arguments["host"] == "b"
        assert seconds == pytest.approx(2 * SILENT, abs=0.02)

    def test_a_name_that_is_not_found(self, run, names) -> None:
        """Each try counts, and the other host is taken."""
        names["a"] = socket.gaierror(-2, "Name or service not known")
        error, driver, *_ = run(lambda *_: None, host="a")
        assert type(error) is HostNotFound
        assert error.attempts > 10
        assert driver.calls == []
        connection, *_ = run(lambda *_: None, host=["a", "b"], port=[1, 1])
        assert connection.arguments["host"] == "b"


class TestABlackHoleAmongOthers:
    """Waiting for a silent host does not keep the others from being tried again."""

    @pytest.mark.parametrize("silent", ["a", "b"])
    def test_the_other_gets_ready(self, run, silent) -> None:
        """It was a standby, or starting, and is the primary now."""

        def script(_, arguments):
            if arguments["host"] == silent:
                return 1000.0
            ready = asyncio.get_running_loop().time() >= 3
            return None if ready else asyncpg.exceptions.TargetServerAttributeNotMatched("no")

        connection, driver, seconds, _ = run(script, host=["a", "b"], port=[1, 1])
        assert connection.arguments["host"] != silent
        assert 3 <= seconds <= 3 + LONGEST_PAUSE
        assert [call["host"] for call in driver.calls].count(silent) == 1

    def test_the_silent_one_ends(self, run) -> None:
        """It refuses after all: both are tried in rounds again."""

        def script(n, arguments):
            return 2.0 if n > 1 and arguments["host"] == "a" else REFUSED if n > 1 else 1.0

        connection, *_ = run(script, host=["a", "b"], port=[1, 1])
        assert connection.arguments["host"] == "a"


class TestASilentServer:
    """What was sent to it may be lost for good; what is sent now may be answered."""

    def test_it_comes_back(self, run) -> None:
        """Once a scout is answered, a fresh attempt is made, and the caller soon served."""
        back = 4.0

        def script(n, _):
            return None if asyncio.get_running_loop().time() >= back else 1000.0

        def scout(_):
            return False if asyncio.get_running_loop().time() >= back else None

        _, driver, seconds, _ = run(script, scout=scout)
        assert back <= seconds <= back + SCOUTING + 0.02
        assert len(driver.calls) == 2

    def test_it_refuses_and_comes_back(self, run) -> None:
        """A scout that is refused is one that was not answered."""
        back = 4.0

        def now_or(otherwise):
            return None if asyncio.get_running_loop().time() >= back else otherwise

        asked = []

        def scout(_):
            asked.append(asyncio.get_running_loop().time())
            return False if now_or(REFUSED) is None else REFUSED

        _, _, seconds, _ = run(lambda *_: now_or(1000.0), scout=scout)
        assert back <= seconds <= back + SCOUTING + 0.02
        assert len(asked) <= back / SCOUTING

    def test_a_waking_server_is_left_to_it(self, run) -> None:
        """It answered and holds the attempt: no scout, no second attempt."""

        def scout(_):
            raise AssertionError("a scout was sent")

        _, driver, seconds, _ = run(lambda *_: Held(8.0), scout=scout)
        assert (len(driver.calls), seconds) == (1, pytest.approx(8, abs=0.02))

    def test_a_server_that_holds_without_a_word(self, run) -> None:
        """Scouts are answered: second attempts stay few, and the held one is not lost."""
        _, driver, seconds, _ = run(lambda n, _: 8.0 if n == 1 else 1000.0, scout=lambda _: True)
        assert seconds == pytest.approx(8, abs=0.02)
        assert driver.most_under_way == 2
        assert len(driver.calls) <= 5
        gaps = [b - a for a, b in zip(driver.times[1:], driver.times[2:], strict=False)]
        assert gaps == sorted(gaps)
        assert gaps[0] >= SECOND_CHANCE

    def test_one_scout_for_all(self, run, monkeypatch) -> None:
        """Fifty callers that wait send one scout at a time."""
        connector = Connector(pooler="none")
        sent = []

        async def fifty():
            arguments = {"timeout": 3, "host": "h", "port": 1, "ssl": False}
            await asyncio.gather(
                *(connector(**arguments) for _ in range(49)), return_exceptions=True
            )

        def script(n, _):
            if n == 1:
                others.append(asyncio.ensure_future(fifty()))
            return 1000.0

        others: list = []

        def scout(endpoint):
            sent.append(endpoint)

        monkeypatch.setattr(connector, "pooler", "none")
        run(script, connector=connector, scout=scout, timeout=3.01)
        assert 5 <= len(sent) <= 3 / SCOUTING

    def test_the_second_attempt_fails_for_good(self, run) -> None:
        """A wrong password is a wrong password, and the patient attempt is given up."""
        error, driver, *_ = run(
            lambda n, _: 1000.0 if n == 1 else pg("28P01"), scout=lambda _: False
        )
        assert (type(error), len(driver.calls)) == (AuthenticationFailed, 2)

    def test_the_second_attempt_fails_for_now(self, run) -> None:
        """The server is starting: tried again, beside the patient attempt."""
        _, driver, seconds, _ = run(
            lambda n, _: 1000.0 if n == 1 else pg("57P03") if n < 5 else None, scout=lambda _: False
        )
        assert len(driver.calls) == 5
        assert seconds < SILENT + 4 * LONGEST_PAUSE

    def test_a_slow_password_is_not_silence(self, run) -> None:
        """Nothing has been sent yet."""

        async def ask() -> str:
            await asyncio.sleep(5)
            return "x"

        _, driver, seconds, _ = run(lambda *_: None, password=ask, scout=lambda _: True)
        assert (len(driver.calls), seconds) == (1, 5)

    def test_a_far_server_is_not_silent(self, run) -> None:
        """Where the last answer took long, more time is given."""
        connector = Connector(pooler="none")
        connector.reputation.note_answer(0.4)
        _, driver, *_ = run(lambda *_: 0.7, connector=connector, scout=lambda _: True)
        assert len(driver.calls) == 1


@pytest.mark.parametrize("turns", range(12))
def test_cancelled_at_every_turn(monkeypatch, turns) -> None:
    """Whenever the caller is cancelled, nothing is left: no task, no connection."""
    driver = FakeDriver(lambda n, _: 1000.0 if n == 1 else 0.0)
    monkeypatch.setattr(asyncpg, "connect", driver.connect)

    async def answered(_):
        return True

    monkeypatch.setattr(scouts, "offers_tls", answered)

    async def main() -> None:
        connector = Connector(pooler="none")
        call = connector(timeout=10, host=["10.0.0.1", "10.0.0.2"], port=[1, 1], ssl=False)
        task = asyncio.ensure_future(call)
        await asyncio.sleep(SILENT)
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        kept = 0
        with contextlib.suppress(asyncio.CancelledError):
            kept = not (await task).terminated
        for _ in range(10):
            await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert (driver.under_way, driver.kept) == (0, kept)

    def loop_factory():
        return looptime.patch_event_loop(asyncio.new_event_loop())

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main())


def test_a_permanent_failure_ends_the_round(run) -> None:
    """A wrong password at the first host is not tried at the second."""
    error, driver, *_ = run(lambda *_: pg("28P01"), host=["a", "b"], port=[1, 1])
    assert (type(error), len(driver.calls)) == (AuthenticationFailed, 1)


def test_hosts_in_random_order(run, monkeypatch) -> None:
    """load_balance_hosts=random shuffles each round."""
    monkeypatch.setattr("random.shuffle", lambda hosts: hosts.reverse())
    connector = Connector(pooler="none", shuffle_hosts=True)
    _, driver, *_ = run(lambda *_: None, connector=connector, host=["a", "b"], port=[1, 1])
    assert driver.calls[0]["host"] == "b"


def test_prefer_standby(run) -> None:
    """All hosts are asked for a standby first, then any will do."""

    def script(_, arguments):
        if arguments["target_session_attrs"] == "standby":
            return asyncpg.exceptions.TargetServerAttributeNotMatched("a primary")
        return None

    _, driver, *_ = run(script, host=["a", "b"], port=[1, 1], target_session_attrs="prefer-standby")
    assert [(c["host"], c["target_session_attrs"]) for c in driver.calls] == [
        ("a", "standby"),
        ("b", "standby"),
        ("a", "any"),
    ]


class TestPassword:
    """A password may be asked for at every physical connect."""

    def test_callables(self, run) -> None:
        """Sync or async, once for each attempt."""
        tokens = iter(["one", "two"])

        async def ask() -> str:
            return next(tokens)

        _, driver, *_ = run(lambda n, _: REFUSED if n == 1 else None, password=ask)
        assert [call["password"] for call in driver.calls] == ["one", "two"]
        _, driver, *_ = run(lambda *_: None, password=lambda: "plain")
        assert driver.calls[0]["password"] == "plain"

    def test_a_callable_that_fails(self, run) -> None:
        """Its type is named, not its words, which may hold the secret."""

        def ask() -> str:
            raise ValueError("t0ken")

        error, driver, *_ = run(lambda *_: None, password=ask)
        assert type(error) is PasswordUnavailable
        assert "ValueError" in str(error)
        assert "t0ken" not in str(error)
        assert driver.calls == []


class TestFallback:
    """`prefer` and `allow` try with TLS and without, as libpq does."""

    CONTEXT = ssl.create_default_context()

    def connector(self) -> Connector:
        return Connector(pooler="none", tls=self.CONTEXT)

    def test_prefer_without_tls_at_the_server(self, run) -> None:
        """A refusal of TLS is followed by a plain connect, and remembered."""
        connector = self.connector()

        def script(_, arguments):
            return ConnectionError("rejected SSL upgrade") if arguments["ssl"] else None

        _, first, *_ = run(script, connector=connector, ssl="prefer")
        _, second, *_ = run(script, connector=connector, ssl="prefer")
        assert [call["ssl"] for call in first.calls] == [self.CONTEXT, False]
        assert [call["ssl"] for call in second.calls] == [False]

    def test_a_refusal_of_tls_is_not_the_cause_of_what_follows(self, run) -> None:
        """The time runs out in the plain connect after it: that one is what failed."""

        def script(_, arguments):
            return ConnectionError("rejected SSL upgrade") if arguments["ssl"] else 1000.0

        error, *_ = run(script, connector=self.connector(), ssl="prefer", timeout=0.5)
        assert type(error) is ConnectTimeout

    def test_allow_where_only_tls_is_let_in(self, run) -> None:
        """A refusal by pg_hba.conf (28000) is followed by one with TLS."""

        def script(_, arguments):
            return None if arguments["ssl"] else pg("28000")

        _, driver, *_ = run(script, connector=self.connector(), ssl="allow")
        assert [call["ssl"] for call in driver.calls] == [False, self.CONTEXT]

    def test_a_wrong_password_is_not_tried_twice(self, run) -> None:
        """Only what the transport may change is tried on the other."""
        error, driver, *_ = run(lambda *_: pg("28P01"), connector=self.connector(), ssl="prefer")
        assert (type(error), len(driver.calls)) == (AuthenticationFailed, 1)


class TestPooler:
    """What is sent at start-up, and what later, for each pooler."""

    SETTINGS = {"application_name": "a", "statement_timeout": "5", "search_path": "x"}

    def run_as(self, run, pooler: str, script=lambda *_: None, **arguments):
        return run(
            script,
            connector=Connector(pooler=pooler),
            server_settings=self.SETTINGS,
            **arguments,
        )

    def test_direct(self, run) -> None:
        """All settings are sent at start-up."""
        connection, *_ = self.run_as(run, "none")
        assert connection.arguments["server_settings"] == self.SETTINGS
        assert (connection.executed, connection.transaction_settings) == ([], {})

    def test_session(self, run) -> None:
        """What a pooler refuses at start-up is set right after it, in one round trip."""
        connection, *_ = self.run_as(run, "session")
        assert connection.arguments["server_settings"] == {"application_name": "a"}
        assert connection.executed == ["SET statement_timeout = '5';SET search_path = 'x';"]

    def test_transaction(self, run) -> None:
        """What a pooler refuses is set in each transaction, and the driver's cache is off."""
        connection, *_ = self.run_as(run, "transaction")
        assert connection.arguments["server_settings"] == {"application_name": "a"}
        assert connection.arguments["statement_cache_size"] == 0
        assert connection.transaction_settings == {"statement_timeout": "5", "search_path": "x"}

    def test_auto_direct_asks_once_an_address(self, run) -> None:
        """The process that answers is compared once; later connects cost nothing more."""
        connector = Connector()
        first, *_ = run(lambda *_: None, connector=connector)
        second, *_ = run(lambda *_: None, connector=connector)
        assert first.executed == ["SELECT 1 WHERE pg_backend_pid() = 7"]
        assert second.executed == []

    def test_auto_finds_a_pooler_by_its_refusal(self, run) -> None:
        """08P01 at start-up: again without the settings, and from then on at once."""
        connector = Connector()

        def script(_, arguments):
            refused = "statement_timeout" in arguments["server_settings"]
            return (
                asyncpg.ProtocolViolationError("unsupported startup parameter") if refused else None
            )

        settings = {"server_settings": self.SETTINGS, "connector": connector}
        first, driver, *_ = run(script, **settings)
        _, again, *_ = run(script, **settings)
        assert (first.pooler, len(driver.calls), len(again.calls)) == ("transaction", 2, 1)

    def test_auto_finds_a_pooler_that_takes_everything(self, run, monkeypatch) -> None:
        """Another process answers than was announced: reconnect as behind a pooler."""

        async def another(self, query: str) -> str:
            return "SELECT 0"

        monkeypatch.setattr(FakeConnection, "execute", another)
        connection, driver, *_ = run(lambda *_: None, connector=Connector())
        assert (connection.pooler, len(driver.calls)) == ("transaction", 2)

    def test_auto_notices_a_pooler_that_comes_later(self, run) -> None:
        """An address found direct, where a pooler was put since, is looked at anew."""
        connector = Connector()
        run(lambda *_: None, connector=connector)

        def script(_, arguments):
            refused = "statement_timeout" in arguments["server_settings"]
            return asyncpg.ProtocolViolationError("refused") if refused else None

        connection, *_ = run(script, connector=connector, server_settings=self.SETTINGS)
        assert connection.pooler == "transaction"
