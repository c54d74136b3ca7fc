"""Faults in the balancer's network namespace on a real engine: they are found, reported and repaired."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.conftest import FAST, System, docker, wait_until


@pytest.fixture(scope="module")
def running(tree: Path) -> Iterator[System]:
    """Two backends that no load moves; each test leaves the data path working."""
    system = System(tree, f"lbfaults{os.getpid()}")
    system.up("2", *FAST, "--metric", "connections", "--target", "100000")
    yield system
    system.down("--now")


@pytest.fixture
def system(running: System) -> System:
    wait_until(lambda: running.status()["data_path"]["working"], "the path is tested", 40)
    return running


def in_namespace(system: System, *command: str) -> None:
    """Runs a command in the balancer's network namespace, as root on the host can."""
    pid = docker("inspect", "-f", "{{.State.Pid}}", f"{system.project}-balancer")
    subprocess.run(["nsenter", f"--net=/proc/{pid}/ns/net", *command], check=True, capture_output=True)


# What breaks the path, what repairs it, and the cause that is reported.
BREAKS = {
    "foreign DROP": ("-I FORWARD 1 -p tcp -j DROP", "-D FORWARD -p tcp -j DROP", "a foreign rule"),
    "policy": ("-P FORWARD DROP", "-P FORWARD ACCEPT", "policy of the balancer's FORWARD chain is DROP"),
}


@pytest.mark.parametrize(("damage", "repair", "found"), BREAKS.values(), ids=BREAKS)
def test_broken_data_path_is_reported_with_its_cause(system: System, damage: str, repair: str, found: str) -> None:
    in_namespace(system, "iptables-legacy", "-w", "5", *damage.split())
    try:
        reported: dict[str, Any] = wait_until(lambda: broken(system), "the broken path is reported", 40)
        assert found in reported["problem"]
        assert f"ERROR   {reported['problem'].split(';')[0]}" in system.log()
        assert status_code(system) == 3, "degraded"
    finally:
        in_namespace(system, "iptables-legacy", "-w", "5", *repair.split())


def broken(system: System) -> dict[str, Any]:
    reported: dict[str, Any] = system.status()["data_path"]
    return reported if reported["problem"] else {}


def status_code(system: System) -> int:
    command = [str(system.tree / "run.sh"), *system.flags, "--status"]
    return subprocess.run(command, capture_output=True, check=False).returncode


def test_disabled_ip_forwarding_is_reported_and_enabled_again(system: System) -> None:
    in_namespace(system, "sysctl", "-qw", "net.ipv4.ip_forward=0")
    wait_until(lambda: "IP forwarding is off" in system.log(), "it is reported", 40)
    wait_until(system.serves, "it is repaired", 20)
    wait_until(lambda: system.status()["data_path"]["working"], "and reported as working", 30)


def test_foreign_redirection_is_moved_behind_the_balancer_rules(system: System) -> None:
    rule = ["-p", "tcp", "--dport", "8000", "-j", "DNAT", "--to-destination", "198.18.255.254:9"]
    in_namespace(system, "iptables-legacy", "-w", "5", "-t", "nat", "-I", "PREROUTING", "1", *rule)
    try:
        time.sleep(3)
        assert all(system.serves() for _ in range(10))
    finally:
        in_namespace(system, "iptables-legacy", "-w", "5", "-t", "nat", "-D", "PREROUTING", *rule)


def test_self_check_is_not_counted_as_load(system: System) -> None:
    time.sleep(3)  # the connections of the tests before are reported
    before = [backend["connections"] for backend in system.active()]
    time.sleep(12)
    assert [backend["connections"] for backend in system.active()] == before
