"""The state that the balancer's threads share.

Each attribute is an immutable value that one thread replaces in one assignment, or an object with its own lock: the
prober, the learner, the events.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

import stalls
from features import Feature
from findings import Finding
from health import Health
from netfilter import Netfilter
from prober import Prober
from rotation import Rotation
from snapshot import Snapshot
from weights import Learner

FULL = 0.98  # share of the connection table in use from which the kernel may drop packets


class State:
    def __init__(self, netfilter: Netfilter) -> None:
        self.netfilter = netfilter
        self.began = time.monotonic()
        self.missing: tuple[Feature, ...] = ()  # optional features that this kernel lacks; set before threads start
        # Written by the thread that follows the manager:
        self.snapshot = Snapshot()
        self.manager_reachable = True
        # Written by the reconciler, after each successful pass:
        self.rotation = Rotation()
        self.converged_at: float | None = None
        # ... and during a pass:
        self.rules_in_place = False
        self.findings: tuple[Finding, ...] = ()
        # Written by the sampler:
        self.live: Mapping[str, int] = {}  # flows by address
        self.frozen: Mapping[str, int] = {}  # stalled connections of each frozen backend, by id
        self.answering: frozenset[str] = frozenset()  # ids of the backends that answer clients now
        # Set when there is work before the next interval:
        self.reconcile_due, self.report_due = threading.Event(), threading.Event()
        self.learner = Learner()
        self.prober = Prober(self.health_changed, self.table_full)

    def health(self, snapshot: Snapshot) -> dict[str, Health]:
        """The health of each backend of the snapshot, by id: by its probes, and frozen ones by their connections."""
        probed, frozen = self.prober.health(), self.frozen
        health = {}
        for backend in snapshot.backends:
            id_ = backend.id
            health[id_] = stalls.health(frozen[id_]) if id_ in frozen else probed.get(id_, Health())
        return health

    def since_converged(self) -> float:
        """Seconds since the last successful pass over the rules, or since the start."""
        return time.monotonic() - (self.converged_at or self.began)

    def health_changed(self) -> None:
        self.reconcile_due.set()
        self.report_due.set()

    def table_full(self) -> bool:
        used, limit = self.netfilter.conntrack_use()
        return used >= FULL * limit
