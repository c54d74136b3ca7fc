"""The manager's state as balancers and people read it: the bodies of GET /sync and GET /status. Pure.

Only this module decides what is a problem of the project. The terminal, the page and programs present the result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from core import fleet as fleets
from core.fleet import ACTIVE, DRAINING, STOPPED, Backend, Fleet
from core.launch_backoff import LaunchBackoff
from core.load import LoadTracker
from core.reasons import Cause
from core.scaler import Policy
from core.settings import Settings

SECRET = {"env", "command"}  # settings that may hold passwords; no answer contains them
NO_REPORT_AFTER = 3  # intervals without a report of any balancer until that is a problem

Status = Mapping[str, Any]  # the body of GET /status


class State(StrEnum):
    HEALTHY = "healthy"
    DEGRADED = "degraded"


class ProblemKind(StrEnum):
    """Why a project is degraded."""

    ENGINE_UNREACHABLE = "engine_unreachable"
    LAUNCHES_FAIL = "launches_fail"
    UPDATE_GIVEN_UP = "update_given_up"
    BALANCER_NOT_RUNNING = "balancer_not_running"
    NO_BALANCER_REPORTS = "no_balancer_reports"
    DATA_PATH_BROKEN = "data_path_broken"
    TOO_FEW_BACKENDS = "too_few_backends"


class UpdatePhase(StrEnum):
    """What an update of the backends does now."""

    NONE = "none"
    STARTING = "starting"  # a new backend is launched and becomes ready
    DRAINING = "draining"  # an old one drains
    WAITING = "waiting"  # the launch backoff
    ROLLING_BACK = "rolling_back"  # it was given up, and its backends are replaced


def for_balancers(fleet: Fleet, settings: Settings, check_source: str) -> dict[str, Any]:
    """The body of GET /sync without its revision. A backend whose container is being stopped is still listed, as
    draining, so that the balancers keep its open connections."""
    known = [fleet[name] for name in sorted(fleet) if fleet[name].known_to_balancers]
    return {
        "service": {
            "port": settings.backend_port,
            "health": settings.health,
            "interval": settings.interval,
            "drain_timeout": settings.drain_timeout,
            "weights": settings.weights,
            "locality": settings.locality,
            "check_source": check_source,
        },
        "backends": [_for_balancers(backend) for backend in known],
    }


def _for_balancers(backend: Backend) -> dict[str, str]:
    state = DRAINING if backend.state == STOPPED else backend.state
    # A new backend may get the name and address of an earlier one, but never its id.
    row = {"id": backend.short_id, "ip": backend.ip, "state": state}
    return {**row, "node": backend.node} if backend.node else row


def revision(snapshot: Status) -> str:
    """A digest of the snapshot. Equal snapshots have equal revisions, also after a restart of the manager."""
    return hashlib.sha256(json.dumps(snapshot).encode()).hexdigest()[:12]


def with_problems(status: Status) -> dict[str, Any]:
    """The status with its `problems`, each a kind and a sentence for people, and the `state` that follows from them."""
    problems = [{"kind": kind.value, "text": text} for kind, text in _problems(status).items()]
    state = State.DEGRADED if problems else State.HEALTHY
    return {**status, "state": state.value, "problems": problems}


def _problems(status: Status) -> dict[ProblemKind, str]:
    found = {}
    if status["engine"] != "ok":
        found[ProblemKind.ENGINE_UNREACHABLE] = f"the engine is unreachable: {status['engine']}"

    launches = status["launches"]
    if launches["failed"]:
        once = launches["failed"] == 1
        what = "a backend or its launch failed" if once else f"{launches['failed']} failures in a row"
        found[ProblemKind.LAUNCHES_FAIL] = f"{what}: {launches['why']}"
    if launches["update_given_up"]:
        found[ProblemKind.UPDATE_GIVEN_UP] = f"the update was given up: {launches['update_given_up']}"

    balancer = status["balancer"]
    if balancer["state"] != "running":
        detail = f": {balancer['problem']}" if balancer["problem"] else ""
        found[ProblemKind.BALANCER_NOT_RUNNING] = f"the balancer does not run ({balancer['state']}){detail}"
    # One balancer that reports is enough: the others may just have been removed.
    longest = NO_REPORT_AFTER * status["settings"]["interval"]
    if not any(one["last_seen"] <= longest for one in status["balancers"]):
        found[ProblemKind.NO_BALANCER_REPORTS] = "no balancer reports"
    if status["data_path"]["working"] is False:
        found[ProblemKind.DATA_PATH_BROKEN] = f"clients cannot reach the service: {status['data_path']['problem']}"

    # A backend without a probe result so far counts as serving: it is in rotation.
    serving = sum(row["state"] == ACTIVE and row["healthy"] is not False for row in status["backends"])
    if serving < status["desired"]:
        found[ProblemKind.TOO_FEW_BACKENDS] = f"{serving} of {status['desired']} backends serve"
    return found


def backends(fleet: Fleet, load: LoadTracker, epoch: float) -> list[dict[str, Any]]:
    """The rows of /status, in the order of the backends' numbers. `epoch`: seconds since 1970 at the clock's zero."""
    return [_backend(fleet[name], load, epoch) for name in sorted(fleet, key=fleets.by_number)]


def _backend(backend: Backend, load: LoadTracker, epoch: float) -> dict[str, Any]:
    verdict = load.verdict(backend)
    counters = {name: round(value, 2) for name, value in load.backend(backend.ip).items()}
    return {
        "name": backend.name,
        "ip": backend.ip,
        "state": backend.state,
        "since": round(epoch + backend.since, 3),
        "node": backend.node,
        "reason": backend.reason.sentence,
        "cause": backend.reason.cause.value,
        "share": round(load.share(backend), 4),
        **counters,
        "healthy": verdict.healthy,
        "why": verdict.why,
    }


def balancers(load: LoadTracker, now: float) -> list[dict[str, Any]]:
    """Each balancer that reports, with the seconds since its newest report."""
    rows = []
    for name, entry in sorted(load.balancers.items()):
        rows.append({"id": name, "last_seen": round(now - entry.at, 1), "revision": entry.report.revision})
    return rows


def settings_in_force(settings: Settings, policy: Policy) -> dict[str, Any]:
    """The settings with the limits in force, which the operator may have changed."""
    in_force = {**vars(settings), "min": policy.min, "max": policy.max, "target": policy.target}
    # JSON has no sets. Sorted, because the order of a set may change.
    public = {}
    for name, value in in_force.items():
        if name not in SECRET:
            public[name] = sorted(value) if isinstance(value, frozenset) else value
    return public


def launches(fleet: Fleet, backoff: LaunchBackoff, now: float) -> dict[str, Any]:
    """Failures of backends or launches in a row, the seconds until the next launch, and the progress of an update."""
    capacity = fleets.capacity_of(fleet)
    replaced = sum(backend.spec == backoff.spec for backend in capacity)
    return {
        "failed": backoff.failures,
        "retry_in": round(backoff.wait(now), 1),
        "why": backoff.why,
        "updating": replaced < len(capacity),
        "phase": _phase(fleet, backoff, replaced < len(capacity), now).value,
        "replaced": replaced,
        "to_replace": len(capacity) - replaced,
        "update_given_up": backoff.given_up,
    }


def _phase(fleet: Fleet, backoff: LaunchBackoff, updating: bool, now: float) -> UpdatePhase:
    if updating and backoff.given_up:
        return UpdatePhase.ROLLING_BACK
    if updating and backoff.wait(now):
        return UpdatePhase.WAITING
    if any(b.state == DRAINING and b.reason.cause is Cause.UPDATE for b in fleet.values()):
        return UpdatePhase.DRAINING
    return UpdatePhase.STARTING if updating else UpdatePhase.NONE
