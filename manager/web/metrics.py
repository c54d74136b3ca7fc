"""What Prometheus is told: counters that live as long as the manager, and gauges that show its state at each scrape.

Names and units follow Prometheus' conventions. Labels take few values: the backends and balancers there are, their
states, kinds of reason; never a number or a sentence. A backend's own counters end with it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from core.fleet import SPARE, STARTING, STATES, Backend, Fleet
from core.load import Report, Sample
from core.scaler import Decision
from core.settings import ROOT

TRAFFIC = {
    "connections": "Connections dealt to a backend.",
    "packets": "Packets from clients to a backend.",
    "bytes": "Bytes from clients to a backend.",
}
LAUNCH_SECONDS = (0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

disable_created_metrics()  # type: ignore[no-untyped-call]  # a series more for each counter, that nobody asks for


class Tally(Collector):
    """What only grows while the manager lives, whatever balancers come, go and start anew."""

    def __init__(self) -> None:
        # Plain numbers, for every row of every report adds to them: by backend, then by TRAFFIC's names.
        self._traffic: dict[str, dict[str, int]] = {}
        self._decisions = _counter("decisions", "Decisions, and what had the last word in them.", "verdict", "reason")
        self._failures = _counter("launch_failures", "Launches that came to nothing, or ended at once.")
        self._launches = Histogram(
            "lbscaler_launch_seconds",
            "Time from a backend's container being there to a balancer finding it ready.",
            buckets=LAUNCH_SECONDS,
            registry=None,
        )
        self._heard: dict[str, dict[str, Sample]] = {}  # backend → balancer → the newest of its samples

    def collect(self) -> Iterable[Metric]:
        traffic = list(self._traffic.items())  # in one go: reports come meanwhile
        for name, text in TRAFFIC.items():
            family = CounterMetricFamily(f"lbscaler_backend_{name}", text, labels=["backend"])
            for backend, counted in traffic:
                family.add_metric([backend], counted[name])
            yield family
        for metric in (self._decisions, self._failures, self._launches):
            yield from metric.collect()

    def changed(self, before: Backend | None, after: Backend | None, now: float) -> None:
        """A backend has come, gone, or become another."""
        if before is None and after is not None:
            self._traffic[after.name] = dict.fromkeys(TRAFFIC, 0)  # from the start, so that no increase is missed
        elif before is not None and after is None:
            del self._traffic[before.name]
            self._heard.pop(before.name, None)
        if before and after and before.state in (SPARE, STARTING) and after.ready and not before.ready:
            self._launches.observe(now - after.launched)

    def reported(self, report: Report, fleet: Fleet) -> None:
        """Adds what a balancer has counted since its last report; one that started anew begins at zero."""
        for backend in fleet.values():
            sample = report.backends.get(backend.ip)
            if sample is None or sample.id not in ("", backend.short_id):
                continue  # another backend had the address before
            heard = self._heard.setdefault(backend.name, {})
            last = heard.get(report.balancer)
            counted = self._traffic.setdefault(backend.name, dict.fromkeys(TRAFFIC, 0))
            for name in TRAFFIC:
                new, old = getattr(sample, name), getattr(last, name, 0)
                counted[name] += new - old if new >= old else new
            heard[report.balancer] = sample

    def keep(self, balancers: Collection[str]) -> None:
        """Forgets the samples of balancers that are gone."""
        for samples in self._heard.values():
            for gone in samples.keys() - balancers:
                del samples[gone]

    def decided(self, decision: Decision) -> None:
        self._decisions.labels(decision.verdict, reason(decision)).inc()

    def launch_failed(self) -> None:
        self._failures.inc()


class State(Collector):
    """The gauges; `status` is asked anew at each scrape."""

    def __init__(self, status: Callable[[], dict[str, Any]]) -> None:
        self._status, self._version = status, version()  # once: the file may change beneath a running manager

    def collect(self) -> Iterable[Metric]:
        yield _each("build_info", "1, labelled with the version that runs.", "version", {self._version: 1})
        yield from gauges(self._status())


def registry(tally: Tally, status: Callable[[], dict[str, Any]]) -> CollectorRegistry:
    """Everything that one manager tells."""
    made = CollectorRegistry()
    made.register(tally)
    made.register(State(status))
    return made


def reason(decision: Decision) -> str:
    """The kind of limit that had the last word; `load` where none had."""
    return decision.clamps[-1].kind.value if decision.clamps else "load"


def gauges(status: Mapping[str, Any]) -> Iterable[Metric]:
    backends, launches, rate = status["backends"], status["launches"], status["rate"]
    ages = {balancer["id"]: balancer["last_seen"] for balancer in status["balancers"]}
    states = {state: sum(b["state"] == state for b in backends) for state in STATES}
    ready = sum(b["state"] == "active" and b["healthy"] is True for b in backends)

    yield _each("backend_share", "Part of the new connections, 0 to 1.", "backend", _column(backends, "share"))
    yield _each("backend_active", "Open connections.", "backend", _column(backends, "active"))
    yield _each("backends", "Backends by state.", "state", states)
    yield _one("ready_backends", "Backends in rotation that a balancer finds healthy.", ready)
    yield _one("desired_backends", "Backends wanted in rotation.", status["desired"])
    yield _one("min_backends", "Fewest backends allowed.", status["min"])
    yield _one("max_backends", "Most backends allowed.", status["max"])
    # Unknown is no sample, never a zero.
    load = {} if rate is None else {status["metric"]: rate}
    yield _each("load", "The fleet's load at the last decision: per second, or open connections.", "metric", load)
    yield _one("target", "Load that one backend is to bear, in the load's unit.", status["target"])
    yield _one("paused", "1 while decisions are not carried out.", status["paused"])
    yield _one("engine_reachable", "1 while the engine that runs the backends answers.", status["engine"] == "ok")
    yield _one("launch_backoff_seconds", "Time until the next launch, after failed ones.", launches["retry_in"])
    yield _one("update_given_up", "1 once an update has gone back by itself.", bool(launches["update_given_up"]))
    yield _one("balancers", "Balancers that report.", len(ages))
    running = status["balancer"]["state"] == "running"
    yield _one("balancer_running", "1 while the balancer runs as the settings want it.", running)
    panic = bool(status["rotation_panic"])
    yield _one("rotation_panic", "1 while fewer than half of the backends are healthy and all stay in rotation.", panic)
    yield _one("failed_launches", "Backends that failed in a row.", launches["failed"])
    working = status["data_path"]["working"]
    if working is not None:
        yield _one("data_path_working", "1 while connections through the balancer reach a backend.", working)
    yield _each("balancer_last_seen_seconds", "Time since a balancer's newest report.", "balancer", ages)


def version() -> str:
    """The newest heading of CHANGELOG.md; the only place that knows."""
    with suppress(OSError):
        for line in (ROOT / "CHANGELOG.md").read_text().splitlines():
            if line.startswith("## "):
                return line.split()[1].lower()
    return "unknown"


def _counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(f"lbscaler_{name}", text, labels, registry=None)


def _one(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"lbscaler_{name}", text, value)


def _each(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(f"lbscaler_{name}", text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _column(backends: Iterable[Mapping[str, Any]], name: str) -> dict[str, float]:
    return {backend["name"]: backend[name] for backend in backends}
