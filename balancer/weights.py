"""Weights that follow the backends' speed, estimated from what the kernel counts anyway. Pure: time is an argument.

Each backend is modelled as an M/M/1 processor-sharing queue: at arrival rate λ it has L = ρ/(1−ρ) waiting flows, with
ρ = λ/μ. So its capacity is μ = λ(1+L)/L = λ + 1/S, where S = L/λ is the time a flow waits (Little's law). This is exact
for an idle backend and tends to λ for an overloaded one. For L ≥ 1 it lies between λ and 2λ, so the large swings of L
on a busy backend change it little.

A capacity counts for at most HEADROOM times the median of the backends that keep up. A backend that answers every
request immediately with an error has L ≈ 0, and would otherwise get most of the traffic.

Stability: each interval, weights move STEP of the way towards μ_i/Σμ. In the model this target depends on the backends'
speed only, not on the weights, so the distance to it halves each interval. The smoothing adds a lag of 1/α ≈ 3
intervals, which is stable with half steps. Against noise, a weight does not change while its distance to the target is
below DEADBAND, or below three standard errors of the estimate, 3/√events.

Only flows that wait for their first reply count. Later requests on kept-alive connections have an indirect effect: they
lengthen that wait. If all backends are overloaded, every L is large and μ_i ≈ λ_i, so the estimates confirm any
weights. RETURN_STEP then moves the weights towards equal ones until one backend keeps up again.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import median_low

ALPHA = 0.3  # share of the newest interval in the smoothed rate and flows
STEP = 0.5  # of the way towards the target, each interval
DEADBAND = 0.1  # relative; smaller changes do not matter
BOUND = 4.0  # every weight is between 1/BOUND and BOUND
BUSY = 0.5  # mean waiting flows; with fewer the fleet is nearly idle, and weights have no effect
KEEPS_UP = 8.0  # mean waiting flows; with more a backend is overloaded, and its rate is not its capacity
RETURN_STEP = 0.05  # of the way, each interval: to equal weights if every backend is overloaded, and down to a cap
HEADROOM = 1.25  # times the median capacity: the most that a capacity counts for
RAMP = 4.0  # seconds of slow start
RAMP_STEPS = 4  # few, because each is a rewrite of rules


@dataclass(frozen=True)
class Estimate:
    """One backend: smoothed connections per second and waiting flows, and its weight. The fleet's mean weight is 1."""

    rate: float
    flows: float
    weight: float = 1.0
    intervals: int = 1

    def blend(self, rate: float, flows: float) -> Estimate:
        """The estimate after one more interval: a mean at first, exponential smoothing from 1/ALPHA intervals on."""
        share = max(ALPHA, 1 / (self.intervals + 1))
        return replace(
            self,
            rate=self.rate + share * (rate - self.rate),
            flows=self.flows + share * (flows - self.flows),
            intervals=self.intervals + 1,
        )

    @property
    def capacity(self) -> float:
        """μ in connections per second. Meaningless without waiting flows: use it for a busy fleet only."""
        return self.rate * (1 + self.flows) / max(self.flows, 0.05)


Estimates = Mapping[str, Estimate]  # by backend id


def adapt(before: Estimates, rates: Mapping[str, float], flows: Mapping[str, float], interval: float) -> Estimates:
    """The estimates after an interval (seconds), given each backend's connections per second and mean waiting flows.
    Backends that are not in `rates` are left out; new ones start with the mean weight."""
    now = {}
    for id_, rate in rates.items():
        now[id_] = before[id_].blend(rate, flows[id_]) if id_ in before else Estimate(rate, flows[id_])
    # Without waiting flows, there is nothing to estimate a capacity from.
    idle = sum(estimate.flows for estimate in now.values()) < BUSY * len(now)
    if len(now) < 2 or idle:
        return now
    # The weights that follow from the capacities.
    capacities = _capped(now)
    total = sum(capacities.values())
    if total <= 0:
        return now
    overloaded = all(estimate.flows > KEEPS_UP for estimate in now.values())
    weights = {}
    for id_, estimate in now.items():
        wanted = _bounded(capacities[id_] * len(now) / total)
        is_capped = capacities[id_] < estimate.capacity
        weight = _moved(estimate, wanted, interval, is_capped)
        if overloaded and weight == estimate.weight:
            weight += RETURN_STEP * (1 - weight)
        weights[id_] = weight
    # Scale them to a mean of 1.
    mean = sum(weights.values()) / len(weights)
    return {id_: replace(estimate, weight=_bounded(weights[id_] / mean)) for id_, estimate in now.items()}


