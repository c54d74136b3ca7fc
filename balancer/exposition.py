"""This balancer's metrics for Prometheus.

A new metric is one row: below COUNTED if other modules count events, in `gauges` if its value is read at each scrape.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from state import State

PREFIX = "lbscaler_balancer_"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)

COUNTED = CollectorRegistry()
APPLY_SECONDS = Histogram(
    f"{PREFIX}apply_seconds", "Time of one restore of a table.", registry=COUNTED, buckets=SECONDS
)
REPAIRS = Counter(f"{PREFIX}repairs", "Passes that found the nat rules changed by another program.", registry=COUNTED)
FAILED_PROBES = Counter(f"{PREFIX}failed_probes", "Failed probes, also of starting backends.", registry=COUNTED)
FAILED_PASSES = Counter(f"{PREFIX}failed_passes", "Passes of a loop that ended with an error.", registry=COUNTED)
FAILED_CONNECTIONS = Counter(
    f"{PREFIX}failed_connections",
    "Connection attempts that a backend refused, or that found no backend. The client's next attempt is dispatched.",
    ["reason"],
    registry=COUNTED,
)


def gauges(state: State) -> tuple[tuple[str, str, float], ...]:
    """(name, meaning, value) of each gauge."""
    used, limit = state.netfilter.conntrack_use()
    return (
        ("rotation_backends", "Backends that get new connections.", len(state.rotation.endpoints)),
        ("panic", "1 while unhealthy backends stay in rotation: fewer than half are healthy.", state.rotation.panic),
        ("flows", "Live flows to backends.", sum(state.live.values())),
        ("conntrack_entries", "Entries in the connection table.", used),
        ("conntrack_entries_limit", "Entries that the connection table can hold.", limit),
        ("converged_seconds", "Time since the last successful pass.", state.since_converged()),
    )


def exposition(state: State) -> bytes:
    """One scrape of all metrics."""
    # A registry for each scrape, so that gauges cannot keep an old value.
    read = CollectorRegistry()
    for name, meaning, value in gauges(state):
        Gauge(PREFIX + name, meaning, registry=read).set(value)
    return generate_latest(COUNTED) + generate_latest(read)
