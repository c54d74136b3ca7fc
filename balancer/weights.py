"""Shares that follow the backends' speed, learnt from what the kernel counts anyway. Pure: time is an argument.

A backend is taken for an M/M/1 processor-sharing queue: at arrival rate λ it has L = ρ/(1−ρ) flows in hand, with
ρ = λ/μ, so its capacity is μ = λ(1+L)/L = λ + 1/S, where S = L/λ is the time a flow stays (Little's law). That is
right when it idles and tends to λ when it drowns; and as it lies between λ and 2λ once L ≥ 1, the wild swings of L on
a busy backend hardly move it.

Why it settles: shares move HALF way towards μ_i/Σμ, which depends on what the backends can do and, in the model, not
on the shares: a contraction by ½ an interval with the true speeds as its fixed point. The smoothing adds a lag of
1/α ≈ 3 intervals, which half steps tolerate. Against noise: a share that is off by less than DEADBAND, or less than the
estimate's own error, 3/√events to be sure, stays as it is.

Flows in hand are those that wait for their first answer, so kept-alive connections, idle or busy, say nothing here: the
requests on them only lengthen the wait of the new ones, as they should. Where all backends drown, every L is large,
μ_i ≈ λ_i confirms whatever shares there are, and LEAK draws them back towards equal until one backend comes up for air.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

ALPHA = 0.3  # weight of the newest interval in the smoothed rate and flows
HALF = 0.5  # of the way towards the target, each interval
DEADBAND = 0.1  # relative; changes below it do not matter
BOUND = 4.0  # no share under 1/BOUND or over BOUND times 1/n
BUSY = 0.5  # mean flows in hand below which the fleet is nearly idle and shares cannot matter
DEAF, LEAK = 8.0, 0.05  # with more flows than DEAF in hand everywhere, this part of the way back to equal an interval
RAMP = 4.0  # seconds of slow start
RAMP_STEPS = 4


@dataclass(frozen=True)
class Estimate:
    """One backend: smoothed connections per second and flows in hand, and its weight, on average 1 over the fleet."""

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
    had so many flows in hand on average. A backend not in `rates` is forgotten; a new one starts at the mean weight."""
    now = {
        id_: before[id_].blend(rate, flows[id_]) if id_ in before else Estimate(rate, flows[id_])
        for id_, rate in rates.items()
    }
    if len(now) < 2 or sum(estimate.flows for estimate in now.values()) < BUSY * len(now):
        return now
    total = sum(estimate.capacity for estimate in now.values())
    if total <= 0:
        return now
    wanted = {id_: _bounded(estimate.capacity * len(now) / total) for id_, estimate in now.items()}
    leak = LEAK if all(estimate.flows > DEAF for estimate in now.values()) else 0.0
    moved = {id_: replace(e, weight=_moved(e, wanted[id_], interval, leak)) for id_, e in now.items()}
    mean = sum(estimate.weight for estimate in moved.values()) / len(moved)
    return {id_: replace(e, weight=_bounded(e.weight / mean)) for id_, e in moved.items()}


def _moved(estimate: Estimate, wanted: float, interval: float, leak: float) -> float:
    events = estimate.rate * interval / ALPHA
    error = max(DEADBAND, 3 / math.sqrt(max(events, 1.0)))
    if abs(wanted - estimate.weight) <= error * estimate.weight:
        return estimate.weight + leak * (1 - estimate.weight)
    return estimate.weight + HALF * (wanted - estimate.weight)


def _bounded(weight: float) -> float:
    return min(BOUND, max(1 / BOUND, weight))


def slow_start(age: float) -> float:
    """The part of its share a backend gets `age` seconds after it got ready; in few steps: each is a rewrite."""
    return min(1.0, (math.floor(age / RAMP * RAMP_STEPS) + 1) / RAMP_STEPS)


@dataclass
class Learner:
    """Collects what the estimates need, interval by interval, and keeps who has been ready since when. Keys are ids."""

    estimates: Estimates = field(default_factory=dict)
    _ready: dict[str, float] = field(default_factory=dict)
    _waiting: dict[str, int] = field(default_factory=dict)
    _samples: int = 0
    _counted: dict[str, int] = field(default_factory=dict)
    _since: float | None = None

    def sample(self, waiting: Mapping[str, int]) -> None:
        """One look at the flows that wait for their first answer; several make an interval's average."""
        for id_, count in waiting.items():
            self._waiting[id_] = self._waiting.get(id_, 0) + count
        self._samples += 1

    def learn(self, connections: Mapping[str, int], now: float) -> None:
        """Ends the interval, given the absolute connection counters of the backends in rotation."""
        if self._since is not None and self._samples and now > self._since:
            interval = now - self._since
            rates = {id_: max(0, n - self._counted.get(id_, n)) / interval for id_, n in connections.items()}
            flows = {id_: self._waiting.get(id_, 0) / self._samples for id_ in connections}
            self.estimates = adapt(self.estimates, rates, flows, interval)
        self._counted, self._since, self._waiting, self._samples = dict(connections), now, {}, 0

    def ready(self, ids: Iterable[str], now: float) -> None:
        """These are ready now; whoever was not before starts slowly."""
        self._ready = {id_: self._ready.get(id_, now) for id_ in ids}

    def weight(self, id_: str, now: float, adaptive: bool) -> float:
        learnt = self.estimates[id_].weight if adaptive and id_ in self.estimates else 1.0
        return round(learnt * slow_start(now - self._ready.get(id_, now)), 3)

    def ramping(self, now: float) -> bool:
        return any(now - since < RAMP for since in self._ready.values())
