"""What the fleet of the last hour would have been with other settings: each recorded load is decided again. Pure.

The replay begins with the fleet and the scaler's memory of that time, as if the settings had been changed then. So with
unchanged settings it makes the decisions that were made. It assumes that the load does not depend on the fleet, and
that backends start at once. Memory and time are bounded by MAX_DECISIONS.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from core import scaler
from core.scaler import Load, Memory, Policy
from core.settings import Settings, check_together, parse

SPAN = 3600.0  # seconds
MAX_DECISIONS = 2400  # an hour at an interval of 2 s: decisions are at least 1.5 s apart


@dataclass(frozen=True, slots=True)
class Recorded:
    """One decision: when, by which policy, from which load; the desired number of backends before and after it."""

    at: float
    policy: Policy
    load: Load
    before: int
    after: int


@dataclass(frozen=True)
class Course:
    """A fleet over time: the desired number of backends after each decision, and what it amounts to. `changes`:
    decisions that changed the number. `highest_load`: of one backend, in the metric's unit."""

    backends: list[int]
    backend_hours: float
    peak: int
    changes: int
    highest_load: float


@dataclass(frozen=True)
class WhatIf:
    """The fleet as it was and as it would have been. `times` are those of the decisions, in seconds since 1970."""

    times: list[float]
    actual: Course
    simulated: Course


class Recording:
    """The decisions of the last hour, and the memory before the oldest of them."""

    def __init__(self, memory: Memory, decisions: Sequence[Recorded] = ()) -> None:
        self.memory, self.decisions = memory, deque(decisions)

    def add(self, newest: Recorded) -> None:
        """Adds a decision, and takes those that are too old over into the memory."""
        self.decisions.append(newest)
        while len(self.decisions) > MAX_DECISIONS or newest.at - self.decisions[0].at > SPAN:
            old = self.decisions.popleft()
            _, self.memory = scaler.decide(old.policy, self.memory, old.load, old.before, old.at)

    def copy(self) -> Recording:
        return Recording(self.memory, self.decisions)


def policy_with(settings: Settings, policy: Policy, texts: Mapping[str, str]) -> Policy:
    """The policy with these settings, by name, instead of those in force. Raises SettingError."""
    values = {}
    for name, text in texts.items():
        values[name] = parse(name, text)
    check_together(replace(settings, **values))
    return replace(policy, **values)


def replay(recording: Recording, policy: Policy, epoch: float) -> WhatIf:
    """The recorded loads, decided by `policy`. `epoch`: seconds since 1970 at the zero of the recording's clock."""
    memory = recording.memory
    simulated: list[Recorded] = []
    for one in recording.decisions:
        size = simulated[-1].after if simulated else one.before
        decision, memory = scaler.decide(policy, memory, one.load, size, one.at)
        simulated.append(replace(one, before=size, after=decision.desired))
    times = [round(epoch + one.at, 3) for one in simulated]
    return WhatIf(times, _course(recording.decisions), _course(simulated))


def _course(decisions: Sequence[Recorded]) -> Course:
    backends: list[int] = []
    seconds, changes, highest_load = 0.0, 0, 0.0
    at = decisions[0].at if decisions else 0.0
    for one in decisions:
        # As many as before this decision, since the one before.
        seconds += one.before * (one.at - at)
        at = one.at
        backends.append(one.after)
        changes += one.after != one.before
        highest_load = max(highest_load, one.load.rate / one.before)
    return Course(backends, round(seconds / 3600, 3), max(backends, default=0), changes, round(highest_load, 3))
