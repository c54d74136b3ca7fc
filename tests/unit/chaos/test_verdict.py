"""A failed request is explained by what a fault may cost, or it is a violation; the page has every figure."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from chaos import allowances, report
from chaos.allowances import Event, Request
from chaos.table import FAULTS
from chaos.verdict import Done, judge

BY_NAME = {fault.name: fault for fault in FAULTS}
VICTIM, OTHER = "backend-1", "backend-2"


LOST_NODE, OTHER_NODE = "198.18.0.2", "198.18.0.3"


def event(fault: str = "kill a backend") -> Event:
    return Event(fault, 100.0, 101.0, 102.0, 103.0, 106.0, frozenset({VICTIM}), frozenset({LOST_NODE}))


def failed(start: float, end: float, backend: str = "", outcome: str = "reset", node: str = "") -> Request:
    return Request("new", start, end, outcome, backend, node)


@pytest.mark.parametrize(
    ("allowance", "request_", "explained"),
    [
        (allowances.nothing, failed(100, 101, VICTIM), False),
        (allowances.in_flight, failed(99, 100.5, VICTIM), True),
        (allowances.in_flight, failed(99, 100.5, OTHER), False),
        (allowances.in_flight, failed(90, 99, VICTIM), False),
        (allowances.in_flight, failed(106.1, 107, VICTIM), False),
        (allowances.in_flight, failed(100.9, 101.2), True),
        (allowances.in_flight, failed(101.8, 103), False),
        (allowances.until_out, failed(101.8, 117), True),
        (allowances.until_out, failed(102.8, 117), False),
        (allowances.answered_by_victims, failed(101, 101.1, VICTIM, "status 500"), True),
        (allowances.answered_by_victims, failed(101, 101.1, OTHER, "status 500"), False),
        (allowances.answered_by_victims, failed(106.1, 106.2, VICTIM, "status 500"), False),
        (allowances.answered_by_victims, failed(101, 101.1, VICTIM, "reset"), False),
        (allowances.new_until_repaired, failed(102, 117), True),
        (allowances.new_until_repaired, failed(105, 120), False),
        (allowances.outage, failed(105, 120, OTHER), True),
        (allowances.outage, failed(107, 120), False),
        (allowances.clients_of_node, failed(105, 120, node=LOST_NODE), True),
        (allowances.clients_of_node, failed(105, 120, node=OTHER_NODE), False),
        (allowances.clients_of_node, failed(107, 120, node=LOST_NODE), False),
        (allowances.node_lost, failed(105, 120, node=LOST_NODE), True),
        (allowances.node_lost, failed(99, 100.5, VICTIM, node=OTHER_NODE), True),
        (allowances.node_lost, failed(101.8, 117, node=OTHER_NODE), False),
        (allowances.node_lost_slowly, failed(101.8, 117, node=OTHER_NODE), True),
        (allowances.node_lost_slowly, failed(102.8, 117, node=OTHER_NODE), False),
    ],
)
def test_failed_request_is_explained_only_by_what_the_fault_may_cost(
    allowance: allowances.Allowance, request_: Request, explained: bool
) -> None:
    assert allowance(request_, event()) is explained


def test_unexplained_failure_is_a_violation_and_counts_at_its_round() -> None:
    requests = [
        Request("new", 99, 99.1, "ok", OTHER),
        Request("new", 104, 104.1, "ok", OTHER),
        failed(99, 100.5, VICTIM),
        failed(105, 120, OTHER, "timeout"),
        failed(50, 51),
    ]
    verdict = judge(requests, [Done((event(),), ("something else",))], BY_NAME)
    assert (verdict.requests, verdict.failed, verdict.explained) == (5, 3, 1)
    cost = verdict.costs["kill a backend"]
    assert (cost.times, cost.requests, cost.failed, cost.explained, cost.recovery) == (1, 3, 2, 1, 3.0)
    assert cost.outcomes == {"reset": 1, "timeout": 1}
    first, second, third = verdict.violations
    assert first == "something else"
    assert (
        second == "kill a backend: a request (new) on backend-2 failed: timeout after 15.00 s, +5.00 s after it began"
    )
    assert third.startswith("no fault: a request")


def test_either_fault_of_a_pair_explains_a_failure() -> None:
    pair = Done((event("kill the manager"), event("kill a backend")))
    verdict = judge([failed(99, 100.5, VICTIM)], [pair], BY_NAME)
    assert (verdict.violations, list(verdict.costs)) == ([], ["kill a backend + kill the manager"])


def result() -> dict[str, Any]:
    verdict = judge([failed(99, 100.5, VICTIM), failed(105, 120)], [Done((event(),))], BY_NAME)
    machine = {"date": "2026-01-02", "commit": "abc", "processors": 2, "kernel": "6", "Docker": "20", "iptables": "v1"}
    run = {
        "seed": 5,
        "minutes": 3.0,
        "datapath": "host",
        "soak": "",
        "machine": machine,
    }
    return {**run, "injected": [["kill a backend"]], **asdict(verdict)}


def test_summary_says_how_to_repeat_a_run_that_violated_something() -> None:
    text = report.summary(result())
    assert text.startswith("1 faults in 1 rounds, 2 requests, 2 failed, 1 of them explained\nVIOLATED kill a backend")
    assert text.endswith("again: sudo tests/chaos/run.sh --seed 5 --minutes 3 --datapath host")


def test_swarms_run_has_its_own_flag_heading_and_table_of_bounds() -> None:
    run = {**result(), "datapath": "swarm"}
    assert report.summary(run).endswith("again: sudo tests/chaos/run.sh --seed 5 --minutes 3 --swarm")
    page = report.page([run])
    assert "## Swarm, seed 5" in page
    own_table = page.partition("In a Swarm. While")[2]
    assert "| drain a node, then activate it | 60 s | " in own_table
    assert "| kill a backend | " not in own_table


def test_failed_request_to_a_node_names_it() -> None:
    verdict = judge([failed(50, 51, node=OTHER_NODE)], [Done((event(),))], BY_NAME)
    assert verdict.violations[0].startswith("no fault: a request (new) to 198.18.0.3 failed: reset")


def test_page_has_each_run_with_its_violations_and_each_fault_with_its_bound() -> None:
    page = report.page([result()])
    assert "| kill a backend | 1 | 2 | 2 (2 reset) | 1 | 3.0 s |" in page
    assert "Violated invariants: 1." in page
    assert "- kill a backend: a request (new) failed: reset" in page
    assert "- kill the engine: a fault of the campaign, but not in these runs." in page
    assert "- kill a backend: a fault" not in page
    assert all(f"| {fault.name} | {fault.bound:g} s | {fault.why} |" in page for fault in FAULTS)
    assert "- clock jump: " in page
