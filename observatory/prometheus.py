"""A real Prometheus on 127.0.0.1, for as long as a block lasts, and its HTTP API."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

START = 20.0
"""Seconds that it may take to be ready."""


class Unavailable(RuntimeError):
    """There is no Prometheus on this machine, or it did not start."""


class Prometheus:
    """One that runs."""

    def __init__(self, port: int) -> None:
        self._base = f"http://127.0.0.1:{port}"

    def is_ready(self) -> bool:
        """Whether it answers and has scraped, which it begins after 5 seconds."""
        try:
            return any(sample["value"][1] == "1" for sample in self.query("up"))
        except (OSError, ValueError):
            return False

    def firing(self) -> list[dict[str, Any]]:
        """The alerts that fire."""
        alerts: list[dict[str, Any]] = self._get("alerts", {})["alerts"]
        return [alert for alert in alerts if alert["state"] == "firing"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Its value now."""
        found: list[dict[str, Any]] = self._get("query", {"query": expression})["result"]
        return found

    def query_range(
        self, expression: str, start: float, end: float, step: float
    ) -> list[dict[str, Any]]:
        """Its values from then to then."""
        parameters = {"query": expression, "start": start, "end": end, "step": step}
        found: list[dict[str, Any]] = self._get("query_range", parameters)["result"]
        return found

    def problems(self) -> list[str]:
        """What the rules and the scrapes of the targets failed with."""
        rules = self._get("rules", {})["groups"]
        targets = self._get("targets", {})["activeTargets"]
        said = [rule.get("lastError") for group in rules for rule in group["rules"]]
        return [text for text in said + [t["lastError"] for t in targets] if text]

    def _get(self, what: str, parameters: Mapping[str, Any]) -> Any:
        url = f"{self._base}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise ValueError(f"{parameters}: {error.read().decode()}") from error


def binary(name: str = "prometheus") -> str | None:
    """Where it is installed."""
    return shutil.which(name) or shutil.which(name, path="/usr/bin:/usr/local/bin")


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


@contextmanager
def running(
    directory: Path, rules: str, target: int, *, interval: float, lookback: float
) -> Iterator[Prometheus]:
    """Start one that scrapes a port of 127.0.0.1.

    Args:
        directory: Where its configuration, data and log go.
        rules: The alert rules, as text.
        target: The port that it scrapes.
        interval: Seconds between scrapes, and between looks at the rules.
        lookback: Seconds for which a value stands without a new one.

    Raises:
        Unavailable: It is not installed, or did not start.
    """
    command = binary()
    if command is None:
        raise Unavailable("prometheus is not installed")
    port = free_port()
    (directory / "rules.yml").write_text(rules)
    (directory / "prometheus.yml").write_text(_configuration(target, interval))
    log = directory / "prometheus.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                command,
                f"--config.file={directory}/prometheus.yml",
                f"--storage.tsdb.path={directory}/data",
                f"--web.listen-address=127.0.0.1:{port}",
                f"--query.lookback-delta={round(1000 * lookback)}ms",
                "--log.level=warn",
            ],
            stdout=output,
            stderr=output,
        )
    try:
        prometheus = Prometheus(port)
        _await_ready(prometheus, process, log)
        yield prometheus
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def _configuration(target: int, interval: float) -> str:
    every = f"{round(1000 * interval)}ms"
    return f"""\
global:
  scrape_interval: {every}
  scrape_timeout: {every}
  evaluation_interval: {every}
rule_files: [rules.yml]
scrape_configs:
  - job_name: orders
    static_configs:
      - targets: ["127.0.0.1:{target}"]
"""


def _await_ready(prometheus: Prometheus, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + START
    while time.monotonic() < until:
        if prometheus.is_ready():
            return
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise Unavailable(f"prometheus did not start: {log.read_text()}")
