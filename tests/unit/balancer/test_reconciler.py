"""What one pass over the kernel changes, in which order, and what it logs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest

import restore
import ruleset
import stalls
from datapath import DataPath
from exposition import APPLY_SECONDS, FAILED_CONNECTIONS, REPAIRS
from fakes_balancer import World
from fakes_netfilter import FakeNetfilter, flow, waiting
from health import Cause, Health
from netfilter import NetfilterError
from weights import Estimate, Learner

UNKNOWN = Health()
UNHEALTHY = Health(False, 0, "does not answer", Cause.PROBE_FAILED)
A, B, C, D = (f"198.18.0.{number}" for number in (2, 3, 4, 5))
UNREACHABLE = Health(False, 0, "port 8000: no connection within 1 s", Cause.UNREACHABLE)


def test_first_pass_writes_the_sets_before_the_rules_and_all_tables(world: World) -> None:
    world.set_backends(f"a {A}", f"b {B}")
    assert world.reconcile() == [f"neighbours {A} {B}", f"add {A} add {B}", "nat", "filter", "raw"]
    assert world.dispatched() == world.chains() == world.members() == {A, B}


def test_pass_without_a_change_changes_nothing(world: World) -> None:
    world.set_backends(f"a {A}", f"b {B}", f"c {C} draining", a=UNHEALTHY)
    world.reconcile()
    assert world.reconcile() == []


def test_pass_adds_new_backends_first_and_removes_old_ones_last(world: World) -> None:
    world.set_backends(f"a {A}", f"b {B}")
    world.reconcile()
    world.kernel.flows = [flow(A), flow(B)]
    world.set_backends(f"b {B}", f"c {C}")
    assert world.reconcile() == [
        *(f"neighbours {C}", f"add {C}"),
        "nat",
        *(f"delete flows {A}", f"neighbours {A}", f"del {A}"),
    ]
    assert world.dispatched() == world.chains() == world.members() == {B, C}
    assert world.kernel.flows == [flow(B)]


@pytest.mark.parametrize("restarted", [False, True], ids=["same client", "new client"])
@pytest.mark.parametrize("break_at", range(1, 7))
def test_pass_that_fails_at_any_step_leaves_working_rules_and_the_next_pass_completes_it(
    world: World, break_at: int, restarted: bool
) -> None:
    world.set_backends(f"a {A}", f"b {B}", f"d {D}")
    world.reconcile()
    world.kernel.flows = [flow(A), flow(B), flow(D)]
    world.set_backends(f"c {C}")
    world.kernel.break_at = len(world.kernel.calls) + break_at
    with pytest.raises(NetfilterError):
        world.reconcile()
    assert world.dispatched() in ({A, B, D}, {C})
    assert world.dispatched() <= world.chains() & world.members()
    assert flow(A) in world.kernel.flows or A not in world.dispatched()
    if restarted:
        world.restart()
        world.set_backends(f"c {C}")
    world.reconcile()
    assert world.dispatched() == world.chains() == world.members() == {C}
    assert world.kernel.flows == []
    assert world.reconcile() == []


def test_flows_of_a_removed_backend_are_deleted_after_its_rules(world: World) -> None:
    world.set_backends(f"a {A}", f"b {B}", f"c {C}")
    world.reconcile()
    world.kernel.flows = [flow(A), flow(B, "SYN_SENT", mark=0), flow(A, "SYN_SENT", 40001, mark=0)]
    world.set_backends(f"b {B}", f"c {C}")
    calls = world.reconcile()
    assert calls.index("nat") < calls.index(f"delete flows {A}") < calls.index(f"del {A}")
    assert world.kernel.flows == [flow(B, "SYN_SENT", mark=0)]


def test_unhealthy_backend_leaves_rotation_and_only_its_unanswered_flows_are_deleted(world: World) -> None:
    world.set_backends(f"a {A}", f"b {B}", f"c {C}")
    world.reconcile()
    world.kernel.count(A, 7)
    world.kernel.flows = [flow(A), flow(A, "SYN_SENT", 40001, mark=0)]
    world.set_backends(f"a {A}", f"b {B}", f"c {C}", a=UNHEALTHY)
    assert world.reconcile() == ["nat", f"delete flows {A} unanswered"]
    assert world.reconcile() == []
    assert world.dispatched() == {B, C}
    assert world.chains() == world.members() == {A, B, C}
    world.sample()
    assert world.report()["backends"][0] == {
        **{"id": "a", "ip": A, "healthy": False, "share": 0.0, "connections": 7, "packets": 0, "bytes": 0},
        **{"active": 1, "why": "does not answer", "cause": "probe_failed"},
    }
    world.set_backends(f"a {A}", f"b {B}", f"c {C}")
    assert world.reconcile() == ["nat"]
    assert world.kernel.flows == [flow(A)]


def test_below_half_healthy_all_stay_in_rotation_and_panic_is_logged_once_and_reported(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    world.set_backends(f"a {A}", f"b {B}", f"c {C}", f"s {D} spare")
    world.reconcile()
    world.kernel.flows = [flow(A, "SYN_SENT", mark=0)]
    caplog.clear()
    for _ in range(2):
        world.set_backends(f"a {A}", f"b {B}", f"c {C}", f"s {D} spare", a=UNHEALTHY, b=UNHEALTHY)
        assert world.reconcile() == []
    assert world.dispatched() == {A, B, C}
    assert world.report()["panic"] is True
    assert world.state.rotation.panic
    assert len(world.kernel.flows) == 1
    world.set_backends(f"a {A}", f"b {B}", f"c {C}", f"s {D} spare", a=UNHEALTHY)
    world.reconcile()
    assert world.dispatched() == {B, C}
    assert world.report()["panic"] is False
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("WARNING", "panic: 1 of 3 backends healthy, all of them stay in rotation"),
        ("INFO", "panic over: 2 of 3 backends healthy"),
        ("INFO", f"rotation {B} {C}"),
    ]


def test_in_panic_unreachable_backends_leave_rotation_while_others_answer(world: World) -> None:
    """As when the node of two of three backends fails: keeping them would lose two thirds of the requests."""
    backends = (f"a {A}", f"b {B}", f"c {C}")
    world.set_backends(*backends)
    world.reconcile()
    world.sample()
    world.kernel.reply(B)  # a has failed; b is overloaded, and still answers some clients
    world.kernel.reply(C)
    world.sample()
    world.set_backends(*backends, a=UNREACHABLE, b=UNREACHABLE)
    world.reconcile()
    assert world.dispatched() == {B, C}
    assert world.report()["panic"] is True
    world.sample(stalls.ANSWERS_WITHIN + 1)
    world.reconcile()
    assert world.dispatched() == {C}, "b no longer answers any client, and c is healthy"


def test_in_panic_all_stay_where_no_backend_is_known_to_answer(world: World) -> None:
    """The fault may be this node's own network."""
    world.set_backends(f"a {A}", f"b {B}")
    world.reconcile()
    world.set_backends(f"a {A}", f"b {B}", a=UNREACHABLE, b=UNREACHABLE)
    world.sample(stalls.ANSWERS_WITHIN + 1)
    world.reconcile()
    assert world.dispatched() == {A, B}


