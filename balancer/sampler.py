"""Samples the flows: for reports, for the weights, to find frozen backends, and to end drains.

At a million flows, a sample of the waiting flows or of one draining backend takes 0.4 s, because the kernel selects the
flows. A sample of all flows takes four seconds. So each kind of sample may use only a limited share of a processor's
time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

import requests

from departures import stop_reason
from features import MARKS
from health import Cause, Health
from manager_client import ManagerClient
from schedule import Pace
from snapshot import Snapshot
from stalls import Replies, StallDetector
from state import State

# The largest shares of a processor's time: for samples of waiting flows; for those of all flows and draining backends.
WAITING_LOAD, COUNT_LOAD = 0.01, 0.04
DRAINING_LOAD = 0.03  # of COUNT_LOAD, while there are draining backends

log = logging.getLogger("balancer")


class Sampler:
    def __init__(self, state: State, manager: ManagerClient) -> None:
        self._state, self._netfilter, self._manager = state, state.netfilter, manager
        self._detector = StallDetector()
        self._waiting_pace, self._draining_pace, self._count_pace = Pace(), Pace(), Pace()
        self._draining_since: dict[str, float] = {}  # by id: an address may be used again

    def samples(self) -> list[Callable[[], None]]:
        """One function for each kind of sample; it does nothing when no sample of that kind is due. If one raises, the
        others still have to be called."""
        samples_drains = self._draining_since and self._state.manager_reachable
        count_load = COUNT_LOAD - DRAINING_LOAD if samples_drains else COUNT_LOAD
        return [
            partial(self._sample, self._sample_waiting, self._waiting_pace, WAITING_LOAD),
            partial(self._sample, self._sample_draining, self._draining_pace, DRAINING_LOAD),
            partial(self._sample, self._count_all, self._count_pace, count_load),
        ]

    def _sample(self, take: Callable[[Snapshot], None], pace: Pace, load: float) -> None:
        if not pace.is_due(time.monotonic()):
            return
        # Processor time, not elapsed time: elapsed time includes waiting for the processor and the manager, and would
        # delay the next sample of the drains.
        began = time.thread_time()
        try:
            take(self._state.snapshot)
        finally:  # a sample that fails took time, too
            pace.done(time.monotonic(), time.thread_time() - began, load)

    def _sample_waiting(self, snapshot: Snapshot) -> None:
        """For the weights and the detector of frozen backends."""
        state = self._state
        if MARKS in state.missing:
            return
        counts = self._netfilter.waiting_flows(snapshot.check_source)
        # How many wait: for the weights.
        state.learner.sample({backend.id: counts.waiting[backend.ip] for backend in snapshot.backends})
        # How many stalled, and how many got their first reply: for the detector.
        replied = self._netfilter.members(self._netfilter.path.replies_set)
        weights = {endpoint.ip: endpoint.weight for endpoint in state.rotation.endpoints}
        seen = {}
        for backend in snapshot.backends:
            first_replies, _ = replied.get(backend.ip, (0, 0))
            seen[backend.id] = Replies(counts.stalled[backend.ip], first_replies, weights.get(backend.ip, 0.0))
        now, frozen_before, answering_before = time.monotonic(), state.frozen, state.answering
        frozen = self._detector.frozen(seen, now, state.table_full())
        # With --sticky, a backend may have only clients that wait in long polls: that others answer is no evidence.
        state.frozen = {} if self._netfilter.path.sticky else frozen
        state.answering = self._detector.answering(now)
        if state.frozen.keys() != frozen_before.keys():
            state.health_changed()
        if state.rotation.panic and state.answering != answering_before:
            state.reconcile_due.set()  # in panic, rotation depends on which backends answer

    def _count_all(self, snapshot: Snapshot) -> None:
        counted = self._netfilter.all_flows(snapshot.check_source).live
        # In the host's namespace, another program may dispatch connections to the same port.
        self._state.live = {ip: counted[ip] for ip in snapshot.ids}

    def _sample_draining(self, snapshot: Snapshot) -> None:
        """Requests a stop of the draining backends whose drain is over."""
        state, now = self._state, time.monotonic()
        if state.converged_at is None:  # before the first pass they are still in rotation
            return
        # Since when each draining backend has been out of rotation.
        draining = {}
        for backend in snapshot.backends:
            if backend.state == "draining" and backend.ip not in state.rotation.ips:
                draining[backend.ip] = backend.id
        self._draining_since = {id_: self._draining_since.get(id_, now) for id_ in draining.values()}
        # Without a manager there is nothing to request.
        if not draining or not state.manager_reachable:
            return
        counts, health = self._netfilter.flows_of(draining), state.health(snapshot)
        state.live = {**state.live, **{ip: counts.live[ip] for ip in draining}}
        for ip, id_ in draining.items():
            seconds = now - self._draining_since[id_]
            reason = stop_reason(
                seconds, counts.live[ip], counts.silent[ip], _is_failed(health[id_]), snapshot.drain_timeout
            )
            if reason:
                self._request_stop(ip, id_, reason)

    def _request_stop(self, ip: str, id_: str, reason: str) -> None:
        """A request that the manager refuses does not affect the others. A manager that does not answer ends this
        sample: otherwise each further request would wait for its timeout."""
        try:
            self._manager.stop(ip, id_, reason)
        except requests.HTTPError as error:
            log.warning("manager: %s", error)


def _is_failed(health: Health) -> bool:
    """Whether a draining backend no longer serves. One that only refuses new connections still serves the open ones."""
    return health.healthy is False and health.cause is not Cause.REFUSED
