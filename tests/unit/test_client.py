"""The balancer's loop against a kernel and a manager in memory: what it changes, in which order, and what it says."""

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
from fakes_netfilter import FakeNetfilter, flow

import ruleset
import synchronization_client as client
from netfilter import NetfilterError
from probe import Answer, Health, Prober
from synchronization_client import Balancer
from weights import Estimate
from wire import Backend, Manager, View

WELL, ILL, UNKNOWN = Health(True), Health(False, 0, "does not answer"), Health()
A, B, C, D = (f"198.18.0.{number}" for number in (2, 3, 4, 5))


class Clock:
    """Time that passes only by sleeping."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class FakeProber(Prober):
    def __init__(self, changed: Callable[[], None]) -> None:
        self.verdicts: dict[str, Health] = {}
        self.watched: list[tuple[Mapping[str, str], int, str]] = []

    def health(self) -> dict[str, Health]:
        return dict(self.verdicts)

    def watch(self, backends: Mapping[str, str], port: int, method: str) -> None:
        self.watched.append((backends, port, method))


class FakeManager(Manager):
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
        """Backends as "id ip [state [weight]]"; those whose health is not given are well."""
        self.balancer.view = View("r1", tuple(backend(words) for words in backends))
        self.prober.verdicts = {b.id: health.get(b.id, WELL) for b in self.balancer.view.backends}

    def converge(self) -> list[str]:
        """What one pass changed, in order."""
        before = len(self.kernel.calls)
        self.balancer.converge()
        return self.kernel.calls[before:]

    def dealt(self) -> set[str]:
        """The addresses that new connections may go to."""
        chains = self.kernel.tables["nat"]
        rules = [rule for c in chains if c.startswith(("LB-DISPATCH", "LB-T-")) for rule in self.kernel.rules("nat", c)]
        return {rule.rpartition("LB-B-")[2] for rule in rules if "LB-B-" in rule}

    def chains(self) -> set[str]:
        return set(ruleset.connections(ruleset.parse_table(self.kernel.table("nat"))))

    def members(self) -> set[str]:
        return set(self.kernel.set or ())

    def look(self, seconds: float) -> None:
        """Lets the balancer look at the flows for that long."""
        end = self.clock.now + seconds
        while self.clock.now < end - 1e-9:
            self.balancer._look()


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


# -- who gets new connections ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backends", "chosen"),
    [
        ([], ""),
        ([("active", WELL), ("active", WELL)], "01"),
        ([("active", WELL), ("active", ILL)], "0"),
        ([("active", WELL), ("starting", WELL)], "01"),
        ([("active", WELL), ("starting", UNKNOWN)], "0"),
        ([("active", WELL), ("starting", ILL)], "0"),
        ([("active", UNKNOWN), ("active", WELL)], "01"),
        ([("active", ILL), ("active", UNKNOWN)], "1"),
        ([("active", ILL), ("active", ILL), ("starting", ILL), ("starting", UNKNOWN)], "01"),
        ([("active", ILL), ("starting", WELL)], "1"),
        ([("starting", UNKNOWN)], ""),
        ([("starting", WELL)], "0"),
        ([("draining", WELL), ("active", WELL)], "1"),
        ([("draining", WELL), ("active", ILL)], "1"),
        ([("draining", WELL)], ""),
        ([("spare", WELL), ("stopped", WELL), ("failed", WELL)], ""),
    ],
)
def test_new_connections_go_to_the_ready_and_to_all_that_ever_were_when_none_is(
    backends: list[tuple[str, Health]], chosen: str
) -> None:
    view = View("r1", tuple(Backend(str(i), f"198.18.0.{i}", state, 1.0) for i, (state, _) in enumerate(backends)))
    health = {str(i): verdict for i, (_, verdict) in enumerate(backends)}
    assert [endpoint.ip for endpoint in client.rotation(view, health)] == [f"198.18.0.{i}" for i in chosen]


def test_rotation_carries_the_views_port_and_weights() -> None:
    view = View("r1", (backend(f"a {A} active 2.5"),), port=9090)
    assert client.rotation(view, {}) == (ruleset.Endpoint(A, 9090, 2.5),)


@pytest.mark.parametrize(("inside", "hidden"), [("", "-p tcp"), ("198.18.0.0/24", "-s 198.18.0.0/24 -p tcp")])
def test_only_clients_within_the_views_inside_are_hidden(world: World, inside: str, hidden: str) -> None:
    world.see(f"a {A}")
    world.balancer.view = replace(world.balancer.view, inside=inside)
    world.converge()
    assert world.kernel.rules("nat", "LB-MASQ")[0].startswith(f"{hidden} -m conntrack ")


@pytest.mark.parametrize("answer", [Answer.FAILED, Answer.REFUSED])
def test_an_active_backend_that_never_answers_a_restarted_client_leaves_rotation(answer: Answer) -> None:
    verdict = Health()
    for _ in range(10):
        verdict = verdict.after(answer)
    view = View("r1", (backend(f"a {A}"), backend(f"b {B}")))
    assert [endpoint.ip for endpoint in client.rotation(view, {"a": verdict, "b": WELL})] == [B]


# -- what the manager says -------------------------------------------------------------------------------------------

SERVICE = {
    **{"port": 8000, "health": "tcp", "interval": 2, "drain_timeout": 30},
    **{"weights": "adaptive", "inside": "198.18.0.0/24"},
}
ONE = {"id": "a", "ip": A, "state": "active", "weight": 1}
MESSAGE: dict[str, Any] = {"revision": "r7", "service": SERVICE, "backends": [ONE]}


def test_a_view_is_read_from_the_managers_message() -> None:
    backends = (Backend("a", A, "active", 1.0),)
    assert View.parse(MESSAGE) == View("r7", backends, 8000, "tcp", 2.0, 30.0, "adaptive", "198.18.0.0/24")
    assert View.parse({**MESSAGE, "backends": [], "more": 1}).backends == ()


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
        {**MESSAGE, "service": {key: SERVICE[key] for key in ("port", "health", "interval")}},
        {key: MESSAGE[key] for key in ("service", "backends")},
    ],
)
def test_a_message_that_is_no_view_raises_what_the_loop_expects(message: Any) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        View.parse(message)


def test_a_new_view_is_taken_and_watched_and_silence_changes_nothing(world: World) -> None:
    world.manager.answers = [MESSAGE, None]
    for _ in range(2):
        world.balancer._follow()
    assert world.balancer.view == View.parse(MESSAGE)
    assert world.prober.watched == [({"a": A}, 8000, "tcp")]
    assert world.balancer._wake.is_set()


def test_a_lost_manager_is_told_once_and_leaves_the_last_view_standing(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    lost = requests.ConnectionError("no route")
    world.manager.answers = [MESSAGE, lost, lost, {"revision": "r8"}, None, None, lost]
    while world.manager.answers:
        world.balancer._follow()
    assert [record.message for record in caplog.records] == [
        "manager out of reach, keeping the last rules: no route",
        "manager in reach again",
        "manager out of reach, keeping the last rules: no route",
    ]
    assert world.balancer.view == View.parse(MESSAGE)
    assert world.manager.asked == ["", "r7", "", "", "", "r7", "r7"]  # after a silence as if for the first time
    assert 4 * 0.2 <= world.clock.now - 1000.0 <= 4.0  # it does not hammer


# -- converging ------------------------------------------------------------------------------------------------------


def test_a_fresh_kernel_gets_the_set_before_the_rules_and_every_table(world: World) -> None:
    world.see(f"a {A}", f"b {B}")
    assert world.converge() == [f"neighbours {A} {B}", f"add {A} add {B}", "nat", "filter", "mangle"]
    assert world.dealt() == world.chains() == world.members() == {A, B}


def test_nothing_is_changed_when_nothing_changed(world: World) -> None:
    world.see(f"a {A}", f"b {B}", f"c {C} draining", a=ILL)
    world.converge()
    assert world.converge() == []


def test_the_fleet_grows_first_and_shrinks_last(world: World) -> None:
    world.see(f"a {A}", f"b {B}")
    world.converge()
    world.kernel.flow_lines = [flow(A), flow(C), flow(B)]
    world.see(f"b {B}", f"c {C}")
    assert world.converge() == [
        *(f"forget {C}", f"neighbours {C}", f"add {C}"),
        "nat",
        *(f"forget {A}", f"neighbours {A}", f"del {A}"),
    ]
    assert world.dealt() == world.chains() == world.members() == {B, C}
    assert world.kernel.flow_lines == [flow(B)]


@pytest.mark.parametrize("restarted", [False, True], ids=["same client", "new client"])
@pytest.mark.parametrize("break_at", range(1, 11))
def test_a_pass_that_breaks_off_anywhere_leaves_a_sound_kernel_and_the_next_one_ends_the_work(
    world: World, break_at: int, restarted: bool
) -> None:
    world.see(f"a {A}", f"b {B}", f"d {D}")
    world.converge()
    world.kernel.flow_lines = [flow(A), flow(C), flow(B), flow(D)]
    world.see(f"c {C}")
    world.kernel.break_at = len(world.kernel.calls) + break_at
    with pytest.raises(NetfilterError):
        world.converge()
    assert world.dealt() in ({A, B, D}, {C})
    assert world.dealt() <= world.chains() & world.members()
    assert flow(A) in world.kernel.flow_lines or A not in world.dealt()
    if restarted:
        world.restart()
        world.see(f"c {C}")
    world.converge()
    assert world.dealt() == world.chains() == world.members() == {C}
    assert world.kernel.flow_lines == []
    assert world.converge() == []


def test_a_dead_backends_flows_are_deleted_once_no_rule_deals_to_it(world: World) -> None:
    world.see(f"a {A}", f"b {B}", f"c {C}")
    world.converge()
    world.kernel.flow_lines = [flow(A), flow(B, "SYN_SENT"), flow(A, "SYN_SENT", 40001)]
    world.see(f"b {B}", f"c {C}")
    calls = world.converge()
    assert calls.index("nat") < calls.index(f"forget {A}") < calls.index(f"del {A}")
    assert world.kernel.flow_lines == [flow(B, "SYN_SENT")]


def test_an_ill_backend_leaves_rotation_and_loses_only_the_flows_it_never_answered(world: World) -> None:
    world.see(f"a {A}", f"b {B}", f"c {C}")
    world.converge()
    world.kernel.count(A, 7)
    world.kernel.flow_lines = [flow(A), flow(A, "SYN_SENT", 40001)]
    world.see(f"a {A}", f"b {B}", f"c {C}", a=ILL)
    assert world.converge() == ["nat", f"forget {A} unanswered"]
    assert world.converge() == []
    assert world.dealt() == {B, C}
    assert world.chains() == world.members() == {A, B, C}
    world.look(client.LOOK)
    assert world.balancer.report()["backends"][0] == {
        **{"id": "a", "ip": A, "healthy": False, "share": 0.0},
        **{"connections": 7, "packets": 0, "bytes": 0, "active": 1, "why": "does not answer"},
    }
    world.see(f"a {A}", f"b {B}", f"c {C}")
    assert world.converge() == ["nat"]
    assert world.kernel.flow_lines == [flow(A)]


def test_where_all_are_ill_all_stay_in_rotation_and_keep_their_flows(world: World) -> None:
    world.see(f"a {A}", f"b {B}")
    world.converge()
    world.kernel.flow_lines = [flow(A, "SYN_SENT")]
    world.see(f"a {A}", f"b {B}", a=ILL, b=ILL)
    assert world.converge() == []
    assert world.dealt() == {A, B}


def test_a_draining_backend_keeps_every_flow_answered_or_not(world: World) -> None:
    world.see(f"a {A}", f"b {B}", f"c {C}")
    world.converge()
    world.kernel.flow_lines = [flow(A), flow(A, "SYN_SENT", 40001)]
    world.see(f"a {A} draining", f"b {B}", f"c {C}")
    assert world.converge() == ["nat"]
    assert world.dealt() == {B, C}
    assert len(world.kernel.flow_lines) == 2


def test_a_backend_on_an_old_address_is_forgotten_before_it_enters(world: World) -> None:
    world.see(f"a {A}", f"b {B}", f"c {C}")
    world.converge()
    world.kernel.flow_lines = [flow(A), flow(B)]
    world.see(f"new {A} starting", f"b {B}", f"c {C}", new=UNKNOWN)
    assert world.converge() == [f"forget {A}", f"neighbours {A}", "nat"]
    assert world.dealt() == {B, C}
    assert world.kernel.flow_lines == [flow(B)]
    world.see(f"new {A} starting", f"b {B}", f"c {C}")
    assert world.converge() == ["nat"]
    assert world.dealt() == {A, B, C}


def test_a_refusal_is_retried_only_while_there_is_another_backend(world: World) -> None:
    world.see(f"a {A}", f"b {B}")
    world.converge()
    assert len(world.kernel.rules("filter", "LB-FORWARD")) == 1
    world.see(f"a {A}", f"b {B}", a=ILL)
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
    assert kernel.set
    del kernel.set[A]


@pytest.mark.parametrize(
    ("vandal", "calls"),
    [
        (_hookless, ["nat"]),
        (_flushed, ["nat"]),
        (_no_filter, ["filter"]),
        (_no_count, ["mangle"]),
        (_no_member, [f"add {A}"]),
    ],
)
def test_what_somebody_else_changed_is_repaired(
    world: World, vandal: Callable[[FakeNetfilter], None], calls: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    world.see(f"a {A}", f"b {B}")
    world.converge()
    whole = [world.kernel.table(name) for name in ("nat", "filter", "mangle")]
    vandal(world.kernel)
    caplog.clear()
    assert world.converge() == calls
    assert [world.kernel.table(name) for name in ("nat", "filter", "mangle")] == whole
    assert world.members() == {A, B}
    assert [r.message for r in caplog.records] == (
        ["repaired the nat table: somebody else had changed it"] if calls == ["nat"] else []
    )


def test_the_first_client_keeps_the_flows_that_the_first_rules_let_in(world: World) -> None:
    first = ruleset.nat([ruleset.Endpoint(A, 8000), ruleset.Endpoint(B, 8000)])  # what script.sh installs
    world.kernel.apply(ruleset.restore(first, ruleset.parse_table(world.kernel.table("nat"))))
    world.kernel.flow_lines = [flow(A), flow(B)]
    world.see(f"a {A}", f"b {B}")
    assert world.converge() == [f"add {A} add {B}", "filter", "mangle"]
    assert world.kernel.flow_lines == [flow(A), flow(B)]


def test_a_restarted_client_takes_over_what_it_finds_and_keeps_every_counter(world: World) -> None:
    world.see(f"a {A}", f"b {B}", f"c {C}")
    world.converge()
    world.kernel.count(A, 41)
    world.kernel.set = {A: (500, 30000), B: (0, 0), C: (0, 0)}
    world.kernel.flow_lines = [flow(A), flow(C)]
    world.restart()
    world.see(f"a {A}", f"b {B}", f"c {C}", a=UNKNOWN, b=UNKNOWN, c=UNKNOWN)
    assert world.converge() == []
    assert world.kernel.flow_lines == [flow(A), flow(C)]
    world.look(client.LOOK)
    report = world.balancer.report()
    rows = [list(row.values()) for row in report.pop("backends")]
    third = pytest.approx(1 / 3)
    assert report == {"balancer": "lb", "revision": "r1", "interval": 2.0, "warnings": []}
    assert rows == [
        ["a", A, None, third, 41, 500, 30000, 1],
        ["b", B, None, third, 0, 0, 0, 0],
        ["c", C, None, third, 0, 0, 0, 1],
    ]


def test_a_backend_that_went_while_the_client_was_away_is_forgotten_too(world: World) -> None:
    world.see(f"a {A}", f"b {B}", f"c {C}")
    world.converge()
    world.kernel.flow_lines = [flow(A), flow(B)]
    world.restart()
    world.see(f"b {B}", f"c {C}")
    assert world.converge() == ["nat", f"forget {A}", f"neighbours {A}", f"del {A}"]
    assert world.kernel.flow_lines == [flow(B)]


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
    world.balancer.view = replace(world.balancer.view, weights=weights)
    world.balancer._learner.estimates = {"a": Estimate(9.0, 1.0, weight=1.5), "b": Estimate(3.0, 1.0, weight=0.5)}
    assert first_chance(world) == pytest.approx(chance)


def test_a_backend_that_answers_slowly_loses_share_and_one_that_answers_fast_gains_it(world: World) -> None:
    world.see(f"a {A}", f"b {B}")
    world.balancer.view = replace(world.balancer.view, weights="adaptive")
    world.converge()
    for _ in range(10):  # 200 connections each an interval; of a's, eight wait at any time
        world.kernel.flow_lines = [flow(A, answer=(2, 112))] * 8 + [flow(B, answer=(2, 112))] + [flow(B)] * 20
        world.look(2.0)
        world.kernel.count(A, 200)
        world.kernel.count(B, 200)
        world.balancer._learn(world.balancer.report())
        world.converge()
    assert first_chance(world) < 0.45
    assert world.balancer.report()["backends"][0]["share"] == pytest.approx(first_chance(world), abs=1e-6)


# -- leavers ---------------------------------------------------------------------------------------------------------


def test_a_backend_is_stopped_as_soon_as_its_last_flow_is_over(world: World) -> None:
    world.see(f"a {A} draining", f"b {B}", f"c {C} draining")
    world.converge()
    world.kernel.flow_lines = [flow(A, "TIME_WAIT"), flow(B), flow(C)]
    world.look(client.LOOK)
    assert world.manager.stops == [(A, "drained in 0.0 s")]
    world.see(f"b {B}", f"c {C} draining")
    world.look(2.5)
    assert world.manager.stops == [(A, "drained in 0.0 s")]
    world.kernel.flow_lines = [flow(B)]
    world.look(client.LOOK)
    assert world.manager.stops[1:] == [(C, "drained in 3.0 s")]


def test_a_backend_with_flows_is_stopped_at_the_drain_deadline_and_not_before(world: World) -> None:
    world.see(f"a {A} draining", f"b {B}")
    world.converge()
    world.kernel.flow_lines = [flow(A), flow(A, client_port=40001)]
    world.look(30.5)
    assert world.manager.stops == []
    world.look(client.LOOK)
    assert world.manager.stops == [(A, "2 flows left at the drain deadline")]


def test_a_draining_backend_that_is_still_dealt_to_is_not_stopped(world: World) -> None:
    world.see(f"a {A}", f"b {B}")
    world.converge()
    world.see(f"a {A} draining", f"b {B}")
    world.look(60.0)
    assert world.manager.stops == []
    world.converge()
    world.look(client.LOOK)
    assert world.manager.stops == [(A, "drained in 0.0 s")]


def test_a_backend_ill_for_too_long_is_replaced_while_another_is_well(world: World) -> None:
    world.see(f"a {A}", f"b {B}", a=ILL)
    world.converge()
    world.look(10.5)
    assert world.manager.stops == []
    world.look(client.LOOK)
    assert world.manager.stops == [(A, "ill for 10 s: does not answer")]


@pytest.mark.parametrize("state", ["starting", "spare"])
@pytest.mark.parametrize("why", ["asks for no new connections", "does not answer"])
def test_a_backend_that_takes_long_to_start_is_left_to_the_managers_patience(
    world: World, why: str, state: str
) -> None:
    world.see(f"s {A} {state}", f"b {B}", s=Health(False, 0, why))
    world.converge()
    world.look(30.0)
    assert world.manager.stops == []


def test_where_all_are_ill_one_is_replaced_each_half_minute(world: World) -> None:
    world.see(f"a {A}", f"b {B}", a=ILL, b=ILL)
    world.converge()
    for seconds, stopped in ((29.0, 0), (2.0, 1), (29.0, 1), (2.0, 2)):
        world.look(seconds)
        assert len(world.manager.stops) == stopped


def test_a_spell_of_illness_ends_with_one_good_look(world: World) -> None:
    for _ in range(3):
        world.see(f"a {A}", f"b {B}", f"u {C}", a=ILL, u=UNKNOWN)
        world.look(8.0)
        world.see(f"a {A}", f"b {B}", f"u {C}", u=UNKNOWN)
        world.look(client.LOOK)
    assert world.manager.stops == []


# -- reports, state, threads -----------------------------------------------------------------------------------------


def test_reports_wait_for_a_view_and_news_brings_one_at_once(world: World) -> None:
    world.balancer._news.set()
    world.balancer._report_regularly()
    assert world.manager.reports == []
    world.see(f"a {A}")
    world.converge()
    world.balancer._health_turned()  # news: no waiting for the interval
    world.balancer._report_regularly()
    assert [report["backends"][0]["ip"] for report in world.manager.reports] == [A]
    assert world.balancer._learner._since is None  # a report out of turn is too short to learn from
    world.balancer.view = replace(world.balancer.view, interval=0.01)
    world.balancer._report_regularly()
    assert len(world.manager.reports) == 2
    assert world.balancer._learner._since == world.clock.now


@pytest.mark.parametrize(("used", "warned"), [(900, False), (901, True)])
def test_a_connection_table_that_is_nearly_full_is_reported(world: World, used: int, warned: bool) -> None:
    world.kernel.members()
    world.kernel.conntrack = used, 1000
    warnings = world.balancer.report()["warnings"]
    assert [("90%" in w, "1000" in w, "nf_conntrack_max" in w) for w in warnings] == [(True,) * 3] * warned


def test_the_metrics_tell_rotation_flows_and_the_connection_table(world: World) -> None:
    world.see(f"a {A}", f"b {B}", b=ILL)
    world.converge()
    world.kernel.flow_lines = [flow(A), flow(B), flow(A, "TIME_WAIT")]
    world.look(client.LOOK)
    lines = client.doors(world.balancer).test_client().get("/metrics").text.splitlines()
    values = dict(line.removeprefix("lbscaler_balancer_").split(" ") for line in lines if not line.startswith("#"))
    expected = {
        **{"rotation_backends": "1.0", "flows": "2.0", "converged_seconds": "0.5"},
        **{"conntrack_entries": "10.0", "conntrack_entries_limit": "1000.0"},
    }
    assert {name: values[name] for name in expected} == expected


def test_the_health_check_fails_once_no_pass_has_ended_well_for_long(world: World) -> None:
    visitor = client.doors(world.balancer).test_client()
    world.see(f"b {B}", f"a {A}")
    world.converge()
    answer = visitor.get("/sync")
    assert (answer.status_code, json.loads(answer.text)) == (
        200,
        {"converged_s_ago": 0.0, "revision": "r1", "rotation": [A, B]},
    )
    world.clock.sleep(10.9)
    assert visitor.get("/sync").status_code == 200
    world.clock.sleep(0.2)
    assert visitor.get("/sync").status_code == 503
    world.converge()
    assert visitor.get("/sync").status_code == 200


@pytest.mark.parametrize(
    ("error", "level"),
    [
        (requests.ConnectionError("away"), "WARNING"),
        (NetfilterError("    1 *nat"), "ERROR"),
        (ZeroDivisionError("a bug"), "ERROR"),
    ],
)
def test_a_pass_that_fails_is_told_and_does_not_end_the_loop(
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
def real_manager() -> Iterator[tuple[Manager, type[Answers]]]:
    class Handler(Answers):
        seen = []  # noqa: RUF012

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield Manager([f"127.0.0.1:{server.server_port}"], "secret", "b1"), Handler
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("call", "status", "body", "result"),
    [
        (lambda m: m.sync("r1"), 200, b'{"revision": "r2"}', {"revision": "r2"}),
        (lambda m: m.sync("r1"), 204, b"", None),
        (lambda m: m.sync("r1"), 200, b"<html>", requests.RequestException),
        (lambda m: m.sync("r1"), 401, b"", requests.RequestException),
        (lambda m: m.report({"x": 1}), 200, b'{"decision": "OK"}', {"decision": "OK"}),
        (lambda m: m.report({"x": 1}), 503, b"", requests.RequestException),
        (lambda m: m.stop(A, "drained"), 204, b"", None),
        (lambda m: m.stop(A, "drained"), 404, b"unknown", None),
        (lambda m: m.stop(A, "drained"), 500, b"", requests.RequestException),
    ],
)
def test_an_answer_of_the_managers_is_a_value_or_a_request_exception(
    real_manager: tuple[Manager, type[Answers]], call: Callable[[Manager], Any], status: int, body: bytes, result: Any
) -> None:
    manager, answers = real_manager
    answers.status, answers.body = status, body
    if result is requests.RequestException:
        with pytest.raises(requests.RequestException):
            call(manager)
    else:
        assert call(manager) == result


def test_every_call_to_the_manager_bears_the_token_and_a_stop_says_whose_word_it_is(
    real_manager: tuple[Manager, type[Answers]],
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
