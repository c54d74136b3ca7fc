"""The balancer's loops over a kernel and a manager in memory: what they change, in which order, and what they log."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
import requests

import app
import ruleset
import stalls
import synchronization_client as client
from fakes_netfilter import FakeNetfilter, flow, waiting
from listings import connections, parse_table
from manager_client import ManagerClient
from netfilter import NetfilterError
from prober import Cause, Health, Prober
from ruleset import REPLIES, Features
from snapshot import Backend, Snapshot
from synchronization_client import Balancer
from weights import Estimate, Learner

HEALTHY, UNKNOWN = Health(True), Health()
UNHEALTHY = Health(False, 0, "does not answer", Cause.PROBE_FAILED)
A, B, C, D = (f"198.18.0.{number}" for number in (2, 3, 4, 5))


class Clock:
    """Time that passes only by sleeping."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class FakeProber(Prober):
    def __init__(self, changed: Callable[[], None], table_full: Callable[[], bool]) -> None:
        self.verdicts: dict[str, Health] = {}
        self.watched: list[tuple[Mapping[str, str], int, str]] = []

    def health(self) -> dict[str, Health]:
        return dict(self.verdicts)

    def watch(self, backends: Mapping[str, str], port: int, method: str) -> None:
        self.watched.append((backends, port, method))