def _capped(estimates: Estimates) -> dict[str, float]:
    """Capacities of at most HEADROOM times the lower median. The median is that of the backends that keep up, or of all
    if fewer than half do: otherwise one backend that fails every request immediately could set the cap for all."""
    keeping_up = [estimate for estimate in estimates.values() if estimate.flows <= KEEPS_UP]
    measured = keeping_up if 2 * len(keeping_up) >= len(estimates) else estimates.values()
    cap = HEADROOM * median_low(estimate.capacity for estimate in measured)
    return {id_: min(estimate.capacity, cap) for id_, estimate in estimates.items()}


def _moved(estimate: Estimate, wanted: float, interval: float, is_capped: bool) -> float:
    """The weight one interval later. It falls to a cap slowly: a slow backend that keeps up only at times moves the
    cap up and down, and the weights would oscillate with it."""
    # The smoothed rate rests on the connections of about 1/ALPHA intervals.
    events = estimate.rate * interval / ALPHA
    error = max(DEADBAND, 3 / math.sqrt(max(events, 1.0)))
    if abs(wanted - estimate.weight) <= error * estimate.weight:
        return estimate.weight
    step = RETURN_STEP if is_capped and wanted < estimate.weight else STEP
    return estimate.weight + step * (wanted - estimate.weight)


def _bounded(weight: float) -> float:
    return min(BOUND, max(1 / BOUND, weight))


def slow_start(age: float) -> float:
    """The part of its share that a backend gets `age` seconds after it became ready."""
    return min(1.0, (math.floor(age / RAMP * RAMP_STEPS) + 1) / RAMP_STEPS)


class Learner:
    """Collects each interval's input of the estimates, and the time since which each backend is ready. Keys are ids.

    Threads share it: the lock guards every field."""

    def __init__(self, estimates: Estimates | None = None) -> None:
        self._lock = threading.Lock()
        self._estimates: Estimates = dict(estimates or {})
        self._ready: dict[str, float] = {}
        self._waiting: Counter[str] = Counter()
        self._samples = 0
        self._counted: dict[str, int] = {}
        self._since: float | None = None

    def sample(self, waiting: Mapping[str, int]) -> None:
        """Adds one sample of the flows that wait for their first reply; an interval's samples are averaged."""
        with self._lock:
            self._waiting.update(waiting)
            self._samples += 1

    def learn(self, connections: Mapping[str, int], now: float, known: Collection[str]) -> None:
        """Ends the interval, given the absolute connection counters of the backends in rotation. The other `known` ones
        keep their estimates."""
        with self._lock:
            if self._since is not None and self._samples and now > self._since:
                interval = now - self._since
                rates, flows = {}, {}
                for id_, count in connections.items():
                    # A backend that was not in rotation before has no whole interval yet.
                    if id_ not in self._counted:
                        continue
                    # A counter that was restarted counts no connections in this interval.
                    rates[id_] = max(0, count - self._counted[id_]) / interval
                    flows[id_] = self._waiting[id_] / self._samples
                kept = {id_: estimate for id_, estimate in self._estimates.items() if id_ in known}
                self._estimates = {**kept, **adapt(kept, rates, flows, interval)}
            self._counted, self._since, self._waiting, self._samples = dict(connections), now, Counter(), 0

    def ready(self, ids: Iterable[str], now: float) -> None:
        """Notes which backends are ready now. Those that were not ready before start slowly."""
        with self._lock:
            self._ready = {id_: self._ready.get(id_, now) for id_ in ids}

    def weight(self, id_: str, now: float, adaptive: bool) -> float:
        with self._lock:
            learnt = self._estimates[id_].weight if adaptive and id_ in self._estimates else 1.0
            return round(learnt * slow_start(now - self._ready.get(id_, now)), 3)

    def ramping(self, now: float) -> bool:
        """Whether a backend is in its slow start."""
        with self._lock:
            return any(now - since < RAMP for since in self._ready.values())
