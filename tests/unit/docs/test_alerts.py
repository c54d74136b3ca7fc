"""The alert rules that are shipped: promtool finds them sound, each has been made to fire and to keep still, and what
they and the dashboard ask for is there."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from exposition import exposition
from fakes import Clock, FakeEngine, controller
from manager_client import ManagerClient
from netfilter import Netfilter
from synchronization_client import Balancer
from web.metrics import registry

ROOT = Path(__file__).parents[3]
RULES, CASES = (ROOT / "docs" / "alerts.yml").read_text(), (ROOT / "tests" / "alerts.yml").read_text()
ALERTS = re.findall(r"alert: (\w+)", RULES)


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool, of Debian's package prometheus")
@pytest.mark.parametrize(
    "words",
    [
        ("check", "rules", "docs/alerts.yml"),
        ("test", "rules", "tests/alerts.yml"),
        ("check", "config", "docs/prometheus.yml"),
    ],
    ids=" ".join,
)
def test_promtool_finds_the_rules_sound(words: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_has_a_case_that_fires_it_and_one_that_does_not(alert: str) -> None:
    assert re.search(rf"alertname: {alert}\n +exp_alerts:\n +- exp_labels:", CASES)
    assert re.search(rf"alertname: {alert}}}", CASES)


@pytest.mark.parametrize("page", ["alerts.yml", "grafana.json"])
def test_alerts_and_dashboard_use_only_metrics_that_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: str
) -> None:
    monkeypatch.setattr(Netfilter, "conntrack_use", lambda self: (1, 2))
    manager = controller(FakeEngine(), tmp_path, Clock())
    manager.path.take_result({"t": ""}, [])
    balancer = Balancer(Netfilter("nft"), ManagerClient("127.0.0.1:1", lambda: "token"), "b1")
    balancer.state.prober._loop.close()  # no backend is probed
    exposed = (generate_latest(registry(manager.recorder, manager.status)) + exposition(balancer.state)).decode()
    used = set(re.findall(r"lbscaler_\w+", (ROOT / "docs" / page).read_text()))
    # A histogram has several series.
    names = {name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name in used}
    assert names <= set(re.findall(r"# TYPE (\w+)", exposed))
