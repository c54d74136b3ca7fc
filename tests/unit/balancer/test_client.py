"""The client's loops: it follows the manager, goes on after failures, and serves its own health."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import requests

import restore
import ruleset
import synchronization_client as client
from exposition import FAILED_PASSES, exposition
from fakes_balancer import World
from fakes_netfilter import flow
from features import MARKS, NOTRACK, RETRIES, Feature
from health import Cause, Health
from netfilter import NetfilterError
from snapshot import Snapshot

UNHEALTHY = Health(False, 0, "does not answer", Cause.PROBE_FAILED)
A, B = "198.18.0.2", "198.18.0.3"
SERVICE = {
    "port": 8000,
    "health": "tcp",
    "interval": 2,
    "drain_timeout": 30,
    "weights": "adaptive",
}
MESSAGE = {"revision": "r7", "service": SERVICE, "backends": [{"id": "a", "ip": A, "state": "active"}]}


def test_new_snapshot_is_probed_and_an_unchanged_one_is_kept(world: World) -> None:
    world.manager.answers = [MESSAGE, None]
    for _ in range(2):
        world.balancer.follow()
    assert world.state.snapshot == Snapshot.parse(MESSAGE)
    assert world.prober.watched == [Snapshot.parse(MESSAGE)]
    assert world.state.reconcile_due.is_set()


def test_unreachable_manager_is_logged_once_and_the_last_snapshot_is_kept(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    lost = requests.ConnectionError("no route")
    world.manager.answers = [MESSAGE, lost, lost, {"revision": "r8"}, None, None, lost]
    while world.manager.answers:
        world.balancer.follow()
    assert [record.message for record in caplog.records] == [
        "manager unreachable, keeping the last rules: no route",
        "manager reachable again",
        "manager unreachable, keeping the last rules: no route",
    ]
    assert world.state.snapshot == Snapshot.parse(MESSAGE)
    assert world.manager.requested == ["", "r7", "", "", "", "r7", "r7"]  # after an error, as if for the first time
    assert 4 * 0.2 <= world.clock.now - 1000.0 <= 4.0  # the requests are spread


def test_malformed_snapshot_is_logged_as_such_and_the_last_one_is_kept(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.manager.answers = [MESSAGE, {"revision": "r8"}, {"revision": "r8"}]
    while world.manager.answers:
        world.balancer.follow()
    assert caplog.messages == ["malformed snapshot, keeping the last rules: KeyError('service')"]
    assert world.state.snapshot == Snapshot.parse(MESSAGE)


@pytest.mark.parametrize(
    ("features", "lacks"),
    [
        ((), []),
        ((MARKS,), ["connmark"]),
        ((MARKS, RETRIES, NOTRACK), ["connmark", "connbytes", "CT target"]),
    ],
)
def test_missing_kernel_features_are_logged(
    features: tuple[Feature, ...], lacks: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    client.log_missing(features)
    assert [(r.levelname, r.message.partition("no ")[2].partition(" in this kernel")[0]) for r in caplog.records] == [
        ("WARNING", lack) for lack in lacks
    ]


@pytest.mark.parametrize(
    ("error", "level"),
    [
        (requests.ConnectionError("away"), "WARNING"),
        (NetfilterError("    1 *nat"), "ERROR"),
        (ZeroDivisionError("a bug"), "ERROR"),
    ],
)
def test_failed_pass_is_logged_and_counted_and_does_not_end_the_loop(
    world: World, caplog: pytest.LogCaptureFixture, error: Exception, level: str
) -> None:
    def fail() -> None:
        raise error

    before = FAILED_PASSES.collect()[0].samples[0].value
    client.attempt(lambda: None)
    assert FAILED_PASSES.collect()[0].samples[0].value == before
    client.attempt(fail)
    assert FAILED_PASSES.collect()[0].samples[0].value == before + 1
    assert [record.levelname for record in caplog.records] == [level]
    assert str(error) in caplog.text


def test_metrics_contain_rotation_flows_and_connection_table(world: World) -> None:
    world.set_backends(f"a {A}", f"b {B}", b=UNHEALTHY)
    world.reconcile()
    world.kernel.flows = [flow(A), flow(B), flow(A, "TIME_WAIT")]
    world.sample()
    lines = exposition(world.state).decode().splitlines()
    values = dict(line.removeprefix("lbscaler_balancer_").split(" ") for line in lines if not line.startswith("#"))
    expected = {
        **{"rotation_backends": "1.0", "flows": "2.0", "converged_seconds": "0.5", "panic": "0.0"},
        **{"conntrack_entries": "10.0", "conntrack_entries_limit": "1000.0"},
    }
    assert {name: values[name] for name in expected} == expected


def health_check(world: World) -> tuple[int, dict[str, Any]]:
    message, status = world.balancer.sync()
    return status, message


def first_rules(world: World, *backends: str) -> None:
    """Installs the first rules for these addresses, as script.sh does. In a Swarm there are none."""
    endpoints = [ruleset.Endpoint(ip) for ip in backends]
    world.kernel.apply(restore.restore(ruleset.nat(endpoints), world.kernel.listing("nat")))


def test_health_check_fails_until_a_new_balancer_of_a_swarm_has_reached_the_manager(world: World) -> None:
    first_rules(world)
    world.balancer.beat("sample")
    world.state.reconcile_due.set()
    world.reconciler.wait_and_reconcile()
    status, message = health_check(world)
    assert (status, message["loops_alive"], message["rules_in_place"]) == (503, True, False)
    world.set_backends(f"a {A}")
    world.state.reconcile_due.set()
    world.reconciler.wait_and_reconcile()
    assert health_check(world)[0] == 200


def test_health_check_passes_without_a_manager_if_the_rules_lead_to_a_backend(world: World) -> None:
    first_rules(world, A)
    world.balancer.beat("sample")
    world.state.reconcile_due.set()
    world.reconciler.wait_and_reconcile()
    world.clock.sleep(119.0)
    assert health_check(world) == (
        200,
        {
            **{"converged_s_ago": 119.0, "revision": "", "rotation": [], "panic": False},
            **{"loops_alive": True, "rules_in_place": True},
        },
    )


def test_health_check_fails_while_a_loop_is_stuck(world: World) -> None:
    world.set_backends(f"b {B}", f"a {A}")
    world.reconcile()
    world.balancer.beat("sample")
    world.clock.sleep(123.0)
    status, message = health_check(world)
    assert (status, message["loops_alive"], message["rules_in_place"]) == (503, False, True)
    world.balancer.beat("sample")
    assert health_check(world)[0] == 200


@pytest.mark.parametrize("snapshot", [True, False], ids=["with a snapshot", "before a snapshot"])
def test_health_check_fails_while_our_rules_are_missing_and_cannot_be_written(world: World, snapshot: bool) -> None:
    first_rules(world, A)
    if snapshot:
        world.set_backends(f"a {A}")
        world.reconcile()
    world.kernel.tables["nat"]["PREROUTING"].clear()
    world.kernel.break_at = len(world.kernel.calls) + 1
    world.state.reconcile_due.set()
    if snapshot:
        with pytest.raises(NetfilterError):
            world.reconciler.wait_and_reconcile()
    else:
        world.reconciler.wait_and_reconcile()
    status, message = health_check(world)
    assert (status, message["loops_alive"], message["rules_in_place"]) == (503, True, False)
    if snapshot:
        world.reconcile()
        assert health_check(world)[0] == 200
