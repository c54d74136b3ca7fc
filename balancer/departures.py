"""Which draining backends are done, and why. Pure: time is an argument.

The balancer asks the manager to stop these and no others: an unhealthy backend that is not draining is the manager's to
replace.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from flows import SILENT_SECONDS


class Reason(Enum):
    DRAINED = "drained"
    SILENT = "silent"
    DEADLINE = "deadline"


@dataclass(frozen=True)
class Draining:
    """One draining backend as the last sample saw it: live flows, and those without a packet for SILENT_SECONDS."""

    since: float  # seconds on the clock of `now`: when it got its last new connection at the latest
    live: int
    silent: int
    unhealthy: bool


@dataclass(frozen=True)
class Departure:
    ip: str
    reason: Reason
    seconds: float  # since it left dispatch
    flows: int  # live ones that it still had

    def sentence(self) -> str:
        match self.reason:
            case Reason.DRAINED:
                return f"drained in {self.seconds:.1f} s"
            case Reason.SILENT:
                return f"{self.flows} open connections, none answered for {SILENT_SECONDS} s"
            case Reason.DEADLINE:
                return f"{self.flows} flows left at the drain deadline"


def departures(draining: Mapping[str, Draining], now: float, drain_timeout: float) -> list[Departure]:
    """Those of `draining` (by address) that are done; `drain_timeout` in seconds."""
    done = []
    for ip, backend in draining.items():
        reason = _reason(backend, now, drain_timeout)
        if reason:
            done.append(Departure(ip, reason, now - backend.since, backend.live))
    return done


def _reason(backend: Draining, now: float, drain_timeout: float) -> Reason | None:
    if not backend.live:
        return Reason.DRAINED
    if backend.unhealthy and backend.silent >= backend.live:
        return Reason.SILENT
    if now - backend.since > drain_timeout:
        return Reason.DEADLINE
    return None
