"""A service's metrics, fetched from its endpoint and parsed."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from urllib.error import HTTPError, URLError
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import Request, build_opener

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from poolkit.cli.top.masking import plain
from poolkit.cli.top.view import SourceError
from poolkit.errors import ConfigurationError

TIMEOUT = 5.0
"""Seconds for one look."""

LARGEST = 32 * 2**20
"""Bytes of an answer; no service's metrics are more."""

_CHUNK = 2**16


class ExpositionError(SourceError):
    """An endpoint gave no metrics; the message says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What an endpoint said.

    Attributes:
        at: When, in seconds of the monotonic clock.
        samples: By name, the service's own among them.
    """

    at: float
    samples: Mapping[str, Sequence[Sample]]

    def of(self, name: str) -> Iterator[tuple[Mapping[str, str], float]]:
        """The labels and the value of each sample of that name."""
        return ((sample.labels, sample.value) for sample in self.samples.get(name, ()))


def parse(text: str, at: float) -> Reading:
    """Read an exposition.

    Raises:
        ValueError: It is none.
    """
    samples: dict[str, list[Sample]] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples.setdefault(sample.name, []).append(sample)
    except (KeyError, IndexError) as error:
        raise ValueError("no exposition") from error
    return Reading(at, samples)


class Endpoint:
    """Where a service shows its metrics.

    Attributes:
        address: As it may be shown: without a user, a password, or a query.

    Args:
        url: ``http://`` or ``https://``; where it has no path, that is ``/metrics``. A user and
            password in it are sent to that host, and shown to nobody.

    Raises:
        ConfigurationError: It is no such URL.
    """

    def __init__(self, url: str) -> None:
        parts = _parts(url)
        self.address = plain(parts._replace(netloc=_place(parts), query="").geturl())
        bare = parts._replace(netloc=_place(parts)).geturl()
        self._request = Request(bare, headers={"Accept": "text/plain; version=0.0.4"})  # noqa: S310 (its scheme is checked)
        if parts.username is not None:
            login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            token = base64.b64encode(login.encode()).decode()
            # A redirect to another host must not take it along.
            self._request.add_unredirected_header("Authorization", f"Basic {token}")

    def read(self) -> Reading:
        """Ask for the metrics; blocks for a bounded time.

        Raises:
            ExpositionError: There are none.
        """
        body = self._fetch()
        try:
            return parse(body.decode(), time.monotonic())
        except ValueError:
            raise ExpositionError(f"{self.address} is no page of Prometheus metrics") from None

    def _fetch(self) -> bytes:
        deadline = time.monotonic() + TIMEOUT
        try:
            with build_opener().open(self._request, timeout=TIMEOUT) as answer:
                return b"".join(self._chunks(answer, deadline))
        except HTTPError as error:
            error.close()
            raise ExpositionError(f"{self.address} answers {error.code} {error.reason}") from None
        except (OSError, HTTPException) as error:
            why = error.reason if isinstance(error, URLError) else error
            said = getattr(why, "strerror", None) or str(why) or type(why).__name__
            raise ExpositionError(f"{self.address} cannot be read: {plain(said)}") from None

    def _chunks(self, answer: HTTPResponse, deadline: float) -> Iterator[bytes]:
        size = 0
        while chunk := answer.read1(_CHUNK):
            size += len(chunk)
            if size > LARGEST or time.monotonic() > deadline:
                raise ExpositionError(
                    f"{self.address} sent {size} bytes in {TIMEOUT:g} s and had more to say: that"
                    " is too much or too slow for metrics"
                )
            yield chunk


def _parts(url: str) -> SplitResult:
    try:
        parts = urlsplit(url.strip())
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is none, or half an IPv6 address
        usable = False
    if not usable:
        raise ConfigurationError("an endpoint of metrics is given as http://host:port/metrics")
    path = parts.path if parts.path not in ("", "/") else "/metrics"
    return parts._replace(path=path, fragment="")


def _place(parts: SplitResult) -> str:
    """Host and port, without the login."""
    return parts.netloc.rpartition("@")[2]
