"""The manager's metrics for Prometheus. METRICS has a row for each gauge and counter.

Names and units follow Prometheus' conventions. Labels have few values: names of backends and balancers, states, kinds
of reason; never a number or a sentence. Counters start at zero with the manager. The counters of a backend are removed
with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from core.fleet import ACTIVE, SPARE, STARTING, STATES, Backend, Fleet
from core.load import NO_SAMPLE, Report, increase
from core.reasons import Cause
from core.scaler import CREATE, OK, STOP, ClampKind, Decision
from core.settings import VERSION
from core.snapshot import ProblemKind

TRAFFIC = ("connections", "packets", "bytes")  # a sample's counters
NO_LIMIT = "load"  # the reason of a decision that no limit changed
LAUNCH_SECONDS = (0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

# By default, each counter has a second series, with its start time.
disable_created_metrics()  # type: ignore[no-untyped-call]

Values = Mapping[tuple[str, ...], float]  # by the labels' values
Source = Mapping[str, Any]  # /status with Tally.counts
Read = Callable[[Source], Values | float | None]


class Tally:
    """The core.controller.Recorder that counts for the metrics, from the manager's start on."""

    def __init__(self) -> None:
        self._traffic: dict[str, dict[str, int]] = {}  # by backend, then by TRAFFIC's names
        self._decisions: Counter[tuple[str, ...]] = Counter()  # by verdict and limit
        # From zero, so that Prometheus sees the first increase.
        for reason in (NO_LIMIT, *ClampKind):
            for verdict in (CREATE, STOP, OK):
                self._decisions[verdict, str(reason)] = 0
        self._launch_failures = 0
        self.launches = Histogram(
            "lbscaler_launch_seconds",
            "Time from the creation of a backend's container to the first report that it is healthy.",
            buckets=LAUNCH_SECONDS,
            registry=None,
        )
        self._launching: set[str] = set()  # the backends whose launch is not timed yet

    def counts(self) -> dict[str, Any]:
        # Copies, because reports change the originals at the same time.
        traffic, decisions = dict(self._traffic), dict(self._decisions)
        return {"traffic": traffic, "decisions": decisions, "launch_failures": self._launch_failures}

    def changed(self, before: Backend | None, after: Backend | None, now: float) -> None:
        """A backend was added, removed or changed."""
        if before is None and after is not None:
            # A series that begins at zero lets Prometheus see the first increase.
            self._traffic[after.name] = dict.fromkeys(TRAFFIC, 0)
            # An adopted spare has been launched by an earlier manager. A Swarm's new backends are adopted as starting.
            adopted_spare = after.state == SPARE and after.reason.cause is Cause.ADOPTED
            if after.state in (SPARE, STARTING) and not after.ready and not adopted_spare:
                self._launching.add(after.name)
        elif before is not None and after is None:
            del self._traffic[before.name]
            self._launching.discard(before.name)
        elif after is not None and after.ready and after.name in self._launching:
            self._launching.remove(after.name)
            self.launches.observe(now - after.launched)

    def reported(self, report: Report, last: Report | None, fleet: Fleet) -> None:
        """Adds what a balancer counted since its report `last`. Without one, its counters may be of any age."""
        if last is None:
            return
        for backend in fleet.values():
            sample = report.backends.get(backend.ip)
            # An address may have had another backend before, which the balancer still reports.
            if sample is None or sample.id not in ("", backend.short_id):
                continue
            base = last.backends.get(backend.ip, NO_SAMPLE)
            if base.id != sample.id:
                base = NO_SAMPLE
            counted = self._traffic[backend.name]
            for name in TRAFFIC:
                counted[name] += increase(getattr(sample, name), getattr(base, name))

    def decided(self, decision: Decision) -> None:
        self._decisions[decision.verdict, limit(decision)] += 1

    def failed(self) -> None:
        self._launch_failures += 1


def limit(decision: Decision) -> str:
    """The kind of the limit that was applied last; NO_LIMIT if none was applied."""
    return decision.clamps[-1].kind.value if decision.clamps else NO_LIMIT


@dataclass(frozen=True)
class Row:
    """A metric, its labels, and how a scrape reads its values: one number, one for each combination of labels, or None
    if the value is not known."""

    family: type[GaugeMetricFamily] | type[CounterMetricFamily]
    name: str
    help: str
    values: Read
    labels: tuple[str, ...]

    def metric(self, source: Source) -> Metric:
        values = self.values(source)
        if not isinstance(values, Mapping):
            # One number has no labels. An unknown number is left out: a zero would be wrong.
            values = {} if values is None else {(): values}
        family = self.family(f"lbscaler_{self.name}", self.help, labels=self.labels)
        for labels, value in values.items():
            family.add_metric(labels, value)
        return family