class FakeManager(ManagerClient):
    def __init__(self) -> None:
        self.answers: list[Any] = []  # of sync: a message, None, or an exception
        self.asked: list[str] = []  # the revisions that sync was told
        self.stops: list[tuple[str, str]] = []
        self.reports: list[Mapping[str, Any]] = []

    def sync(self, have: str) -> Mapping[str, Any] | None:
        self.asked.append(have)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    def report(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        self.reports.append(message)
        return {}

    def stop(self, ip: str, reason: str) -> None:
        self.stops.append((ip, reason))


class World:
    """A balancer and all that it touches."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.kernel, self.manager = clock, FakeNetfilter(), FakeManager()
        self.restart()

    def restart(self) -> None:
        """A new client over the same kernel."""
        self.balancer = Balancer(self.kernel, self.manager, "lb")
        self.prober: FakeProber = self.balancer._prober  # type: ignore[assignment]

    def see(self, *backends: str, **health: Health) -> None:
        """Backends as "id ip [state [weight]]"; those whose health is not given are healthy."""
        self.balancer.snapshot = Snapshot("r1", tuple(backend(words) for words in backends))
        self.prober.verdicts = {b.id: health.get(b.id, HEALTHY) for b in self.balancer.snapshot.backends}

    def converge(self) -> list[str]:
        """What one pass changed, in order."""
        before = len(self.kernel.calls)
        self.balancer.converge()
        return self.kernel.calls[before:]

    def dispatched(self) -> set[str]:
        """The addresses that new connections may go to."""
        chains = self.kernel.tables["nat"]
        rules = [rule for c in chains if c.startswith(("LB-DISPATCH", "LB-T-")) for rule in self.kernel.rules("nat", c)]
        return {rule.rpartition("LB-B-")[2] for rule in rules if "LB-B-" in rule}

    def chains(self) -> set[str]:
        return set(connections(parse_table(self.kernel.table("nat"))))

    def members(self) -> set[str]:
        assert self.kernel.set.keys() == self.kernel.all_sets[REPLIES].keys()
        return set(self.kernel.set)

    def sample(self, seconds: float = client.SAMPLE_PERIOD) -> None:
        """Lets the balancer sample the flows for that long."""
        end = self.clock.now + seconds
        while self.clock.now < end - 1e-9:
            self.balancer._sample()


def backend(words: str) -> Backend:
    id_, ip, *rest = words.split(" ")
    state, weight = (*rest, *("active", "1")[len(rest) :])
    return Backend(id_, ip, state, float(weight))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    clock = Clock()
    monkeypatch.setattr(client, "time", clock)
    monkeypatch.setattr(client, "Prober", FakeProber)
    return World(clock)


# -- what the manager wants ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("inside", "hidden"), [("", "-p tcp"), ("198.18.0.0/24", "-s 198.18.0.0/24 -p tcp")])
def test_only_clients_within_the_views_inside_are_hidden(world: World, inside: str, hidden: str) -> None:
    world.see(f"a {A}")
    world.balancer.snapshot = replace(world.balancer.snapshot, backend_subnet=inside)
    world.converge()
    assert world.kernel.rules("nat", "LB-MASQ")[0].startswith(f"{hidden} -m conntrack ")


SERVICE = {
    **{"port": 8000, "health": "tcp", "interval": 2, "drain_timeout": 30},
    **{"weights": "adaptive", "backend_subnet": "198.18.0.0/24"},
}
ONE = {"id": "a", "ip": A, "state": "active", "weight": 1}
MESSAGE: dict[str, Any] = {"revision": "r7", "service": SERVICE, "backends": [ONE]}


def test_a_view_is_read_from_the_managers_message() -> None:
    backends = (Backend("a", A, "active", 1.0),)
    assert Snapshot.parse(MESSAGE) == Snapshot("r7", backends, 8000, "tcp", 2.0, 30.0, "adaptive", "198.18.0.0/24")
    assert Snapshot.parse({**MESSAGE, "backends": [], "more": 1}).backends == ()


@pytest.mark.parametrize(("given", "source"), [({}, ""), ({"check_source": ""}, ""), ({"check_source": A}, A)])
def test_a_view_may_name_the_source_of_self_checks(given: dict[str, str], source: str) -> None:
    assert Snapshot.parse({**MESSAGE, "service": {**SERVICE, **given}}).check_source == source


@pytest.mark.parametrize(
    "message",
    [
        {},
        [],
        "busy",
        {**MESSAGE, "backends": None},
        {**MESSAGE, "backends": [A]},
        {**MESSAGE, "backends": [{"ip": A}]},
        {**MESSAGE, "backends": [{**ONE, "weight": "much"}]},
        {**MESSAGE, "backends": [{**ONE, "weight": None}]},
        {**MESSAGE, "service": None},
        {**MESSAGE, "service": {**SERVICE, "port": "http"}},
        {**MESSAGE, "service": {**SERVICE, "check_source": "-j ACCEPT"}},
        {**MESSAGE, "service": {key: SERVICE[key] for key in ("port", "health", "interval")}},
        {key: MESSAGE[key] for key in ("service", "backends")},
    ],
)
def test_a_message_that_is_no_view_raises_what_the_loop_expects(message: Any) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Snapshot.parse(message)


def test_a_new_view_is_taken_and_watched_and_silence_changes_nothing(world: World) -> None:
    world.manager.answers = [MESSAGE, None]
    for _ in range(2):
        world.balancer._follow()
    assert world.balancer.snapshot == Snapshot.parse(MESSAGE)
    assert world.prober.watched == [({"a": A}, 8000, "tcp")]
    assert world.balancer._wake.is_set()


def test_a_lost_manager_is_logged_once_and_leaves_the_last_view_standing(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    lost = requests.ConnectionError("no route")
    world.manager.answers = [MESSAGE, lost, lost, {"revision": "r8"}, None, None, lost]
    while world.manager.answers:
        world.balancer._follow()
    assert [record.message for record in caplog.records] == [
        "manager unreachable, keeping the last rules: no route",
        "manager reachable again",
        "manager unreachable, keeping the last rules: no route",
    ]
    assert world.balancer.snapshot == Snapshot.parse(MESSAGE)
    assert world.manager.asked == ["", "r7", "", "", "", "r7", "r7"]  # after a silence as if for the first time
    assert 4 * 0.2 <= world.clock.now - 1000.0 <= 4.0  # it does not hammer


# -- converging ------------------------------------------------------------------------------------------------------


def test_a_fresh_kernel_gets_the_set_before_the_rules_and_every_table(world: World) -> None:
    world.see(f"a {A}", f"b {B}")
    assert world.converge() == [f"neighbours {A} {B}", f"add {A} add {B}", "nat", "filter", "mangle", "raw"]
    assert world.dispatched() == world.chains() == world.members() == {A, B}


def test_nothing_is_changed_when_nothing_changed(world: World) -> None:
    world.see(f"a {A}", f"b {B}", f"c {C} draining", a=UNHEALTHY)
    world.converge()
    assert world.converge() == []


def test_the_fleet_grows_first_and_shrinks_last(world: World) -> None:
    world.see(f"a {A}", f"b {B}")
    world.converge()
    world.kernel.flows = [flow(A), flow(B)]
    world.see(f"b {B}", f"c {C}")
    assert world.converge() == [
        *(f"neighbours {C}", f"add {C}"),
        "nat",
        *(f"forget {A}", f"neighbours {A}", f"del {A}"),
    ]
    assert world.dispatched() == world.chains() == world.members() == {B, C}
    assert world.kernel.flows == [flow(B)]


@pytest.mark.parametrize("restarted", [False, True], ids=["same client", "new client"])
@pytest.mark.parametrize("break_at", range(1, 7))
def test_a_pass_that_breaks_off_anywhere_leaves_a_sound_kernel_and_the_next_one_ends_the_work(
    world: World, break_at: int, restarted: bool
) -> None:
    world.see(f"a {A}", f"b {B}", f"d {D}")
    world.converge()
    world.kernel.flows = [flow(A), flow(B), flow(D)]
    world.see(f"c {C}")
    world.kernel.break_at = len(world.kernel.calls) + break_at
    with pytest.raises(NetfilterError):
        world.converge()
    assert world.dispatched() in ({A, B, D}, {C})
    assert world.dispatched() <= world.chains() & world.members()
    assert flow(A) in world.kernel.flows or A not in world.dispatched()
    if restarted:
        world.restart()
        world.see(f"c {C}")
    world.converge()
    assert world.dispatched() == world.chains() == world.members() == {C}
    assert world.kernel.flows == []
    assert world.converge() == []


def test_a_failed_backends_flows_are_deleted_once_no_rule_leads_to_it(world: World) -> None:
    world.see(f"a {A}", f"b {B}", f"c {C}")
    world.converge()
    world.kernel.flows = [flow(A), flow(B, "SYN_SENT", mark=0), flow(A, "SYN_SENT", 40001, mark=0)]
    world.see(f"b {B}", f"c {C}")
    calls = world.converge()
    assert calls.index("nat") < calls.index(f"forget {A}") < calls.index(f"del {A}")
    assert world.kernel.flows == [flow(B, "SYN_SENT", mark=0)]


def test_an_unhealthy_backend_leaves_rotation_and_loses_only_the_flows_it_never_answered(world: World) -> None:
    world.see(f"a {A}", f"b {B}", f"c {C}")
    world.converge()
    world.kernel.count(A, 7)
    world.kernel.flows = [flow(A), flow(A, "SYN_SENT", 40001, mark=0)]
    world.see(f"a {A}", f"b {B}", f"c {C}", a=UNHEALTHY)
    assert world.converge() == ["nat", f"forget {A} unanswered"]
    assert world.converge() == []
    assert world.dispatched() == {B, C}
    assert world.chains() == world.members() == {A, B, C}
    world.sample()
    assert world.balancer.report()["backends"][0] == {
        **{"id": "a", "ip": A, "healthy": False, "share": 0.0, "connections": 7, "packets": 0, "bytes": 0},
        **{"active": 1, "why": "does not answer", "cause": "probe_failed"},
    }
    world.see(f"a {A}", f"b {B}", f"c {C}")
    assert world.converge() == ["nat"]
    assert world.kernel.flows == [flow(A)]


def test_below_half_healthy_all_stay_in_rotation_and_panic_is_logged_once_and_reported(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    world.see(f"a {A}", f"b {B}", f"c {C}", f"s {D} spare")
    world.converge()
    world.kernel.flows = [flow(A, "SYN_SENT", mark=0)]
    caplog.clear()
    for _ in range(2):
        world.see(f"a {A}", f"b {B}", f"c {C}", f"s {D} spare", a=UNHEALTHY, b=UNHEALTHY)
        assert world.converge() == []
    assert world.dispatched() == {A, B, C}
    assert world.balancer.report()["panic"] is True
    assert world.balancer.gauges()["panic"][1] == 1
    assert len(world.kernel.flows) == 1
    world.see(f"a {A}", f"b {B}", f"c {C}", f"s {D} spare", a=UNHEALTHY)
    world.converge()
    assert world.dispatched() == {B, C}
    assert world.balancer.report()["panic"] is False
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("WARNING", "panic: 1 of 3 backends healthy, all of them stay in rotation"),
        ("INFO", "panic over: 2 of 3 backends healthy"),
        ("INFO", f"rotation {B} {C}"),
    ]


UNREACHABLE = Health(False, 0, "port 8000: no connection within 1 s", Cause.UNREACHABLE)


def test_in_panic_backends_that_answer_nobody_leave_while_others_answer(world: World) -> None:
    """As when the node of two of three backends is lost: to keep them would lose two thirds of the requests."""
    backends = (f"a {A}", f"b {B}", f"c {C}")
    world.see(*backends)
    world.converge()
    world.sample()
    world.kernel.reply(B)  # a is dead, b overloaded: it still answers some clients
    world.kernel.reply(C)
    world.sample()
    world.see(*backends, a=UNREACHABLE, b=UNREACHABLE)
    world.converge()
    assert world.dispatched() == {B, C}
    assert world.balancer.report()["panic"] is True
    world.sample(stalls.ANSWERS_WITHIN + 1)
    world.converge()
    assert world.dispatched() == {C}, "b answers nobody any more, and c is healthy"


def test_in_panic_all_stay_where_nobody_is_known_to_answer(world: World) -> None:
    """The fault may be this node's own network."""
    world.see(f"a {A}", f"b {B}")
    world.converge()
    world.see(f"a {A}", f"b {B}", a=UNREACHABLE, b=UNREACHABLE)
    world.sample(stalls.ANSWERS_WITHIN + 1)
    world.converge()
    assert world.dispatched() == {A, B}


def test_a_pass_that_fails_has_no_later_one_delete_the_flows_of_a_new_backend(world: World) -> None:
    world.see(f"a {A}", f"b {B}")
    world.converge()
    world.see(f"new {A}", f"b {B}")
    world.kernel.flows = []
    forgotten: list[set[str]] = []
    forget = world.kernel.forget_flows

    def note(ips: Any, unanswered_only: bool = False) -> None:
        forgotten.append(set(ips))
        forget(ips, unanswered_only)

    world.kernel.forget_flows = note  # type: ignore[method-assign]
    world.balancer._write = lambda *_: (_ for _ in ()).throw(NetfilterError("no"))  # type: ignore[method-assign]
    for _ in range(3):
        with pytest.raises(NetfilterError):
            world.converge()
    assert [ips for ips in forgotten if A in ips] == [{A}], "once, before it could have any"


def test_a_draining_backend_that_refuses_new_connections_is_not_cut(world: World) -> None:
    """It answers its probes with 503, so it is alive; its streams may be silent for long."""
    world.see(f"a {A} draining", f"b {B}", a=Health(False, 0, "status 503", Cause.REFUSED))
    world.converge()
    world.kernel.flows = [flow(A, idle=60)]
    world.sample(20)
    assert world.manager.stops == []


def test_a_draining_backend_keeps_every_flow_answered_or_not(world: World) -> None:
    world.see(f"a {A}", f"b {B}", f"c {C}")
    world.converge()
    world.kernel.flows = [flow(A), flow(A, "SYN_SENT", 40001, mark=0)]
    world.see(f"a {A} draining", f"b {B}", f"c {C}")
    assert world.converge() == ["nat"]
    assert world.dispatched() == {B, C}
    assert len(world.kernel.flows) == 2


def test_a_backend_on_an_old_address_is_forgotten_before_it_enters(world: World) -> None:
    world.see(f"a {A}", f"b {B}", f"c {C}")
    world.converge()
    world.kernel.flows = [flow(A), flow(B)]
    world.see(f"new {A} starting", f"b {B}", f"c {C}", new=UNKNOWN)
    assert world.converge() == [f"forget {A}", f"neighbours {A}", "nat"]
    assert world.dispatched() == {B, C}
    assert world.kernel.flows == [flow(B)]
    world.see(f"new {A} starting", f"b {B}", f"c {C}")
    assert world.converge() == ["nat"]
    assert world.dispatched() == {A, B, C}


def test_a_refusal_is_retried_only_while_there_is_another_backend(world: World) -> None:
    world.see(f"a {A}", f"b {B}")
    world.converge()
    assert len(world.kernel.rules("filter", "LB-FORWARD")) == 1
    world.see(f"a {A}", f"b {B}", a=UNHEALTHY)
    assert world.converge()[:2] == ["nat", "filter"]
    assert world.kernel.rules("filter", "LB-FORWARD") == []


def _hookless(kernel: FakeNetfilter) -> None:
    kernel.tables["nat"]["PREROUTING"].clear()


def _flushed(kernel: FakeNetfilter) -> None:
    kernel.tables["nat"]["LB-DISPATCH"].clear()


def _no_filter(kernel: FakeNetfilter) -> None:
    kernel.tables["filter"] = {"INPUT": [], "FORWARD": [], "OUTPUT": []}


def _no_count(kernel: FakeNetfilter) -> None:
    kernel.tables["mangle"]["LB-COUNT"].clear()


def _no_member(kernel: FakeNetfilter) -> None:
    del kernel.set[A]


def _no_raw(kernel: FakeNetfilter) -> None:
    kernel.tables["raw"] = {"PREROUTING": [], "OUTPUT": []}


@pytest.mark.parametrize(
    ("vandal", "calls"),
    [
        (_hookless, ["nat"]),
        (_flushed, ["nat"]),
        (_no_filter, ["filter"]),
        (_no_raw, ["raw"]),
        (_no_count, ["mangle"]),
        (_no_member, [f"add {A}"]),
    ],
)
def test_what_somebody_else_changed_is_repaired(
    world: World, vandal: Callable[[FakeNetfilter], None], calls: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    world.see(f"a {A}", f"b {B}")
    world.converge()
    whole = [world.kernel.table(name) for name in ("nat", "filter", "mangle", "raw")]
    vandal(world.kernel)
    caplog.clear()
    assert world.converge() == calls
    assert [world.kernel.table(name) for name in ("nat", "filter", "mangle", "raw")] == whole
    assert world.members() == {A, B}
    assert [r.message for r in caplog.records] == (
        ["repaired the nat table: somebody else had changed it"] if calls == ["nat"] else []
    )


def test_the_first_client_keeps_the_flows_that_the_first_rules_let_in(world: World) -> None:
    first = ruleset.nat([ruleset.Endpoint(A, 8000), ruleset.Endpoint(B, 8000)])  # what script.sh installs
    world.kernel.apply(ruleset.restore(first, parse_table(world.kernel.table("nat"))))
    world.kernel.flows = [flow(A), flow(B)]
    world.see(f"a {A}", f"b {B}")
    assert world.converge() == [f"add {A} add {B}", "filter", "mangle", "raw"]
    assert world.kernel.flows == [flow(A), flow(B)]


def test_a_restarted_client_takes_over_what_it_finds_and_keeps_every_counter(world: World) -> None:
    world.see(f"a {A}", f"b {B}", f"c {C}")
    world.converge()
    world.kernel.count(A, 41)
    world.kernel.set = {A: (500, 30000), B: (0, 0), C: (0, 0)}
    world.kernel.flows = [flow(A), flow(C)]
    world.restart()
    world.see(f"a {A}", f"b {B}", f"c {C}", a=UNKNOWN, b=UNKNOWN, c=UNKNOWN)
    assert world.converge() == []
    assert world.kernel.flows == [flow(A), flow(C)]
    world.sample()
    report = world.balancer.report()
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


def test_a_backend_that_went_while_the_client_was_away_is_forgotten_too(world: World) -> None:
    world.see(f"a {A}", f"b {B}", f"c {C}")
    world.converge()
    world.kernel.flows = [flow(A), flow(B)]
    world.restart()
    world.see(f"b {B}", f"c {C}")
    assert world.converge() == ["nat", f"forget {A}", f"neighbours {A}", f"del {A}"]
    assert world.kernel.flows == [flow(B)]


def test_a_change_of_rotation_is_one_line(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for fleet in ((f"b {B}", f"a {A}"), (f"b {B}", f"a {A}"), (f"b {B} active 3", f"a {A}"), ()):
        world.see(*fleet)
        world.converge()
    assert [record.message for record in caplog.records] == [f"rotation {A} {B}", "rotation empty"]


def first_chance(world: World) -> float:
    world.converge()
    return float(world.kernel.rules("nat", "LB-DISPATCH")[0].split("--probability ")[1].split(" ")[0])


def test_a_newcomer_gets_a_quarter_of_its_share_at_first_and_all_of_it_after_three_seconds(world: World) -> None:
    world.see(f"a {A}")
    world.converge()
    world.clock.sleep(60.0)
    world.see(f"a {A}", f"b {B}")
    chances = []
    for _ in range(5):
        chances.append(first_chance(world))
        world.clock.sleep(1.0)
    assert chances == pytest.approx([1 / 1.25, 1 / 1.5, 1 / 1.75, 0.5, 0.5], abs=1e-8)
    assert world.converge() == []


@pytest.mark.parametrize(("weights", "chance"), [("adaptive", 0.75), ("equal", 0.5)])
def test_learnt_weights_reach_the_rules_only_where_that_is_wanted(world: World, weights: str, chance: float) -> None:
    world.see(f"a {A}", f"b {B}")
    world.balancer.snapshot = replace(world.balancer.snapshot, weights=weights)
    estimates = {"a": Estimate(9.0, 1.0, weight=1.5), "b": Estimate(3.0, 1.0, weight=0.5)}
    world.balancer._learner = Learner(estimates)
    assert first_chance(world) == pytest.approx(chance)


def test_a_backend_that_answers_slowly_loses_share_and_one_that_answers_fast_gains_it(world: World) -> None:
    world.see(f"a {A}", f"b {B}")
    world.balancer.snapshot = replace(world.balancer.snapshot, weights="adaptive")
    world.converge()
    for _ in range(10):  # 200 connections each an interval; of a's, twelve wait at any time
        world.kernel.flows = [waiting(A)] * 12 + [waiting(B)] + [flow(B)] * 20
        world.sample(2.0)
        world.kernel.count(A, 200)
        world.kernel.count(B, 200)
        world.balancer._learn(world.balancer.report())
        world.converge()
    assert first_chance(world) < 0.45
    assert world.balancer.report()["backends"][0]["share"] == pytest.approx(first_chance(world), abs=1e-6)


# -- draining --------------------------------------------------------------------------------------------------------


def test_a_backend_is_stopped_as_soon_as_its_last_flow_is_over(world: World) -> None:
    world.see(f"a {A} draining", f"b {B}", f"c {C} draining")
    world.converge()
    world.kernel.flows = [flow(A, "TIME_WAIT"), flow(B), flow(C)]
    world.sample()
    assert world.manager.stops == [(A, "drained in 0.0 s")]
    world.see(f"b {B}", f"c {C} draining")
    world.sample(2.5)
    assert world.manager.stops == [(A, "drained in 0.0 s")]
    world.kernel.flows = [flow(B)]
    world.sample()
    assert world.manager.stops[1:] == [(C, "drained in 3.0 s")]


def test_a_backend_with_flows_is_stopped_at_the_drain_deadline_and_not_before(world: World) -> None:
    world.see(f"a {A} draining", f"b {B}")
    world.converge()
    world.kernel.flows = [flow(A), flow(A, client_port=40001)]
    world.sample(30.5)
    assert world.manager.stops == []
    world.sample()
    assert world.manager.stops == [(A, "2 flows left at the drain deadline")]


def test_a_draining_backend_that_still_gets_connections_is_not_stopped(world: World) -> None:
    world.see(f"a {A}", f"b {B}")
    world.converge()
    world.see(f"a {A} draining", f"b {B}")
    world.sample(60.0)
    assert world.manager.stops == []
    world.converge()
    world.sample()
    assert world.manager.stops == [(A, "drained in 0.0 s")]


def test_an_unhealthy_draining_backend_is_stopped_once_no_connection_is_answered_any_more(world: World) -> None:
    world.see(f"a {A} draining", f"b {B}", a=UNHEALTHY)
    world.converge()
    world.kernel.flows = [flow(A, idle=12), flow(A, client_port=40001, idle=3)]
    world.sample()
    assert world.manager.stops == []
    world.kernel.flows = [flow(A, idle=12), flow(A, client_port=40001, idle=10)]
    world.sample()
    assert world.manager.stops == [(A, "2 open connections, none answered for 10 s")]


@pytest.mark.parametrize("state", ["active", "starting", "spare"])
def test_a_backend_that_is_only_unhealthy_is_left_to_the_manager(world: World, state: str) -> None:
    for a in (HEALTHY, UNHEALTHY):
        world.see(f"a {A} {state}", f"b {B}", a=a)
        world.converge()
        world.sample(60.0)
    assert world.manager.stops == []
    assert [row["healthy"] for row in world.balancer.report()["backends"]] == [False, True]


def test_a_stop_that_the_manager_refuses_keeps_no_other_from_being_asked_for(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    accepted: list[str] = []

    def stop(ip: str, reason: str) -> None:
        if ip == A:
            raise requests.HTTPError("500 Server Error")
        accepted.append(ip)

    monkeypatch.setattr(world.manager, "stop", stop)
    world.see(f"a {A} draining", f"b {B} draining", f"c {C}")
    world.converge()
    world.sample()
    assert accepted == [B]
    assert "manager: 500 Server Error" in caplog.text


def test_at_a_million_flows_samples_take_a_twentieth_of_the_time_and_a_drain_ends_within_a_minute(
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
    world.see(f"a {A} draining", f"b {B} draining", f"c {C}")
    world.balancer.snapshot = replace(world.balancer.snapshot, drain_timeout=3600.0)
    world.converge()
    world.kernel.flows = [flow(A), flow(B)]
    world.sample(2000.0)
    assert all(spent.values())
    assert sum(spent.values()) <= 0.055 * 2000
    world.kernel.flows = []
    began = world.clock.now
    while not world.manager.stops:
        world.sample()
    assert world.clock.now - began < 60


# -- frozen backends -------------------------------------------------------------------------------------------------


def freeze(world: World) -> None:
    """Of three backends in rotation, a stops to answer its connections; the others go on for eleven seconds."""
    world.see(f"a {A}", f"b {B}", f"c {C}")
    world.converge()
    world.kernel.flows = [waiting(A, client_port=port, idle=11) for port in range(40000, 40004)]
    for _ in range(22):
        world.kernel.reply(B)
        world.kernel.reply(C)
        world.sample()


def test_a_frozen_backend_leaves_rotation_though_its_probes_are_answered(world: World) -> None:
    freeze(world)
    assert world.balancer._changed.is_set()
    assert world.balancer._wake.is_set()
    assert world.converge() == ["nat", f"forget {A} unanswered"]
    assert world.dispatched() == {B, C}
    row = world.balancer.report()["backends"][0]
    assert (row["healthy"], row["cause"]) == (False, "no_first_reply")
    assert row["why"] == "4 connections wait for a first reply, none got one for 10 s"
    world.kernel.reply(A)
    world.sample()
    world.converge()
    assert world.dispatched() == {A, B, C}


def test_while_the_connection_table_is_full_no_backend_is_taken_for_frozen(world: World) -> None:
    world.kernel.conntrack = 98, 100
    freeze(world)
    assert world.converge() == []


def test_a_kernel_without_marks_takes_no_samples_of_waiting_flows(world: World) -> None:
    world.balancer._features = Features(marks=False, notrack=False)
    world.see(f"a {A}", f"b {B}")
    assert world.converge() == [f"neighbours {A} {B}", f"add {A} add {B}", "nat", "filter", "mangle"]
    world.kernel.flows = [waiting(A)]
    world.sample()
    assert world.balancer._learner._samples == 0
    assert world.balancer.report()["backends"][0]["active"] == 1


@pytest.mark.parametrize(
    ("features", "lacks"),
    [
        (Features(), []),
        (Features(marks=False), ["connmark"]),
        (Features(False, False, False), ["connmark", "connbytes", "CT target"]),
    ],
)
def test_what_the_kernel_lacks_is_logged(
    features: Features, lacks: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    client._log_lacks(features)
    assert [(r.levelname, r.message.partition("no ")[2].partition(" in this kernel")[0]) for r in caplog.records] == [
        ("WARNING", lack) for lack in lacks
    ]


# -- self-checks of the manager --------------------------------------------------------------------------------------


def test_self_check_connections_are_no_load(world: World) -> None:
    world.see(f"a {A}", f"b {B}")
    world.balancer.snapshot = replace(world.balancer.snapshot, check_source="198.18.0.1")
    world.converge()
    assert world.kernel.rules("nat", "PREROUTING")[0].endswith("-j LB-CHECK")
    world.kernel.flows = [flow(A, client="198.18.0.1", client_port=port) for port in (60999, 61000, 61063, 61064)]
    world.sample()
    assert world.balancer.report()["backends"][0]["active"] == 2


# -- reports, state, threads -----------------------------------------------------------------------------------------


def test_reports_wait_for_a_view_and_a_change_of_health_brings_one_at_once(world: World) -> None:
    world.balancer._changed.set()
    world.balancer._report_once()
    assert world.manager.reports == []
    world.see(f"a {A}")
    world.converge()
    world.clock.sleep(0.3)
    world.balancer._health_changed()  # no waiting for the interval
    world.balancer._report_once()
    assert [report["backends"][0]["ip"] for report in world.manager.reports] == [A]
    assert world.balancer._learner._since is None  # an early report is too short to learn from
    world.clock.sleep(1.7)
    world.balancer._report_once()
    assert len(world.manager.reports) == 2
    assert world.balancer._learner._since == world.clock.now


def test_many_changes_of_health_bring_four_reports_a_second_and_delay_no_regular_one(world: World) -> None:
    world.see(f"a {A}")
    world.converge()
    began, learnt = world.clock.now, []
    for _ in range(20):
        world.balancer._health_changed()
        world.balancer._report_once()
        if world.balancer._learner._since not in (None, *learnt):
            learnt.append(world.balancer._learner._since)
    assert world.clock.now - began == pytest.approx(19 * 0.25)
    assert learnt == [began + 2.0, began + 4.0]


def test_a_report_carries_what_is_wrong_with_the_data_path(world: World) -> None:
    world.kernel.forwards = False
    world.kernel.tables["filter"]["FORWARD"] = [(0, "-s 203.0.113.0/24 -j DROP")]
    world.see(f"a {A}")
    world.converge()
    assert world.balancer.report()["findings"] == [
        {"kind": "ip_forward_off", "detail": "net.ipv4.ip_forward is 0"},
        {"kind": "foreign_rule", "detail": "filter: -A FORWARD -s 203.0.113.0/24 -j DROP"},
    ]


def test_an_unreachable_manager_is_neither_reported_to_nor_asked_to_stop_anything(world: World) -> None:
    world.see(f"a {A} draining", f"b {B}")
    world.converge()
    world.balancer._reachable = False
    world.clock.sleep(2.0)
    world.balancer._report_once()
    world.sample(5.0)
    assert (world.manager.reports, world.manager.stops) == ([], [])
    assert world.balancer._learner._since is not None  # but shares are learnt
    world.balancer._reachable = True
    world.sample()
    assert [ip for ip, _ in world.manager.stops] == [A]


def test_uptime_is_the_senders_own_clock(world: World) -> None:
    world.see(f"a {A}")
    world.converge()
    world.clock.sleep(7.5)
    assert world.balancer.report()["uptime"] == 7.5


@pytest.mark.parametrize(("used", "warned"), [(900, False), (901, True)])
def test_a_connection_table_that_is_nearly_full_is_reported(world: World, used: int, warned: bool) -> None:
    world.kernel.make_sets()
    world.kernel.conntrack = used, 1000
    warnings = world.balancer.report()["warnings"]
    assert [("90%" in w, "1000" in w, "nf_conntrack_max" in w) for w in warnings] == [(True,) * 3] * warned


def test_the_metrics_show_rotation_flows_and_the_connection_table(world: World) -> None:
    world.see(f"a {A}", f"b {B}", b=UNHEALTHY)
    world.converge()
    world.kernel.flows = [flow(A), flow(B), flow(A, "TIME_WAIT")]
    world.sample()
    lines = app.create_app(world.balancer).test_client().get("/metrics").text.splitlines()
    values = dict(line.removeprefix("lbscaler_balancer_").split(" ") for line in lines if not line.startswith("#"))
    expected = {
        **{"rotation_backends": "1.0", "flows": "2.0", "converged_seconds": "0.5", "panic": "0.0"},
        **{"conntrack_entries": "10.0", "conntrack_entries_limit": "1000.0"},
    }
    assert {name: values[name] for name in expected} == expected


def health_check(world: World) -> tuple[int, dict[str, Any]]:
    answer = app.create_app(world.balancer).test_client().get("/sync")
    return answer.status_code, json.loads(answer.text)


def first_rules(world: World) -> None:
    """What script.sh installs in a Swarm."""
    world.kernel.apply(ruleset.restore(ruleset.nat([]), parse_table(world.kernel.table("nat"))))


def test_the_health_check_passes_without_a_manager_as_long_as_rules_are_there_and_loops_go_on(world: World) -> None:
    first_rules(world)
    world.balancer._beat("sample")
    world.balancer._wake.set()
    world.balancer._converge_once()
    world.clock.sleep(119.0)
    assert health_check(world) == (
        200,
        {
            **{"converged_s_ago": 119.0, "revision": "", "rotation": [], "panic": False},
            **{"loops_alive": True, "rules_in_place": True},
        },
    )


def test_the_health_check_fails_while_a_loop_is_stuck(world: World) -> None:
    world.see(f"b {B}", f"a {A}")
    world.converge()
    world.balancer._beat("sample")
    world.clock.sleep(123.0)
    status, message = health_check(world)
    assert (status, message["loops_alive"], message["rules_in_place"]) == (503, False, True)
    world.balancer._beat("sample")
    assert health_check(world)[0] == 200


@pytest.mark.parametrize("snapshot", [True, False], ids=["with a snapshot", "before a snapshot"])
def test_the_health_check_fails_while_our_rules_are_gone_and_cannot_be_written(world: World, snapshot: bool) -> None:
    first_rules(world)
    if snapshot:
        world.see(f"a {A}")
        world.converge()
    _hookless(world.kernel)
    world.kernel.break_at = len(world.kernel.calls) + 1
    world.balancer._wake.set()
    if snapshot:
        with pytest.raises(NetfilterError):
            world.balancer._converge_once()
    else:
        world.balancer._converge_once()
    status, message = health_check(world)
    assert (status, message["loops_alive"], message["rules_in_place"]) == (503, True, False)
    if snapshot:
        world.converge()
        assert health_check(world)[0] == 200


@pytest.mark.parametrize(
    ("error", "level"),
    [
        (requests.ConnectionError("away"), "WARNING"),
        (NetfilterError("    1 *nat"), "ERROR"),
        (ZeroDivisionError("a bug"), "ERROR"),
    ],
)
def test_a_pass_that_fails_is_logged_and_does_not_end_the_loop(
    world: World, caplog: pytest.LogCaptureFixture, error: Exception, level: str
) -> None:
    def fail() -> None:
        raise error

    client._attempt(fail)
    assert [record.levelname for record in caplog.records] == [level]
    assert str(error) in caplog.text


# -- the manager's HTTP interface ------------------------------------------------------------------------------------


class Answers(BaseHTTPRequestHandler):
    seen: list[tuple[str, str | None, bytes]]
    status, body = 200, b"{}"

    def do_GET(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        self.seen.append((f"{self.command} {self.path}", self.headers["Authorization"], self.rfile.read(size)))
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    do_POST = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def real_manager() -> Iterator[tuple[ManagerClient, type[Answers]]]:
    class Handler(Answers):
        seen = []  # noqa: RUF012

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield ManagerClient([f"127.0.0.1:{server.server_port}"], "secret", "b1"), Handler
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("call", "status", "body", "result"),
    [
        (lambda m: m.sync("r1"), 200, b'{"revision": "r2"}', {"revision": "r2"}),
        (lambda m: m.sync("r1"), 204, b"", None),
        (lambda m: m.sync("r1"), 200, b"<html>", requests.RequestException),
        (lambda m: m.sync("r1"), 401, b"", requests.RequestException),
        (lambda m: m.sync("r1"), 503, b"", requests.RequestException),
        (lambda m: m.report({"x": 1}), 200, b'{"decision": "OK"}', {"decision": "OK"}),
        (lambda m: m.report({"x": 1}), 503, b"", requests.RequestException),
        (lambda m: m.stop(A, "drained"), 204, b"", None),
        (lambda m: m.stop(A, "drained"), 404, b"unknown", None),
        (lambda m: m.stop(A, "drained"), 500, b"", requests.RequestException),
    ],
)
def test_an_answer_of_the_managers_is_a_value_or_a_request_exception(
    real_manager: tuple[ManagerClient, type[Answers]],
    call: Callable[[ManagerClient], Any],
    status: int,
    body: bytes,
    result: Any,
) -> None:
    manager, answers = real_manager
    answers.status, answers.body = status, body
    if result is requests.RequestException:
        with pytest.raises(requests.RequestException):
            call(manager)
    else:
        assert call(manager) == result


def test_every_call_to_the_manager_bears_the_token_and_a_stop_names_its_balancer(
    real_manager: tuple[ManagerClient, type[Answers]],
) -> None:
    manager, answers = real_manager
    manager.sync("r1")
    manager.report({"x": 1})
    manager.stop(A, "drained")
    assert [(line, token, json.loads(body or b"null")) for line, token, body in answers.seen] == [
        ("GET /sync?have=r1&wait=25.0", "Bearer secret", None),
        ("POST /pkts_info", "Bearer secret", {"x": 1}),
        ("POST /stop", "Bearer secret", {"ip": A, "reason": "drained", "balancer": "b1"}),
    ]
