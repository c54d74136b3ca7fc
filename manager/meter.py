"""Absolute counters from any number of balancers in, rates out. Pure: time is an argument.

A counter that went down was restarted, so its new value is what came since. A balancer that misses reports is unknown
load, never zero; one silent for FORGET seconds is taken to be gone for good.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fleet import Backend
from scaler import Load

MISSED = 1.5  # intervals without a report until a balancer's last one no longer counts
FORGET = 20.0  # seconds


@dataclass(frozen=True)
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


@dataclass
class _Balancer:
    report: Report  # the newest
    at: float
    base: Report  # the one that rates are measured from, and when it came
    base_at: float
    rates: dict[str, dict[str, float]] | None = None  # address → metric → per second; None: one report so far


@dataclass
class Meter:
    balancers: dict[str, _Balancer] = field(default_factory=dict)

    def add(self, report: Report, now: float) -> bool:
        """Takes a report in; False when it brings news of health but came too soon to measure a rate by."""
        before = self.balancers.get(report.balancer)
        if before is None:
            self.balancers[report.balancer] = _Balancer(report, now, report, now)
            return False
        before.report, before.at = report, now
        elapsed = now - before.base_at
        if elapsed < report.interval / 2:
            return False
        old = before.base.backends
        before.rates = {ip: _rates(sample, old.get(ip), elapsed) for ip, sample in report.backends.items()}
        before.base, before.base_at = report, now
        return True

    def warnings(self, balancer: str) -> tuple[str, ...]:
        """What that balancer warned of in its newest report."""
        return self.balancers[balancer].report.warnings if balancer in self.balancers else ()

    def forget_gone(self, now: float) -> None:
        for name in [name for name, entry in self.balancers.items() if now - entry.at > FORGET]:
            del self.balancers[name]

    def load(self, metric: str, now: float) -> Load | None:
        """The fleet's load by `metric` (packets, connections or concurrency); None while nobody could measure any."""
        self.forget_gone(now)
        silent = [name for name, entry in self.balancers.items() if now - entry.at > MISSED * entry.report.interval]
        measured = [e.rates for name, e in self.balancers.items() if e.rates is not None and name not in silent]
        if not measured:
            return None
        rate = sum(rates[metric] for by_ip in measured for rates in by_ip.values())
        return Load(rate, ", ".join(sorted(silent)))

    def backend(self, ip: str) -> dict[str, float]:
        """One backend's counters and rates, summed over the balancers."""
        total = dict.fromkeys(("connections", "packets", "bytes", "active", "connections_rate", "packets_rate"), 0.0)
        for entry in self.balancers.values():
            if sample := entry.report.backends.get(ip):
                for name in ("connections", "packets", "bytes", "active"):
                    total[name] += getattr(sample, name)
            for metric in ("connections", "packets"):
                total[f"{metric}_rate"] += (entry.rates or {}).get(ip, {}).get(metric, 0.0)
        return total

    def share(self, backend: Backend) -> float:
        """Its part of all new connections, on average over the balancers that say."""
        samples = (entry.report.backends.get(backend.ip) for entry in self.balancers.values())
        shares = [sample.share for sample in samples if sample is not None and sample.share is not None]
        return sum(shares) / len(shares) if shares else 0.0

    def healthy(self, backend: Backend) -> bool | None:
        """Whether any balancer finds it well; None while none has an opinion."""
        samples = (entry.report.backends.get(backend.ip) for entry in self.balancers.values())
        ours = [sample for sample in samples if sample is not None and sample.id in ("", backend.short_id)]
        opinions = [sample.healthy for sample in ours if sample.healthy is not None]
        return any(opinions) if opinions else None

    def why(self, backend: Backend) -> str:
        """What the last probe that found it ill met; empty where it is well, or nobody says."""
        samples = (entry.report.backends.get(backend.ip) for entry in self.balancers.values())
        ill = (s.why for s in samples if s is not None and not s.healthy and s.id in ("", backend.short_id))
        return next(ill, "")


def _rates(now: Sample, before: Sample | None, elapsed: float) -> dict[str, float]:
    def rate(new: int, old: int) -> float:
        return (new - old if new >= old else new) / elapsed

    old = before or Sample(0, 0, 0, 0, None)
    return {
        "connections": rate(now.connections, old.connections),
        "packets": rate(now.packets, old.packets),
        "concurrency": float(now.active),
    }
