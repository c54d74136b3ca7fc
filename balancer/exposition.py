"""This balancer's metrics for Prometheus: counters kept here, for there is one balancer a process, and its gauges."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

APPLY_SECONDS = Histogram(
    "lbscaler_balancer_apply_seconds",
    "Time that one restore of a table's changed rules took.",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
    registry=None,
)
Gauges = Mapping[str, tuple[str, float]]  # name → (meaning, value)

REPAIRS = Counter(
    "lbscaler_balancer_repairs", "Passes that found our nat rules changed by somebody else.", registry=None
)
FAILED_PROBES = Counter(
    "lbscaler_balancer_failed_probes", "Probes that failed, those of starting backends too.", registry=None
)
FAILED_PASSES = Counter(
    "lbscaler_balancer_failed_passes",
    "Passes of a loop that ended with an error: of netfilter, or of a call to the manager.",
    registry=None,
)


def exposition(gauges: Gauges) -> bytes:
    """One scrape: the counters, and `gauges`."""
    registry = CollectorRegistry()
    for metric in (APPLY_SECONDS, REPAIRS, FAILED_PROBES, FAILED_PASSES):
        registry.register(metric)
    for name, (meaning, value) in gauges.items():
        Gauge(f"lbscaler_balancer_{name}", meaning, registry=registry).set(value)
    return generate_latest(registry)
