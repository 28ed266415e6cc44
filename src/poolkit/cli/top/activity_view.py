"""The server's sessions, drawn: connections against the limit, applications, the worst sessions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from poolkit.cli.output import count
from poolkit.cli.top.activity import IDLE, Activity, Application, Session
from poolkit.cli.top.order import LONG, Placed, ordered, worth_showing
from poolkit.cli.top.pictures import BAD, DOUBTFUL, age, bar, line, rounded, table
from poolkit.cli.top.view import Frame

WIDE, WIDER = 110, 140
"""Columns of the terminal from which on users, and databases, clients and waits, are shown."""

BAR = 30
APPLICATIONS = 6
"""Lines, and a quarter of the height, at most for the table of applications."""

ROOMY = 14
"""Lines below which the sessions have them all."""

FULL = 0.9
"""Of the connections: from there on their number is red."""

NAMED = 3
"""Sessions that are named as blocking another."""

DEEPEST = 4
"""Steps by which a session in a lock queue is indented."""

_STATES = {
    "idle in transaction": "idle in tx",
    "idle in transaction (aborted)": "aborted tx",
    "fastpath function call": "function",
}
_POOLERS = {
    "session": ", through a pooler",
    "transaction": ", through a pooler in transaction mode",
}


@dataclass(frozen=True, slots=True)
class Sessions:
    """A look at a server."""

    address: str
    activity: Activity

    @property
    def title(self) -> str:
        """The server, the database and the role."""
        found = self.activity
        return (
            f"PostgreSQL {found.version} at {self.address}, database {found.database},"
            f" as {found.role}{_POOLERS.get(found.pooler, '')}"
        )

    def draw(self, frame: Frame) -> RenderableType:
        """The view."""
        head = [_connections(self.activity, frame), _states(self.activity)]
        head += _notes(self.activity)
        left = None if frame.height is None else max(0, frame.height - len(head))
        applications, height = _applications(self.activity.applications, left)
        placed = ordered(self.activity.sessions)
        shown = placed if frame.everything else [p for p in placed if worth_showing(p)]
        left = None if left is None else max(0, left - height)
        return Group(*head, *applications, *_sessions(shown, frame, left))

    def as_json(self, *, everything: bool) -> dict[str, Any]:
        """The server, its connections, applications, and sessions in their order."""
        found = self.activity
        placed = ordered(found.sessions)
        shown = placed if everything else [p for p in placed if worth_showing(p)]
        return {
            "server": {
                "address": self.address,
                "version": found.version,
                "database": found.database,
                "role": found.role,
                "pooler": found.pooler,
            },
            "connections": {
                "used": found.connections,
                "max": found.max_connections,
                "reserved": found.reserved,
                "hidden": found.hidden,
            },
            "applications": [rounded(asdict(each)) for each in found.applications],
            "sessions": [_session_json(each) for each in shown],
        }


def _session_json(placed: Placed) -> dict[str, Any]:
    session = placed.session
    facts = asdict(session) | {"seconds": session.seconds, "blocks": placed.blocks}
    return rounded(facts | {"hidden": session.is_hidden})  # type: ignore[no-any-return]


def _connections(found: Activity, frame: Frame) -> Text:
    used, most = found.connections, found.max_connections - found.reserved
    style = BAD if used >= FULL * most else "green"
    drawn = bar(used, most, min(BAR, frame.width // 3), style, ascii_only=frame.ascii_only)
    numbers = f" {used} of {most} ({found.max_connections} - {found.reserved} reserved)"
    return line(Text("connections  ", "cyan"), drawn, Text(numbers, style if used >= most else ""))


def _states(found: Activity) -> Text:
    blocked = sum(s.lock is not None for s in found.clients)
    states = Counter(s.state for s in found.clients if s.lock is None and not s.is_hidden)
    in_transaction = sum(s.is_in_transaction for s in found.clients)
    parts = [
        Text(f"active {states['active']}"),
        Text(f"idle {states[IDLE]}"),
        Text(f"idle in transaction {in_transaction}", DOUBTFUL if in_transaction else ""),
        Text(f"blocked {blocked}", BAD if blocked else ""),
    ]
    if found.hidden:
        parts.append(Text(f"hidden {found.hidden}", DOUBTFUL))
    return line(Text("sessions     ", "cyan"), Text("   ").join(parts))


def _notes(found: Activity) -> Iterator[Text]:
    if found.hidden:
        yield line(
            Text(
                f"what others do is hidden from {found.role}: GRANT pg_monitor TO {found.role}",
                DOUBTFUL,
            )
        )


def _applications(
    found: Sequence[Application], height: int | None
) -> tuple[list[RenderableType], int]:
    """The table, and the lines that it takes."""
    room = len(found) if height is None else min(APPLICATIONS, height // 4)
    if not found or (height is not None and height < ROOMY):
        return [], 0
    hidden = any(each.hidden for each in found)
    titles = ["all", "active", "idle", "in tx", "blocked", *(["hidden"] if hidden else [])]
    drawn = table("application", *(f">{title}" for title in titles), ">oldest tx")
    shown = found if len(found) <= room else found[: room - 1]
    for each in shown:
        numbers = [each.connections, each.active, each.idle, each.in_transaction, each.blocked]
        cells = [_number(n, _alarm(title)) for n, title in zip(numbers, titles, strict=False)]
        if hidden:
            cells.append(_number(each.hidden, ""))
        drawn.add_row(Text(each.name or "-"), *cells, age(each.longest))
    if rest := len(found) - len(shown):
        drawn.add_row(Text(f"and {rest} more", "dim"))
    return [Text(""), drawn], 2 + min(room, len(found))


def _alarm(title: str) -> str:
    return {"in tx": DOUBTFUL, "blocked": BAD}.get(title, "")


def _number(number: int, style: str) -> Text:
    return Text(str(number), style) if number else Text("0", "dim")


def _sessions(
    placed: Sequence[Placed], frame: Frame, height: int | None
) -> Iterator[RenderableType]:
    room = None if height is None else height - 2
    if room is not None and room < 1:
        return
    yield Text("")
    if not placed:
        yield line(Text("nobody runs a statement, holds a transaction or waits", "green"))
        return
    drawn = _session_table(frame.width)
    taken = 0
    for place, each in enumerate(placed):
        cells = _cells(each, frame)
        lines = 1 + cells[-1].plain.count("\n")
        rest = len(placed) - place
        if room is not None and taken + lines > room - (rest > 1):
            yield from ([drawn] if place else [])
            yield line(Text(f"and {count(rest, 'session')} more", "dim"))
            return
        taken += lines
        drawn.add_row(*cells)
    yield drawn


def _session_table(width: int) -> Table:
    columns = ["pid", "application"]
    if width >= WIDE:
        columns.append("user")
    if width >= WIDER:
        columns += ["database", "client"]
    columns += ["state", ">for", ">in tx"]
    if width >= WIDER:
        columns.append("waits for")
    return table(*columns, "statement", last_takes_rest=True, gap=2 if width >= WIDE else 1)


def _cells(placed: Placed, frame: Frame) -> list[Text]:
    session = placed.session
    name = session.application or ("-" if session.is_client else session.backend or "-")
    cells = [_pid(placed, ascii_only=frame.ascii_only), Text(name)]
    if frame.width >= WIDE:
        cells.append(Text(session.user or "-"))
    if frame.width >= WIDER:
        cells += [Text(session.database or "-"), Text(session.client or "-")]
    word, style = _state(session)
    cells += [Text(word, style), Text(age(session.seconds), style)]
    cells.append(Text(age(session.transaction_for)))
    if frame.width >= WIDER:
        cells.append(Text(session.wait or "" if session.state == "active" else ""))
    return [*cells, _statement(placed)]


def _pid(placed: Placed, *, ascii_only: bool) -> Text:
    steps = min(placed.depth, DEEPEST)
    branch = ("`-" if ascii_only else "└─") if steps else ""
    return Text("  " * max(0, steps - 1) + branch + str(placed.session.pid))


def _state(session: Session) -> tuple[str, str]:
    if session.lock is not None:
        return "blocked", BAD
    if session.is_hidden:
        return "hidden", "dim"
    is_long = (session.seconds or 0) >= LONG
    word = _STATES.get(session.state or "", session.state or "-")
    if session.is_in_transaction:
        return word, DOUBTFUL if is_long else ""
    return word, "dim" if session.state in (None, IDLE) else ""


def _statement(placed: Placed) -> Text:
    session = placed.session
    notes = [f"blocks {placed.blocks}"] if placed.blocks else []
    if session.lock is not None:
        mode = session.lock.mode.removesuffix("Lock")
        notes.append(f"waits for {session.lock.target} ({mode}){_others(placed)}")
    statement = Text(session.query, "" if session.state == "active" else "dim")
    if not notes:
        return statement
    style = BAD if session.lock is not None else DOUBTFUL
    return Text("\n").join([Text(", ".join(notes), style), statement])


def _others(placed: Placed) -> str:
    """Who is at fault besides the session above."""
    names = [str(pid) if pid else "a prepared transaction" for pid in placed.others]
    if not names:
        return ""
    more = ["..."] if len(names) > NAMED else []
    return f", {'also ' if placed.depth else ''}of {', '.join(names[:NAMED] + more)}"
