"""The manager's own connections through the balancer: which ports they use, what they report."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from core.load import Finding
from core.path_check import PathCheck
from engines import path_probe
from engines.path_probe import SOURCE_PORTS, connect

PASSED, FAILED = {"t": ""}, {"t": "timed out"}
FORWARDING_OFF = Finding("ip_forward_off")


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
    check.take_result(FAILED, [])
    check.take_result(PASSED, [])
    check.take_result(FAILED, [])
    assert (check.problem, check.working) == ("", True)
    check.take_result(FAILED, [Finding("foreign_rule", "a rule"), Finding("new_kind", "a detail")])
    assert check.working is False
    assert check.problem == (
        "connections through the balancer at t fail: timed out; "
        "found: a foreign rule blocks or redirects connections: a rule; new_kind: a detail"
    )
    check.take_result(PASSED, [])
    assert (check.problem, check.working) == ("", True)
    check.take_result({}, [])
    assert check.working is True, "nothing was tested"


def test_problem_is_reported_after_one_failure_where_a_balancer_found_its_cause() -> None:
    check = PathCheck()
    check.take_result(FAILED, [FORWARDING_OFF])
    assert check.working is False
    assert check.repairable([FORWARDING_OFF])
    assert check.problem.endswith("found: IP forwarding is off where the balancer's rules are")


def test_forwarding_that_is_off_on_the_host_is_a_problem_although_the_test_from_the_host_passes() -> None:
    check = PathCheck(on_host=True)
    check.take_result(PASSED, [FORWARDING_OFF])
    assert (check.working, check.error) == (False, "the host forwards no packets of other machines")
    assert not check.repairable([FORWARDING_OFF]), "a new balancer container does not change the host"
    check.take_result(PASSED, [])
    assert check.problem == ""


def test_forwarding_that_is_off_is_no_problem_on_the_default_path_while_the_test_passes() -> None:
    check = PathCheck()
    check.take_result(PASSED, [FORWARDING_OFF])
    assert check.problem == ""
