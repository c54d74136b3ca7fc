"""A real Prometheus, with the configuration that is shipped, scrapes a running system: the alert rules are loaded, and
every panel of the dashboard has data."""

from __future__ import annotations

import time
from pathlib import Path

from e2e.conftest import Load, System, docker, wait_until
from grafana import Viewer
from prometheus import DOCS, needs_prometheus, prometheus

pytestmark = needs_prometheus


def addresses(system: System) -> tuple[str, str]:
    """Of the manager and the balancer."""
    where = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
    return f"127.0.0.1:{system.manager_port}", f"{docker('inspect', '-f', where, f'{system.project}-balancer')}:5000"


def test_prometheus_scrapes_manager_and_balancer_and_loads_the_alert_rules(system: System, tmp_path: Path) -> None:
    with prometheus(tmp_path, *addresses(system)) as it:
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


def test_every_panel_and_annotation_of_the_dashboard_has_data(system: System, tmp_path: Path) -> None:
    manager, balancer = addresses(system)
    with prometheus(tmp_path, manager, balancer, seconds=1) as it:
        wait_until(it.health, "both targets are scraped", 60)
        viewer = Viewer(it, manager, balancer, seconds=1)
        # A load that wants more backends than two, until they are there; then none.
        load = Load(system.port, 120, 40)
        system.operate("/scale", {"min": 2, "max": 4, "target": 20})
        system.wait_for_active(4, 60)
        load.stop()
        system.wait_for_active(2, 90)
        deadline = time.monotonic() + 30
        while (faults := viewer.faults()) and time.monotonic() < deadline:
            time.sleep(1)
        assert faults == {}
