"""Decides how many backends to have, and gives the reason. Pure: time is an argument, memory an argument and a result.

The formula is that of the Kubernetes HorizontalPodAutoscaler: `desired = ceil(ready × ratio)` with `ratio = rate /
(ready × target)`, and a stabilization window for shrinking (kubernetes.io, "Algorithm details"). HPA's tolerance is
applied to shrinking only. For growing it would leave a fleet over its target for as long as the load stays there (a
step to 85 at target 10: 900 s in `tests/bench/replay.py`, against 8 s). The two averaging windows and panic are those
of Knative's KPA. Backends that are starting count as capacity; otherwise one burst would cause two scale-outs. Missing
data is never a zero: an incomplete load is a lower bound, so it may cause growing but not shrinking.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, field, replace
from enum import StrEnum
from operator import itemgetter
from typing import TypeVar

CREATE, STOP, OK = "CREATE_SERVER", "STOP_SERVER", "OK"
TOLERANCE = 0.1  # HPA's default. After shrinking, each backend has at most 1 - TOLERANCE of the target
MAX_GAP = 2.0  # in panic windows: after a longer time without a decision, the history begins again

T = TypeVar("T")


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
    """The whole fleet's load: `rate` in the policy's unit; `missing` names the balancers without a report."""

    rate: float
    missing: str = ""


@dataclass(frozen=True)
class Memory:
    """What one decision passes on to the next: when the history began, and (time, value) pairs, oldest first."""

    started: float
    rates: tuple[tuple[float, float], ...] = ()
    recommended: tuple[tuple[float, int], ...] = ()
    overloaded_at: float | None = None  # the last time the load was at least twice the capacity


class ClampKind(StrEnum):
    """A limit that changes the number of backends that the formula gives."""

    STEP = "step_limit"  # value: the most in one step
    MIN = "min"  # value: the policy's
    MAX = "max"  # value: the policy's
    LOAD_UNKNOWN = "load_unknown"  # detail: the balancers without a report
    NO_HISTORY = "no_history"  # value: seconds since the start, or since a gap without reports
    PANIC = "panic"
    STABLE_WINDOW = "stable_window"  # value: the largest number wanted within it; detail: its length


@dataclass(frozen=True)
class Clamp:
    """One limit that applied. Its sentence is made from these fields alone."""

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
                return f"the history is too short: it began {self.value:.0f} s ago"
            case ClampKind.PANIC:
                return "panic: the load passed twice the capacity within the stable window"
            case ClampKind.STABLE_WINDOW:
                return f"{self.value:g} wanted within the last {self.detail}"


@dataclass(frozen=True)
class Decision:
    """A verdict and every number that led to it. `clamps` are the limits that changed `raw`, in order; `reason` is the
    sentence made from all of them."""

    at: float
    verdict: str
    current: int
    desired: int
    rate: float
    ratio: float
    raw: int
    clamps: tuple[Clamp, ...]
    reason: str
    panic: bool = False  # the load passed twice the capacity within the stable window


@dataclass
class _Count:
    """The number of backends, from the formula to the decision, with the limits that changed it."""

    value: int
    clamps: list[Clamp] = field(default_factory=list)

    def limit(self, value: int, clamp: Clamp) -> None:
        if value != self.value:
            self.value = value
            self.clamps.append(clamp)


def decide(policy: Policy, memory: Memory, load: Load, capacity: int, now: float) -> tuple[Decision, Memory]:
    """The number of backends to have, given that `capacity` (≥ 1) are ready or starting; and the memory for the next
    decision. Times in seconds."""
    memory = _remember(policy, memory, load, now)

    # Panic begins at twice the capacity. It ends when the load has been lower for one stable window.
    short = _mean(memory.rates, now - policy.panic_window)
    if short >= 2 * capacity * policy.target:
        memory = replace(memory, overloaded_at=now)
    panic = memory.overloaded_at is not None and now - memory.overloaded_at < policy.stable_window
    rate = max(short, _mean(memory.rates, now - policy.stable_window)) if panic else short

    # The formula. Rounding keeps 3.0000000001 from becoming 4.
    ratio = rate / (capacity * policy.target)
    raw = math.ceil(round(rate / policy.target, 9))
    # Without a gap between growing and shrinking, a load close to a multiple of the target would make it alternate.
    if raw < capacity:
        raw = min(capacity, math.ceil(round(rate / (policy.target * (1 - TOLERANCE)), 9)))

    # The limits. One step is at most HPA's default: double, or 4 more, whichever is larger.
    count = _Count(raw)
    step = max(2 * capacity, capacity + 4)
    count.limit(min(count.value, step), Clamp(ClampKind.STEP, step))
    count.limit(max(count.value, policy.min), Clamp(ClampKind.MIN, policy.min))
    count.limit(min(count.value, policy.max), Clamp(ClampKind.MAX, policy.max))
    # Remembered before shrinking is limited, because that limit uses this recommendation, too.
    memory = replace(memory, recommended=(*memory.recommended, (now, count.value)))
    if count.value < capacity:
        fewest, clamp = _shrink_limit(policy, memory, load, panic, capacity)
        count.limit(max(count.value, fewest), clamp)

    desired = count.value
    verdict = CREATE if desired > capacity else STOP if desired < capacity else OK
    clamps = tuple(count.clamps)
    reason = _sentence(policy, rate, capacity, ratio, clamps)
    return Decision(now, verdict, capacity, desired, rate, ratio, raw, clamps, reason, panic), memory


def _sentence(policy: Policy, rate: float, capacity: int, ratio: float, clamps: tuple[Clamp, ...]) -> str:
    backends = "1 backend" if capacity == 1 else f"{capacity} backends"
    load = f"{rate:.4g} {policy.unit} over {backends} = {rate / capacity:.4g} each"
    figures = f"{load}, target {policy.target:g} ({ratio:.2f}×)"
    return "; ".join([figures, *(clamp.sentence for clamp in clamps)])


def _shrink_limit(policy: Policy, memory: Memory, load: Load, panic: bool, capacity: int) -> tuple[int, Clamp]:
    """The fewest backends allowed, and why. Shrinking needs complete data, a stable window of history, no panic, and
    that no recommendation within the window was higher. They are checked in this order."""
    now, _ = memory.recommended[-1]
    if load.missing:
        return capacity, Clamp(ClampKind.LOAD_UNKNOWN, detail=load.missing)
    if now - memory.started < policy.stable_window:
        return capacity, Clamp(ClampKind.NO_HISTORY, now - memory.started)
    if panic:
        return capacity, Clamp(ClampKind.PANIC)
    # At most the present number: a higher recommendation prevents shrinking but does not grow the fleet.
    highest = min(capacity, max(value for _, value in memory.recommended))
    return highest, Clamp(ClampKind.STABLE_WINDOW, highest, f"{policy.stable_window:g} s")


def _remember(policy: Policy, memory: Memory, load: Load, now: float) -> Memory:
    """The memory with this load added and entries older than the stable window removed."""
    since = now - policy.stable_window
    last = memory.rates[-1][0] if memory.rates else now
    # After a gap (the process was stopped, or no balancer reported), the history does not cover a stable window.
    interrupted = now - last > MAX_GAP * policy.panic_window
    rates, recommended = _after(memory.rates, since), _after(memory.recommended, since)
    started = now if interrupted else memory.started
    return replace(memory, started=started, rates=(*rates, (now, load.rate)), recommended=recommended)


def _after(pairs: tuple[tuple[float, T], ...], since: float) -> tuple[tuple[float, T], ...]:
    """The pairs later than `since`. They are in order, so a window of thousands of pairs needs no pass over them."""
    return pairs[bisect_right(pairs, since, key=itemgetter(0)) :]


def _mean(rates: tuple[tuple[float, float], ...], since: float) -> float:
    # Never empty: the newest rate was measured now.
    values = [rate for _, rate in _after(rates, since)]
    return sum(values) / len(values)
