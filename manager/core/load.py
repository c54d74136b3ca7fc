"""Absolute counters from any number of balancers in, rates out. Pure: time is an argument.

A counter that went down was restarted, so its new value is what came since. Rates are measured by the sender's clock
where the report has it, so a report that waited on its way changes none. A balancer that misses reports keeps its last
known load, and that load counts as incomplete, until the engine says that the balancer is gone.

A report costs its own rows, however many balancers report: what all of them report of an address is kept as sums. A
balancer's old rows are taken out of them when its new ones come.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from core.fleet import Backend, Verdict
from core.scaler import Load

MISSED = 1.5  # intervals without a report until a balancer counts as silent
FINEST = 2.0**-24  # of a rate or a share: sums of its multiples are exact, and so back at zero without any balancer


@dataclass(frozen=True, slots=True)
class Sample:
    """One backend in one report: counters since the balancer began, `active` right now, `healthy` None if unknown."""

    connections: int
    packets: int
    bytes: int
    active: int
    healthy: bool | None
    share: float | None = None  # of the balancer's new connections
    id: str = ""  # the container's, where reported: the address may have had another backend before
    why: str = ""  # what the last probe met
    cause: str = ""  # where it is unhealthy, the kind of cause


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong with the data path: `kind` is one of the balancer's fixed words, `detail` for people."""

    kind: str
    detail: str = ""


@dataclass(frozen=True)
class Report:
    balancer: str
    revision: str
    interval: float
    backends: Mapping[str, Sample]  # by address
    warnings: tuple[str, ...] = ()  # what the balancer wants the operator to know
    uptime: float | None = None  # seconds on the balancer's own clock
    panic: bool = False  # fewer than half of its backends are healthy, so it keeps them all in rotation
    findings: tuple[Finding, ...] = ()


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
class _Sums:
    """What the balancers' newest reports say of one address, summed."""

    balancers: int = 0
    shares: int = 0  # how many of them report a share
    share: float = 0.0
    connections: int = 0
    packets: int = 0
    bytes: int = 0
    active: int = 0
    connections_rate: float = 0.0
    packets_rate: float = 0.0
    verdicts: Counter[tuple[str, bool | None, str]] = field(default_factory=Counter)  # (id, healthy, why) → balancers

    def add(self, sample: Sample, rates: _Rates, sign: int) -> None:
        """Adds one balancer's row, or, with a `sign` of -1, takes it out again."""
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
class LoadTracker:
    balancers: dict[str, _Balancer] = field(default_factory=dict)
    _sums: defaultdict[str, _Sums] = field(default_factory=lambda: defaultdict(_Sums))  # by address

    def add(self, report: Report, now: float) -> bool:
        """Takes a report in; False if it came too soon after the one before to measure a rate."""
        entry = self.balancers.get(report.balancer)
        if entry is None:
            self.balancers[report.balancer] = entry = _Balancer(report, now, report, now)
            self._count(entry, 1)
            return False
        self._count(entry, -1)
        entry.report, entry.at = report, now
        elapsed = _elapsed(entry, report, now)
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
            sums = self._sums[ip]
            sums.add(sample, (entry.rates or {}).get(ip, NO_RATES), sign)
            if not sums.balancers:
                del self._sums[ip]

    def warnings(self, balancer: str) -> tuple[str, ...]:
        """What that balancer warned of in its newest report."""
        return self.balancers[balancer].report.warnings if balancer in self.balancers else ()

    def keep(self, balancers: Collection[str], listed_at: float) -> None:
        """Forgets every balancer that the engine's list, begun at `listed_at`, does not have."""
        gone = [name for name, entry in self.balancers.items() if name not in balancers and entry.at < listed_at]
        for name in gone:
            self._count(self.balancers.pop(name), -1)

    def load(self, metric: str, now: float) -> Load | None:
        """The fleet's load by `metric` (packets, connections or concurrency); None while nobody could measure any. A
        silent balancer's last known load is part of it, and the balancer's name is in `missing`."""
        silent = {name for name, entry in self.balancers.items() if now - entry.at > MISSED * entry.report.interval}
        measured = [entry.load for entry in self.balancers.values() if entry.rates is not None]
        if not measured or silent == self.balancers.keys():
            return None
        return Load(sum(getattr(load, metric) for load in measured), ", ".join(sorted(silent)))

    def reports(self, now: float) -> bool:
        """Whether a balancer reports that is not silent."""
        return any(now - entry.at <= MISSED * entry.report.interval for entry in self.balancers.values())

    @property
    def panic(self) -> list[str]:
        """The balancers that keep unhealthy backends in rotation because fewer than half are healthy."""
        return sorted(name for name, entry in self.balancers.items() if entry.report.panic)

    @property
    def findings(self) -> list[Finding]:
        """What the balancers find wrong with the data path, each once."""
        found = (finding for entry in self.balancers.values() for finding in entry.report.findings)
        return list(dict.fromkeys(found))

    def backend(self, ip: str) -> dict[str, float]:
        """One backend's counters and rates, summed over the balancers."""
        sums = self._sums.get(ip, _Sums())
        return {name: float(getattr(sums, name)) for name in TOTALS}

    def share(self, backend: Backend) -> float:
        """Its part of all new connections, on average over the balancers that report one."""
        sums = self._sums.get(backend.ip)
        return sums.share / sums.shares if sums and sums.shares else 0.0

    def verdict(self, backend: Backend) -> Verdict:
        """Healthy where any balancer finds it healthy; `why` is empty then."""
        sums = self._sums.get(backend.ip)
        ours = ("", backend.short_id)
        opinions = [opinion for opinion in (sums.verdicts if sums else ()) if opinion[0] in ours]
        if any(healthy for _, healthy, _ in opinions):
            return Verdict(True)
        why = next((why for _, healthy, why in opinions if healthy is False), "")
        return Verdict(False if any(healthy is False for _, healthy, _ in opinions) else None, why)


def _elapsed(entry: _Balancer, report: Report, now: float) -> float:
    """Seconds since the report that rates are measured from; by our own clock where the sender's began anew."""
    before, after = entry.base.uptime, report.uptime
    return after - before if before is not None and after is not None and after >= before else now - entry.base_at


def _rates(now: Sample, before: Sample | None, elapsed: float) -> _Rates:
    def rate(new: int, old: int) -> float:
        return _exact((new - old if new >= old else new) / elapsed)

    old = before or Sample(0, 0, 0, 0, None)
    return _Rates(rate(now.connections, old.connections), rate(now.packets, old.packets), float(now.active))


def _exact(value: float) -> float:
    return round(value / FINEST) * FINEST
