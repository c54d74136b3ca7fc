"""The problems in /status: each is found, and nothing else makes a project degraded."""

from __future__ import annotations

from typing import Any

import pytest

from core.snapshot import ProblemKind, with_problems


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


def launches(**changes: object) -> dict[str, Any]:
    return {"launches": {**status()["launches"], **changes}}


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"engine": "timed out"}, ProblemKind.ENGINE_UNREACHABLE, "the engine is unreachable: timed out"),
        (
            launches(failed=3, why="no such image"),
            ProblemKind.LAUNCHES_FAIL,
            "3 launches in a row failed: no such image",
        ),
        (launches(failed=1, why="no such image"), ProblemKind.LAUNCHES_FAIL, "a launch failed: no such image"),
        (launches(update_given_up="exit 3"), ProblemKind.UPDATE_GIVEN_UP, "the update was given up: exit 3"),
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
        launches(updating=True),
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
