"""Reports to the manager: absolute counters of every backend, and the faults that the balancer found."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from health import Health
from listings import connections
from manager_client import ManagerClient
from schedule import ReportSchedule
from state import State

NEARLY_FULL = 0.9  # of the connection table: reported as a warning


class Reporter:
    """`name` is the balancer's name in its reports."""

    def __init__(self, state: State, manager: ManagerClient, name: str) -> None:
        self._state, self._manager, self._name = state, manager, name
        self._schedule = ReportSchedule(state.began, state.snapshot.interval)

    def wait_and_report(self) -> None:
        """Sends the next report: a regular one each interval, or an early one after a change of health."""
        state = self._state
        is_early = state.report_due.wait(self._schedule.until_regular(time.monotonic()))
        # One failure often causes several changes within a short time: the pause puts them into one report.
        if is_early:
            time.sleep(self._schedule.early_pause(time.monotonic()))
        state.report_due.clear()
        is_regular = self._schedule.send(time.monotonic(), state.snapshot.interval)
        if not state.snapshot.revision:
            return
        report = self.report()
        # An early report ends no learning interval: a short one has few connections, so its estimates are noisy.
        if is_regular:
            self.learn(report)
        if state.manager_reachable:  # the thread that follows the manager logs when it is not
            self._manager.report(report)

    def report(self) -> dict[str, Any]:
        """The message of POST /pkts_info."""
        state, snapshot, rotation = self._state, self._state.snapshot, self._state.rotation
        health = state.health(snapshot)
        path = state.netfilter.path
        counted = connections(state.netfilter.listing("nat"), path.backend_chain(""))
        traffic = state.netfilter.members(path.traffic_set)
        # The share of each backend, by its weight.
        weights = {endpoint.ip: endpoint.weight for endpoint in rotation.endpoints}
        total = sum(weights.values()) or 1.0
        rows = []
        for backend in snapshot.backends:
            packets, size = traffic.get(backend.ip, (0, 0))
            row = {
                "id": backend.id,
                "ip": backend.ip,
                "share": weights.get(backend.ip, 0.0) / total,
                "connections": counted.get(backend.ip, 0),
                "packets": packets,
                "bytes": size,
                "active": state.live.get(backend.ip, 0),
            }
            rows.append(row | _health_fields(health[backend.id]))
        return {
            "balancer": self._name,
            "revision": snapshot.revision,
            "interval": snapshot.interval,
            "uptime": time.monotonic() - state.began,
            "panic": rotation.panic,
            "findings": [finding.message() for finding in state.findings],
            "warnings": self._warnings(),
            "backends": rows,
        }

    def learn(self, report: Mapping[str, Any]) -> None:
        """Ends a learning interval of the weights."""
        in_rotation = self._state.rotation.ips
        counted = {row["id"]: row["connections"] for row in report["backends"] if row["ip"] in in_rotation}
        self._state.learner.learn(counted, time.monotonic(), {row["id"] for row in report["backends"]})
        self._state.reconcile_due.set()

    def _warnings(self) -> list[str]:
        used, limit = self._state.netfilter.conntrack_use()
        if used <= NEARLY_FULL * limit:
            return []
        return [f"connection table over {NEARLY_FULL:.0%} of its {limit} entries: raise net.netfilter.nf_conntrack_max"]


def _health_fields(health: Health) -> dict[str, Any]:
    fields: dict[str, Any] = {"healthy": health.healthy}
    if health.healthy is False:
        fields["why"] = health.why
        if health.cause:
            fields["cause"] = health.cause.value
    return fields
