"""What is wrong on a Swarm is found, on the node where it is wrong, and nothing is found when all holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from fakes_chaos import complete

from chaos import swarm_observe
from chaos.allowances import Request
from chaos.observe import Container, Observation
from chaos.swarm_observe import SwarmSeen, by_container

FIRST, SECOND = "198.18.0.1", "198.18.0.2"  # the nodes
ADDRESSES = ("198.19.0.2", "198.19.0.3")  # of the backends
BACKENDS = [Container(f"backend{n}", f"backend{n}", "backend", True, ip, f"t{n}") for n, ip in enumerate(ADDRESSES)]
NAMES = {FIRST: "n1", SECOND: "n2"}


def on_node(number: int) -> Observation:
    own = Container(f"balancer{number}", f"balancer{number}", "balancer", True, "", f"b{number}")
    return complete([*BACKENDS, own], ADDRESSES, balancers=[{"id": f"balancer{n}"} for n in (1, 2)])


def healthy() -> SwarmSeen:
    members = {"n1": "Ready Active Leader", "n2": "Ready Active Reachable"}
    return SwarmSeen(100.0, {FIRST: on_node(1), SECOND: on_node(2)}, frozenset({"t0", "t1", "b1", "b2"}), members)


def on_second(seen: SwarmSeen, **values: object) -> SwarmSeen:
    return replace(seen, nodes={**seen.nodes, SECOND: replace(seen.nodes[SECOND], **values)})


VIOLATIONS: dict[str, tuple[Callable[[SwarmSeen], SwarmSeen], str]] = {
    "rule missing on one node": (lambda seen: on_second(seen, connections={}), f"{SECOND}: DNAT rules: []"),
    "not dispatched on one node": (lambda seen: on_second(seen, dispatched=set()), f"{SECOND}: dispatch: []"),
    "no balancer on one node": (lambda seen: on_second(seen, containers=BACKENDS), f"{SECOND}: 0 containers of the"),
    "orphan": (lambda seen: replace(seen, tasks=seen.tasks - {"t0"}), "a container of the task t0, which should not"),
    "task without a container": (lambda seen: replace(seen, tasks=seen.tasks | {"t9"}), "no container of the task t9"),
    "node away": (lambda seen: replace(seen, members={**seen.members, "n2": "Down Active "}), "node n2 is Down"),
    "no leader": (lambda seen: replace(seen, members={}), "the Swarm does not answer"),
    "a balancer that does not report": (
        lambda seen: replace(
            seen, nodes={**seen.nodes, FIRST: replace(on_node(1), status={**on_node(1).status, "balancers": []})}
        ),
        "balancers that report: [], that run: ['balancer1', 'balancer2']",
    ),
}
VIOLATIONS["a balancer that has gone and is still listed"] = (
    lambda seen: replace(seen, nodes={FIRST: seen.nodes[FIRST]}, tasks=seen.tasks - {"b2"}),
    "balancers that report: ['balancer1', 'balancer2'], that run: ['balancer1']",
)


@pytest.mark.parametrize(("change", "found"), VIOLATIONS.values(), ids=VIOLATIONS)
def test_violated_invariant_is_found(change: Callable[[SwarmSeen], SwarmSeen], found: str) -> None:
    assert swarm_observe.violated(healthy(), 2, set()) == []
    assert any(sentence.startswith(found) for sentence in swarm_observe.violated(change(healthy()), 2, set()))


def test_state_of_a_node_that_a_fault_keeps_away_is_no_violation() -> None:
    lost = replace(healthy(), members={"n1": "Ready Active Leader", "n2": "Down Active Unreachable"})
    assert swarm_observe.violated(lost, 2, {"n2"}) == []


def test_counter_that_falls_on_one_node_is_found() -> None:
    fewer = on_second(healthy(), connections={**healthy().nodes[SECOND].connections, ADDRESSES[0]: 9})
    assert swarm_observe.fallen(healthy(), fewer, False) == [
        f"{SECOND}: rules: connections of backend0 fell from 10 to 9"
    ]


def test_managers_sum_may_fall_only_when_a_balancer_has_started_again() -> None:
    status = on_node(1).status
    first, second = status["backends"]
    status = {**status, "backends": [{**first, "connections": 3.0}, second]}
    nodes = {node: replace(one, status=status) for node, one in healthy().nodes.items()}
    assert len(swarm_observe.fallen(healthy(), replace(healthy(), nodes=nodes), False)) == len(nodes)
    restarted = [*BACKENDS, Container("new", "new", "balancer", True, "", "b9")]
    nodes[SECOND] = replace(nodes[SECOND], containers=restarted, connections=dict.fromkeys(ADDRESSES, 0))
    assert swarm_observe.fallen(healthy(), replace(healthy(), nodes=nodes), False) == []


def test_backend_without_a_share_on_one_node_is_found_there() -> None:
    later = replace(healthy(), nodes={node: replace(one, at=200.0) for node, one in healthy().nodes.items()})
    requests = []
    for number in range(100):
        requests.append(Request("new", 101.0 + number / 2, 102.0, "ok", f"backend{number % 2}", FIRST))
        requests.append(Request("new", 101.0 + number / 2, 102.0, "ok", "backend0", SECOND))
    [sentence] = swarm_observe.unfair(healthy(), later, requests)
    assert sentence.startswith(f"{SECOND}: backend1 answered 0 of 100")


def test_backends_of_the_status_get_the_names_of_their_containers() -> None:
    listed = [Container("0123456789abcdef", "0123456789ab", "backend", True, "", "x7k2pabcdefgh")]
    status = {"backends": [{"name": "lbchaos-backend-3.x7k2p"}, {"name": "lbchaos-backend-4.other"}]}
    names = [row["name"] for row in by_container(status, listed)["backends"]]
    assert names == ["0123456789ab", "lbchaos-backend-4.other"]
    assert by_container({}, listed) == {}