def _gauge(name: str, help_: str, values: Read, *labels: str) -> Row:
    return Row(GaugeMetricFamily, name, help_, values, labels)


def _counter(name: str, help_: str, values: Read, *labels: str) -> Row:
    return Row(CounterMetricFamily, name, help_, values, labels)


# -- how a row's values are read ---------------------------------------------------------------------------------------


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


def _by_problem(source: Source) -> Values:
    values: dict[tuple[str, ...], float] = {}
    for kind in ProblemKind:
        values[kind.value,] = 0.0
    for problem in source["problems"]:
        values[problem["kind"],] = 1.0
    return values


def _last_seen(source: Source) -> Values:
    return {(balancer["id"],): balancer["last_seen"] for balancer in source["balancers"]}


PANIC = "1 while fewer than half of the backends are healthy, so that all stay in rotation."
READY = "Backends in rotation that the newest report of a balancer calls healthy, however old that report is."
METRICS = (
    _counter("backend_connections", "Connections sent to a backend.", _traffic("connections"), "backend"),
    _counter("backend_packets", "Packets from clients to a backend.", _traffic("packets"), "backend"),
    _counter("backend_bytes", "Bytes from clients to a backend.", _traffic("bytes"), "backend"),
    _counter("decisions", "Decisions, and the limit applied last.", lambda s: s["decisions"], "verdict", "reason"),
    _counter(
        "launch_failures",
        "Launches that failed, and backends that failed after their start.",
        _number("launch_failures"),
    ),
    _gauge("build_info", "Always 1, with the manager's version.", lambda _: {(VERSION,): 1}, "version"),
    _gauge("backend_share", "Part of the new connections, 0 to 1.", _by_backend("share"), "backend"),
    _gauge("backend_active", "Open connections.", _by_backend("active"), "backend"),
    _gauge("backends", "Backends by state.", _by_state, "state"),
    _gauge("ready_backends", READY, _ready),
    _gauge("desired_backends", "Backends wanted in rotation.", _number("desired")),
    _gauge("min_backends", "Fewest backends allowed.", _number("min")),
    _gauge("max_backends", "Most backends allowed.", _number("max")),
    _gauge("load", "Load at the last decision: per second, or open connections.", _load, "metric"),
    _gauge("target", "Wanted load of one backend, in the load's unit.", _number("target")),
    _gauge("problems", "1 for each reason why the project is degraded.", _by_problem, "kind"),
    _gauge("paused", "1 while decisions are not carried out.", _number("paused")),
    _gauge("engine_reachable", "1 while the container engine answers.", lambda s: s["engine"] == "ok"),
    _gauge("launch_backoff_seconds", "Time until the next launch, after failures.", _number("launches", "retry_in")),
    _gauge("failed_launches", "Failures of launches or backends in a row.", _number("launches", "failed")),
    _gauge("update_given_up", "1 after an update was undone.", lambda s: s["launches"]["update_given_up"] != ""),
    _gauge("balancers", "Balancers that have reported.", lambda s: len(s["balancers"])),
    _gauge("balancer_running", "1 while the balancer runs.", lambda s: s["balancer"]["state"] == "running"),
    _gauge("balancer_last_seen_seconds", "Time since a balancer's newest report.", _last_seen, "balancer"),
    _gauge("rotation_panic", PANIC, lambda s: bool(s["rotation_panic"])),
    _gauge("data_path_working", "1 while the balancer forwards connections.", _number("data_path", "working")),
)


class Exposition(Collector):
    """All rows of METRICS, computed at each scrape."""

    def __init__(self, tally: Tally, status: Callable[[], dict[str, Any]]) -> None:
        self._tally, self._status = tally, status

    def collect(self) -> Iterable[Metric]:
        source = {**self._status(), **self._tally.counts()}
        return [row.metric(source) for row in METRICS]


def registry(tally: Tally, status: Callable[[], dict[str, Any]]) -> CollectorRegistry:
    """The metrics of one manager."""
    made = CollectorRegistry()
    made.register(tally.launches)
    made.register(Exposition(tally, status))
    return made
