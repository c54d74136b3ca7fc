"""What balancers and people are shown of the manager's state. Pure."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from core import fleet as fleets
from core.fleet import DRAINING, STOPPED, Backend, Fleet
from core.launch_backoff import LaunchBackoff
from core.load import LoadTracker
from core.scaler import Policy
from core.settings import Settings

WEIGHT = 1.0  # what every backend is given; speed is for the balancers to learn
SECRET = {"env", "command"}  # settings that may hold passwords: shown to nobody


def for_balancers(fleet: Fleet, settings: Settings, backend_subnet: str, check_source: str) -> dict[str, Any]:
    """The body of GET /sync, but for the revision. One whose container is being stopped still shows as draining."""
    return {
        "service": {
            "port": settings.backend_port,
            "health": settings.health,
            "interval": settings.interval,
            "drain_timeout": settings.drain_timeout,
            "weights": settings.weights,
            "backend_subnet": backend_subnet,
            "locality": settings.locality,
            "check_source": check_source,
        },
        "backends": [
            {
                "id": backend.short_id,
                "ip": backend.ip,
                "state": DRAINING if backend.state == STOPPED else backend.state,
                "weight": WEIGHT,
                **({"node": backend.node} if backend.node else {}),
            }
            for backend in sorted(fleet.values(), key=lambda b: b.name)
            if backend.known_to_balancers
        ],
    }


def revision(shown: dict[str, Any]) -> str:
    """A digest of the view: it moves when, and only when, a balancer has something to learn, and a restarted manager
    that finds the same fleet comes to the same one."""
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:12]


def backends(fleet: Fleet, load: LoadTracker) -> list[dict[str, Any]]:
    return [_backend(fleet[name], load) for name in sorted(fleet, key=fleets.by_number)]


def _backend(backend: Backend, load: LoadTracker) -> dict[str, Any]:
    verdict = load.verdict(backend)
    return {
        "name": backend.name,
        "ip": backend.ip,
        "state": backend.state,
        "node": backend.node,
        "reason": backend.reason.sentence,
        "cause": backend.reason.cause.value,
        "weight": WEIGHT,
        "share": round(load.share(backend), 4),
        **{name: round(value, 2) for name, value in load.backend(backend.ip).items()},
        "healthy": verdict.healthy,
        "why": verdict.why,
    }


def balancers(load: LoadTracker, now: float) -> list[dict[str, Any]]:
    return [
        {"id": name, "last_seen": round(now - entry.at, 1), "revision": entry.report.revision}
        for name, entry in sorted(load.balancers.items())
    ]


def settings_in_force(settings: Settings, policy: Policy) -> dict[str, Any]:
    """The settings as they are now: the operator's limits where he has set others."""
    values = {**vars(settings), "min": policy.min, "max": policy.max, "target": policy.target}
    return {
        name: sorted(value) if isinstance(value, frozenset) else value
        for name, value in values.items()
        if name not in SECRET
    }


def launches(fleet: Fleet, backoff: LaunchBackoff, now: float) -> dict[str, Any]:
    live = fleets.live(fleet)
    replaced = sum(backend.spec == backoff.spec for backend in live)
    return {
        "failed": backoff.failures,
        "retry_in": round(backoff.wait(now), 1),
        "why": backoff.why,
        "updating": replaced < len(live),
        "replaced": replaced,
        "to_replace": len(live) - replaced,
        "update_given_up": backoff.given_up,
    }
