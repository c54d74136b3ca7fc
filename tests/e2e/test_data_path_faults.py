"""Faults in the balancer's network namespace on a real engine: they are found, reported and repaired."""

from __future__ import annotations

import subprocess
import time
from typing import Any

import pytest

from e2e.conftest import FAST, System, docker, wait_until


def in_namespace(system: System, *command: str) -> None:
    """Runs a command in the balancer's network namespace, as root on the host can."""
    pid = docker("inspect", "-f", "{{.State.Pid}}", f"{system.project}-balancer")
    subprocess.run(["nsenter", f"--net=/proc/{pid}/ns/net", *command], check=True, capture_output=True)


BREAKS: dict[str, tuple[tuple[str, ...], str]] = {
    "foreign DROP": (("iptables-nft", "-I", "FORWARD", "1", "-p", "tcp", "-j", "DROP"), "a foreign rule"),
    "policy": (("iptables-nft", "-P", "FORWARD", "DROP"), "policy of the balancer's FORWARD chain is DROP"),
}


@pytest.mark.parametrize(("command", "found"), BREAKS.values(), ids=BREAKS)
def test_broken_data_path_is_reported_with_its_cause(fresh: System, command: tuple[str, ...], found: str) -> None:
    fresh.up("2", *FAST, "--target", "100000")
    wait_until(lambda: fresh.status()["data_path"]["working"], "the path is tested", 20)
    in_namespace(fresh, *command)
    reported: dict[str, Any] = wait_until(lambda: broken(fresh), "the broken path is reported", 40)
    assert found in reported["problem"]
    assert f"ERROR   {reported['problem'].split(';')[0]}" in fresh.log()
    assert status_code(fresh) == 3, "degraded"


def broken(system: System) -> dict[str, Any]:
    reported: dict[str, Any] = system.status()["data_path"]
    return reported if reported["problem"] else {}


def status_code(system: System) -> int:
    command = [str(system.tree / "run.sh"), *system.flags, "--status"]
    return subprocess.run(command, capture_output=True, check=False).returncode


def test_disabled_ip_forwarding_is_reported_and_enabled_again(fresh: System) -> None:
    fresh.up("2", *FAST, "--target", "100000")
    wait_until(lambda: fresh.status()["data_path"]["working"], "the path is tested", 20)
    in_namespace(fresh, "sysctl", "-qw", "net.ipv4.ip_forward=0")
    wait_until(lambda: "IP forwarding is off" in fresh.log(), "it is reported", 40)
    wait_until(fresh.serves, "it is repaired", 20)
    wait_until(lambda: fresh.status()["data_path"]["working"], "and reported as working", 30)


def test_foreign_redirection_is_moved_behind_the_balancer_rules(fresh: System) -> None:
    fresh.up("2", *FAST, "--target", "100000")
    rule = ("-p", "tcp", "--dport", "8000", "-j", "DNAT", "--to-destination", "198.18.255.254:9")
    in_namespace(fresh, "iptables-nft", "-t", "nat", "-I", "PREROUTING", "1", *rule)
    time.sleep(3)
    assert all(fresh.serves() for _ in range(10))


def test_self_check_is_not_counted_as_load(fresh: System) -> None:
    fresh.up("2", *FAST, "--metric", "connections")
    time.sleep(4)
    wait_until(lambda: fresh.status()["data_path"]["working"], "the path is tested", 20)
    before = [backend["connections"] for backend in fresh.active()]
    time.sleep(12)
    assert [backend["connections"] for backend in fresh.active()] == before
