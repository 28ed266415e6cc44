"""What a client and a server say to each other, message by message."""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from poolkit.testing._wire import Frame, Framer, Mode

Sender = Literal["client", "server"]

_REQUESTS = {
    80_877_102: "CancelRequest",
    80_877_103: "SSLRequest",
    80_877_104: "GSSENCRequest",
}
_CLIENT = {
    b"B": "Bind",
    b"C": "Close",
    b"D": "Describe",
    b"E": "Execute",
    b"F": "FunctionCall",
    b"H": "Flush",
    b"P": "Parse",
    b"Q": "Query",
    b"S": "Sync",
    b"X": "Terminate",
    b"c": "CopyDone",
    b"d": "CopyData",
    b"f": "CopyFail",
}
_SERVER = {
    b"1": "ParseComplete",
    b"2": "BindComplete",
    b"3": "CloseComplete",
    b"A": "NotificationResponse",
    b"C": "CommandComplete",
    b"D": "DataRow",
    b"E": "ErrorResponse",
    b"G": "CopyInResponse",
    b"H": "CopyOutResponse",
    b"I": "EmptyQueryResponse",
    b"K": "BackendKeyData",
    b"N": "NoticeResponse",
    b"S": "ParameterStatus",
    b"T": "RowDescription",
    b"V": "FunctionCallResponse",
    b"W": "CopyBothResponse",
    b"Z": "ReadyForQuery",
    b"c": "CopyDone",
    b"d": "CopyData",
    b"n": "NoData",
    b"s": "PortalSuspended",
    b"t": "ParameterDescription",
    b"v": "NegotiateProtocolVersion",
}
_AUTHENTICATIONS = {
    0: "AuthenticationOk",
    3: "AuthenticationCleartextPassword",
    5: "AuthenticationMD5Password",
    7: "AuthenticationGSS",
    8: "AuthenticationGSSContinue",
    9: "AuthenticationSSPI",
    10: "AuthenticationSASL",
    11: "AuthenticationSASLContinue",
    12: "AuthenticationSASLFinal",
}
# How much of a message is looked at; the rest streams through, unread.
_CLIENT_PEEK = {b"Q": 65_536, b"P": 65_536, b"B": 1024, b"E": 1024}
_SERVER_PEEK = {b"C": 1024, b"E": 1024, b"N": 1024, b"R": 4, b"Z": 1}
_CREDENTIALS = {3: "PasswordMessage", 5: "PasswordMessage", 10: "SASLInitialResponse"}
_CREDENTIALS |= {11: "SASLResponse", 7: "GSSResponse", 8: "GSSResponse", 9: "GSSResponse"}

MESSAGE_TYPES = frozenset(
    {
        "StartupMessage",
        "EncryptionResponse",
        *_REQUESTS.values(),
        *_CLIENT.values(),
        *_SERVER.values(),
        *_AUTHENTICATIONS.values(),
        *_CREDENTIALS.values(),
    }
)
"""The names of PostgreSQL's documentation; the byte that answers SSLRequest has none in it."""

EXECUTING = frozenset({"Query", "Execute"})
"""What a client has a statement executed by."""

OUTCOMES = frozenset({"CommandComplete", "EmptyQueryResponse", "PortalSuspended", "ErrorResponse"})
"""What a server ends its answer to a statement with."""


@dataclass(frozen=True, slots=True)
class Message:
    """A message of PostgreSQL's protocol, as it came to the proxy.

    Passwords, SASL data, Bind's parameters and rows are not kept. SQL is, with the literals in it.

    Attributes:
        connection: The connection's number, counted from 1.
        sender: Who sent it.
        type: Its name in PostgreSQL's documentation. A run of DataRow or CopyData is told once.
        text: The SQL of a Query, Parse, Bind or Execute; the tag of a CommandComplete; the
            SQLSTATE of an ErrorResponse or NoticeResponse; the status of a ReadyForQuery (I, T, E);
            the answer to a request for encryption (S, G, N).
        statement: The SQL that a server's message answers, as far as is known.
        time: `time.monotonic()` when it came.
    """

    connection: int
    sender: Sender
    type: str
    text: str | None
    statement: str | None
    time: float


@dataclass(frozen=True, slots=True)
class Unit:
    """Bytes to relay, and the messages that begin and end with them."""

    data: bytes
    begins: Message | None = None
    ends: Message | None = None


