"""Which failed requests the faults explain, and what each fault cost. Pure: records in, values out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from chaos.allowances import Event, Request
from chaos.fault import Fault


@dataclass(frozen=True)
class Done:
    """A round that was carried out."""

    events: tuple[Event, ...]
    violations: tuple[str, ...] = ()

    @property
    def begun(self) -> float:
        return min(event.begun for event in self.events)

    @property
    def settled(self) -> float:
        return max(event.settled for event in self.events)


@dataclass
class Cost:
    """Of all rounds of one kind: one fault, or a pair."""

    times: int = 0
    requests: int = 0
    failed: int = 0
    explained: int = 0
    recovery: float = 0.0  # seconds, the longest
    outcomes: dict[str, int] = field(default_factory=dict)


@dataclass
class Verdict:
    requests: int
    failed: int
    explained: int
    costs: dict[str, Cost]
    violations: list[str]
    backends: tuple[int, int] = (0, 0)  # fewest and most of a soak


def requests_of(records: Sequence[Sequence[Any]]) -> list[Request]:
    return [Request(*record) for record in records]


def judge(requests: Sequence[Request], rounds: Sequence[Done], faults: Mapping[str, Fault]) -> Verdict:
    """Each failed request belongs to the round in which it began, or to the one before if only that explains it."""
    costs: dict[str, Cost] = {}
    violations = [sentence for one in rounds for sentence in one.violations]
    for one in rounds:
        _add_round(costs.setdefault(title(one), Cost()), one, requests)
    explained = failed = 0
    for request in requests:
        if request.outcome == "ok":
            continue
        failed += 1
        owner = _explaining(request, rounds, faults)
        explained += owner is not None
        place = owner or _around(request, rounds)
        if place is not None:
            cost = costs[title(place)]
            cost.failed += 1
            cost.explained += owner is not None
            cost.outcomes[request.outcome] = cost.outcomes.get(request.outcome, 0) + 1
        if owner is None:
            name = title(place) if place else "no fault"
            violations.append(_sentence(request, place, name))
    return Verdict(len(requests), failed, explained, costs, violations)


def title(one: Done) -> str:
    return " + ".join(sorted(event.fault for event in one.events))


def _add_round(cost: Cost, one: Done, requests: Sequence[Request]) -> None:
    cost.times += 1
    cost.requests += sum(request.end >= one.begun and request.start <= one.settled for request in requests)
    cost.recovery = max(cost.recovery, one.settled - max(event.undone for event in one.events))


def _explaining(request: Request, rounds: Sequence[Done], faults: Mapping[str, Fault]) -> Done | None:
    """The last round that explains it."""
    for one in reversed(rounds):
        if any(faults[event.fault].allowance(request, event) for event in one.events):
            return one
    return None


def _around(request: Request, rounds: Sequence[Done]) -> Done | None:
    """The last round that had begun when the request ended."""
    begun = [one for one in rounds if one.begun <= request.end]
    return begun[-1] if begun else None


def _sentence(request: Request, place: Done | None, name: str) -> str:
    since = f", {request.start - place.begun:+.2f} s after it began" if place else ""
    backend = f" on {request.backend}" if request.backend else ""
    node = f" to {request.node}" if request.node else ""
    took = request.end - request.start
    return f"{name}: a request ({request.kind}){node}{backend} failed: {request.outcome} after {took:.2f} s{since}"
