"""Changes the kernel's rules, sets and flows until they match the snapshot and the backends' health. The client writes
rules nowhere else.

A pass adds first and removes last:

    add:     old flows of its address deleted → added to the sets → chain written, and its share once it is healthy
    remove:  share and chain deleted in one step → its flows deleted → removed from the sets

A pass that fails at any step leaves working rules, and the next pass completes it. Without a manager, the last snapshot
stays in force.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import replace

import findings
import restore
import ruleset
from exposition import APPLY_SECONDS, FAILED_CONNECTIONS, REPAIRS
from health import Health
from listings import Listing, connections
from restore import Table
from rotation import Rotation, rotation
from ruleset import Endpoint
from snapshot import Snapshot
from state import State
from weights import RAMP, RAMP_STEPS

# Seconds between passes while a backend is in its slow start: one rewrite for each step.
SLOW_START_STEP = RAMP / RAMP_STEPS

log = logging.getLogger("balancer")


class Reconciler:
    """`node` is the Swarm node of this balancer; empty on a single host."""

    def __init__(self, state: State, node: str = "") -> None:
        self._state, self._netfilter, self._node = state, state.netfilter, node
        self._path = state.netfilter.path
        # Address → id of each backend that this client may have written rules for.
        self._ids: Mapping[str, str] = {}
        self._in_rotation: Collection[str] | None = None  # ids, after the last pass; None before the first
        self._nat: Table | None = None  # as it was written last
        self._misdirected = False  # another program had changed the nat table, and its flows are not deleted yet
        self._failed: Mapping[str, int] = {}  # connections that the rules had dropped at the last pass, by reason

    def wait_and_reconcile(self) -> None:
        """Makes one pass when something changes, or after an interval: other programs may have changed the rules."""
        wait = self._state.snapshot.interval
        if self._state.learner.ramping(time.monotonic()):
            wait = min(SLOW_START_STEP, wait)
        self._state.reconcile_due.wait(wait)
        self._state.reconcile_due.clear()
        if self._state.snapshot.revision:
            self.reconcile()
            return
        # Before the first snapshot, this balancer serves if the rules of script.sh or of an earlier client lead to a
        # backend. In a Swarm there are none for a new balancer: until it has reached the manager, its health check
        # fails, so that an update does not replace the balancers of the other nodes as well.
        nat = self._netfilter.listing("nat")
        leads_to_backend = bool(connections(nat, self._path.backend_chain("")))
        self._state.rules_in_place = leads_to_backend and ruleset.is_hooked(nat, self._path)

    def reconcile(self) -> None:
        """Makes one pass; changes nothing when everything is in place."""
        state, snapshot, before = self._state, self._state.snapshot, self._state.rotation
        health = state.health(snapshot)
        chosen = self._choose(snapshot, health)
        ids = snapshot.ids

        # After a start, the kernel has the first rules of script.sh, or what an earlier client left.
        nat = self._netfilter.listing("nat")
        state.rules_in_place = ruleset.is_hooked(nat, self._path)
        self._netfilter.make_sets()
        members = {name: self._netfilter.members(name) for name in self._path.backend_sets}
        # The addresses that the kernel may have flows of.
        counted = connections(nat, self._path.backend_chain(""))
        known = {*counted, *members[self._path.traffic_set], *self._ids}

        # Add the new backends: first to the sets, which rules need.
        self._prepare(ids, known)
        # The new backends may get flows from now on. If this pass fails below, the next must not delete them.
        self._ids = {**self._ids, **ids}
        self._change_members(members, ids, add=True)
        self._netfilter.make_client_sets(ids)
        # Write the rules. If the kernel no longer has the nat table that was written last, another program changed it.
        tables = self._tables(chosen, snapshot)
        repaired = self._nat is not None and bool(restore.restore(self._nat, nat))
        self._misdirected |= repaired and not self._path.on_host
        self._write(tables, nat)
        if repaired:
            log.warning("repaired the nat table: another program had changed it")
            REPAIRS.inc()
        if self._misdirected:
            # Another program's rule may have sent flows elsewhere. They keep that translation, and so would new flows
            # from the same ports of a client, for the two minutes after the last SYN. On the host, a flow to the same
            # port may belong to another service, so nothing is deleted there.
            self._netfilter.delete_misdirected_flows(ids)
            self._misdirected = False
        # Remove the old backends: no rule leads to them now.
        unhealthy = {backend.ip for backend in snapshot.backends if health[backend.id].healthy is False}
        ejected = (before.ips & unhealthy) - chosen.ips
        self._remove(known - ids.keys(), ejected)
        self._change_members(members, ids, add=False)
        self._netfilter.remove_client_sets(ids)

        self._ids = ids
        self._in_rotation = {ids[ip] for ip in chosen.ips}
        state.rotation, state.converged_at = chosen, time.monotonic()
        _log_changes(before, chosen)

    def _choose(self, snapshot: Snapshot, health: Mapping[str, Health]) -> Rotation:
        """The backends in rotation, weighted by their speed. A backend in its slow start gets a part of its share. Slow
        start counts from when a backend became healthy, so a spare's is usually over when it enters rotation."""
        chosen = rotation(snapshot, health, self._node, self._state.answering, self._in_rotation)
        learner, now, adaptive = self._state.learner, time.monotonic(), snapshot.weights == "adaptive"
        ids = snapshot.ids
        healthy = {id_ for id_, one in health.items() if one.healthy}
        learner.ready(healthy | {ids[ip] for ip in chosen.ips}, now)
        endpoints = []
        for endpoint in chosen.endpoints:
            weight = endpoint.weight * learner.weight(ids[endpoint.ip], now, adaptive)
            endpoints.append(replace(endpoint, weight=weight))
        return replace(chosen, endpoints=tuple(endpoints))

    def _change_members(self, members: Mapping[str, Collection[str]], ids: Mapping[str, str], *, add: bool) -> None:
        """Adds the backends' addresses to the sets, or removes all others. `members`: the sets' before the pass."""
        for name, present in members.items():
            both = {*present, *ids}
            wanted, actual = (both, present) if add else (ids, both)
            self._netfilter.change_sets(restore.set_changes(wanted, actual, name))

    def _prepare(self, ids: Mapping[str, str], known: set[str]) -> None:
        """Deletes the old flows and neighbour entries of new backends' addresses. `_remove` has deleted the flows of
        addresses that no backend has; so only an address that another backend had until now can have some."""
        reused = {ip for ip, id_ in ids.items() if self._ids.get(ip, id_) != id_}
        self._netfilter.delete_flows(reused)
        self._netfilter.delete_neighbours((ids.keys() - known) | reused)
        # After a start of this client, every backend may be a new one, at an address that the kernel knows.
        unknown = {ip for ip, id_ in ids.items() if self._ids.get(ip) != id_}
        if self._path.on_host and unknown:
            self._netfilter.enable_hairpin()

    def _remove(self, removed: Collection[str], ejected: Collection[str]) -> None:
        """Deletes the flows and neighbour entries of removed backends, and the unanswered flows of ejected ones: the
        client's next SYN is then sent to another backend."""
        self._netfilter.delete_flows(removed)
        self._netfilter.delete_neighbours(removed)
        self._netfilter.delete_flows(ejected, unanswered_only=True)

    def _tables(self, chosen: Rotation, snapshot: Snapshot) -> list[Table]:
        """The wanted tables, the nat table first."""
        others = [Endpoint(backend.ip) for backend in snapshot.backends if backend.ip not in chosen.ips]
        return ruleset.tables(chosen.endpoints, others, self._path, snapshot.check_source, self._state.missing)

    def _write(self, tables: list[Table], nat: Listing) -> None:
        """Writes each table that differs from the kernel's."""
        # The nat table first: it alone decides where connections go.
        listings = {"nat": nat}
        self._apply(tables[0], nat)
        self._nat = tables[0]
        self._state.rules_in_place = True
        for table in tables[1:]:
            listings[table.name] = self._netfilter.listing(table.name)
            self._apply(table, listings[table.name])
        self._count_failed(ruleset.failed_connections(listings["filter"], self._path))
        # On the host, foreign rules are not reported: most of them match other traffic.
        inspected = {} if self._path.on_host else listings
        self._state.findings = tuple(findings.find(self._netfilter.ip_forward(), inspected))

    def _count_failed(self, failed: Mapping[str, int]) -> None:
        for reason, count in failed.items():
            # The first pass counts nothing: these are of an earlier client. Rewritten rules begin at zero.
            before = self._failed.get(reason, count)
            FAILED_CONNECTIONS.labels(reason).inc(count - before if count >= before else count)
        self._failed = failed

    def _apply(self, table: Table, actual: Listing) -> None:
        text = restore.restore(table, actual)
        if text:
            with APPLY_SECONDS.time():
                self._netfilter.apply(text)


def _log_changes(before: Rotation, after: Rotation) -> None:
    if after.panic and not before.panic:
        log.warning("panic: %s of %s backends healthy, all of them stay in rotation", after.healthy, after.candidates)
    if before.panic and not after.panic:
        log.info("panic over: %s of %s backends healthy", after.healthy, after.candidates)
    if after.ips != before.ips:
        log.info("rotation %s", " ".join(sorted(after.ips)) or "empty")
