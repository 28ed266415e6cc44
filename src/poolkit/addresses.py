"""Whom a connect tries, and in which order."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import random
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from poolkit.scouts import Endpoint
from poolkit.url import DEFAULT_PORT, Address

SILENT = 0.3
"""Seconds without a single byte after which another address is tried beside. RFC 8305 waits 0.25 s
for TCP alone; a first byte takes a round trip more."""

LONGEST_SILENT = 1.0
"""The same, at most, where the last answer took long too: twice what it took."""

SILENT_AGAIN = 0.05
"""The same where every address that is left has been bad lately."""

REMEMBERED = 60.0
"""Seconds for which an address that was silent or failed is tried last."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One address to try.

    Attributes:
        address: As the URL says it; None is the driver's own default.
        endpoint: The IP address and port that were found for it; None leaves it to the driver.
        attrs: The ``target_session_attrs`` to ask it for.
        failure: Why no IP address was found.
    """

    address: Address | None
    endpoint: Endpoint | None = None
    attrs: Any = None
    failure: OSError | None = None

    @property
    def key(self) -> object:
        """What is remembered about it is remembered under this."""
        return self.endpoint or self.address

    def __str__(self) -> str:
        return str(self.address) if self.address else "the local server"


@dataclass(eq=False, slots=True)
class Reputation:
    """What the last connects have found out about addresses."""

    patience: float = SILENT
    _bad_until: dict[object, float] = field(default_factory=dict)

    def is_bad(self, candidate: Candidate) -> bool:
        """Whether it was silent or failed a short while ago."""
        until = self._bad_until.get(candidate.key)
        return until is not None and asyncio.get_running_loop().time() < until

    def note_bad(self, candidate: Candidate) -> None:
        """It was silent, or failed."""
        now = asyncio.get_running_loop().time()
        self._bad_until = {key: until for key, until in self._bad_until.items() if until > now}
        self._bad_until[candidate.key] = now + REMEMBERED

    def note_good(self, candidate: Candidate) -> None:
        """It gave a connection."""
        self._bad_until.pop(candidate.key, None)

    def note_answer(self, seconds: float) -> None:
        """The first byte came after that long: a far server is not taken for a silent one."""
        self.patience = min(max(SILENT, 2 * seconds), LONGEST_SILENT)

    def patience_for(self, candidate: Candidate, rest: Sequence[Candidate]) -> float:
        """Seconds of silence after which the rest are tried beside it."""
        if not rest or not self.is_bad(candidate):
            return self.patience
        return SILENT_AGAIN if all(map(self.is_bad, rest)) else 0.0

    def sort(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        """The bad ones last, otherwise as they were."""
        return sorted(candidates, key=self.is_bad)


def listed(arguments: dict[str, Any]) -> list[Address | None]:
    """The addresses among asyncpg's arguments; None is asyncpg's own default."""
    hosts, ports = arguments.get("host"), arguments.get("port")
    if not hosts:
        return [None]
    hosts = [hosts] if isinstance(hosts, str) else list(hosts)
    ports = list(ports) if isinstance(ports, list | tuple) else [ports] * len(hosts)
    return [Address(h, int(p) if p else None) for h, p in zip(hosts, ports, strict=True)]


async def candidates(
    arguments: dict[str, Any], reputation: Reputation, *, shuffle: bool
) -> list[Candidate]:
    """All there is to try, in order; each host may have several addresses."""
    addresses = listed(arguments)
    if shuffle:
        random.shuffle(addresses)
    found = await _resolve_all(addresses, reputation.patience)
    attrs = arguments.get("target_session_attrs")
    wanted = ["standby", "any"] if attrs == "prefer-standby" else [attrs]
    return [
        candidate
        for attr in wanted
        for candidate in reputation.sort(
            Candidate(address, endpoint, attr, failure)
            for address, (endpoints, failure) in zip(addresses, found, strict=True)
            for endpoint in endpoints
        )
    ]


_Found = tuple[Sequence[Endpoint | None], OSError | None]
_LEFT_TO_DRIVER: _Found = ([None], None)


async def _resolve_all(addresses: Sequence[Address | None], patience: float) -> list[_Found]:
    """Of several hosts, a name that takes long is left to the driver and holds up no other."""
    if len(addresses) == 1:
        return [await _resolve(addresses[0])]
    tasks = [asyncio.ensure_future(_resolve(address)) for address in addresses]
    try:
        await asyncio.wait(tasks, timeout=patience)
        return [task.result() if task.done() else _LEFT_TO_DRIVER for task in tasks]
    finally:
        for task in tasks:
            task.cancel()


async def _resolve(address: Address | None) -> _Found:
    port = None if address is None else _port(address)
    if address is None or port is None or address.is_socket:
        return _LEFT_TO_DRIVER
    if _is_literal(address.host):
        return [(address.host, port)], None
    loop = asyncio.get_running_loop()
    try:
        infos = await loop.getaddrinfo(address.host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        return [None], error
    return list(dict.fromkeys((str(info[4][0]), port) for info in infos)), None


def _port(address: Address) -> int | None:
    """The port as the driver finds it; None where only the driver can tell."""
    if address.port is not None:
        return address.port
    text = os.environ.get("PGPORT") or str(DEFAULT_PORT)
    return int(text) if text.isdigit() else None


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
