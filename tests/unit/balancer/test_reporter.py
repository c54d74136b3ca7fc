"""The reports to the manager, and when they are sent."""

from __future__ import annotations

import pytest

from fakes_balancer import World

A, B = "198.18.0.2", "198.18.0.3"


def test_first_report_follows_the_first_snapshot_and_a_change_of_health_is_reported_early(world: World) -> None:
    world.state.report_due.set()
    world.reporter.wait_and_report()
    assert world.manager.reports == []
    world.set_backends(f"a {A}")
    world.reconcile()
    world.clock.sleep(0.3)
    world.state.health_changed()  # is reported before the interval ends
    world.reporter.wait_and_report()
    assert [report["backends"][0]["ip"] for report in world.manager.reports] == [A]
    assert world.state.learner._since is None  # an early report does not end a learning interval
    world.clock.sleep(1.7)
    world.reporter.wait_and_report()
    assert len(world.manager.reports) == 2
    assert world.state.learner._since == world.clock.now


def test_many_changes_of_health_cause_four_reports_a_second_and_delay_no_regular_one(world: World) -> None:
    world.set_backends(f"a {A}")
    world.reconcile()
    began, learnt = world.clock.now, []
    for _ in range(20):
        world.state.health_changed()
        world.reporter.wait_and_report()
        if world.state.learner._since not in (None, *learnt):
            learnt.append(world.state.learner._since)
    assert world.clock.now - began == pytest.approx(19 * 0.25)
    assert learnt == [began + 2.0, began + 4.0]


def test_report_contains_the_findings(world: World) -> None:
    world.kernel.forwards = False
    world.kernel.tables["filter"]["FORWARD"] = [(0, "-s 203.0.113.0/24 -j DROP")]
    world.set_backends(f"a {A}")
    world.reconcile()
    assert world.report()["findings"] == [
        {"kind": "ip_forward_off", "detail": "net.ipv4.ip_forward is 0"},
        {"kind": "foreign_rule", "detail": "filter: -A FORWARD -s 203.0.113.0/24 -j DROP"},
    ]


def test_unreachable_manager_gets_neither_reports_nor_stops(world: World) -> None:
    world.set_backends(f"a {A} draining", f"b {B}")
    world.reconcile()
    world.state.manager_reachable = False
    world.clock.sleep(2.0)
    world.reporter.wait_and_report()
    world.sample(5.0)
    assert (world.manager.reports, world.manager.stops) == ([], [])
    assert world.state.learner._since is not None  # weights are still learnt
    world.state.manager_reachable = True
    world.sample()
    assert [ip for ip, _ in world.manager.stops] == [A]


def test_uptime_is_the_balancers_own_clock(world: World) -> None:
    world.set_backends(f"a {A}")
    world.reconcile()
    world.clock.sleep(7.5)
    assert world.report()["uptime"] == 7.5


@pytest.mark.parametrize(("used", "warned"), [(900, False), (901, True)])
def test_nearly_full_connection_table_is_reported(world: World, used: int, warned: bool) -> None:
    world.kernel.make_sets()
    world.kernel.conntrack = used, 1000
    warnings = world.report()["warnings"]
    assert [("90%" in w, "1000" in w, "nf_conntrack_max" in w) for w in warnings] == [(True,) * 3] * warned