def test_flows_of_a_new_backend_are_not_deleted_after_a_failed_pass(world: World) -> None:
    world.set_backends(f"a {A}", f"b {B}")
    world.reconcile()
    world.set_backends(f"new {A}", f"b {B}")
    world.kernel.flows = []
    deleted: list[set[str]] = []
    delete = world.kernel.delete_flows

    def note(ips: Any, unanswered_only: bool = False) -> None:
        deleted.append(set(ips))
        delete(ips, unanswered_only)

    world.kernel.delete_flows = note  # type: ignore[method-assign]
    world.reconciler._write = lambda *_: (_ for _ in ()).throw(NetfilterError("no"))  # type: ignore[method-assign]
    for _ in range(3):
        with pytest.raises(NetfilterError):
            world.reconcile()
    assert [ips for ips in deleted if A in ips] == [{A}], "once, before the new backend could have flows"


def test_draining_backend_keeps_all_its_flows(world: World) -> None:
    world.set_backends(f"a {A}", f"b {B}", f"c {C}")
    world.reconcile()
    world.kernel.flows = [flow(A), flow(A, "SYN_SENT", 40001, mark=0)]
    world.set_backends(f"a {A} draining", f"b {B}", f"c {C}")
    assert world.reconcile() == ["nat"]
    assert world.dispatched() == {B, C}
    assert len(world.kernel.flows) == 2


