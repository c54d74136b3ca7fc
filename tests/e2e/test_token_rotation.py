"""The token is replaced while clients are served, on a real engine."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Callable

import pytest

from e2e.conftest import Load, System, docker, wait_until


def status_of_a_call(system: System, token: str) -> int:
    """The status of a balancer's call with this token."""
    url = f"http://127.0.0.1:{system.manager_port}/stop"
    body = b'{"ip": "198.18.255.254", "reason": "a test"}'
    request = urllib.request.Request(url, body, {"Authorization": f"Bearer {token}"})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=10)
    caught.value.close()
    return caught.value.code


@pytest.mark.parametrize("datapath", ["bridge", "host"])
def test_rotation_under_load_fails_no_request(fresh: System, datapath: str, figure: Callable[[str], None]) -> None:
    fresh.up("2", "--min", "2", "--datapath", datapath, "--target", "100000", "--interval", "1", "--panic-window", "3")
    old = (fresh.run_dir / "token").read_text()
    balancer = docker("inspect", "-f", "{{.Id}}", f"{fresh.project}-balancer")
    assert status_of_a_call(fresh, old) == 404, "there is no such backend"
    load = Load(fresh.port, seconds=120, per_second=60)
    for _ in range(2):
        fresh.up("--rotate-secrets")
        wait_until(lambda: fresh.status()["balancers"], "the balancer reports with the new token", 20)
    answered, others, slowest = load.stop()
    figure(f"two rotations under 60 connections/s, {datapath}: {others} failed of {answered}, slowest {slowest:.2f} s")
    assert (answered > 100, others) == (True, 0)
    new = (fresh.run_dir / "token").read_text()
    assert (status_of_a_call(fresh, old), status_of_a_call(fresh, new)) == (401, 404)
    assert docker("inspect", "-f", "{{.Id}}", f"{fresh.project}-balancer") == balancer, "it was not replaced"
    assert new not in docker("inspect", f"{fresh.project}-balancer")
    # A balancer that is restarted has the new token, too: it reports again.
    docker("restart", "-t", "0", f"{fresh.project}-balancer")
    time.sleep(5)
    wait_until(lambda: any(b["last_seen"] < 3 for b in fresh.status()["balancers"]), "a report after the restart", 20)
