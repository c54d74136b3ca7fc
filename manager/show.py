"""What balancers and people are shown of the manager's state. Pure."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import fleet as fleets
from fleet import DRAINING, STOPPED, Backend, Fleet
from meter import Meter
from patience import Patience
from scaler import Policy
from settings import Settings

WEIGHT = 1.0  # what every backend is given; speed is for the balancers to learn
SECRET = {"env", "command"}  # settings that may hold passwords: shown to nobody


def view(fleet: Fleet, settings: Settings, inside: str) -> dict[str, Any]:
    """The body of GET /sync, but for the revision. One whose container is being stopped still shows as draining."""
    return {
        "service": {
            "port": settings.backend_port,
            "health": settings.health,
            "interval": settings.interval,
            "drain_timeout": settings.drain_timeout,
            "weights": settings.weights,
            "inside": inside,
            "locality": settings.locality,
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
            if backend.in_view
        ],
    }


def revision(shown: dict[str, Any]) -> str:
    """A digest of the view: it moves when, and only when, a balancer has something to learn, and a restarted manager
    that finds the same fleet comes to the same one."""
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:12]


def backends(fleet: Fleet, meter: Meter) -> list[dict[str, Any]]:
    return [_backend(fleet[name], meter) for name in sorted(fleet, key=fleets.by_number)]


def _backend(backend: Backend, meter: Meter) -> dict[str, Any]:
    return {
        "name": backend.name,
        "ip": backend.ip,
        "state": backend.state,
        "node": backend.node,
        "reason": backend.reason,
        "weight": WEIGHT,
        "share": round(meter.share(backend), 4),
        **{name: round(value, 2) for name, value in meter.backend(backend.ip).items()},
        "healthy": meter.healthy(backend),
        "why": meter.why(backend),
    }


def balancers(meter: Meter, now: float) -> list[dict[str, Any]]:
    return [
        {"id": name, "last_seen": round(now - entry.at, 1), "revision": entry.report.revision}
        for name, entry in sorted(meter.balancers.items())
    ]


def settings_in_force(settings: Settings, policy: Policy) -> dict[str, Any]:
    """The settings as they are now: the operator's limits where he has set others."""
    values = {**vars(settings), "min": policy.min, "max": policy.max, "target": policy.target}
    return {
        name: sorted(value) if isinstance(value, frozenset) else value
        for name, value in values.items()
        if name not in SECRET
    }


def launches(fleet: Fleet, patience: Patience, now: float) -> dict[str, Any]:
    return {
        "failed": patience.failures,
        "retry_in": round(patience.wait(now), 1),
        "why": patience.why,
        "updating": any(backend.spec != patience.spec for backend in fleets.live(fleet)),
        "update_given_up": patience.given_up,
    }
