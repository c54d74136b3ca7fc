"""Which backends get new connections, and when all stay in rotation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from health import Answer, Cause, Health
from rotation import rotation
from snapshot import Backend, Snapshot

GOOD, BAD, UNKNOWN = Health(True), Health(False, cause=Cause.PROBE_FAILED), Health()
UNREACHABLE = Health(False, cause=Cause.UNREACHABLE)
STATES = ("active", "starting", "spare", "draining", "stopped")


def fleet(*states: str) -> Snapshot:
    return Snapshot("r1", tuple(Backend(str(i), f"198.18.0.{i}", state) for i, state in enumerate(states)))


@pytest.mark.parametrize(
    ("backends", "chosen", "panic"),
    [
        ([], "", False),
        ([("active", GOOD), ("active", GOOD)], "01", False),
        ([("active", GOOD), ("active", BAD)], "0", False),
        ([("active", GOOD), ("active", BAD), ("active", BAD)], "012", True),
        ([("active", GOOD), ("active", GOOD), ("active", BAD), ("active", BAD)], "01", False),
        ([("active", BAD)], "0", True),
        ([("active", GOOD), ("starting", GOOD)], "01", False),
        ([("active", GOOD), ("starting", UNKNOWN)], "0", False),
        ([("active", GOOD), ("starting", BAD)], "0", False),
        ([("active", UNKNOWN), ("active", GOOD)], "01", False),
        ([("active", BAD), ("active", UNKNOWN)], "1", False),
        ([("active", BAD), ("active", BAD), ("starting", BAD), ("starting", UNKNOWN)], "01", True),
        ([("active", BAD), ("starting", GOOD)], "1", False),
        ([("starting", UNKNOWN)], "", False),
        ([("starting", GOOD)], "0", False),
        ([("draining", GOOD), ("active", GOOD)], "1", False),
        ([("draining", GOOD), ("active", BAD)], "1", True),
        ([("draining", GOOD)], "", False),
        ([("spare", GOOD), ("spare", GOOD), ("active", BAD)], "2", True),
        ([("spare", BAD), ("draining", BAD), ("active", GOOD), ("active", BAD)], "2", False),
        ([("spare", GOOD), ("stopped", GOOD), ("failed", GOOD)], "", False),
    ],
)
def test_unhealthy_candidates_leave_rotation_while_at_least_half_are_healthy(
    backends: list[tuple[str, Health]], chosen: str, panic: bool
) -> None:
    snapshot = fleet(*(state for state, _ in backends))
    result = rotation(snapshot, {str(i): health for i, (_, health) in enumerate(backends)})
    assert [endpoint.ip for endpoint in result.endpoints] == [f"198.18.0.{i}" for i in chosen]
    assert result.panic == panic


@pytest.mark.parametrize(
    ("health", "answering", "chosen"),
    [
        ([GOOD, BAD, BAD, BAD], "", "0123"),
        ([GOOD, UNREACHABLE, UNREACHABLE, BAD], "", "03"),
        ([GOOD, UNREACHABLE, UNREACHABLE, UNREACHABLE], "2", "02"),  # its probes fail, and it answers clients
        ([BAD, UNREACHABLE, BAD, BAD], "0", "023"),
        ([BAD, UNREACHABLE, BAD, BAD], "", "0123"),  # no backend is known to answer
        ([UNREACHABLE] * 4, "", "0123"),
    ],
)
def test_in_panic_only_unreachable_backends_leave_rotation(health: list[Health], answering: str, chosen: str) -> None:
    snapshot = fleet("active", "active", "active", "active")
    result = rotation(snapshot, {str(i): one for i, one in enumerate(health)}, answering=set(answering))
    assert [endpoint.ip for endpoint in result.endpoints] == [f"198.18.0.{i}" for i in chosen]
    assert result.panic


def test_active_backend_that_was_not_probed_yet_stays_in_rotation_and_does_not_enter_it() -> None:
    """In a Swarm, a new backend may be active before this balancer has reached it."""
    snapshot, health = fleet("active", "active", "active"), {"0": GOOD, "1": UNKNOWN, "2": UNKNOWN}
    result = rotation(snapshot, health, before={"0", "1"})
    assert [endpoint.ip for endpoint in result.endpoints] == ["198.18.0.0", "198.18.0.1"]
    assert (result.healthy, result.candidates) == (2, 2)


@given(st.lists(st.tuples(st.sampled_from(STATES), st.sampled_from([GOOD, BAD, UNKNOWN])), max_size=12))
def test_at_least_half_of_the_active_backends_stay_in_rotation(
    backends: list[tuple[str, Health]],
) -> None:
    snapshot = fleet(*(state for state, _ in backends))
    result = rotation(snapshot, {str(i): health for i, (_, health) in enumerate(backends)})
    states = {f"198.18.0.{i}": state for i, (state, _) in enumerate(backends)}
    assert {states[endpoint.ip] for endpoint in result.endpoints} <= {"active", "starting"}
    assert 2 * len(result.endpoints) >= sum(state == "active" for state, _ in backends)


def test_rotation_has_the_numbers_that_decided_on_panic() -> None:
    result = rotation(fleet("active", "active", "active", "spare"), {"0": GOOD, "1": BAD, "2": BAD, "3": GOOD})
    assert (result.healthy, result.candidates) == (1, 3)


@pytest.mark.parametrize("cause", [Cause.PROBE_FAILED, Cause.UNREACHABLE, Cause.REFUSED])
def test_active_backend_that_never_answers_a_restarted_client_leaves_rotation(cause: Cause) -> None:
    health = Health()
    for _ in range(10):
        health = health.after(Answer(cause))
    result = rotation(fleet("active", "active"), {"0": health, "1": GOOD})
    assert [endpoint.ip for endpoint in result.endpoints] == ["198.18.0.1"]


def weights(locality: str, node: str, *nodes: str, unhealthy: str = "") -> list[float]:
    backends = tuple(Backend(f"b{i}", f"198.18.0.{i + 2}", "active", name) for i, name in enumerate(nodes))
    health = {backend.id: BAD if backend.id == unhealthy else GOOD for backend in backends}
    return [e.weight for e in rotation(Snapshot("r", backends, locality=locality), health, node).endpoints]


@pytest.mark.parametrize(
    ("locality", "node", "nodes", "expected"),
    [
        ("prefer", "n1", ("n1", "n2", "n1"), [1.0, 0.1, 1.0]),
        ("prefer", "n3", ("n1", "n2"), [1.0, 1.0]),  # none is local
        ("", "n1", ("n1", "n2"), [1.0, 1.0]),
        ("", "", ("", ""), [1.0, 1.0]),
    ],
)
def test_remote_backends_get_little_where_local_ones_are_preferred(
    locality: str, node: str, nodes: tuple[str, ...], expected: list[float]
) -> None:
    assert weights(locality, node, *nodes) == expected


def test_unhealthy_local_backend_does_not_reduce_the_weight_of_remote_ones() -> None:
    assert weights("prefer", "n1", "n1", "n2", "n3", unhealthy="b0") == [1.0, 1.0]
