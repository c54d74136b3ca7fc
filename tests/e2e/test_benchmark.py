"""`tests/bench/run.sh --quick`: it measures every way of its subset, and leaves nothing on the host."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from e2e.conftest import docker

WAYS = {
    "published port, no balancer",
    "this project, host path",
    "this project, bridge path",
    "HAProxy, host network",
    "kube-proxy's rules",
    "course project's rules",
}
RATES = ("new connections", "keep-alive")


def left_on_the_host() -> dict[str, str]:
    """What the bench could leave: containers, networks, rules, sets, links and the two sysctls that it changes."""
    save = subprocess.run(["iptables-save"], capture_output=True, text=True, check=True).stdout
    sets = subprocess.run(["ipset", "list", "-name"], capture_output=True, text=True, check=True).stdout
    links = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True).stdout
    settings = [
        Path("/proc/sys/net/netfilter", name) for name in ("nf_conntrack_max", "nf_conntrack_tcp_timeout_time_wait")
    ]
    found = {
        "containers": docker("ps", "-aq", "--filter", "label=lbscaler.bench"),
        "projects": docker("ps", "-aq", "--filter", "name=lbbench"),
        "networks": docker("network", "ls", "-q", "--filter", "name=lbbench"),
        "rules": "\n".join(line for line in save.splitlines() if "BENCH-" in line or "LB-benc" in line),
        "sets": "\n".join(name for name in sets.split() if name.startswith("LB-benc")),
        "links": "\n".join(line for line in links.splitlines() if line.startswith("lbb")),
    }
    return found | {setting.name: setting.read_text() for setting in settings}


@pytest.mark.serial  # its figures would disturb others, and theirs its
def test_quick_run_measures_each_way_and_leaves_nothing(tree: Path, tmp_path: Path) -> None:
    before, out = left_on_the_host(), tmp_path / "result.json"
    command = [str(tree / "tests" / "bench" / "run.sh"), "--quick", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["results"]
    for quantity in RATES:
        assert {row["way"] for row in rows if row["quantity"] == quantity} == WAYS
    measured = [row for row in rows if not row["quantity"].startswith("kill") and "failed" not in row["quantity"]]
    assert all(value > 0 for row in measured for value in row["values"])
    assert {"download", "rules alone", "sticky", "memory"} <= {row["quantity"] for row in rows}
    assert "to HAProxy" in done.stdout
    assert left_on_the_host() == before
    assert not list((tree / "run").glob("lbbench*"))
