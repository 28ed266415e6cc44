"""Families of samples: read from this process, put together, sent from worker to worker."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import REGISTRY, Metric
from prometheus_client.samples import Exemplar, Sample

_log = logging.getLogger("poolkit.telemetry")
_PATIENCE = 1.0


class ForkSafeLock:
    """A lock that is free in a forked child, and that no other thread holds during a fork.

    Make it before registering a hook that has to run outside of it: hooks before a fork run in
    reverse order.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held = False
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(
                before=self._before, after_in_parent=self._in_parent, after_in_child=self._in_child
            )

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_exc: object) -> None:
        self._lock.release()

    def _before(self) -> None:
        # Bounded: whoever holds it may be a collector that hangs, or the one that forks.
        self._held = self._lock.acquire(timeout=_PATIENCE)

    def _in_parent(self) -> None:
        if self._held:
            self._lock.release()

    def _in_child(self) -> None:
        self._lock = threading.Lock()


# OpenTelemetry's collector mixes up the results of two that collect at once.
_collecting = ForkSafeLock()

Collect = Callable[[], Iterable[Metric]]


def collect() -> list[Metric]:
    """What this process has in ``prometheus_client``'s global registry."""
    with _collecting:
        return list(REGISTRY.collect())


def merge(sources: Iterable[tuple[Mapping[str, str], Iterable[Metric]]]) -> list[Metric]:
    """One family for each name, each sample with its source's labels besides its own.

    A label that both have is kept as ``exported_<label>``, as Prometheus does it.
    """
    merged: dict[str, Metric] = {}
    for labels, families in sources:
        for family in families:
            into = merged.get(family.name)
            if into is None:
                into = merged[family.name] = _empty(family)
            if into.type != family.type:
                _log.warning(
                    "the metric %s is both a %s and a %s: the second is left out",
                    *(family.name, into.type, family.type),
                )
                continue
            into.samples += [_labelled(sample, labels) for sample in family.samples]
    return list(merged.values())


def restrict(families: Iterable[Metric], names: Iterable[str]) -> list[Metric]:
    """The samples that have one of the names; families without any are left out."""
    wanted, kept = set(names), []
    for family in families:
        part = _empty(family)
        part.samples = [sample for sample in family.samples if sample.name in wanted]
        if part.samples:
            kept.append(part)
    return kept


def encode(families: Iterable[Metric]) -> bytes:
    """What one worker sends to another."""
    return json.dumps(
        [
            (f.name, f.documentation, f.type, f.unit, [_plain(sample) for sample in f.samples])
            for f in families
        ]
    ).encode()


def decode(sent: bytes) -> list[Metric]:
    """What another worker sent.

    Raises:
        ValueError: It is cut off, or nothing that ``encode`` made.
    """
    try:
        return [_family(*family) for family in json.loads(sent)]
    except (TypeError, AttributeError) as error:
        raise ValueError("not what a worker sends") from error


def _empty(family: Metric) -> Metric:
    return Metric(family.name, family.documentation, family.type, family.unit)


def _labelled(sample: Sample, labels: Mapping[str, str]) -> Sample:
    own = {f"exported_{k}" if k in labels else k: v for k, v in sample.labels.items()}
    return sample._replace(labels=own | dict(labels))


def _plain(sample: Sample) -> tuple[Any, ...]:
    stamp = None if sample.timestamp is None else float(sample.timestamp)
    exemplar = None if sample.exemplar is None else tuple(sample.exemplar)
    return (sample.name, sample.labels, sample.value, stamp, exemplar)


def _family(name: str, documentation: str, kind: str, unit: str, samples: Any) -> Metric:
    family = Metric(name, documentation, kind, unit)
    for sample, labels, value, stamp, exemplar in samples:
        family.add_sample(
            sample, labels, value, stamp, None if exemplar is None else Exemplar(*exemplar)
        )
    return family
