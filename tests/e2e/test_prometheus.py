"""A real Prometheus, with the configuration that is shipped, scrapes manager and balancer and loads the alert rules."""

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

import pytest

from e2e.conftest import System, docker, free_port, wait_until

DOCS = Path(__file__).parents[2] / "docs"
TARGETS = {"manager": "127.0.0.1:5000", "balancer": "198.18.0.2:5000"}  # as docs/prometheus.yml has them

pytestmark = pytest.mark.skipif(not shutil.which("prometheus"), reason="needs prometheus, of Debian's packages")


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
        with urllib.request.urlopen(
            f"{self._address}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=10
        ) as answer:
            return json.load(answer)["data"]

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
def prometheus(place: Path, manager: str, balancer: str) -> Iterator[Prometheus]:
    """One with docs/prometheus.yml but for the addresses, and its data in `place`."""
    text = (DOCS / "prometheus.yml").read_text()
    for shipped, real in ((TARGETS["manager"], manager), (TARGETS["balancer"], balancer)):
        assert text.count(f'"{shipped}"') == 1, f"docs/prometheus.yml has another address than {shipped}"
        text = text.replace(f'"{shipped}"', f'"{real}"')
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


def test_prometheus_scrapes_manager_and_balancer_and_loads_the_alert_rules(system: System, tmp_path: Path) -> None:
    where = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
    balancer = docker("inspect", "-f", where, f"{system.project}-balancer")
    with prometheus(tmp_path, f"127.0.0.1:{system.manager_port}", f"{balancer}:5000") as it:
        scraped = wait_until(it.health, "both targets are scraped", 60)
        assert scraped == {"lbscaler-manager": "up", "lbscaler-balancer": "up"}

        system.get()
        active = len(system.active())
        wait_until(
            lambda: it.value('sum(lbscaler_backends{state="active"})') == active,
            f"{active} active backends are exported",
        )
        wait_until(lambda: it.value("lbscaler_balancer_rotation_backends") == active, "all of them are in rotation")
        wait_until(
            lambda: it.value("lbscaler_desired_backends") == system.status()["desired"],
            "the desired number is exported",
        )
        wait_until(lambda: (it.value("sum(lbscaler_backend_connections_total)") or 0) > 0, "a connection is counted")
        wait_until(lambda: it.value("sum(lbscaler_decisions_total)"), "a decision is counted")
        assert it.value("lbscaler_balancer_apply_seconds_count")

        shipped = {line.split()[-1] for line in (DOCS / "alerts.yml").read_text().splitlines() if "- alert:" in line}
        assert it.alerts() == shipped
        caused_by_earlier_tests = {"LbscalerLaunchesFail", "LbscalerBackingOff"}
        assert it.pending_alerts() <= caused_by_earlier_tests, "no other alert fires"
