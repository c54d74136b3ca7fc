"""Absolute counters of any number of balancers in, rates out. Pure: time is an argument.

A counter that decreased was restarted, so its new value is the increase. Rates are measured by the sender's clock where
the report has it, so a delayed report changes none. A silent balancer keeps its last known load, which then counts as
incomplete, until the engine no longer lists that balancer.

Only the newest report of each balancer is kept, with its rates. Sums over balancers are computed when they are read, so
a report costs only its own rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from core.fleet import Backend, Verdict
from core.scaler import Load

SILENT_AFTER = 1.5  # intervals without a report until a balancer counts as silent


@dataclass(frozen=True, slots=True)
class Sample:
    """One backend in one report: counters since the balancer's start, open connections, health (None: unknown)."""

    connections: int
    packets: int
    bytes: int
    active: int
    healthy: bool | None
    share: float | None = None  # of the balancer's new connections
    id: str = ""  # the container's, where reported: the address may have had another backend before
    why: str = ""  # the last probe's result, for people
    cause: str = ""  # where it is unhealthy, the kind of cause


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong with the data path: `kind` is one of a fixed set, `detail` is for people."""

    kind: str
    detail: str = ""


@dataclass(frozen=True)
class Report:
    balancer: str
    revision: str
    interval: float
    backends: Mapping[str, Sample]  # by address
    warnings: tuple[str, ...] = ()  # for the operator
    uptime: float | None = None  # seconds on the balancer's own clock
    panic: bool = False  # fewer than half of its backends are healthy, so it keeps them all in rotation
    findings: tuple[Finding, ...] = ()


class _Rates(NamedTuple):
    """Per second, but for `concurrency`: the open connections."""

    connections: float = 0.0
    packets: float = 0.0
    concurrency: float = 0.0


NO_RATES = _Rates()
NO_SAMPLE = Sample(0, 0, 0, 0, None)


@dataclass
class _Balancer:
    report: Report  # the newest
    at: float
    base: Report  # the report that rates are measured from
    base_at: float
    rates: Mapping[str, _Rates] | None = None  # by address; None before the second report
    load: _Rates = NO_RATES  # the sum of the rates

    def silent(self, now: float) -> bool:
        return now - self.at > SILENT_AFTER * self.report.interval


@dataclass
class LoadTracker:
    balancers: dict[str, _Balancer] = field(default_factory=dict)

    def add(self, report: Report, now: float) -> bool:
        """Takes a report. False if it came too soon after the one before to measure a rate."""
        entry = self.balancers.get(report.balancer)
        if entry is None:
            self.balancers[report.balancer] = _Balancer(report, now, report, now)
            return False
        entry.report, entry.at = report, now
        elapsed = _elapsed(entry, report, now)
        if elapsed < report.interval / 2:
            return False
        before = entry.base.backends
        rates = {ip: _rates(sample, before.get(ip, NO_SAMPLE), elapsed) for ip, sample in report.backends.items()}
        entry.rates, entry.load = rates, _Rates(*map(sum, zip(*rates.values(), strict=True)))
        entry.base, entry.base_at = report, now
        return True

    def warnings(self, balancer: str) -> tuple[str, ...]:
        """The warnings in that balancer's newest report."""
        return self.balancers[balancer].report.warnings if balancer in self.balancers else ()

    def keep(self, balancers: Collection[str], listed_at: float) -> None:
        """Forgets every balancer that the engine's list, begun at `listed_at`, does not have."""
        for name, entry in list(self.balancers.items()):
            if name not in balancers and entry.at < listed_at:
                del self.balancers[name]

    def load(self, metric: str, now: float) -> Load | None:
        """The fleet's load by `metric` (packets, connections or concurrency); None while no balancer can measure it.
        A silent balancer's last known load is part of it, and the balancer's name is in `missing`."""
        silent = sorted(name for name, entry in self.balancers.items() if entry.silent(now))
        measured = [entry.load for entry in self.balancers.values() if entry.rates is not None]
        if not measured or len(silent) == len(self.balancers):
            return None
        return Load(sum(getattr(load, metric) for load in measured), ", ".join(silent))

    def reports(self, now: float) -> bool:
        """Whether a balancer reports that is not silent."""
        return any(not entry.silent(now) for entry in self.balancers.values())

    @property
    def panic(self) -> list[str]:
        """The balancers that keep unhealthy backends in rotation because fewer than half are healthy."""
        return sorted(name for name, entry in self.balancers.items() if entry.report.panic)

    @property
    def findings(self) -> list[Finding]:
        """The balancers' findings about the data path, each once."""
        found = (finding for entry in self.balancers.values() for finding in entry.report.findings)
        return list(dict.fromkeys(found))

    def _samples(self, ip: str) -> Iterator[Sample]:
        """The balancers' newest samples of an address."""
        for entry in self.balancers.values():
            sample = entry.report.backends.get(ip)
            if sample is not None:
                yield sample

    def backend(self, ip: str) -> dict[str, float]:
        """The counters and rates of an address, summed over the balancers."""
        connections = packets = size = active = 0
        for sample in self._samples(ip):
            connections += sample.connections
            packets += sample.packets
            size += sample.bytes
            active += sample.active
        rates = [entry.rates.get(ip, NO_RATES) for entry in self.balancers.values() if entry.rates]
        return {
            "connections": float(connections),
            "packets": float(packets),
            "bytes": float(size),
            "active": float(active),
            "connections_rate": sum(rate.connections for rate in rates),
            "packets_rate": sum(rate.packets for rate in rates),
        }

    def share(self, backend: Backend) -> float:
        """Its part of all new connections, on average over the balancers that report one."""
        shares = [sample.share for sample in self._samples(backend.ip) if sample.share is not None]
        return sum(shares) / len(shares) if shares else 0.0

    def verdict(self, backend: Backend) -> Verdict:
        """Healthy where any balancer reports it healthy; `why` is empty then."""
        verdict = Verdict()
        for sample in self._samples(backend.ip):
            if sample.id not in ("", backend.short_id) or sample.healthy is None:
                continue  # of another backend that had the address, or not probed yet
            if sample.healthy:
                return Verdict(True)
            if verdict.healthy is None:
                verdict = Verdict(False, sample.why)
        return verdict


def _elapsed(entry: _Balancer, report: Report, now: float) -> float:
    """Seconds since the report that rates are measured from; by our own clock if the sender's was restarted."""
    before, after = entry.base.uptime, report.uptime
    if before is None or after is None or after < before:
        return now - entry.base_at
    return after - before


def _rates(now: Sample, before: Sample, elapsed: float) -> _Rates:
    connections = _increase(now.connections, before.connections) / elapsed
    packets = _increase(now.packets, before.packets) / elapsed
    return _Rates(connections, packets, float(now.active))


def _increase(new: int, old: int) -> int:
    return new - old if new >= old else new
