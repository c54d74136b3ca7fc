"""Brings the kernel's rules, sets and flows to what the snapshot and the backends' health require. The only writer of
rules.

A pass adds first and removes last:

    in:   healthy → old flows of its address deleted → in the sets → its chain and its share, in one step
    out:  share and chain removed, in one step → its flows deleted → out of the sets

A pass that fails at any step leaves working rules, and the next pass completes it. Without a manager, the last snapshot
stays in force.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import replace

import findings
import ruleset
from exposition import APPLY_SECONDS, REPAIRS
from health import Health
from listings import Listing, connections
from rotation import Rotation, rotation
from ruleset import SET, Endpoint, Table
from snapshot import Snapshot
from state import State

SLOW_START_STEP = 1.0  # seconds between passes while a backend is in its slow start

log = logging.getLogger("balancer")


class Reconciler:
    """`node` is the machine that this balancer is on, where there are several."""

    def __init__(self, state: State, node: str = "") -> None:
        self._state, self._netfilter, self._node = state, state.netfilter, node
        # What the kernel has: address → id of each backend that it may know (None after a start), and the nat table.
        self._known: Mapping[str, str] | None = None
        self._nat: Table | None = None

    def wait_and_reconcile(self) -> None:
        """Makes one pass: when something changed, or after an interval, which repairs what other programs changed."""
        wait = self._state.snapshot.interval
        if self._state.learner.ramping(time.monotonic()):
            wait = min(SLOW_START_STEP, wait)
        self._state.reconcile_due.wait(wait)
        self._state.reconcile_due.clear()
        if self._state.snapshot.revision:
            self.reconcile()
        else:  # before the first snapshot: the health check reports whether the first rules are there
            self._state.rules_in_place = ruleset.is_hooked(self._netfilter.listing("nat"))

    def reconcile(self) -> None:
        """Makes one pass; changes nothing when everything is in place."""
        state, snapshot, before = self._state, self._state.snapshot, self._state.rotation
        health = state.health(snapshot)
        chosen = rotation(snapshot, health, self._node, state.answering)
        chosen = self._weighted(chosen, snapshot, health)
        ids = snapshot.ids

        # After a start, the kernel has the first rules of script.sh, or what an earlier client left.
        nat = self._netfilter.listing("nat")
        state.rules_in_place = ruleset.is_hooked(nat)
        self._netfilter.make_sets()
        members = self._netfilter.members()
        known = dict.fromkeys((*connections(nat), *members[SET]), "") if self._known is None else self._known

        # Add the new backends: first to the sets, which rules need.
        self._prepare(ids, known)
        additions = [ruleset.set_changes({*present, *ids}, present, name) for name, present in members.items()]
        self._netfilter.change_sets("".join(additions))
        if self._known is not None:
            # The new backends may get flows from now on. If this pass fails below, the next must not delete them.
            self._known = {**known, **ids}
        # Write the rules. If the wanted nat table is that of the last pass, another program had changed the kernel's.
        tables = self._tables(chosen, snapshot)
        repaired = self._write(tables, nat) and self._nat == tables[0]
        # Remove the old backends: no rule leads to them now.
        unhealthy = {backend.ip for backend in snapshot.backends if health[backend.id].healthy is False}
        ejected = (before.ips & unhealthy) - chosen.ips
        self._remove(known.keys() - ids.keys(), ejected)
        removals = [ruleset.set_changes(ids, {*present, *ids}, name) for name, present in members.items()]
        self._netfilter.change_sets("".join(removals))

        self._known, self._nat = ids, tables[0]
        state.rotation, state.converged_at = chosen, time.monotonic()
        _log_changes(before, chosen, repaired)

    def _weighted(self, chosen: Rotation, snapshot: Snapshot, health: Mapping[str, Health]) -> Rotation:
        """`chosen` with weights by the backends' speed. Backends that became healthy a moment ago get a part of their
        share; a spare was healthy long before it enters rotation."""
        learner, now, adaptive = self._state.learner, time.monotonic(), snapshot.weights == "adaptive"
        ids = snapshot.ids
        healthy = {id_ for id_, one in health.items() if one.healthy}
        learner.ready(healthy | {ids[ip] for ip in chosen.ips}, now)
        endpoints = []
        for endpoint in chosen.endpoints:
            weight = endpoint.weight * learner.weight(ids[endpoint.ip], now, adaptive)
            endpoints.append(replace(endpoint, weight=weight))
        return replace(chosen, endpoints=tuple(endpoints))

    def _prepare(self, ids: Mapping[str, str], known: Mapping[str, str]) -> None:
        """Deletes what the kernel still has of new backends' addresses. Only an address that another backend had until
        now can have flows: those of an unknown address were deleted when its last backend was removed."""
        reused = {ip for ip, id_ in ids.items() if known.get(ip) and known[ip] != id_}
        self._netfilter.delete_flows(reused)
        self._netfilter.delete_neighbours((ids.keys() - known.keys()) | reused)

    def _remove(self, removed: Collection[str], ejected: Collection[str]) -> None:
        """Deletes what the kernel has of removed backends, and the unanswered connections of ejected ones: the
        client's next SYN is then sent to another backend."""
        self._netfilter.delete_flows(removed)
        self._netfilter.delete_neighbours(removed)
        self._netfilter.delete_flows(ejected, unanswered_only=True)

    def _tables(self, chosen: Rotation, snapshot: Snapshot) -> list[Table]:
        """The wanted tables, the nat table first."""
        others = [Endpoint(b.ip, snapshot.port) for b in snapshot.backends if b.ip not in chosen.ips]
        return ruleset.tables(
            chosen.endpoints, others, snapshot.backend_subnet, snapshot.check_source, self._state.missing
        )

    def _write(self, tables: list[Table], nat: Listing) -> bool:
        """Writes what differs, and returns whether the nat table did."""
        listings = {"nat": nat}
        changed = self._apply(tables[0], nat)
        self._state.rules_in_place = True
        for table in tables[1:]:
            listings[table.name] = self._netfilter.listing(table.name)
            self._apply(table, listings[table.name])
        self._state.findings = tuple(findings.find(self._netfilter.ip_forward(), listings))
        return changed

    def _apply(self, table: Table, actual: Listing) -> bool:
        text = ruleset.restore(table, actual)
        if text:
            with APPLY_SECONDS.time():
                self._netfilter.apply(text)
        return bool(text)


def _log_changes(before: Rotation, after: Rotation, repaired: bool) -> None:
    if after.panic and not before.panic:
        log.warning("panic: %s of %s backends healthy, all of them stay in rotation", after.healthy, after.candidates)
    if before.panic and not after.panic:
        log.info("panic over: %s of %s backends healthy", after.healthy, after.candidates)
    if after.ips != before.ips:
        log.info("rotation %s", " ".join(sorted(after.ips)) or "empty")
    elif repaired:
        log.warning("repaired the nat table: another program had changed it")
        REPAIRS.inc()
