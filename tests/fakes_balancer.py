"""The balancer over a kernel and a manager in memory, with time that passes only by sleeping."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import schedule
from datapath import OWN_NAMESPACE, DataPath
from fakes_netfilter import REPLIES, FakeNetfilter
from health import Health
from listings import connections
from manager_client import ManagerClient
from prober import Prober
from snapshot import Backend, Snapshot
from synchronization_client import Balancer

HEALTHY = Health(True)


class Clock:
    now = 1000.0
    waited = 0.0  # seconds in which this thread used no processor

    def monotonic(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return self.now - self.waited

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class FakeProber(Prober):
    def __init__(self, changed: Callable[[], None], table_full: Callable[[], bool]) -> None:
        self.results: dict[str, Health] = {}
        self.watched: list[Snapshot] = []

    def health(self) -> dict[str, Health]:
        return dict(self.results)

    def watch(self, snapshot: Snapshot) -> None:
        self.watched.append(snapshot)


class FakeManager(ManagerClient):
    def __init__(self) -> None:
        self.answers: list[Any] = []  # of sync: a message, None, or an exception
        self.requested: list[str] = []  # the revisions in requests of sync
        self.stops: list[tuple[str, str]] = []
        self.reports: list[Mapping[str, Any]] = []

    def sync(self, have: str) -> Mapping[str, Any] | None:
        self.requested.append(have)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    def report(self, message: Mapping[str, Any]) -> None:
        self.reports.append(message)

    def stop(self, ip: str, id_: str, reason: str) -> None:
        self.stops.append((ip, reason))


class World:
    """A balancer and everything that it uses."""

    def __init__(self, clock: Clock, path: DataPath = OWN_NAMESPACE) -> None:
        self.clock, self.kernel, self.manager = clock, FakeNetfilter(path), FakeManager()
        self.restart()

    def restart(self) -> None:
        """A new client over the same kernel."""
        self.balancer = Balancer(self.kernel, self.manager, "lb")
        self.state, self.reporter = self.balancer.state, self.balancer.reporter
        self.reconciler = self.balancer.reconciler
        self.prober: FakeProber = self.state.prober  # type: ignore[assignment]

    def set_backends(self, *backends: str, **health: Health) -> None:
        """Takes a snapshot with backends as "id ip [state]". Those whose health is not given are healthy."""
        self.state.snapshot = Snapshot("r1", tuple(backend(text) for text in backends))
        self.prober.results = {b.id: health.get(b.id, HEALTHY) for b in self.state.snapshot.backends}

    def reconcile(self) -> list[str]:
        """Makes one pass, and returns its changes in order."""
        before = len(self.kernel.calls)
        self.reconciler.reconcile()
        return self.kernel.calls[before:]

    def dispatched(self) -> set[str]:
        """The addresses that new connections may go to."""
        chains = self.kernel.tables["nat"]
        rules = [rule for c in chains if c.startswith(("LB-DISPATCH", "LB-T-")) for rule in self.kernel.rules("nat", c)]
        return {rule.rpartition("LB-B-")[2] for rule in rules if "LB-B-" in rule}

    def chains(self) -> set[str]:
        return set(connections(self.kernel.listing("nat")))

    def members(self) -> set[str]:
        assert self.kernel.set.keys() == self.kernel.all_sets[REPLIES].keys()
        return set(self.kernel.set)

    def sample(self, seconds: float = schedule.SAMPLE_PERIOD) -> None:
        """Lets the balancer sample the flows for that long."""
        end = self.clock.now + seconds
        while self.clock.now < end - 1e-9:
            self.balancer.sample()

    def report(self) -> dict[str, Any]:
        return self.reporter.report()


def backend(text: str) -> Backend:
    id_, ip, *state = text.split(" ")
    return Backend(id_, ip, *(state or ["active"]))
