"""Pools, drawn from a service's metrics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from poolkit.cli.output import count, duration
from poolkit.cli.top.pictures import BAD, DOUBTFUL, bar, line, rounded, stacked, table
from poolkit.cli.top.pools import ALL, Count, Pool, Room
from poolkit.cli.top.view import Frame
from poolkit.telemetry.catalogue import SECONDS

BAR, SMALL_BAR = 40, 10
WIDER = 110

BUSY = 0.8
"""Utilisation from which on it is doubtful; at 1 it is bad."""


_BAR = ""
_TITLES = (
    *("pool", "worker", _BAR, ">used", ">idle", ">waiting"),
    *(">per s", ">wait p95", ">timeouts", ">failures"),
)


@dataclass(frozen=True, slots=True)
class Pools:
    """A look at an endpoint.

    Attributes:
        seconds: What the growth and the rates are of.
    """

    address: str
    seconds: float
    pools: Sequence[Pool]

    @property
    def title(self) -> str:
        """The endpoint."""
        return self.address

    def draw(self, frame: Frame) -> RenderableType:
        """One block for each pool; workers, and more pools than fit, in a table."""
        whole = [pool for pool in self.pools if pool.worker in (None, ALL)]
        workers = [pool for pool in self.pools if pool not in whole]
        blocks = [_block(pool, frame) for pool in whole]
        lines = sum(map(len, blocks)) + len(blocks) - 1
        room = None if frame.height is None else frame.height - lines
        if room is not None and room < 0:
            return Group(*_table(whole + workers, frame, frame.height))
        parts: list[RenderableType] = []
        for block in blocks:
            parts += [*([Text("")] if parts else []), *block]
        if workers and (room is None or room > 3):  # noqa: PLR2004 (a blank, the titles, a row)
            parts += [Text(""), *_table(workers, frame, None if room is None else room - 1)]
        return Group(*parts)

    def as_json(self, *, everything: bool) -> dict[str, Any]:  # noqa: ARG002 (nothing is left out)
        """The pools."""
        return {
            "endpoint": self.address,
            "seconds": rounded(self.seconds),
            "pools": [_json(pool) for pool in self.pools],
        }


def _json(pool: Pool) -> dict[str, Any]:
    return rounded(asdict(pool) | {"utilisation": pool.utilisation})  # type: ignore[no-any-return]


def _block(pool: Pool, frame: Frame) -> list[Text]:
    return [
        _name(pool),
        _connections(pool, frame),
        _waiting(pool, frame),
        _labelled("checkouts", _checkouts(pool)),
        _labelled("trouble", _trouble(pool)),
        _labelled("closed", _closed(pool.closed)),
        *([_server(pool.server)] if pool.server else []),
    ]


def _name(pool: Pool) -> Text:
    name = f"{pool.name}, worker {pool.worker}" if pool.worker not in (None, ALL) else pool.name
    overload = Text("   overload: the newest in line are served first", BAD)
    return line(Text(name, "bold"), *([overload] if pool.overloaded else []))


def _labelled(label: str, value: Text) -> Text:
    return line(Text(f"  {label:<11}", "cyan"), value)


def _connections(pool: Pool, frame: Frame) -> Text:
    style = _style(pool)
    parts = ((pool.used, style or "green"), (pool.idle, "blue"), (pool.opening, "magenta"))
    most = pool.limit or max(sum(number for number, _ in parts), 1)
    drawn = stacked(parts, most, min(BAR, frame.width // 3), ascii_only=frame.ascii_only)
    share = "" if pool.utilisation is None else f" {pool.utilisation:4.0%}"
    of = "unlimited" if pool.limit is None else f"of {pool.limit}"
    told = f"  used {pool.used}, idle {pool.idle}, opening {pool.opening} {of}"
    return _labelled("pool", drawn + Text(share, style) + Text(told))


def _style(pool: Pool) -> str:
    if pool.utilisation is None or pool.utilisation < BUSY:
        return ""
    return BAD if pool.utilisation >= 1 else DOUBTFUL


def _waiting(pool: Pool, frame: Frame) -> Text:
    scale = max(pool.limit or 1, pool.waiting)
    width = min(BAR, frame.width // 3)
    drawn = bar(pool.waiting, scale, width, DOUBTFUL, ascii_only=frame.ascii_only)
    return _labelled(
        "waiting", drawn + Text(f" {pool.waiting:4}", DOUBTFUL if pool.waiting else "")
    )


def _checkouts(pool: Pool) -> Text:
    parts = ["-" if pool.checkouts is None else f"{_rate(pool.checkouts)} per second"]
    if pool.wait is not None:
        parts.append(f"wait p50 {_bucketed(pool.wait.p50)}, p95 {_bucketed(pool.wait.p95)}")
    if pool.longest_use:
        parts.append(f"longest use {duration(pool.longest_use)}")
    return Text(", ".join(parts))


def _rate(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 or not number else f"{number:.1f}"  # noqa: PLR2004


def _bucketed(seconds: float) -> str:
    """A quantile; beyond the last bucket no more is known."""
    last = SECONDS[-1]
    return f"over {duration(last)}" if seconds > last else duration(seconds)


def _trouble(pool: Pool) -> Text:
    counts = {
        "timeout": pool.timeouts,
        "refusal": pool.refusals,
        "connect failure": pool.failures,
        "long holder": pool.long_holders,
        "repeated transaction": pool.retries,
    }
    parts = [_counted(name, each) for name, each in counts.items() if each.total]
    return Text(", ").join(parts) if parts else Text("none", "green")


def _counted(name: str, counted: Count) -> Text:
    said = count(counted.total, name)
    style = BAD if counted.growth else ""
    return Text(f"{said}{_grown(counted)}{_reasons(counted)}", style)


def _grown(counted: Count) -> str:
    return f" (+{counted.growth})" if counted.growth else ""


def _reasons(counted: Count) -> str:
    if not counted.by:
        return ""
    by = sorted(counted.by.items(), key=lambda each: -each[1])
    return ": " + ", ".join(f"{name.replace('_', ' ')} {number}" for name, number in by)


def _closed(counted: Count) -> Text:
    if not counted.total:
        return Text("none")
    return Text(f"{counted.total}{_grown(counted)}{_reasons(counted)}")


def _server(room: Room) -> Text:
    return _labelled("server", Text(f"{room.used} of {room.max} connections, of all its clients"))


def _table(pools: Sequence[Pool], frame: Frame, height: int | None) -> Iterator[RenderableType]:
    """One row for each, the worst first."""
    worst = sorted(pools, key=lambda pool: (-pool.waiting, -(pool.utilisation or 0)))
    room = len(worst) if height is None else max(0, height - 1)
    shown = worst if len(worst) <= room else worst[: max(0, room - 1)]
    rows = [_row(pool, ascii_only=frame.ascii_only) for pool in shown]
    left_out = set(_needless(pools, frame.width))
    titles = [title for title in _TITLES if title not in left_out]
    drawn = table(*titles, gap=2 if frame.width >= WIDER else 1)
    for row in rows:
        drawn.add_row(*(cell for title, cell in row.items() if title not in left_out))
    yield drawn
    if rest := len(worst) - len(shown):
        yield line(Text(f"and {rest} more", "dim"))


def _needless(pools: Sequence[Pool], width: int) -> Iterator[str]:
    """Columns that say nothing, or have no room."""
    if all(pool.worker is None for pool in pools):
        yield "worker"
    if len({pool.name for pool in pools}) == 1:
        yield "pool"
    elif width < WIDER:
        yield _BAR


def _row(pool: Pool, *, ascii_only: bool) -> dict[str, Text]:
    style = _style(pool)
    drawn = bar(pool.used, pool.limit or 1, SMALL_BAR, style or "green", ascii_only=ascii_only)
    cells = (
        Text(pool.name),
        Text(pool.worker or "-"),
        drawn,
        Text(f"{pool.used}/{pool.limit}" if pool.limit else str(pool.used), style),
        Text(str(pool.idle)),
        Text(str(pool.waiting), DOUBTFUL if pool.waiting else "dim"),
        Text("-" if pool.checkouts is None else _rate(pool.checkouts)),
        Text("-" if pool.wait is None else _bucketed(pool.wait.p95)),
        _total(pool.timeouts),
        _total(pool.failures),
    )
    return dict(zip(_TITLES, cells, strict=True))


def _total(counted: Count) -> Text:
    return Text(str(counted.total), BAD if counted.growth else "" if counted.total else "dim")