def test_flows_of_a_reused_address_are_deleted_before_the_new_backend_is_in_rotation(world: World) -> None:
    world.set_backends(f"a {A}", f"b {B}", f"c {C}")
    world.reconcile()
    world.kernel.flows = [flow(A), flow(B)]
    world.set_backends(f"new {A} starting", f"b {B}", f"c {C}", new=UNKNOWN)
    assert world.reconcile() == [f"delete flows {A}", f"neighbours {A}", "nat"]
    assert world.dispatched() == {B, C}
    assert world.kernel.flows == [flow(B)]
    world.set_backends(f"new {A} starting", f"b {B}", f"c {C}")
    assert world.reconcile() == ["nat"]
    assert world.dispatched() == {A, B, C}


def test_refused_connection_is_tried_again_only_while_rotation_has_another_backend(world: World) -> None:
    world.set_backends(f"a {A}", f"b {B}")
    world.reconcile()
    refusal = world.kernel.rules("filter", "LB-FIRST-REPLY")[0]
    assert "RST" in refusal and refusal.endswith("-j DROP")
    world.set_backends(f"a {A}", f"b {B}", a=UNHEALTHY)
    assert world.reconcile()[:2] == ["nat", "filter"]
    assert refusal not in world.kernel.rules("filter", "LB-FIRST-REPLY")


def remove_hook(kernel: FakeNetfilter) -> None:
    kernel.tables["nat"]["PREROUTING"].clear()


def flush_dispatch(kernel: FakeNetfilter) -> None:
    kernel.tables["nat"]["LB-DISPATCH"].clear()


def remove_filter_rules(kernel: FakeNetfilter) -> None:
    kernel.tables["filter"] = {"INPUT": [], "FORWARD": [], "OUTPUT": []}


def remove_count(kernel: FakeNetfilter) -> None:
    kernel.tables["filter"]["LB-FORWARD"].clear()


def remove_member(kernel: FakeNetfilter) -> None:
    del kernel.set[A]


def remove_raw_rules(kernel: FakeNetfilter) -> None:
    kernel.tables["raw"] = {"PREROUTING": [], "OUTPUT": []}


