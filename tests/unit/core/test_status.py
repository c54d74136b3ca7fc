"""The problems in /status: each is found, and nothing else makes a project degraded."""

from __future__ import annotations

from typing import Any

import pytest

from core.fleet import Backend
from core.launch_backoff import LaunchBackoff
from core.reasons import Cause, Reason
from core.snapshot import ProblemKind, UpdatePhase, launches, with_problems


def backend(**changes: object) -> dict[str, Any]:
    return {"state": "active", "healthy": True, **changes}


def status(**changes: object) -> dict[str, Any]:
    """A healthy project with two backends; only what problems depend on."""
    return {
        "desired": 2,
        "engine": "ok",
        "launches": {"failed": 0, "why": "", "update_given_up": ""},
        "balancer": {"state": "running", "problem": ""},
        "balancers": [{"last_seen": 0.8}],
        "data_path": {"working": True, "problem": ""},
        "settings": {"interval": 2.0},
        "backends": [backend(), backend()],
        **changes,
    }


def with_launches(**changes: object) -> dict[str, Any]:
    return {"launches": {**status()["launches"], **changes}}


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"engine": "timed out"}, ProblemKind.ENGINE_UNREACHABLE, "the engine is unreachable: timed out"),
        (
            with_launches(failed=3, why="no such image"),
            ProblemKind.LAUNCHES_FAIL,
            "3 failures in a row: no such image",
        ),
        (
            with_launches(failed=1, why="no such image"),
            ProblemKind.LAUNCHES_FAIL,
            "a backend or its launch failed: no such image",
        ),
        (with_launches(update_given_up="exit 3"), ProblemKind.UPDATE_GIVEN_UP, "the update was given up: exit 3"),
        (
            {"balancer": {"state": "failed", "problem": "port in use"}},
            ProblemKind.BALANCER_NOT_RUNNING,
            "the balancer does not run (failed): port in use",
        ),
        (
            {"balancer": {"state": "starting", "problem": ""}},
            ProblemKind.BALANCER_NOT_RUNNING,
            "the balancer does not run (starting)",
        ),
        ({"balancers": []}, ProblemKind.NO_BALANCER_REPORTS, "no balancer reports"),
        ({"balancers": [{"last_seen": 6.1}]}, ProblemKind.NO_BALANCER_REPORTS, "no balancer reports"),
        (
            {"data_path": {"working": False, "problem": "timed out"}},
            ProblemKind.DATA_PATH_BROKEN,
            "clients cannot reach the service: timed out",
        ),
        ({"backends": [backend()]}, ProblemKind.TOO_FEW_BACKENDS, "1 of 2 backends serve"),
        ({"backends": [backend(), backend(state="starting")]}, ProblemKind.TOO_FEW_BACKENDS, "1 of 2 backends serve"),
        ({"backends": [backend(healthy=False)] * 2}, ProblemKind.TOO_FEW_BACKENDS, "0 of 2 backends serve"),
    ],
)
def test_each_problem_makes_the_project_degraded(changes: dict[str, Any], kind: ProblemKind, text: str) -> None:
    found = with_problems(status(**changes))
    assert (found["state"], found["problems"]) == ("degraded", [{"kind": kind.value, "text": text}])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"paused": True},
        {"backends": [backend()] * 3},
        {"backends": [backend(healthy=None), backend(), backend(state="draining")]},
        with_launches(updating=True),
        {"balancers": [{"last_seen": 5.9}, {"last_seen": 60}]},
        {"data_path": {"working": None, "problem": ""}},
    ],
)
def test_a_project_that_serves_as_desired_is_healthy(changes: dict[str, Any]) -> None:
    found = with_problems(status(**changes))
    assert (found["state"], found["problems"]) == ("healthy", [])


def test_all_problems_are_listed() -> None:
    found = with_problems(status(engine="timed out", balancers=[]))
    kinds = [problem["kind"] for problem in found["problems"]]
    assert kinds == [ProblemKind.ENGINE_UNREACHABLE, ProblemKind.NO_BALANCER_REPORTS]


OLD, NEW = Backend("old", "active", 0.0, spec="1"), Backend("new", "active", 0.0, spec="2")
LAST_OLD_DRAINS = [NEW, OLD.to("draining", 1.0, Reason(Cause.UPDATE))]


@pytest.mark.parametrize(
    ("fleet", "backoff", "phase", "replaced", "left"),
    [
        ([NEW, NEW.to("draining", 1.0, Reason(Cause.OPERATOR))], LaunchBackoff("2"), UpdatePhase.NONE, 1, 0),
        ([OLD, NEW.to("starting", 1.0)], LaunchBackoff("2"), UpdatePhase.STARTING, 1, 1),
        ([OLD], LaunchBackoff("2", failures=1, retry_at=9.0), UpdatePhase.WAITING, 0, 1),
        ([NEW], LaunchBackoff("2", failures=1, retry_at=9.0), UpdatePhase.NONE, 1, 0),
        (LAST_OLD_DRAINS, LaunchBackoff("2"), UpdatePhase.DRAINING, 1, 0),
        ([OLD, NEW], LaunchBackoff("1", refused="2", refusal=Reason(Cause.ENDED, 3)), UpdatePhase.ROLLING_BACK, 1, 1),
        ([OLD], LaunchBackoff("1", refused="2", refusal=Reason(Cause.ENDED, 3)), UpdatePhase.NONE, 1, 0),
    ],
)
def test_an_update_has_a_phase(
    fleet: list[Backend], backoff: LaunchBackoff, phase: UpdatePhase, replaced: int, left: int
) -> None:
    by_name = {f"{number}": one for number, one in enumerate(fleet)}
    found = launches(by_name, backoff, 2.0)
    assert (found["phase"], found["replaced"], found["to_replace"]) == (phase, replaced, left)
    assert found["updating"] is (left > 0)
