"""Flows are counted and deleted over a netlink socket, and errors of the kernel are reported."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ctnetlink
import flows
from netfilter import NetfilterError
from netns.conftest import VIP, Balancer
from netns.lab import Lab, Namespace, Server, connect
from netns.test_failures import eventually

ONE, TWO, LOST = "198.18.1.1", "198.18.1.2", "198.18.1.9"  # no namespace has the last address


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as made:
        yield made


@pytest.fixture
def open_flows(lab: Lab, client: Namespace, balancer: Balancer, stack: contextlib.ExitStack) -> dict[str, int]:
    """Three connections to each of two backends, and one to an address that does not exist."""
    Server(lab.add(ONE, TWO), talk=lambda connection: connection.recv(1))
    for ip in (ONE, TWO):
        balancer.dispatch_over(ip)
        for _ in range(3):
            stack.enter_context(connect(client, VIP)).recv(100)
    balancer.dispatch_over(LOST)
    with client:
        pending = stack.enter_context(socket.socket())
        pending.setblocking(False)
        pending.connect_ex(VIP)
    expected = {ONE: 3, TWO: 3, LOST: 1}
    eventually(lambda: _equal(balancer.live(), expected))
    return expected


def test_all_flows_and_those_of_some_backends_are_counted(open_flows: dict[str, int], balancer: Balancer) -> None:
    assert balancer.all_flows().live == open_flows
    assert balancer.flows_of([ONE]).live == {ONE: 3}
    assert balancer.flows_of([ONE, LOST]).live.items() >= {ONE: 3, LOST: 1}.items()
    assert balancer.flows_of(["198.18.77.77"]).live == {}


def test_only_flows_of_the_given_backends_are_deleted(open_flows: dict[str, int], balancer: Balancer) -> None:
    balancer.delete_flows([ONE, LOST])
    assert balancer.live() == {TWO: 3}


def test_unanswered_only_keeps_answered_flows(open_flows: dict[str, int], balancer: Balancer) -> None:
    balancer.delete_flows([ONE, LOST], True)
    assert balancer.live() == {ONE: 3, TWO: 3}


def test_misdirected_flows_are_those_without_an_answer_that_go_to_no_backend(
    open_flows: dict[str, int], balancer: Balancer
) -> None:
    balancer.delete_misdirected_flows([ONE])
    assert balancer.live() == {ONE: 3, TWO: 3}, "the unanswered one of another address is deleted"


def test_deleting_a_flow_that_has_ended_is_no_error(open_flows: dict[str, int], balancer: Balancer) -> None:
    with balancer.namespace:
        ports = balancer.path.service_ports
        found = []
        for block in ctnetlink.listing(flows.listing_request(ports)):
            found += flows.deletions(block, ports, flows.of_backends([ONE, TWO], False))
        assert len(found) == 6
        ctnetlink.delete(found)
        ctnetlink.delete(found)
    assert balancer.live() == {LOST: 1}


def test_scan_over_the_time_limit_is_an_error(
    open_flows: dict[str, int], balancer: Balancer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctnetlink, "SCAN_SECONDS", 0.0)
    with pytest.raises(NetfilterError, match="connection table: not finished after 0 s"):
        balancer.all_flows()
    assert open_flows


def test_missing_permission_is_an_error(balancer: Balancer) -> None:
    script = "from netfilter import Netfilter; Netfilter('nft').all_flows()"
    folder = str(Path(ctnetlink.__file__).parent)
    command = [sys.executable, "-c", f"import sys, os; sys.path.insert(0, {folder!r}); import netfilter; "]
    command[-1] += f"os.setuid(65534); {script}"
    with balancer.namespace:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 1
    assert "connection table: [Errno 1] Operation not permitted" in done.stderr


def _equal(seen: object, expected: object) -> None:
    assert seen == expected
