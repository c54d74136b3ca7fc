"""The manager's metrics for Prometheus. METRICS has a row for each gauge and counter.

Names and units follow Prometheus' conventions. Labels have few values: names of backends and balancers, states, kinds
of reason; never a number or a sentence. Counters start at zero with the manager. A backend's counters end with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from core.fleet import ACTIVE, SPARE, STARTING, STATES, Backend, Fleet
from core.load import Report, Sample
from core.scaler import Decision
from core.settings import ROOT

TRAFFIC = ("connections", "packets", "bytes")  # a sample's counters
LAUNCH_SECONDS = (0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

disable_created_metrics()  # type: ignore[no-untyped-call] # else each counter has a second series with its start time

Values = Mapping[tuple[str, ...], float]  # by the labels' values
Source = Mapping[str, Any]  # /status with Tally.counts


class Tally(Collector):
    """Counts what happens from the manager's start on, as core.controller.Recorder."""

    def __init__(self) -> None:
        self._traffic: dict[str, dict[str, int]] = {}  # by backend, then by TRAFFIC's names
        self._decisions: Counter[tuple[str, ...]] = Counter()  # by verdict and reason
        self._launch_failures = 0
        self._launches = Histogram(
            "lbscaler_launch_seconds",
            "Time from the creation of a backend's container to the first report that it is healthy.",
            buckets=LAUNCH_SECONDS,
            registry=None,
        )
        self._newest: dict[str, dict[str, Sample]] = {}  # backend -> balancer -> its newest sample

    def collect(self) -> Iterable[Metric]:
        return self._launches.collect()

    def counts(self) -> dict[str, Any]:
        # Copies, because reports change the originals at the same time.
        return {
            "traffic": dict(self._traffic),
            "decisions": dict(self._decisions),
            "launch_failures": self._launch_failures,
        }

    def changed(self, before: Backend | None, after: Backend | None, now: float) -> None:
        """A backend was added, removed or changed."""
        if before is None and after is not None:
            self._traffic[after.name] = dict.fromkeys(TRAFFIC, 0)  # zero first, so that Prometheus sees every increase
        elif before is not None and after is None:
            del self._traffic[before.name]
            self._newest.pop(before.name, None)
        elif before is not None and after is not None:
            became_ready = after.ready and not before.ready
            if became_ready and before.state in (SPARE, STARTING):
                self._launches.observe(now - after.launched)

    def reported(self, report: Report, fleet: Fleet) -> None:
        """Adds what a balancer counted since its last report. A counter that went down was restarted at zero."""
        for backend in fleet.values():
            sample = report.backends.get(backend.ip)
            if sample is None or sample.id not in ("", backend.short_id):
                continue  # the sample is of an earlier backend with the same address
            newest = self._newest.setdefault(backend.name, {})
            last = newest.get(report.balancer)
            counted = self._traffic.setdefault(backend.name, dict.fromkeys(TRAFFIC, 0))
            for name in TRAFFIC:
                new, old = getattr(sample, name), getattr(last, name, 0)
                counted[name] += new - old if new >= old else new
            newest[report.balancer] = sample

    def keep(self, balancers: Collection[str]) -> None:
        """Removes the samples of balancers that no longer exist."""
        for samples in self._newest.values():
            for gone in samples.keys() - balancers:
                del samples[gone]

    def decided(self, decision: Decision) -> None:
        self._decisions[decision.verdict, reason(decision)] += 1

    def launch_failed(self) -> None:
        self._launch_failures += 1


def reason(decision: Decision) -> str:
    """The kind of the limit that was applied last; `load` where none was."""
    return decision.clamps[-1].kind.value if decision.clamps else "load"


def version() -> str:
    """The newest heading of CHANGELOG.md."""
    with suppress(OSError):
        for line in (ROOT / "CHANGELOG.md").read_text().splitlines():
            if line.startswith("## "):
                return line.split()[1].lower()
    return "unknown"


@dataclass(frozen=True)
class Row:
    """A metric, its labels, and how its values are read at a scrape: one number, or one for each combination of labels.
    None is no sample, for a value that is not known."""

    family: type[GaugeMetricFamily] | type[CounterMetricFamily]
    name: str
    help: str
    values: Callable[[Source], Values | float | None]
    labels: tuple[str, ...] = ()

    def metric(self, source: Source) -> Metric:
        values = self.values(source)
        if not isinstance(values, Mapping):
            values = {} if values is None else {(): values}
        family = self.family(f"lbscaler_{self.name}", self.help, labels=self.labels)
        for labels, value in values.items():
            family.add_metric(labels, value)
        return family