class Dialogue:
    """Reads along on one connection, and keeps what is needed to understand the next message.

    Args:
        connection: The connection's number.
        refuse_encryption: The server is not asked, so that it does not answer.
    """

    def __init__(self, connection: int, *, refuse_encryption: bool) -> None:
        self._connection = connection
        self._refuse_encryption = refuse_encryption
        self._framers = {
            "client": Framer(Mode.STARTUP, _CLIENT_PEEK, b"d"),
            "server": Framer(Mode.TYPED, _SERVER_PEEK, b"Dd"),
        }
        self._current: dict[Sender, Message | None] = {"client": None, "server": None}
        self._authentication = 0
        self._statements: dict[str, str] = {}
        self._portals: dict[str, str | None] = {}
        # Queries, Executes and Syncs that the server has not answered, with their SQL.
        self._pending: deque[tuple[str, str | None]] = deque()

    @property
    def encrypted(self) -> bool:
        return self._framers["client"].mode is Mode.OPAQUE

    def units(self, sender: Sender, data: bytes) -> Iterator[Unit]:
        """The bytes as they came, cut at messages."""
        for part in self._framers[sender].feed(data):
            message = None if part.begins is None else self._told(sender, part.begins)
            if message is not None:
                self._current[sender] = message
            yield Unit(part.data, message, self._current[sender] if part.ends else None)

    def rest(self, sender: Sender) -> bytes:
        return self._framers[sender].rest()

    def _told(self, sender: Sender, frame: Frame) -> Message:
        if sender == "client":
            name, text = self._client(frame) if frame.kind else self._request(frame)
            statement = None
        else:
            statement = self._answered(frame.kind)
            name, text = self._server(frame) if frame.kind else self._encryption(frame)
        return Message(self._connection, sender, name, text, statement, time.monotonic())

    def _request(self, frame: Frame) -> tuple[str, None]:
        name = _REQUESTS.get(int.from_bytes(frame.body, "big"), "StartupMessage")
        if name == "StartupMessage":
            self._framers["client"].mode = Mode.TYPED
        elif name != "CancelRequest" and not self._refuse_encryption:
            self._framers["server"].mode = Mode.ANSWER
        return name, None

    def _encryption(self, frame: Frame) -> tuple[str, str]:
        if frame.body != b"N":
            self._framers["client"].mode = self._framers["server"].mode = Mode.OPAQUE
        return "EncryptionResponse", frame.body.decode()

    def _client(self, frame: Frame) -> tuple[str, str | None]:
        if frame.kind == b"p":
            return _CREDENTIALS.get(self._authentication, "PasswordMessage"), None
        name = _CLIENT.get(frame.kind, "Unknown")
        text = self._sql(name, frame.body)
        if name in {"Query", "Execute", "Sync", "FunctionCall"}:
            self._pending.append((name, text))
        return name, text

    def _sql(self, name: str, body: bytes) -> str | None:
        match name:
            case "Query":
                return _strings(body, 1)[0]
            case "Parse":
                statement, sql = _strings(body, 2)
                self._statements[statement] = sql
                return sql
            case "Bind":
                portal, statement = _strings(body, 2)
                self._portals[portal] = self._statements.get(statement)
                return self._portals[portal]
            case "Execute":
                return self._portals.get(_strings(body, 1)[0])
            case _:
                return None

    def _server(self, frame: Frame) -> tuple[str, str | None]:
        if frame.kind == b"R":
            self._authentication = int.from_bytes(frame.body, "big")
            return _AUTHENTICATIONS.get(self._authentication, "Authentication"), None
        name = _SERVER.get(frame.kind, "Unknown")
        match name:
            case "CommandComplete":
                text: str | None = _strings(frame.body, 1)[0]
            case "ErrorResponse" | "NoticeResponse":
                text = _sqlstate(frame.body)
            case "ReadyForQuery":
                text = frame.body.decode("ascii", "replace")
            case _:
                text = None
        self._settle(name)
        return name, text

    def _answered(self, kind: bytes) -> str | None:
        # In COPY the server ignores a Sync; what it completes is never one.
        while kind in {b"C", b"I", b"s"} and self._pending and self._pending[0][0] == "Sync":
            self._pending.popleft()
        return self._pending[0][1] if self._pending else None

    def _settle(self, name: str) -> None:
        pending = self._pending
        if name == "ReadyForQuery":
            while pending and pending.popleft()[0] == "Execute":
                pass  # skipped by the server after an error
        elif name in OUTCOMES and pending and pending[0][0] == "Execute":
            pending.popleft()


def _strings(body: bytes, count: int) -> list[str]:
    found = body.split(b"\0", count)[:count]
    found += [b""] * (count - len(found))
    return [each.decode("utf-8", "replace") for each in found]


def _sqlstate(body: bytes) -> str | None:
    codes = (field[1:] for field in body.split(b"\0") if field[:1] == b"C")
    return next((code.decode("ascii", "replace") for code in codes), None)
