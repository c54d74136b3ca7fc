"""Samples of flows: stops of drained backends, frozen backends, and how often samples are taken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import requests

from datapath import DataPath
from fakes_balancer import HEALTHY, World
from fakes_netfilter import flow, waiting
from features import MARKS, NOTRACK
from health import Cause, Health
from netfilter import NetfilterError

UNKNOWN = Health()
UNHEALTHY = Health(False, 0, "does not answer", Cause.PROBE_FAILED)
A, B, C, D = (f"198.18.0.{number}" for number in (2, 3, 4, 5))


def test_draining_backend_that_refuses_new_connections_is_not_stopped_early(world: World) -> None:
    """It answers its probes with 503, so it still works, and its streams may be silent for long."""
    world.set_backends(f"a {A} draining", f"b {B}", a=Health(False, 0, "status 503", Cause.REFUSED))
    world.reconcile()
    world.kernel.flows = [flow(A, idle=60)]
    world.sample(20)
    assert world.manager.stops == []


def test_draining_backend_is_stopped_when_its_last_flow_ends(world: World) -> None:
    world.set_backends(f"a {A} draining", f"b {B}", f"c {C} draining")
    world.reconcile()
    world.kernel.flows = [flow(A, "TIME_WAIT"), flow(B), flow(C)]
    world.sample()
    assert world.manager.stops == [(A, "drained in 0.0 s")]
    world.set_backends(f"b {B}", f"c {C} draining")
    world.sample(2.5)
    assert world.manager.stops == [(A, "drained in 0.0 s")]
    world.kernel.flows = [flow(B)]
    world.sample()
    assert world.manager.stops[1:] == [(C, "drained in 3.0 s")]


def test_draining_backend_with_flows_is_stopped_at_the_drain_deadline(world: World) -> None:
    world.set_backends(f"a {A} draining", f"b {B}")
    world.reconcile()
    world.kernel.flows = [flow(A), flow(A, client_port=40001)]
    world.sample(30.5)
    assert world.manager.stops == []
    world.sample()
    assert world.manager.stops == [(A, "2 open connections at the drain deadline")]


def test_drain_deadline_of_an_address_is_that_of_the_backend_that_has_it_now(world: World) -> None:
    """On a busy machine, no sample may be taken between the end of one drain and the next one at that address."""
    world.set_backends(f"a {A} draining", f"b {B}")
    world.reconcile()
    world.kernel.flows = [flow(A)]
    world.sample(29)
    world.set_backends(f"c {A} draining", f"b {B}")
    world.reconcile()
    world.kernel.flows = [flow(A)]
    world.sample(29)
    assert world.manager.stops == []
    world.sample(2)
    assert world.manager.stops == [(A, "1 open connections at the drain deadline")]


def test_draining_backend_that_is_still_in_rotation_is_not_stopped(world: World) -> None:
    world.set_backends(f"a {A}", f"b {B}")
    world.reconcile()
    world.set_backends(f"a {A} draining", f"b {B}")
    world.sample(60.0)
    assert world.manager.stops == []
    world.reconcile()
    world.sample()
    assert world.manager.stops == [(A, "drained in 0.0 s")]


def test_unhealthy_draining_backend_is_stopped_when_all_its_connections_are_silent(world: World) -> None:
    world.set_backends(f"a {A} draining", f"b {B}", a=UNHEALTHY)
    world.reconcile()
    world.kernel.flows = [flow(A, idle=12), flow(A, client_port=40001, idle=3)]
    world.sample()
    assert world.manager.stops == []
    world.kernel.flows = [flow(A, idle=12), flow(A, client_port=40001, idle=10)]
    world.sample()
    assert world.manager.stops == [(A, "2 open connections, none answered for 10 s")]


@pytest.mark.parametrize("state", ["active", "starting", "spare"])
def test_unhealthy_backend_that_is_not_draining_is_not_stopped(world: World, state: str) -> None:
    for a in (HEALTHY, UNHEALTHY):
        world.set_backends(f"a {A} {state}", f"b {B}", a=a)
        world.reconcile()
        world.sample(60.0)
    assert world.manager.stops == []
    assert [row["healthy"] for row in world.report()["backends"]] == [False, True]


def test_manager_that_answers_slowly_does_not_delay_the_next_sample(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def stop(ip: str, id_: str, reason: str) -> None:
        asked.append(world.clock.now)
        world.clock.now += 3.0
        world.clock.waited += 3.0

    monkeypatch.setattr(world.manager, "stop", stop)
    world.set_backends(f"a {A} draining", f"b {B}")
    world.reconcile()
    world.sample(8)
    assert len(asked) == 3, asked


def test_manager_that_does_not_answer_a_stop_delays_no_other_sample(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    monkeypatch.setattr(world.manager, "stop", Mock(side_effect=requests.ReadTimeout("timed out")))
    for name in ("waiting_flows", "all_flows"):
        count = getattr(world.kernel, name)
        monkeypatch.setattr(world.kernel, name, lambda *a, name=name, count=count: (taken.append(name), count(*a))[1])
    world.set_backends(f"a {A} draining", f"b {B}")
    world.reconcile()
    world.clock.now += 1
    world.balancer.sample()
    assert sorted(taken) == ["all_flows", "waiting_flows"]


def test_each_failed_sample_is_logged(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("waiting_flows", "all_flows"):
        monkeypatch.setattr(world.kernel, name, Mock(side_effect=NetfilterError(f"{name} failed")))
    world.balancer.sample()
    assert caplog.messages == ["waiting_flows failed", "all_flows failed"]


def test_drain_timeout_passes_also_while_the_manager_is_unreachable(world: World) -> None:
    world.set_backends(f"a {A} draining", f"b {B}")
    world.reconcile()
    world.kernel.flows = [flow(A)]
    world.state.manager_reachable = False
    world.sample(60)
    assert world.manager.stops == []
    world.state.manager_reachable = True
    world.sample()
    assert world.manager.stops == [(A, "1 open connections at the drain deadline")]


def test_refused_stop_does_not_affect_other_stops(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    accepted: list[str] = []

    def stop(ip: str, id_: str, reason: str) -> None:
        if ip == A:
            raise requests.HTTPError("500 Server Error")
        accepted.append(ip)

    monkeypatch.setattr(world.manager, "stop", stop)
    world.set_backends(f"a {A} draining", f"b {B} draining", f"c {C}")
    world.reconcile()
    world.sample()
    assert accepted == [B]
    assert "manager: 500 Server Error" in caplog.text


def test_with_a_million_flows_samples_take_a_twentieth_of_the_time_and_a_drain_ends_within_a_minute(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent = dict.fromkeys(("all_flows", "waiting_flows", "flows_of"), 0.0)

    def slow(name: str, seconds: float) -> None:
        call = getattr(world.kernel, name)

        def slowly(*arguments: Any) -> Any:
            world.clock.sleep(seconds)
            spent[name] += seconds
            return call(*arguments)

        monkeypatch.setattr(world.kernel, name, slowly)

    slow("all_flows", 4.0)
    slow("waiting_flows", 0.4)
    slow("flows_of", 0.8)
    world.set_backends(f"a {A} draining", f"b {B} draining", f"c {C}")
    world.state.snapshot = replace(world.state.snapshot, drain_timeout=3600.0)
    world.reconcile()
    world.kernel.flows = [flow(A), flow(B)]
    world.sample(2000.0)
    assert all(spent.values())
    assert sum(spent.values()) <= 0.055 * 2000
    world.kernel.flows = []
    began = world.clock.now
    while not world.manager.stops:
        world.sample()
    assert world.clock.now - began < 60


def freeze(world: World) -> None:
    """Three backends are in rotation; `a` stops answering its connections, the others answer for eleven seconds."""
    world.set_backends(f"a {A}", f"b {B}", f"c {C}")
    world.reconcile()
    world.kernel.flows = [waiting(A, client_port=port, idle=11) for port in range(40000, 40004)]
    for _ in range(22):
        world.kernel.reply(B)
        world.kernel.reply(C)
        world.sample()


def test_frozen_backend_with_successful_probes_leaves_rotation(world: World) -> None:
    freeze(world)
    assert world.state.report_due.is_set()
    assert world.state.reconcile_due.is_set()
    assert world.reconcile() == ["nat", f"delete flows {A} unanswered"]
    assert world.dispatched() == {B, C}
    row = world.report()["backends"][0]
    assert (row["healthy"], row["cause"]) == (False, "no_first_reply")
    assert row["why"] == "4 connections wait for a first reply, none got one for 10 s"
    world.kernel.reply(A)
    world.sample()
    world.reconcile()
    assert world.dispatched() == {A, B, C}


def test_connections_show_no_frozen_backend_where_clients_are_sticky(world: World) -> None:
    sticky = World(world.clock, DataPath(sticky=60))
    freeze(sticky)
    assert sticky.reconcile() == []
    assert sticky.dispatched() == {A, B, C}


def test_no_backend_counts_as_frozen_while_the_connection_table_is_full(world: World) -> None:
    world.kernel.conntrack = 98, 100
    freeze(world)
    assert world.reconcile() == []


def test_without_marks_there_are_no_samples_of_waiting_flows(world: World) -> None:
    world.state.missing = (MARKS, NOTRACK)
    world.set_backends(f"a {A}", f"b {B}")
    assert world.reconcile() == [f"neighbours {A} {B}", f"add {A} add {B}", "nat", "filter"]
    world.kernel.flows = [waiting(A)]
    world.sample()
    assert world.state.learner._samples == 0
    assert world.report()["backends"][0]["active"] == 1


def test_self_check_connections_are_not_counted(world: World) -> None:
    world.set_backends(f"a {A}", f"b {B}")
    world.state.snapshot = replace(world.state.snapshot, check_source="198.18.0.1")
    world.reconcile()
    assert world.kernel.rules("nat", "PREROUTING")[0].endswith("-j LB-CHECK")
    world.kernel.flows = [flow(A, client="198.18.0.1", client_port=port) for port in (60999, 61000, 61063, 61064)]
    world.sample()
    assert world.report()["backends"][0]["active"] == 2