def _number(*path: str) -> Callable[[Source], float | None]:
    """The number at that path of keys."""

    def read(source: Source) -> float | None:
        value: Any = source
        for key in path:
            value = value[key]
        return None if value is None else float(value)

    return read


def _traffic(counter: str) -> Callable[[Source], Values]:
    return lambda source: {(name,): counted[counter] for name, counted in source["traffic"].items()}


def _by_backend(field: str) -> Callable[[Source], Values]:
    return lambda source: {(row["name"],): row[field] for row in source["backends"]}


def _by_state(source: Source) -> Values:
    states = Counter(row["state"] for row in source["backends"])
    return {(state,): states[state] for state in STATES}


def _ready(source: Source) -> int:
    return sum(row["state"] == ACTIVE and row["healthy"] is True for row in source["backends"])


def _load(source: Source) -> Values:
    return {} if source["rate"] is None else {(source["metric"],): source["rate"]}


def _last_seen(source: Source) -> Values:
    return {(balancer["id"],): balancer["last_seen"] for balancer in source["balancers"]}


def _update_given_up(source: Source) -> float:
    return bool(source["launches"]["update_given_up"])


def _balancer_runs(source: Source) -> float:
    return bool(source["balancer"]["state"] == "running")


PANIC = "1 while fewer than half of the backends are healthy, so that all stay in rotation."
G, C = GaugeMetricFamily, CounterMetricFamily
METRICS = (
    Row(C, "backend_connections", "Connections sent to a backend.", _traffic("connections"), ("backend",)),
    Row(C, "backend_packets", "Packets from clients to a backend.", _traffic("packets"), ("backend",)),
    Row(C, "backend_bytes", "Bytes from clients to a backend.", _traffic("bytes"), ("backend",)),
    Row(C, "decisions", "Decisions, and the limit applied last.", lambda s: s["decisions"], ("verdict", "reason")),
    Row(C, "launch_failures", "Backends that failed to start, or soon after.", _number("launch_failures")),
    Row(G, "build_info", "Always 1, with the manager's version.", lambda s: {(s["version"],): 1}, ("version",)),
    Row(G, "backend_share", "Part of the new connections, 0 to 1.", _by_backend("share"), ("backend",)),
    Row(G, "backend_active", "Open connections.", _by_backend("active"), ("backend",)),
    Row(G, "backends", "Backends by state.", _by_state, ("state",)),
    Row(G, "ready_backends", "Backends in rotation that a balancer reports healthy.", _ready),
    Row(G, "desired_backends", "Backends wanted in rotation.", _number("desired")),
    Row(G, "min_backends", "Fewest backends allowed.", _number("min")),
    Row(G, "max_backends", "Most backends allowed.", _number("max")),
    Row(G, "load", "Load at the last decision: per second, or open connections.", _load, ("metric",)),
    Row(G, "target", "Wanted load of one backend, in the load's unit.", _number("target")),
    Row(G, "paused", "1 while decisions are not carried out.", _number("paused")),
    Row(G, "engine_reachable", "1 while the container engine answers.", lambda s: s["engine"] == "ok"),
    Row(G, "launch_backoff_seconds", "Time until the next launch, after failures.", _number("launches", "retry_in")),
    Row(G, "failed_launches", "Launches that failed in a row.", _number("launches", "failed")),
    Row(G, "update_given_up", "1 after an update was given up and undone.", _update_given_up),
    Row(G, "balancers", "Balancers that have reported.", lambda s: len(s["balancers"])),
    Row(G, "balancer_running", "1 while the balancer runs with the current settings.", _balancer_runs),
    Row(G, "balancer_last_seen_seconds", "Time since a balancer's newest report.", _last_seen, ("balancer",)),
    Row(G, "rotation_panic", PANIC, lambda s: bool(s["rotation_panic"])),
    Row(G, "data_path_working", "1 while the balancer forwards connections.", _number("data_path", "working")),
)


class Exposition(Collector):
    """All rows of METRICS, computed at each scrape."""

    def __init__(self, tally: Tally, status: Callable[[], dict[str, Any]]) -> None:
        self._tally, self._status = tally, status
        self._version = version()  # read once: the file may change while the manager runs

    def collect(self) -> Iterable[Metric]:
        source = {**self._status(), **self._tally.counts(), "version": self._version}
        return [row.metric(source) for row in METRICS]


def registry(tally: Tally, status: Callable[[], dict[str, Any]]) -> CollectorRegistry:
    """The metrics of one manager."""
    made = CollectorRegistry()
    made.register(tally)
    made.register(Exposition(tally, status))
    return made
