"""Who gets new connections, and when all stay."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prober import Answer, Health
from rotation import rotation
from ruleset import Endpoint
from snapshot import Backend, Snapshot

GOOD, BAD, UNKNOWN = True, False, None
STATES = ("active", "starting", "spare", "draining", "stopped")


def fleet(*states: str) -> Snapshot:
    return Snapshot("r1", tuple(Backend(str(i), f"198.18.0.{i}", state, 1.0) for i, state in enumerate(states)))


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
def test_unhealthy_candidates_are_left_out_while_at_least_half_are_healthy(
    backends: list[tuple[str, bool | None]], chosen: str, panic: bool
) -> None:
    snapshot = fleet(*(state for state, _ in backends))
    result = rotation(snapshot, {str(i): verdict for i, (_, verdict) in enumerate(backends)})
    assert [endpoint.ip for endpoint in result.endpoints] == [f"198.18.0.{i}" for i in chosen]
    assert result.panic == panic


@pytest.mark.parametrize(
    ("dead", "chosen"),
    [
        ("", "0123"),
        ("12", "03"),
        ("3", "012"),
        ("0123", "0123"),  # a fault of our own network, more likely: better a chance than none
    ],
)
def test_in_panic_only_dead_backends_leave_rotation(dead: str, chosen: str) -> None:
    snapshot = fleet("active", "active", "active", "active")
    result = rotation(snapshot, {"0": GOOD, "1": BAD, "2": BAD, "3": BAD}, dead=set(dead))
    assert [endpoint.ip for endpoint in result.endpoints] == [f"198.18.0.{i}" for i in chosen]
    assert result.panic


@given(st.lists(st.tuples(st.sampled_from(STATES), st.sampled_from([GOOD, BAD, UNKNOWN])), max_size=12))
def test_never_does_more_than_half_of_the_active_backends_leave_rotation(
    backends: list[tuple[str, bool | None]],
) -> None:
    snapshot = fleet(*(state for state, _ in backends))
    result = rotation(snapshot, {str(i): verdict for i, (_, verdict) in enumerate(backends)})
    states = {f"198.18.0.{i}": state for i, (state, _) in enumerate(backends)}
    assert {states[endpoint.ip] for endpoint in result.endpoints} <= {"active", "starting"}
    assert 2 * len(result.endpoints) >= sum(state == "active" for state, _ in backends)


def test_the_numbers_behind_a_panic_are_given() -> None:
    result = rotation(fleet("active", "active", "active", "spare"), {"0": GOOD, "1": BAD, "2": BAD, "3": GOOD})
    assert (result.healthy, result.candidates) == (1, 3)


def test_rotation_carries_the_views_port_and_weights() -> None:
    snapshot = Snapshot("r1", (Backend("a", "198.18.0.2", "active", 2.5),), port=9090)
    assert rotation(snapshot, {}).endpoints == (Endpoint("198.18.0.2", 9090, 2.5),)


@pytest.mark.parametrize("answer", [Answer.FAILED, Answer.TIMED_OUT, Answer.REFUSED])
def test_an_active_backend_that_never_answers_a_restarted_client_leaves_rotation(answer: Answer) -> None:
    health = Health()
    for _ in range(10):
        health = health.after(answer)
    result = rotation(fleet("active", "active"), {"0": health.healthy, "1": GOOD})
    assert [endpoint.ip for endpoint in result.endpoints] == ["198.18.0.1"]