@pytest.mark.parametrize(
    ("damage", "calls"),
    [
        (remove_hook, ["nat"]),
        (flush_dispatch, ["nat"]),
        (remove_filter_rules, ["filter"]),
        (remove_raw_rules, ["raw"]),
        (remove_count, ["filter"]),
        (remove_member, [f"add {A}"]),
    ],
)
def test_changes_by_other_programs_are_repaired(
    world: World, damage: Callable[[FakeNetfilter], None], calls: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    world.set_backends(f"a {A}", f"b {B}")
    world.reconcile()
    intact = [world.kernel.table(name) for name in ("nat", "filter", "raw")]
    damage(world.kernel)
    caplog.clear()
    assert world.reconcile() == calls
    assert [world.kernel.table(name) for name in ("nat", "filter", "raw")] == intact
    assert world.members() == {A, B}
    assert [r.message for r in caplog.records] == (
        ["repaired the nat table: another program had changed it"] if calls == ["nat"] else []
    )


def test_rules_that_a_failed_pass_wrote_are_not_taken_for_another_programs(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.set_backends(f"a {A}", f"b {B}")
    world.reconcile()
    world.set_backends(f"a {A}")
    world.kernel.break_at = len(world.kernel.calls) + 2
    with pytest.raises(NetfilterError):
        world.reconcile()
    assert world.dispatched() == {A}, "it failed after it had written the nat table"
    world.set_backends(f"a {A}", f"b {B}")
    world.reconcile()
    assert world.dispatched() == {A, B}
    assert not [message for message in caplog.messages if "another program" in message]


@pytest.mark.parametrize("name", ["world", "host"])
def test_repair_deletes_the_flows_that_another_program_sent_elsewhere(
    request: pytest.FixtureRequest, name: str
) -> None:
    """On the host, they may be those of another program's own service at that port."""
    world: World = request.getfixturevalue(name)
    world.set_backends(f"a {A}", f"b {B}")
    world.reconcile()
    elsewhere, own = flow("198.18.0.77", "SYN_SENT"), [flow(A), flow(B, "SYN_SENT"), flow("198.18.0.77")]
    world.kernel.flows = [elsewhere, *own]
    world.reconcile()
    assert world.kernel.flows == [elsewhere, *own], "nothing was repaired"
    world.kernel.tables["nat"][world.kernel.path.chain("DISPATCH")].clear()
    world.reconcile()
    assert world.kernel.flows == ([elsewhere, *own] if name == "host" else own)


def test_repair_is_noticed_although_the_rotation_changes_in_the_same_pass(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.set_backends(f"a {A}", f"b {B}")
    world.reconcile()
    world.kernel.flows = [flow("198.18.0.77", "SYN_SENT")]
    world.kernel.tables["nat"]["LB-DISPATCH"].clear()
    world.set_backends(f"a {A}", f"b {B}", f"c {C}")
    world.reconcile()
    assert world.kernel.flows == []
    assert "repaired the nat table: another program had changed it" in caplog.messages


def test_deletion_of_misdirected_flows_that_failed_is_done_by_the_next_pass(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world.set_backends(f"a {A}", f"b {B}")
    world.reconcile()
    world.kernel.flows = [flow("198.18.0.77", "SYN_SENT")]
    world.kernel.tables["nat"]["LB-DISPATCH"].clear()
    with monkeypatch.context() as broken, pytest.raises(NetfilterError):
        broken.setattr(world.kernel, "delete_misdirected_flows", Mock(side_effect=NetfilterError("timed out")))
        world.reconcile()
    assert "repaired the nat table: another program had changed it" in caplog.messages
    world.reconcile()
    assert world.kernel.flows == []


def test_first_pass_keeps_the_flows_of_the_first_rules(world: World) -> None:
    first = ruleset.nat([ruleset.Endpoint(A), ruleset.Endpoint(B)])  # what script.sh installs
    world.kernel.apply(restore.restore(first, world.kernel.listing("nat")))
    world.kernel.flows = [flow(A), flow(B)]
    world.set_backends(f"a {A}", f"b {B}")
    assert world.reconcile() == [f"add {A} add {B}", "filter", "raw"]
    assert world.kernel.flows == [flow(A), flow(B)]


def test_restarted_client_keeps_rules_flows_and_counters(world: World) -> None:
    world.set_backends(f"a {A}", f"b {B}", f"c {C}")
    world.reconcile()
    world.kernel.count(A, 41)
    world.kernel.set = {A: (500, 30000), B: (0, 0), C: (0, 0)}
    world.kernel.flows = [flow(A), flow(C)]
    world.restart()
    world.set_backends(f"a {A}", f"b {B}", f"c {C}", a=UNKNOWN, b=UNKNOWN, c=UNKNOWN)
    assert world.reconcile() == []
    assert world.kernel.flows == [flow(A), flow(C)]
    world.sample()
    report = world.report()
    rows = [list(row.values()) for row in report.pop("backends")]
    third = pytest.approx(1 / 3)
    assert report == {
        **{"balancer": "lb", "revision": "r1", "interval": 2.0, "uptime": 0.5},
        **{"panic": False, "findings": [], "warnings": []},
    }
    assert rows == [
        ["a", A, third, 41, 500, 30000, 1, None],
        ["b", B, third, 0, 0, 0, 0, None],
        ["c", C, third, 0, 0, 0, 1, None],
    ]


def test_backend_that_was_removed_while_the_client_was_down_is_removed_at_its_restart(world: World) -> None:
    world.set_backends(f"a {A}", f"b {B}", f"c {C}")
    world.reconcile()
    world.kernel.flows = [flow(A), flow(B)]
    world.restart()
    world.set_backends(f"b {B}", f"c {C}")
    assert world.reconcile() == ["nat", f"delete flows {A}", f"neighbours {A}", f"del {A}"]
    assert world.kernel.flows == [flow(B)]


def test_change_of_rotation_is_logged_in_one_line(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for fleet in ((f"b {B}", f"a {A}"), (f"b {B}", f"a {A}"), (f"b {B} active 3", f"a {A}"), ()):
        world.set_backends(*fleet)
        world.reconcile()
    assert [record.message for record in caplog.records] == [f"rotation {A} {B}", "rotation empty"]


def test_active_backend_enters_rotation_when_this_balancer_has_reached_it(world: World) -> None:
    world.set_backends(f"a {A}", f"b {B}", a=UNKNOWN, b=UNKNOWN)
    world.reconcile()
    assert world.dispatched() == {A, B}, "they may have been in rotation before this client started"
    for _ in range(2):
        world.set_backends(f"a {A}", f"b {B}", f"c {C}", a=UNKNOWN, c=UNKNOWN)
        world.reconcile()
        assert world.dispatched() == {A, B}
    world.set_backends(f"a {A}", f"b {B}", f"c {C}")
    world.reconcile()
    assert world.dispatched() == {A, B, C}


def first_chance(world: World) -> float:
    world.reconcile()
    return float(world.kernel.rules("nat", "LB-DISPATCH")[0].split("--probability ")[1].split(" ")[0])


def test_new_backend_starts_with_a_quarter_of_its_share_and_has_all_after_three_seconds(world: World) -> None:
    world.set_backends(f"a {A}")
    world.reconcile()
    world.clock.sleep(60.0)
    world.set_backends(f"a {A}", f"b {B}")
    chances = []
    for _ in range(5):
        chances.append(first_chance(world))
        world.clock.sleep(1.0)
    assert chances == pytest.approx([1 / 1.25, 1 / 1.5, 1 / 1.75, 0.5, 0.5], abs=1e-8)
    assert world.reconcile() == []


@pytest.mark.parametrize(("weights", "chance"), [("adaptive", 0.75), ("equal", 0.5)])
def test_estimated_weights_are_in_the_rules_only_if_adaptive(world: World, weights: str, chance: float) -> None:
    world.set_backends(f"a {A}", f"b {B}")
    world.state.snapshot = replace(world.state.snapshot, weights=weights)
    estimates = {"a": Estimate(9.0, 1.0, weight=1.5), "b": Estimate(3.0, 1.0, weight=0.5)}
    world.state.learner = Learner(estimates)
    assert first_chance(world) == pytest.approx(chance)


def test_slow_backend_gets_a_smaller_share(world: World) -> None:
    world.set_backends(f"a {A}", f"b {B}")
    world.state.snapshot = replace(world.state.snapshot, weights="adaptive")
    world.reconcile()
    for _ in range(10):  # 200 connections each an interval; of a's, twelve wait at any time
        world.kernel.flows = [waiting(A)] * 12 + [waiting(B)] + [flow(B)] * 20
        world.sample(2.0)
        world.kernel.count(A, 200)
        world.kernel.count(B, 200)
        world.reporter.learn(world.report())
        world.reconcile()
    assert first_chance(world) < 0.45
    assert world.report()["backends"][0]["share"] == pytest.approx(first_chance(world), abs=1e-6)


def value(metric: Any, suffix: str) -> float:
    return sum(s.value for family in metric.collect() for s in family.samples if s.name.endswith(suffix))


def test_each_restore_is_timed_and_a_pass_without_a_change_is_not(world: World) -> None:
    world.set_backends(f"a {A}", f"b {B}")
    before = value(APPLY_SECONDS, "_count")
    world.reconcile()
    after = value(APPLY_SECONDS, "_count")
    assert after - before == 3, "nat, filter, raw"
    world.reconcile()
    assert value(APPLY_SECONDS, "_count") == after


def test_only_repairs_are_counted_as_repairs(world: World) -> None:
    before = value(REPAIRS, "_total")
    for backends in ((f"a {A}", f"b {B}"), (f"a {A}",), (f"a {A}", f"b {B}")):
        world.set_backends(*backends)
        world.reconcile()
    assert value(REPAIRS, "_total") == before
    remove_hook(world.kernel)
    world.reconcile()
    assert value(REPAIRS, "_total") == before + 1


def test_refused_and_undispatched_connections_are_counted_since_the_start_of_this_client(world: World) -> None:
    def failed() -> tuple[float, float]:
        world.reconcile()
        one, other = (FAILED_CONNECTIONS.labels(reason)._value.get() for reason in ("refused", "no_backend"))
        return one, other

    world.set_backends(f"a {A}", f"b {B}")
    refused, no_backend = failed()
    world.kernel.drop("LB-FIRST-REPLY", 3)
    world.kernel.drop("LB-INPUT", 5)
    assert failed() == failed() == (refused + 3, no_backend + 5)

    # With one backend there is no rule for refusals, and later a new one, which begins at zero.
    for backends in ((f"a {A}",), (f"a {A}", f"b {B}")):
        world.set_backends(*backends)
        assert failed() == (refused + 3, no_backend + 5)
    world.kernel.drop("LB-FIRST-REPLY", 2)
    assert failed() == (refused + 5, no_backend + 5)

    world.restart()
    world.set_backends(f"a {A}", f"b {B}")
    assert failed() == (refused + 5, no_backend + 5)


# -- on the host, and with sticky clients ------------------------------------------------------------------------------

HOST = DataPath(prefix="LB-0a1b2c-", bridge="br0", subnet="198.18.0.0/20", sticky=60)


@pytest.fixture
def host(world: World) -> World:
    """A balancer whose rules are in the host's namespace. (`world` replaces its prober and its clock.)"""
    return World(world.clock, HOST)


def test_on_the_host_rules_stand_in_two_tables_and_backends_can_call_themselves(host: World) -> None:
    host.kernel.tables["filter"]["FORWARD"] = [(0, "-j DOCKER-USER"), (0, "-j DROP")]
    host.kernel.tables["filter"]["DOCKER-USER"] = []
    host.set_backends(f"a {A}", f"b {B}")
    calls = host.reconcile()
    assert [call for call in calls if call in ("nat", "filter", "raw", "hairpin")] == [
        "hairpin",
        "nat",
        "filter",
    ]
    assert host.kernel.rules("filter", "FORWARD") == [
        "-j DOCKER-USER",
        "-o br0 -m conntrack --ctstate DNAT --ctdir ORIGINAL -j LB-0a1b2c-FORWARD",
        "-i br0 -p tcp -m conntrack --ctstate INVALID,DNAT -j LB-0a1b2c-REPLY",
        "-j DROP",
    ]
    assert host.state.findings == (), "the policy and the rules of others are not reported"
    assert host.reconcile() == []


def test_backend_at_a_known_address_can_call_itself_after_a_restart_of_the_client(host: World) -> None:
    host.set_backends(f"a {A}", f"b {B}")
    host.reconcile()
    host.restart()
    host.set_backends(f"c {A}", f"d {B}")
    assert "hairpin" in host.reconcile()
    assert "hairpin" not in host.reconcile()


def test_each_backend_has_a_set_of_its_clients_until_it_is_removed(host: World) -> None:
    host.set_backends(f"a {A}", f"b {B}")
    host.reconcile()
    client_sets = {HOST.clients_set, HOST.sticky_set(A), HOST.sticky_set(B)}
    assert set(host.kernel.all_sets) - set(HOST.backend_sets) == client_sets
    host.set_backends(f"a {A}", f"b {B} draining")
    host.reconcile()
    assert set(host.kernel.all_sets) - set(HOST.backend_sets) == client_sets
    assert host.kernel.rules("nat", "LB-0a1b2c-STICKY")[1:-1] == [
        f"-m set --match-set LB-0a1b2c-S-{A} src -j LB-0a1b2c-B-{A}",
        f"-j SET --del-set LB-0a1b2c-S-{B} src",
    ], "a draining backend gets no connection, not even from its own clients"
    host.set_backends(f"a {A}")
    host.reconcile()
    assert set(host.kernel.all_sets) - set(HOST.backend_sets) == client_sets - {HOST.sticky_set(B)}


def test_client_of_the_balancer_that_starts_again_on_the_host_keeps_the_rules(host: World) -> None:
    host.set_backends(f"a {A}", f"b {B}")
    host.reconcile()
    host.kernel.flows = [flow(A), flow(B)]
    host.restart()
    host.set_backends(f"a {A}", f"b {B}")
    assert [call for call in host.reconcile() if call != "hairpin"] == []
    assert len(host.kernel.flows) == 2
