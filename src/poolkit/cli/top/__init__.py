"""``poolkit top``: a live view of a server's sessions, of a service's pools, or of a demo."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    nullcontext,
)
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from poolkit.cli import output
from poolkit.cli.loading import Loaded, load
from poolkit.cli.top import live
from poolkit.cli.top.live import Feed
from poolkit.cli.top.server import Server
from poolkit.cli.top.view import Frame, Source, failure
from poolkit.errors import ConfigurationError

OK, NO_SOURCE, BAD_SETTINGS = 0, 1, 2

ENDPOINTS = ("http://", "https://")

_SILENCE = logging.NullHandler()

Opened = AbstractAsyncContextManager[Sequence[Source]]


@dataclass(frozen=True, slots=True)
class Options:
    """How to show it.

    Attributes:
        interval: Seconds between looks.
        once: Whether to print what is there now, and end.
        as_json: Whether to do that as JSON.
        everything: Whether what is idle is wanted, too.
    """

    interval: float
    once: bool
    as_json: bool
    everything: bool


def run(target: str | None, options: Options, *, prefix: str, demo: bool) -> int:
    """Show it, and return the exit code."""
    logging.getLogger().addHandler(_SILENCE)  # else warnings would end up in the picture
    has_settings = not demo and not _is_endpoint(target)
    loaded = load(prefix, target) if has_settings else Loaded(None, {}, None, [])
    try:
        opened = _demo(options) if demo else _opened(target, loaded, options)
        found = asyncio.run(_show(opened, options))
    except Exception as error:  # noqa: BLE001 (whatever it is, the user is told in one sentence)
        _tell(error, loaded.doubts, as_json=options.as_json)
        return BAD_SETTINGS if isinstance(error, ConfigurationError) else NO_SOURCE
    if options.as_json:
        output.print_json({"ok": True, **found, "warnings": [*loaded.doubts]})
    else:
        output.print_warnings(output.stderr(), loaded.doubts)
    return OK


def _is_endpoint(target: str | None) -> bool:
    return target is not None and target.strip().lower().startswith(ENDPOINTS)


def _opened(target: str | None, loaded: Loaded, options: Options) -> Opened:
    if loaded.settings is not None:
        return _closing(Server(loaded.settings))
    if loaded.error is not None:
        raise loaded.error
    return _endpoint(target or "", options)


@asynccontextmanager
async def _closing(source: Source) -> AsyncIterator[Sequence[Source]]:
    try:
        yield [source]
    finally:
        await source.close()


def _endpoint(url: str, options: Options) -> Opened:
    try:
        from poolkit.cli.top.endpoint import Metrics  # noqa: PLC0415 (its package is optional)
        from poolkit.cli.top.exposition import Endpoint  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    return _closing(Metrics(Endpoint(url), options.interval))


def _demo(options: Options) -> Opened:
    try:
        from poolkit.cli.top.demo import opened  # noqa: PLC0415 (as above)
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    return opened(options.interval)


def _missing(error: ModuleNotFoundError) -> ConfigurationError:
    """What to install, if it is the optional package that is missing."""
    package = (error.name or "").partition(".")[0]
    if package != "prometheus_client":
        raise error
    return ConfigurationError(
        f"metrics need the package {package}: pip install 'poolkit[prometheus]'"
    )


async def _show(opened: Opened, options: Options) -> dict[str, object]:
    """Show the sources, live or once; what they say, for JSON."""
    console = output.stdout()
    once = options.once or options.as_json
    is_live = console.is_terminal and not (once or console.is_dumb_terminal)
    async with AsyncExitStack() as stack:
        with console.status("looking") if is_live else nullcontext():
            feeds = [Feed(source) for source in await stack.enter_async_context(opened)]
            for feed in feeds:
                await feed.look()
                if feed.error is not None:
                    raise feed.error
        if options.as_json:
            return _merged(feeds, options)
        if is_live:
            await live.run(console, feeds, interval=options.interval, everything=options.everything)
        else:
            _print(console, feeds, options)
    return {}


def _merged(feeds: Sequence[Feed], options: Options) -> dict[str, object]:
    looks = [feed.last for feed in feeds if feed.last is not None]
    parts = [look.as_json(everything=options.everything) for look in looks]
    return {name: value for part in parts for name, value in part.items()}


def _print(console: Console, feeds: Sequence[Feed], options: Options) -> None:
    frame = Frame(console.width, None, console.options.ascii_only, options.everything)
    for place, feed in enumerate(feeds):
        assert feed.last is not None
        if place:
            console.print()
        console.print(Text(feed.last.title, "bold"))
        console.print(feed.last.draw(frame))


def _tell(error: Exception, doubts: Sequence[str], *, as_json: bool) -> None:
    found = failure(error)
    if as_json:
        output.print_json({"ok": False, "error": found.as_json(), "warnings": [*doubts]})
        return
    output.print_failure(found)
    output.print_warnings(output.stderr(), doubts)
