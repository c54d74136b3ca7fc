"""Load and policy in, Decision with its reason out. Pure: time is an argument, and memory goes in and comes out.

The rule is the Kubernetes HorizontalPodAutoscaler's: `desired = ceil(ready × ratio)` with `ratio = rate / (ready ×
target)`, and a stabilization window for shrinking (kubernetes.io, "Algorithm details"). Its tolerance we keep below 1
only: above, it leaves a fleet over its target for as long as the load stays there (a step to 85 at target 10: 900 s in
`tests/bench/replay.py`, against 8). From Knative's KPA come the two averaging windows and panic. Backends that are
starting count as capacity, so one burst is not answered twice. Missing data is never a zero: an incomplete load is a
lower bound, good for growing only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import StrEnum

CREATE, STOP, OK = "CREATE_SERVER", "STOP_SERVER", "OK"
TOLERANCE = 0.1  # HPA's default: a ratio this little under 1 is no reason to shrink


# Without a decision for so many panic windows, what was remembered says nothing of the time in between.
GAP = 2.0


@dataclass(frozen=True)
class Policy:
    """Windows in seconds; `target` in units of the metric per backend."""

    min: int
    max: int
    target: float
    metric: str = "packets"
    stable_window: float = 60.0
    panic_window: float = 6.0

    @property
    def unit(self) -> str:
        return "open connections" if self.metric == "concurrency" else f"{self.metric}/s"


@dataclass(frozen=True)
class Load:
    """The whole fleet's load: `rate` in the policy's unit; `missing` says whose report is not there."""

    rate: float
    missing: str = ""


@dataclass(frozen=True)
class Memory:
    """What the next decision has to remember: when the manager started, and (time, value) pairs, oldest first."""

    started: float
    rates: tuple[tuple[float, float], ...] = ()
    recommended: tuple[tuple[float, int], ...] = ()
    panic_since: float | None = None  # the last time the load crossed twice the capacity


class ClampKind(StrEnum):
    """A limit that changes the number of backends which the formula gives."""

    STEP = "step_limit"  # value: the most in one step
    MIN = "min"  # value: the policy's
    MAX = "max"  # value: the policy's
    LOAD_UNKNOWN = "load_unknown"  # detail: whose report is missing
    NO_HISTORY = "no_history"  # value: seconds since the manager started
    PANIC = "panic"
    STABLE_WINDOW = "stable_window"  # value: the most that were wanted within it; detail: its length


@dataclass(frozen=True)
class Clamp:
    """One limit that applied. The sentence for people is made from these fields, and from nothing else."""

    kind: ClampKind
    value: float = 0
    detail: str = ""

    @property
    def sentence(self) -> str:
        match self.kind:
            case ClampKind.STEP:
                return f"at most {self.value:g} in one step"
            case ClampKind.MIN | ClampKind.MAX:
                return f"{self.kind.value} {self.value:g}"
            case ClampKind.LOAD_UNKNOWN:
                return f"load unknown: no report from {self.detail}"
            case ClampKind.NO_HISTORY:
                return f"no history yet: started {self.value:.0f} s ago"
            case ClampKind.PANIC:
                return "panic: the load passed twice the capacity within the stable window"
            case ClampKind.STABLE_WINDOW:
                return f"{self.value:g} wanted within the last {self.detail}"


@dataclass(frozen=True)
class Decision:
    """What to do, and every number that led there; `clamps` are the limits that changed `raw`, in order. `reason` is
    the sentence made from them."""

    at: float
    verdict: str
    current: int
    desired: int
    rate: float
    ratio: float
    raw: int
    clamps: tuple[Clamp, ...]
    reason: str


@dataclass
class _Course:
    """The number of backends on its way from the formula to the decision, and the limits that changed it."""

    value: int
    clamps: list[Clamp] = field(default_factory=list)

    def limit(self, value: int, clamp: Clamp) -> None:
        if value != self.value:
            self.value = value
            self.clamps.append(clamp)


def decide(policy: Policy, memory: Memory, load: Load, capacity: int, now: float) -> tuple[Decision, Memory]:
    """How many backends there should be, given that `capacity` (≥ 1) are ready or starting."""
    memory = _remember(policy, memory, load, now)
    short, stable = _mean(memory.rates, now - policy.panic_window), _mean(memory.rates, now - policy.stable_window)
    if short >= 2 * capacity * policy.target:
        memory = replace(memory, panic_since=now)
    panic = memory.panic_since is not None and now - memory.panic_since < policy.stable_window
    rate = max(short, stable) if panic else short

    ratio = rate / (capacity * policy.target)
    raw = capacity if 1 - TOLERANCE <= ratio <= 1 else math.ceil(round(rate / policy.target, 9))
    course = _Course(raw)
    if raw > capacity:
        step = max(2 * capacity, capacity + 4)
        course.limit(min(raw, step), Clamp(ClampKind.STEP, step))
    course.limit(max(course.value, policy.min), Clamp(ClampKind.MIN, policy.min))
    course.limit(min(course.value, policy.max), Clamp(ClampKind.MAX, policy.max))
    memory = replace(memory, recommended=(*memory.recommended, (now, course.value)))
    if course.value < capacity:
        value, clamp = _shrink_limit(policy, memory, load, panic, capacity)
        course.limit(max(course.value, value), clamp)

    desired = course.value
    verdict = CREATE if desired > capacity else STOP if desired < capacity else OK
    each = f"{rate:.4g} {policy.unit} over {capacity} backend{'s' * (capacity != 1)} = {rate / capacity:.4g} each"
    reason = f"{each}, target {policy.target:g} ({ratio:.2f}×)" + "".join(
        f"; {clamp.sentence}" for clamp in course.clamps
    )
    decision = Decision(now, verdict, capacity, desired, rate, ratio, raw, tuple(course.clamps), reason)
    return decision, memory


def _shrink_limit(policy: Policy, memory: Memory, load: Load, panic: bool, capacity: int) -> tuple[int, Clamp]:
    """The fewest backends to go down to, and why: shrinking waits for data, for history, for calm, for agreement."""
    now, _ = memory.recommended[-1]
    if load.missing:
        return capacity, Clamp(ClampKind.LOAD_UNKNOWN, detail=load.missing)
    if now - memory.started < policy.stable_window:
        return capacity, Clamp(ClampKind.NO_HISTORY, now - memory.started)
    if panic:
        return capacity, Clamp(ClampKind.PANIC)
    highest = min(capacity, max(value for _, value in memory.recommended))
    return highest, Clamp(ClampKind.STABLE_WINDOW, highest, f"{policy.stable_window:g} s")


def _remember(policy: Policy, memory: Memory, load: Load, now: float) -> Memory:
    since = now - policy.stable_window
    last = memory.rates[-1][0] if memory.rates else now
    return replace(
        memory,
        started=now if now - last > GAP * policy.panic_window else memory.started,
        rates=(*(pair for pair in memory.rates if pair[0] > since), (now, load.rate)),
        recommended=tuple(pair for pair in memory.recommended if pair[0] > since),
    )


def _mean(rates: tuple[tuple[float, float], ...], since: float) -> float:
    values = [rate for at, rate in rates if at > since]
    return sum(values) / len(values)
