"""Shares that follow the backends' speed, learnt from what the kernel counts anyway. Pure: time is an argument.

A backend is taken for an M/M/1 processor-sharing queue: at arrival rate λ it has L = ρ/(1−ρ) waiting flows, with
ρ = λ/μ, so its capacity is μ = λ(1+L)/L = λ + 1/S, where S = L/λ is the time a flow waits (Little's law). That is
right when it idles and tends to λ when it is overloaded; and as it lies between λ and 2λ once L ≥ 1, the wild swings
of L on a busy backend hardly move it.

Being fast is not rewarded beyond HEADROOM times the median of the backends that keep up: a backend that answers every
request at once with an error has L ≈ 0, and would otherwise draw most of the traffic.

Why it settles: shares move HALF way towards μ_i/Σμ, which depends on what the backends can do and, in the model, not
on the shares: a contraction by ½ an interval with the true speeds as its fixed point. The smoothing adds a lag of
1/α ≈ 3 intervals, which half steps tolerate. Against noise: a share that is off by less than DEADBAND, or less than the
estimate's own error, 3/√events to be sure, stays as it is.

Only flows that wait for their first reply count, so kept-alive connections, idle or busy, say nothing here: the
requests on them only lengthen the wait of the new ones, as they should. Where all backends are overloaded, every L is
large and μ_i ≈ λ_i confirms whatever shares there are; RETURN_STEP then draws them back towards equal until one backend
keeps up again.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import median_low

ALPHA = 0.3  # weight of the newest interval in the smoothed rate and flows
HALF = 0.5  # of the way towards the target, each interval
DEADBAND = 0.1  # relative; changes below it do not matter
BOUND = 4.0  # no share under 1/BOUND or over BOUND times 1/n
BUSY = 0.5  # mean waiting flows below which the fleet is nearly idle and shares cannot matter
KEEPS_UP = 8.0  # mean waiting flows at most; with more a backend is overloaded, and its speed says nothing about others
RETURN_STEP = 0.05  # of the way, each interval: back to equal where every backend is overloaded, down to a new cap
HEADROOM = 1.25  # times the median capacity: the most that a capacity counts for
RAMP = 4.0  # seconds of slow start
RAMP_STEPS = 4


@dataclass(frozen=True)
class Estimate:
    """One backend: smoothed connections per second and waiting flows, and its weight, on average 1 over the fleet."""

    rate: float
    flows: float
    weight: float = 1.0
    intervals: int = 1

    def blend(self, rate: float, flows: float) -> Estimate:
        """With one more interval: a plain mean at first, exponential smoothing from 1/ALPHA intervals on."""
        share = max(ALPHA, 1 / (self.intervals + 1))
        return replace(
            self,
            rate=self.rate + share * (rate - self.rate),
            flows=self.flows + share * (flows - self.flows),
            intervals=self.intervals + 1,
        )

    @property
    def capacity(self) -> float:
        """μ in connections per second; infinite on no flows at all, so ask only of a busy fleet."""
        return self.rate * (1 + self.flows) / max(self.flows, 0.05)


Estimates = Mapping[str, Estimate]  # by backend id


def adapt(before: Estimates, rates: Mapping[str, float], flows: Mapping[str, float], interval: float) -> Estimates:
    """The estimates after an interval (seconds) in which each backend of `rates` got so many connections per second and
    had so many waiting flows on average. A backend not in `rates` is forgotten; a new one starts at the mean weight."""
    now = {
        id_: before[id_].blend(rate, flows[id_]) if id_ in before else Estimate(rate, flows[id_])
        for id_, rate in rates.items()
    }
    if len(now) < 2 or sum(estimate.flows for estimate in now.values()) < BUSY * len(now):
        return now
    capacities = _capped(now)
    total = sum(capacities.values())
    if total <= 0:
        return now
    overloaded = all(estimate.flows > KEEPS_UP for estimate in now.values())
    moved = {}
    for id_, estimate in now.items():
        wanted = _bounded(capacities[id_] * len(now) / total)
        is_capped = capacities[id_] < estimate.capacity
        weight = _moved(estimate, wanted, interval, is_capped)
        if overloaded and weight == estimate.weight:
            weight += RETURN_STEP * (1 - weight)
        moved[id_] = replace(estimate, weight=weight)
    mean = sum(estimate.weight for estimate in moved.values()) / len(moved)
    return {id_: replace(e, weight=_bounded(e.weight / mean)) for id_, e in moved.items()}


def _capped(estimates: Estimates) -> dict[str, float]:
    """Capacities, none above HEADROOM times the lower median of those that keep up. Where fewer than half do, of all:
    a backend that fails every request at once must not be the only measure while the others are overloaded."""
    keeping_up = [estimate for estimate in estimates.values() if estimate.flows <= KEEPS_UP]
    measure = keeping_up if 2 * len(keeping_up) >= len(estimates) else list(estimates.values())
    most = HEADROOM * median_low([estimate.capacity for estimate in measure])
    return {id_: min(estimate.capacity, most) for id_, estimate in estimates.items()}


def _moved(estimate: Estimate, wanted: float, interval: float, is_capped: bool) -> float:
    """The weight one interval later. The cap is lifted and set again as a slow backend stops and begins to keep up:
    what it takes away, it takes away slowly, or shares would swing."""
    events = estimate.rate * interval / ALPHA
    error = max(DEADBAND, 3 / math.sqrt(max(events, 1.0)))
    if abs(wanted - estimate.weight) <= error * estimate.weight:
        return estimate.weight
    step = RETURN_STEP if is_capped and wanted < estimate.weight else HALF
    return estimate.weight + step * (wanted - estimate.weight)


def _bounded(weight: float) -> float:
    return min(BOUND, max(1 / BOUND, weight))


def slow_start(age: float) -> float:
    """The part of its share a backend gets `age` seconds after it got ready; in few steps: each is a rewrite."""
    return min(1.0, (math.floor(age / RAMP * RAMP_STEPS) + 1) / RAMP_STEPS)


class Learner:
    """Collects what the estimates need, interval by interval, and keeps who has been ready since when. Keys are ids.

    Threads share it: the lock guards every field."""

    def __init__(self, estimates: Estimates | None = None) -> None:
        self._lock = threading.Lock()
        self._estimates: Estimates = dict(estimates or {})
        self._ready: dict[str, float] = {}
        self._waiting: dict[str, int] = {}
        self._samples = 0
        self._counted: dict[str, int] = {}
        self._since: float | None = None

    @property
    def estimates(self) -> Estimates:
        with self._lock:
            return self._estimates

    def sample(self, waiting: Mapping[str, int]) -> None:
        """One sample of the flows that wait for their first reply; several make an interval's average."""
        with self._lock:
            for id_, count in waiting.items():
                self._waiting[id_] = self._waiting.get(id_, 0) + count
            self._samples += 1

    def learn(self, connections: Mapping[str, int], now: float) -> None:
        """Ends the interval, given the absolute connection counters of the backends in rotation."""
        with self._lock:
            if self._since is not None and self._samples and now > self._since:
                interval = now - self._since
                rates = {id_: max(0, n - self._counted.get(id_, n)) / interval for id_, n in connections.items()}
                flows = {id_: self._waiting.get(id_, 0) / self._samples for id_ in connections}
                self._estimates = adapt(self._estimates, rates, flows, interval)
            self._counted, self._since, self._waiting, self._samples = dict(connections), now, {}, 0

    def ready(self, ids: Iterable[str], now: float) -> None:
        """These are ready now; whoever was not before starts slowly."""
        with self._lock:
            self._ready = {id_: self._ready.get(id_, now) for id_ in ids}

    def weight(self, id_: str, now: float, adaptive: bool) -> float:
        with self._lock:
            learnt = self._estimates[id_].weight if adaptive and id_ in self._estimates else 1.0
            return round(learnt * slow_start(now - self._ready.get(id_, now)), 3)

    def ramping(self, now: float) -> bool:
        with self._lock:
            return any(now - since < RAMP for since in self._ready.values())
