"""The manager's own connections through the balancer: which ports they use, what they report."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from core.load import Finding
from core.path_check import PathCheck
from engines import path_probe
from engines.path_probe import SOURCE_PORTS, connect


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


def test_connection_comes_from_the_ports_that_the_balancer_knows(listener: socket.socket) -> None:
    assert connect(listener.getsockname(), "127.0.0.1") == ""
    accepted, address = listener.accept()
    accepted.close()
    assert address[1] in SOURCE_PORTS


def test_ports_of_closed_connections_are_used_again(listener: socket.socket) -> None:
    for _ in range(2 * len(SOURCE_PORTS)):
        assert connect(listener.getsockname(), "127.0.0.1") == ""
        listener.accept()[0].close()


def test_port_that_another_program_holds_is_passed_over(listener: socket.socket) -> None:
    taken = next(path_probe._ports) + 1
    taken = taken if taken in SOURCE_PORTS else SOURCE_PORTS[0]
    with socket.create_server(("127.0.0.1", taken)):
        assert connect(listener.getsockname(), "127.0.0.1") == ""


def test_refused_connection_is_reported(listener: socket.socket) -> None:
    address = listener.getsockname()
    listener.close()
    assert connect(address, "127.0.0.1") == "Connection refused"


def test_problem_is_reported_after_two_failures_in_a_row() -> None:
    check = PathCheck()
    check.failed("t", "timed out", [])
    check.passed()
    check.failed("t", "timed out", [])
    assert (check.problem, check.working) == ("", True)
    check.failed("t", "timed out", [Finding("foreign_rule", "a rule"), Finding("new_kind", "a detail")])
    assert check.working is False
    assert check.problem == (
        "connections through the balancer at t fail: timed out; "
        "found: a foreign rule blocks or redirects connections: a rule; new_kind: a detail"
    )
    check.passed()
    assert (check.problem, check.working) == ("", True)


def test_problem_is_reported_after_one_failure_where_a_balancer_found_its_cause() -> None:
    check = PathCheck()
    check.failed("t", "timed out", [Finding("ip_forward_off")])
    assert check.working is False
    assert check.problem.endswith("found: IP forwarding is off in the balancer's namespace")
