"""Turns the counters that the balancers report into rates, and sums them over all balancers. Pure: time is an argument.

A counter that decreased was restarted, so its new value is the increase. Elapsed time is measured by the sender's clock
if the report contains it, so a delayed report does not change a rate. When a balancer becomes silent, its last load
still counts and the sum is marked as incomplete, until the engine no longer lists that balancer.

For each balancer, this module keeps its newest report and its rates. Sums are computed when they are read, so the cost
of taking a report depends only on its own rows.
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
    id: str = ""  # the container's, if reported: the address may have belonged to another backend before
    why: str = ""  # the last probe's result, for people
    cause: str = ""  # kind of failure of an unhealthy backend


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem of the data path: `kind` is one of a fixed set, `detail` is for people."""

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
    """Connections and packets per second; `concurrency` is the number of open connections."""

    connections: float = 0.0
    packets: float = 0.0
    concurrency: float = 0.0


NO_RATES = _Rates()
NO_SAMPLE = Sample(0, 0, 0, 0, None)


@dataclass
class _Balancer:
    report: Report  # the newest
    at: float  # when it arrived
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
        """Takes a report. False if no rate can be measured: it is the first one, or too soon after the one before."""
        entry = self.balancers.get(report.balancer)
        if entry is None:
            self.balancers[report.balancer] = _Balancer(report, now, report, now)
            return False
        entry.report, entry.at = report, now
        # A report that came too soon does not become the base, so the next rate is measured over a longer time.
        elapsed = _elapsed(entry, report, now)
        if elapsed < report.interval / 2:
            return False
        before = entry.base.backends
        rates = {ip: _rates(sample, before.get(ip, NO_SAMPLE), elapsed) for ip, sample in report.backends.items()}
        entry.rates, entry.load = rates, _Rates(*map(sum, zip(*rates.values(), strict=True)))
        entry.base, entry.base_at = report, now
        return True

    def newest_of(self, balancer: str) -> Report | None:
        """That balancer's newest report."""
        return self.balancers[balancer].report if balancer in self.balancers else None

    def keep(self, balancers: Collection[str], listed_at: float) -> None:
        """Removes each balancer that is not in `balancers`, the engine's list, which began at `listed_at`. A balancer
        that has reported since then stays: it may have started after the list."""
        for name, entry in list(self.balancers.items()):
            if name not in balancers and entry.at < listed_at:
                del self.balancers[name]

    def load(self, metric: str, now: float) -> Load | None:
        """The fleet's load by `metric` (packets, connections or concurrency); None while no balancer can measure it.
        The last load of a silent balancer is part of it, and `missing` names that balancer."""
        # If all balancers are silent, nothing is known about the present load.
        silent = sorted(name for name, entry in self.balancers.items() if entry.silent(now))
        measured = [entry.load for entry in self.balancers.values() if entry.rates is not None]
        if not measured or len(silent) == len(self.balancers):
            return None
        return Load(sum(getattr(load, metric) for load in measured), ", ".join(silent))

    def reports(self, now: float) -> bool:
        """Whether at least one balancer is not silent."""
        return any(not entry.silent(now) for entry in self.balancers.values())

    @property
    def panic(self) -> list[str]:
        """The balancers that keep unhealthy backends in rotation because fewer than half are healthy."""
        return sorted(name for name, entry in self.balancers.items() if entry.report.panic)

    @property
    def findings(self) -> list[Finding]:
        """The balancers' findings about the data path, without duplicates."""
        found: dict[Finding, None] = {}
        for entry in self.balancers.values():
            found.update(dict.fromkeys(entry.report.findings))
        return list(found)

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
        """The backend's share of the new connections: the mean over the balancers that report one."""
        shares = []
        for sample in self._samples(backend.ip):
            # The address may have another backend now.
            if sample.share is not None and sample.id in ("", backend.short_id):
                shares.append(sample.share)
        return sum(shares) / len(shares) if shares else 0.0

    def verdict(self, backend: Backend) -> Verdict:
        """Healthy if at least one balancer reports it healthy; then `why` is empty."""
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
    """Seconds since the report that rates are measured from. By the manager's clock if the sender's clock is not
    reported or was restarted."""
    before, after = entry.base.uptime, report.uptime
    if before is None or after is None or after < before:
        return now - entry.base_at
    return after - before


def _rates(now: Sample, before: Sample, elapsed: float) -> _Rates:
    connections = increase(now.connections, before.connections) / elapsed
    packets = increase(now.packets, before.packets) / elapsed
    return _Rates(connections, packets, float(now.active))


def increase(new: int, old: int) -> int:
    """The increase of a counter. One that decreased was restarted at zero."""
    return new - old if new >= old else new
