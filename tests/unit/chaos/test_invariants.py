"""Each invariant is found when it is violated, and is not when it holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from fakes_chaos import complete

from chaos import invariants
from chaos.observe import Container, Observation, Process, dnat_counters, of_project, reachable

ADDRESSES = ("198.18.0.2", "198.18.0.3")
RULES = """*nat
:LB-DISPATCH - [0:0]
[9:540] -A PREROUTING -p tcp -m tcp --dport 8000 -m addrtype --dst-type LOCAL -j LB-DISPATCH
[3:180] -A LB-DISPATCH -m statistic --mode random --probability 0.50000000000 -j LB-B-198.18.0.2
[6:360] -A LB-DISPATCH -j LB-T-1
[6:360] -A LB-T-1 -j LB-B-198.18.0.3
[3:180] -A LB-B-198.18.0.2 -p tcp -j DNAT --to-destination 198.18.0.2:8000
[6:360] -A LB-B-198.18.0.3 -p tcp -j DNAT --to-destination 198.18.0.3:8000
[1:60] -A LB-B-198.18.0.4 -p tcp -j DNAT --to-destination 198.18.0.4:8000
[2:120] -A LB-CHECK -p tcp -j DNAT --to-destination 198.18.0.2:8000
COMMIT
"""


def healthy() -> Observation:
    backends = [Container(f"id{n}", f"backend-{n}", "backend", True, ip) for n, ip in enumerate(ADDRESSES)]
    return complete([*backends, Container("b", "balancer", "balancer", True, "198.18.0.9")], ADDRESSES)


def with_row(seen: Observation, **values: Any) -> Observation:
    first, *others = seen.status["backends"]
    return replace(seen, status={**seen.status, "backends": [{**first, **values}, *others]})


def with_backend(seen: Observation, **values: Any) -> Observation:
    first, *others = seen.containers
    return replace(seen, containers=[replace(first, **values), *others])


ORPHAN = Container("id9", "backend-9", "backend", True, "198.18.0.4")
VIOLATIONS: dict[str, tuple[Callable[[Observation], Observation], str]] = {
    "two managers": (lambda seen: replace(seen, managers=2), "2 managers"),
    "no supervisor": (lambda seen: replace(seen, supervisors=0), "0 supervisors"),
    "orphan": (lambda seen: replace(seen, containers=[*seen.containers, ORPHAN]), "3 backends run, 2 are wanted"),
    "left over": (lambda seen: with_backend(seen, running=False), "do not run: backend-0"),
    "double address": (lambda seen: with_backend(seen, ip=ADDRESSES[1]), "addresses of backends"),
    "no balancer": (lambda seen: replace(seen, containers=seen.containers[:2]), "0 containers of the balancer"),
    "rule too many": (lambda seen: replace(seen, connections={**seen.connections, "198.18.0.4": 0}), "DNAT rules"),
    "rule missing": (lambda seen: replace(seen, connections={ADDRESSES[0]: 1}), "DNAT rules"),
    "not dispatched": (lambda seen: replace(seen, dispatched={ADDRESSES[0]}), "dispatch"),
    "not counted": (lambda seen: replace(seen, members=set()), "the set of backends"),
    "silent manager": (lambda seen: replace(seen, status={}), "does not answer"),
    "unhealthy": (lambda seen: with_row(seen, healthy=None), "not active and healthy: backend-0"),
    "draining": (lambda seen: with_row(seen, state="draining"), "not active and healthy: backend-0"),
    "another name": (lambda seen: with_row(seen, name="other"), "not those of the engine"),
    "a problem": (
        lambda seen: replace(seen, status={**seen.status, "problems": [{"kind": "data_path_broken", "text": "x"}]}),
        "the manager reports: x",
    ),
}


@pytest.mark.parametrize(("change", "found"), VIOLATIONS.values(), ids=VIOLATIONS)
def test_violated_invariant_is_found(change: Callable[[Observation], Observation], found: str) -> None:
    assert invariants.unsettled(healthy(), 2) == []
    assert any(found in sentence for sentence in invariants.unsettled(change(healthy()), 2))


def test_another_number_than_desired_is_found() -> None:
    assert len(invariants.unsettled(healthy(), 3)) == 2, "of the engine's and of the manager's"


def test_counter_that_falls_is_found_except_after_a_restart() -> None:
    before = healthy()
    in_rules = replace(before, connections={**before.connections, ADDRESSES[0]: 9})
    in_status = with_row(before, connections=9.0)
    assert [len(invariants.fallen_counters(before, after, False)) for after in (in_rules, in_status)] == [1, 1]
    assert invariants.fallen_counters(before, in_rules, True) == []
    restarted = replace(in_rules, containers=[*before.containers[:2], Container("c", "b", "balancer", True, "")])
    assert invariants.fallen_counters(before, restarted, False) == []
    replaced = with_backend(in_rules, id="new")
    assert invariants.fallen_counters(before, replaced, False) == [], "another container"


def test_changes_among_others_are_found() -> None:
    assert invariants.changed_foreign(["a", "b"], ["b", "c"]) == ["lost of others: a", "new among others: c"]
    assert invariants.changed_foreign(["a"], ["a"]) == []


@pytest.mark.parametrize(
    ("answers", "unfair"), [((80, 80), 0), ((160, 0), 1), ((157, 3), 1), ((140, 20), 0), ((3, 0), 0)]
)
def test_healthy_backend_without_its_share_is_found(answers: tuple[int, int], unfair: int) -> None:
    counted = dict(zip(("a", "b"), answers, strict=True))
    assert len(invariants.unfair_shares(counted, {"a", "b"})) == unfair


def test_growth_of_an_old_process_is_found() -> None:
    def samples(*sizes: tuple[float, int, int]) -> list[tuple[float, Process]]:
        return [(at, Process("manager", "1", memory * 2**20, files)) for at, memory, files in sizes]

    assert invariants.growth(samples((0, 10, 5), (70, 50, 50), (140, 50, 50))) == [], "it was young"
    assert len(invariants.growth(samples((0, 50, 50), (70, 50, 50), (140, 80, 90)))) == 2
    first, _, last = samples((0, 50, 50), (70, 50, 50), (140, 80, 90))
    assert invariants.growth([first, (140, replace(last[1], identity="2"))]) == [], "another process"


def test_changes_of_direction_are_counted() -> None:
    assert invariants.changes_of_direction([2, 2, 4, 4, 5, 3, 2, 2]) == 1
    assert invariants.changes_of_direction([2, 3, 2, 3, 2]) == 3


def test_rules_are_read_with_counters_and_with_what_dispatch_reaches() -> None:
    assert dnat_counters(RULES) == {"198.18.0.2": 3, "198.18.0.3": 6, "198.18.0.4": 1}
    assert reachable(RULES) == {"198.18.0.2", "198.18.0.3"}, "a draining backend has a chain, but gets nothing"
    on_host = RULES.replace("LB-", "LB-abc123-")
    assert (dnat_counters(on_host), reachable(on_host)) == (dnat_counters(RULES), reachable(RULES))


@pytest.mark.parametrize(
    ("line", "own"),
    [
        ("-A FORWARD -j LB-abc123-FORWARD", True),
        ("-A DOCKER ! -i br-0123456789ab -p tcp -j DNAT", True),
        ("-A POSTROUTING -s 172.16.0.6/32 -j MASQUERADE", True),
        ("-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE", False),
        ("add foreign 198.18.255.1", False),
    ],
)
def test_rules_of_others_are_told_from_those_of_the_project(line: str, own: bool) -> None:
    assert of_project(line, "0123456789abcdef", "172.16.0.0/20") is own
