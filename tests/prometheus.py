"""A real Prometheus, with the configuration that is shipped, for the tests."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest

from e2e.conftest import free_port, wait_until

DOCS = Path(__file__).parents[1] / "docs"
TARGETS = {"manager": "127.0.0.1:5000", "balancer": "198.18.0.2:5000"}  # as docs/prometheus.yml has them
SCRAPE_INTERVAL = "scrape_interval: 5s"

needs_prometheus = pytest.mark.skipif(
    not shutil.which("prometheus"), reason="needs prometheus, of Debian's package prometheus"
)


class Prometheus:
    def __init__(self, port: int) -> None:
        self._address = f"http://127.0.0.1:{port}"

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._address}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:  # not there yet, or there and not ready
            return False

    def get(self, path: str, **query: str) -> Any:
        url = f"{self._address}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except HTTPError as error:  # its body has the reason, such as a syntax error
            raise AssertionError(f"{path} {query}: {error.read().decode()}") from error

    def value(self, expression: str) -> float | None:
        """Of an expression with one result; None while it has none."""
        result = self.get("query", query=expression)["result"]
        assert len(result) < 2, result
        return float(result[0]["value"][1]) if result else None

    def health(self) -> dict[str, str]:
        """Job → up or down, with the last error; empty until every target has been scraped."""
        targets = self.get("targets")["activeTargets"]
        if len(targets) < len(TARGETS) or any(target["health"] == "unknown" for target in targets):
            return {}
        return {target["labels"]["job"]: f"{target['health']} {target['lastError']}".strip() for target in targets}

    def alerts(self) -> set[str]:
        return {rule["name"] for group in self.get("rules")["groups"] for rule in group["rules"]}

    def pending_alerts(self) -> set[str]:
        """The alerts that fire or are about to."""
        return {alert["labels"]["alertname"] for alert in self.get("alerts")["alerts"]}


@contextmanager
def prometheus(place: Path, manager: str, balancer: str, seconds: int = 5) -> Iterator[Prometheus]:
    """One with docs/prometheus.yml but for the addresses and the seconds between scrapes, and its data in `place`."""
    text = (DOCS / "prometheus.yml").read_text()
    replacements = {f'"{TARGETS["manager"]}"': f'"{manager}"', f'"{TARGETS["balancer"]}"': f'"{balancer}"'}
    replacements[SCRAPE_INTERVAL] = f"scrape_interval: {seconds}s"
    for shipped, real in replacements.items():
        assert text.count(shipped) == 1, f"docs/prometheus.yml no longer has {shipped}"
        text = text.replace(shipped, real)
    (place / "prometheus.yml").write_text(text)
    shutil.copy(DOCS / "alerts.yml", place)
    port = free_port()
    command = ["prometheus", f"--config.file={place}/prometheus.yml", f"--storage.tsdb.path={place}/data"]
    with (place / "prometheus.log").open("w") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
        try:
            it = Prometheus(port)
            wait_until(lambda: process.poll() is not None or it.ready(), "Prometheus is ready")
            assert process.poll() is None, (place / "prometheus.log").read_text()
            yield it
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
