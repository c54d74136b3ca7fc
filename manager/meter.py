"""Absolute counters from any number of balancers in, rates out. Pure: time is an argument.

A counter that went down was restarted, so its new value is what came since. A balancer that misses reports is unknown
load, never zero; one silent for FORGET seconds is taken to be gone for good.

A report costs its own rows, whoever else reports: what all say of an address is kept as sums, which a balancer's old
rows leave when its new ones enter.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from fleet import Backend
from scaler import Load

MISSED = 1.5  # intervals without a report until a balancer's last one no longer counts
FORGET = 20.0  # seconds
FINEST = 2.0**-24  # of a rate or a share: sums of its multiples are exact, and so back at zero when all have left them


@dataclass(frozen=True, slots=True)
class Sample:
    """One backend in one report: counters since the balancer began, `active` right now, `healthy` None if unknown."""

    connections: int
    packets: int
    bytes: int
    active: int
    healthy: bool | None
    share: float | None = None  # of the balancer's new connections
    id: str = ""  # the container's, where told: the address may have had another backend before
    why: str = ""  # what the last probe met


@dataclass(frozen=True)
class Report:
    balancer: str
    revision: str
    interval: float
    backends: Mapping[str, Sample]  # by address
    warnings: tuple[str, ...] = ()  # what the balancer wants the operator to know


class _Rates(NamedTuple):
    """Per second; `concurrency` is what was open when they were measured."""

    connections: float = 0.0
    packets: float = 0.0
    concurrency: float = 0.0


NO_RATES = _Rates()


@dataclass
class _Balancer:
    report: Report  # the newest
    at: float
    base: Report  # the one that rates are measured from, and when it came
    base_at: float
    rates: Mapping[str, _Rates] | None = None  # by address; None: one report so far
    load: _Rates = NO_RATES  # the sum of them


@dataclass
class _Said:
    """What the balancers' newest reports say of one address, all together."""

    balancers: int = 0
    shares: int = 0  # how many of them tell a share
    share: float = 0.0
    connections: int = 0
    packets: int = 0
    bytes: int = 0
    active: int = 0
    connections_rate: float = 0.0
    packets_rate: float = 0.0
    verdicts: Counter[tuple[str, bool | None, str]] = field(default_factory=Counter)  # (id, healthy, why) → balancers

    def add(self, sample: Sample, rates: _Rates, sign: int) -> None:
        """Takes one balancer's word in, or, with a `sign` of -1, back out."""
        self.balancers += sign
        if sample.share is not None:
            self.shares += sign
            self.share += sign * _exact(sample.share)
        self.connections += sign * sample.connections
        self.packets += sign * sample.packets
        self.bytes += sign * sample.bytes
        self.active += sign * sample.active
        self.connections_rate += sign * rates.connections
        self.packets_rate += sign * rates.packets
        verdict = (sample.id, sample.healthy, sample.why)
        self.verdicts[verdict] += sign
        if not self.verdicts[verdict]:
            del self.verdicts[verdict]


TOTALS = ("connections", "packets", "bytes", "active", "connections_rate", "packets_rate")


@dataclass
class Meter:
    balancers: dict[str, _Balancer] = field(default_factory=dict)
    _said: defaultdict[str, _Said] = field(default_factory=lambda: defaultdict(_Said))  # by address

    def add(self, report: Report, now: float) -> bool:
        """Takes a report in; False when it brings news of health but came too soon to measure a rate by."""
        entry = self.balancers.get(report.balancer)
        if entry is None:
            self.balancers[report.balancer] = entry = _Balancer(report, now, report, now)
            self._count(entry, 1)
            return False
        self._count(entry, -1)
        entry.report, entry.at = report, now
        elapsed = now - entry.base_at
        measured = elapsed >= report.interval / 2
        if measured:
            old = entry.base.backends
            entry.rates = {ip: _rates(sample, old.get(ip), elapsed) for ip, sample in report.backends.items()}
            entry.load = _Rates(*map(sum, zip(*entry.rates.values(), strict=True)))
            entry.base, entry.base_at = report, now
        self._count(entry, 1)
        return measured

    def _count(self, entry: _Balancer, sign: int) -> None:
        for ip, sample in entry.report.backends.items():
            said = self._said[ip]
            said.add(sample, (entry.rates or {}).get(ip, NO_RATES), sign)
            if not said.balancers:
                del self._said[ip]  # and with it what rounding has left in its sums

    def warnings(self, balancer: str) -> tuple[str, ...]:
        """What that balancer warned of in its newest report."""
        return self.balancers[balancer].report.warnings if balancer in self.balancers else ()

    def forget_gone(self, now: float) -> None:
        for name in [name for name, entry in self.balancers.items() if now - entry.at > FORGET]:
            self._count(self.balancers.pop(name), -1)

    def load(self, metric: str, now: float) -> Load | None:
        """The fleet's load by `metric` (packets, connections or concurrency); None while nobody could measure any."""
        self.forget_gone(now)
        silent = {name for name, entry in self.balancers.items() if now - entry.at > MISSED * entry.report.interval}
        measured = [e.load for name, e in self.balancers.items() if e.rates is not None and name not in silent]
        if not measured:
            return None
        return Load(sum(getattr(load, metric) for load in measured), ", ".join(sorted(silent)))

    def backend(self, ip: str) -> dict[str, float]:
        """One backend's counters and rates, summed over the balancers."""
        said = self._said.get(ip, _Said())
        return {name: float(getattr(said, name)) for name in TOTALS}

    def share(self, backend: Backend) -> float:
        """Its part of all new connections, on average over the balancers that say."""
        said = self._said.get(backend.ip)
        return said.share / said.shares if said and said.shares else 0.0

    def healthy(self, backend: Backend) -> bool | None:
        """Whether any balancer finds it well; None while none has an opinion."""
        opinions = [healthy for healthy, _ in self._verdicts(backend) if healthy is not None]
        return any(opinions) if opinions else None

    def why(self, backend: Backend) -> str:
        """What the last probe that found it ill met; empty where it is well, or nobody says."""
        return next((why for healthy, why in self._verdicts(backend) if not healthy), "")

    def _verdicts(self, backend: Backend) -> list[tuple[bool | None, str]]:
        said = self._said.get(backend.ip)
        ours = ("", backend.short_id)
        return [(healthy, why) for id_, healthy, why in said.verdicts if id_ in ours] if said else []


def _rates(now: Sample, before: Sample | None, elapsed: float) -> _Rates:
    def rate(new: int, old: int) -> float:
        return _exact((new - old if new >= old else new) / elapsed)

    old = before or Sample(0, 0, 0, 0, None)
    return _Rates(rate(now.connections, old.connections), rate(now.packets, old.packets), float(now.active))


def _exact(value: float) -> float:
    return round(value / FINEST) * FINEST
