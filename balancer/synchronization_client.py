"""The balancer's threads: sync backends → converge rules → probe → sample → report. Decisions are in the pure modules.

`converge` is the only writer of rules. An ordering holds throughout, grow first, shrink last:

    in:   probed ready → its address forgotten by the kernel → in the sets → its chain and its share, in one step
    out:  share and chain gone, in one step → its flows deleted → out of the sets

Fails static: without the manager the last snapshot stays in force; when fewer than half of the backends are healthy,
all are kept.

What threads share is either an immutable value that one thread replaces at once (the snapshot,
`_Converged`, `_Sampled`), or an object with a lock of its own (the prober's health, the learner).
"""

from __future__ import annotations

import logging
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import requests

import findings
import ruleset
import stalls
from app import create_app, serve_in_thread
from departures import Draining, departures
from exposition import APPLY_SECONDS, FAILED_PASSES, REPAIRS, Gauges
from findings import Finding
from listings import Listing, connections, parse_set, parse_table
from manager_client import ManagerClient
from netfilter import Netfilter, NetfilterError
from prober import Cause, Health, Prober
from rotation import Rotation, rotation
from ruleset import REPLIES, SET, Endpoint, Features, Table
from schedule import Pace, ReportSchedule
from snapshot import Snapshot
from stalls import Replies, StallDetector
from weights import Learner

HERE = Path(__file__).parent
SECRETS = Path("/run/secrets")  # where a Swarm puts them
SAMPLE_PERIOD = 0.5  # seconds between samples of the flows, while they cost little
# The most of the time that samples may take: of waiting flows, and of all and of draining backends' together. At a
# million flows a sample takes 0.4 s for those that wait and for each draining backend, and four seconds for all.
WAITING_LOAD, COUNT_LOAD = 0.01, 0.04
DRAINING_LOAD = 0.03  # of COUNT_LOAD, while there are draining backends
NEARLY_FULL, FULL = 0.9, 0.98  # of the connection table: worth a warning; from here on the kernel drops packets
LOOP_SECONDS = 120.0  # and an interval without a new pass: a loop is stuck; a long poll takes up to 38 s

log = logging.getLogger("balancer")


@dataclass(frozen=True)
class _Converged:
    """What the last good pass left in the kernel."""

    rotation: Rotation = field(default_factory=Rotation)
    ids: Mapping[str, str] | None = None  # address → id of every backend the kernel may know; None before the first
    nat: Table | None = None
    at: float = 0.0

    @property
    def serving(self) -> frozenset[str]:
        return frozenset(endpoint.ip for endpoint in self.rotation.endpoints)


@dataclass(frozen=True)
class _Sampled:
    """What the last samples of the flows and of the tables showed."""

    live: Mapping[str, int] = field(default_factory=dict)  # flows by address
    stalled: Mapping[str, int] = field(default_factory=dict)  # by id: backends that do not answer their connections
    answering: frozenset[str] = frozenset()  # ids of the backends that answer clients now


class Balancer:
    """Keeps the kernel at what the snapshot and the probes ask for, and reports to the manager what it sees."""

    def __init__(self, netfilter: Netfilter, manager: ManagerClient, name: str, node: str = "") -> None:
        self.snapshot = Snapshot()
        self._netfilter, self._manager, self._name, self._node = netfilter, manager, name, node
        self._features = Features()
        self._began = time.monotonic()
        self._wake = threading.Event()  # something changed that the rules have to follow
        self._changed = threading.Event()  # a backend's health changed: worth a report at once
        self._prober = Prober(self._health_changed, self._table_full)
        self._learner = Learner()
        self._converged = _Converged(at=self._began)
        self._sampled = _Sampled()
        self._findings: tuple[Finding, ...] = ()
        self._rules_in_place = False
        self._reachable = True
        self._beats: dict[str, float] = {}  # when each loop began its last pass; each has its own key
        # Of the sampling thread alone:
        self._detector = StallDetector()
        self._paces = {name: Pace(SAMPLE_PERIOD) for name in ("waiting", "all", "draining")}
        self._draining_since: dict[str, float] = {}
        # Of the reporting thread alone:
        self._schedule = ReportSchedule(self._began, self.snapshot.interval)

    def run(self) -> None:
        """Converges for ever: at once when something changed, and every interval to repair what others changed."""
        self._features = self._netfilter.features()
        _log_lacks(self._features)
        self._prober.start()
        bodies = {"follow": self._follow, "report": self._report_once, "sample": self._sample}
        for name, body in bodies.items():
            self._beat(name)
            threading.Thread(target=self._forever, args=(name, body), name=name, daemon=True).start()
        self._forever("converge", self._converge_once)

    def _forever(self, name: str, body: Callable[[], None]) -> None:
        while True:
            self._beat(name)
            _attempt(body)

    def _beat(self, name: str) -> None:
        self._beats[name] = time.monotonic()

    # -- rules -----------------------------------------------------------------------------------------------------

    def _converge_once(self) -> None:
        ramping = self._learner.ramping(time.monotonic())
        self._wake.wait(min(1.0, self.snapshot.interval) if ramping else self.snapshot.interval)
        self._wake.clear()
        if self.snapshot.revision:
            self.converge()
        else:
            self._note_rules(parse_table(self._netfilter.table("nat")))

    def converge(self) -> None:
        """One pass over tables, sets and flows towards what is wanted now; changes nothing when all is as it should."""
        snapshot, before = self.snapshot, self._converged
        health = self._health()
        chosen = self._weighted(rotation(snapshot, _healthy(health), self._node, self._dead(health)), health, snapshot)
        ids = {backend.ip: backend.id for backend in snapshot.backends}
        nat = parse_table(self._netfilter.table("nat"))
        self._note_rules(nat)
        self._netfilter.make_sets()
        sets = self._sets()
        # A client that begins finds what script.sh wrote (chains, no set) or what a client before it left halfway.
        known = dict.fromkeys((*connections(nat), *sets[SET]), "") if before.ids is None else before.ids

        self._take_in(ids, known, sets)
        if before.ids is not None:
            # From now on these may have flows, also where this pass fails below: the next must not delete them.
            self._converged = replace(before, ids={**known, **ids})
        wanted = self._wanted(chosen, snapshot)
        repaired = self._write(wanted, nat) and before.nat == wanted[0]
        unhealthy = {b.ip for b in snapshot.backends if health.get(b.id, Health()).healthy is False}
        in_rotation = {endpoint.ip for endpoint in chosen.endpoints}
        self._let_go(ids, known, sets, (before.serving & unhealthy & ids.keys()) - in_rotation)

        self._converged = _Converged(chosen, ids, wanted[0], time.monotonic())
        _log_changes(before, self._converged, repaired)

    def _take_in(self, ids: Mapping[str, str], known: Mapping[str, str], sets: Mapping[str, Collection[str]]) -> None:
        """Makes the kernel ready for new backends. Only an address that another backend had before can have flows: an
        address that the kernel does not know was forgotten when its last backend went."""
        reused = {ip for ip, id_ in ids.items() if known.get(ip) and known[ip] != id_}
        self._netfilter.forget_flows(reused)
        self._netfilter.forget_neighbours((ids.keys() - known.keys()) | reused)
        additions = (ruleset.set_changes({*members, *ids}, members, name) for name, members in sets.items())
        self._netfilter.change_sets("".join(additions))

    def _let_go(
        self,
        ids: Mapping[str, str],
        known: Mapping[str, str],
        sets: Mapping[str, Collection[str]],
        ejected: Collection[str],
    ) -> None:
        """Removes what the kernel has of backends that are gone. Connections to ejected ones that still wait for their
        first packet are forgotten, so that the client's next SYN is sent to another backend."""
        gone = known.keys() - ids.keys()
        self._netfilter.forget_flows(gone)
        self._netfilter.forget_neighbours(gone)
        self._netfilter.forget_flows(ejected, unanswered_only=True)
        removals = (ruleset.set_changes(ids, {*members, *ids}, name) for name, members in sets.items())
        self._netfilter.change_sets("".join(removals))

    def _wanted(self, chosen: Rotation, snapshot: Snapshot) -> list[Table]:
        """The nat table first."""
        in_rotation = {endpoint.ip for endpoint in chosen.endpoints}
        others = [Endpoint(b.ip, snapshot.port) for b in snapshot.backends if b.ip not in in_rotation]
        return ruleset.tables(chosen.endpoints, others, snapshot.backend_subnet, snapshot.check_source, self._features)

    def _write(self, wanted: list[Table], nat: Listing) -> bool:
        """Writes what differs; whether the nat table did."""
        listings = {"nat": nat}
        nat_text = ruleset.restore(wanted[0], nat)
        self._apply(nat_text)
        self._rules_in_place = True
        for table in wanted[1:]:
            listings[table.name] = parse_table(self._netfilter.table(table.name))
            self._apply(ruleset.restore(table, listings[table.name]))
        self._findings = tuple(findings.find(self._netfilter.ip_forward(), listings))
        return bool(nat_text)

    def _apply(self, text: str) -> None:
        if text:
            with APPLY_SECONDS.time():
                self._netfilter.apply(text)

    def _note_rules(self, nat: Listing) -> None:
        self._rules_in_place = ruleset.is_hooked(nat)

    def _sets(self) -> dict[str, dict[str, tuple[int, int]]]:
        text = self._netfilter.sets()
        return {name: parse_set(text, name) for name in (SET, REPLIES)}

    def _weighted(self, chosen: Rotation, health: Mapping[str, Health], snapshot: Snapshot) -> Rotation:
        """`chosen` with the weights learnt from their speed, and with new backends held back a little: those that have
        not been healthy for long. A spare has had its time before it enters."""
        now, adaptive = time.monotonic(), snapshot.weights == "adaptive"
        ids = {backend.ip: backend.id for backend in snapshot.backends}
        healthy = {b.id for b in snapshot.backends if health.get(b.id, Health()).healthy}
        self._learner.ready(healthy | {ids[e.ip] for e in chosen.endpoints}, now)
        weights = {e.ip: e.weight * self._learner.weight(ids[e.ip], now, adaptive) for e in chosen.endpoints}
        return replace(chosen, endpoints=tuple(replace(e, weight=weights[e.ip]) for e in chosen.endpoints))

    # -- health ----------------------------------------------------------------------------------------------------

    def _health(self) -> dict[str, Health]:
        """By id: what the probes say, and over that what the connections show."""
        health = self._prober.health()
        for id_, stalled in self._sampled.stalled.items():
            health[id_] = Health(False, 0, stalls.why(stalled), Cause.NO_FIRST_REPLY)
        return health

    def _dead(self, health: Mapping[str, Health]) -> set[str]:
        """The ids of backends that cannot be connected to and answer no client, while others answer: else the fault may
        be this node's own network."""
        answering = self._sampled.answering
        others_answer = bool(answering) or any(verdict.healthy for verdict in health.values())
        unreachable = {id_ for id_, verdict in health.items() if verdict.cause is Cause.UNREACHABLE}
        return unreachable - answering if others_answer else set()

    def _health_changed(self) -> None:
        self._wake.set()
        self._changed.set()

    def _table_full(self) -> bool:
        used, limit = self._netfilter.conntrack_use()
        return used >= FULL * limit

    # -- the manager -----------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Takes the manager's next snapshot. Logs when it becomes unreachable and when it answers again."""
        try:
            # After a silence ask as if for the first time: the answer comes at once, and so does a change.
            message = self._manager.sync(self.snapshot.revision if self._reachable else "")
            if message is not None:
                self.snapshot = Snapshot.parse(message)
                backends = {b.id: b.ip for b in self.snapshot.backends}
                self._prober.watch(backends, self.snapshot.port, self.snapshot.health)
                self._wake.set()
        except (requests.RequestException, KeyError, TypeError, ValueError) as error:
            if self._reachable:
                log.warning("manager unreachable, keeping the last rules: %s", error)
            self._reachable = False
            time.sleep(random.uniform(0.2, 1.0))  # noqa: S311 - spreads balancers, hides nothing
        else:
            if not self._reachable:
                log.info("manager reachable again")
            self._reachable = True

    def _report_once(self) -> None:
        """Waits until a report is due, regular or early, and sends it."""
        early = self._changed.wait(self._schedule.until_regular(time.monotonic()))
        if early:
            time.sleep(self._schedule.early_pause(time.monotonic()))
        self._changed.clear()
        regular = self._schedule.send(time.monotonic(), self.snapshot.interval)
        if not self.snapshot.revision:
            return
        report = self.report()
        if regular:
            self._learn(report)
        if self._reachable:  # else _follow has logged it, and will log when that is over
            self._manager.report(report)

    def report(self) -> dict[str, Any]:
        """The message of POST /pkts_info: absolute counters of every backend in the snapshot."""
        snapshot, health, converged = self.snapshot, self._health(), self._converged
        counted = connections(parse_table(self._netfilter.table("nat")))
        traffic = self._sets()[SET]
        weights = {endpoint.ip: endpoint.weight for endpoint in converged.rotation.endpoints}
        total = sum(weights.values()) or 1.0
        backends = []
        for backend in snapshot.backends:
            packets, size = traffic.get(backend.ip, (0, 0))
            row = {
                "id": backend.id,
                "ip": backend.ip,
                "share": weights.get(backend.ip, 0.0) / total,
                "connections": counted.get(backend.ip, 0),
                "packets": packets,
                "bytes": size,
                "active": self._sampled.live.get(backend.ip, 0),
            }
            backends.append(row | _health_fields(health.get(backend.id, Health())))
        return {
            "balancer": self._name,
            "revision": snapshot.revision,
            "interval": snapshot.interval,
            "uptime": time.monotonic() - self._began,
            "panic": converged.rotation.panic,
            "findings": [finding.message() for finding in self._findings],
            "warnings": self._warnings(),
            "backends": backends,
        }

    def _learn(self, report: Mapping[str, Any]) -> None:
        """Ends a learning interval."""
        serving = self._converged.serving
        counted = {b["id"]: b["connections"] for b in report["backends"] if b["ip"] in serving}
        self._learner.learn(counted, time.monotonic())
        self._wake.set()

    def _warnings(self) -> list[str]:
        used, limit = self._netfilter.conntrack_use()
        if used <= NEARLY_FULL * limit:
            return []
        return [f"connection table over {NEARLY_FULL:.0%} of its {limit} entries: raise net.netfilter.nf_conntrack_max"]

    # -- samples of the flows --------------------------------------------------------------------------------------

    def _sample(self) -> None:
        """Takes each sample that is due. At a million flows a count of all takes seconds, and is made seldom; those
        that wait, and those of a draining backend, are picked out by the kernel."""
        time.sleep(SAMPLE_PERIOD)
        snapshot = self.snapshot
        count_load = COUNT_LOAD - DRAINING_LOAD if self._draining_since else COUNT_LOAD
        self._take_sample("waiting", self._sample_waiting, snapshot, WAITING_LOAD)
        self._take_sample("draining", self._sample_draining, snapshot, DRAINING_LOAD)
        self._take_sample("all", self._count_all, snapshot, count_load)

    def _take_sample(self, name: str, body: Callable[[Snapshot], None], snapshot: Snapshot, share: float) -> None:
        pace = self._paces[name]
        began = time.monotonic()
        if not pace.is_due(began):
            return
        try:
            body(snapshot)
        finally:  # a sample that fails has cost time, too
            pace.done(began, time.monotonic(), share)

    def _sample_waiting(self, snapshot: Snapshot) -> None:
        """For the weights and the detector of frozen backends."""
        if not self._features.marks:
            return
        counts = self._netfilter.waiting_flows(snapshot.check_source)
        self._learner.sample({b.id: counts.waiting.get(b.ip, 0) for b in snapshot.backends})
        replied = self._sets()[REPLIES]
        serving = self._converged.serving
        seen = {}
        for b in snapshot.backends:
            first_replies, _ = replied.get(b.ip, (0, 0))
            seen[b.id] = Replies(counts.stalled.get(b.ip, 0), first_replies, b.ip in serving)
        now, before = time.monotonic(), self._sampled
        stalled = self._detector.judge(seen, now, self._table_full())
        self._sampled = replace(before, stalled=stalled, answering=self._detector.answering(now))
        if stalled.keys() != before.stalled.keys():
            self._health_changed()
        if self._converged.rotation.panic and self._sampled.answering != before.answering:
            self._wake.set()  # a dead backend can be told from an overloaded one now

    def _count_all(self, snapshot: Snapshot) -> None:
        self._sampled = replace(self._sampled, live=self._netfilter.all_flows(snapshot.check_source).live)

    def _sample_draining(self, snapshot: Snapshot) -> None:
        """Asks the manager to stop the draining backends that are done."""
        if self._converged.ids is None or not self._reachable:
            return  # before the first pass nobody has left dispatch yet; without a manager there is nobody to ask
        now, health = time.monotonic(), self._health()
        draining = {
            b.ip: b.id for b in snapshot.backends if b.state == "draining" and b.ip not in self._converged.serving
        }
        self._draining_since = {ip: self._draining_since.get(ip, now) for ip in draining}
        if not draining:
            return
        counts = self._netfilter.flows_of(draining)
        live = {ip: counts.live.get(ip, 0) for ip in draining}
        self._sampled = replace(self._sampled, live={**self._sampled.live, **live})
        states = {}
        for ip, id_ in draining.items():
            verdict = health.get(id_, Health())
            unhealthy = verdict.healthy is False and verdict.cause is not Cause.REFUSED  # that one is alive
            states[ip] = Draining(self._draining_since[ip], live[ip], counts.silent.get(ip, 0), unhealthy)
        for departure in departures(states, now, snapshot.drain_timeout):
            try:
                self._manager.stop(departure.ip, departure.sentence())
            except requests.HTTPError as error:
                # A stop that the manager refuses keeps no other from being asked for. A manager that does not answer
                # ends this sample: each wait for it would keep the others from being made.
                log.warning("manager: %s", error)

    # -- what port 5000 serves -------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Any], int]:
        """The answer to GET /sync, and its status: 503 when a loop is stuck or our rules are gone. Whether the manager
        can be reached does not matter: traffic flows without it."""
        now, converged = time.monotonic(), self._converged
        longest = LOOP_SECONDS + self.snapshot.interval
        loops_alive = all(now - beat < longest for beat in dict(self._beats).values())
        healthy = loops_alive and self._rules_in_place
        message = {
            "converged_s_ago": round(now - converged.at, 3),
            "revision": self.snapshot.revision,
            "rotation": sorted(converged.serving),
            "panic": converged.rotation.panic,
            "loops_alive": loops_alive,
            "rules_in_place": self._rules_in_place,
        }
        return message, 200 if healthy else 503

    def gauges(self) -> Gauges:
        used, limit = self._netfilter.conntrack_use()
        converged = self._converged
        return {
            "rotation_backends": ("Backends that get new connections.", len(converged.serving)),
            "panic": (
                "1 while fewer than half of the backends are healthy, so that all stay.",
                converged.rotation.panic,
            ),
            "flows": ("Live flows to backends.", sum(self._sampled.live.values())),
            "conntrack_entries": ("Entries in the connection table.", used),
            "conntrack_entries_limit": ("Entries that the connection table can hold.", limit),
            "converged_seconds": ("Time since the last good pass.", time.monotonic() - converged.at),
        }


def _healthy(health: Mapping[str, Health]) -> dict[str, bool | None]:
    return {id_: verdict.healthy for id_, verdict in health.items()}


def _health_fields(health: Health) -> dict[str, Any]:
    fields: dict[str, Any] = {"healthy": health.healthy}
    if health.healthy is False:
        fields["why"] = health.why
        if health.cause:
            fields["cause"] = health.cause.value
    return fields


def _log_changes(before: _Converged, after: _Converged, repaired: bool) -> None:
    numbers = after.rotation.healthy, after.rotation.candidates
    if after.rotation.panic and not before.rotation.panic:
        log.warning("panic: %s of %s backends healthy, all of them stay in rotation", *numbers)
    if before.rotation.panic and not after.rotation.panic:
        log.info("panic over: %s of %s backends healthy", *numbers)
    if after.serving != before.serving:
        log.info("rotation %s", " ".join(sorted(after.serving)) or "empty")
    elif repaired:
        log.warning("repaired the nat table: somebody else had changed it")
        REPAIRS.inc()


def _log_lacks(features: Features) -> None:
    if not features.marks:
        log.warning("no connmark in this kernel: weights stay equal, and only probes find a frozen backend")
    if not features.retries:
        log.warning("no connbytes in this kernel: a refused connection is not tried elsewhere")
    if not features.notrack:
        log.warning("no CT target in this kernel: probes and reports need room in the connection table")


def _attempt(body: Callable[[], None]) -> None:
    """Runs one pass of a loop; a pass that fails is logged and followed by the next, for the loop must not end."""
    try:
        with FAILED_PASSES.count_exceptions():
            body()
    except requests.RequestException as error:
        log.warning("manager: %s", error)
    except NetfilterError as error:
        log.error("%s", error)
    except Exception:
        log.exception("this pass failed; trying again")
        time.sleep(1)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)
    addresses = os.environ.get("LB_MANAGERS") or (HERE / "hostip.txt").read_text().strip()
    name, node = socket.gethostname(), os.environ.get("LB_NODE", "")
    token = os.environ.get("LB_TOKEN") or (SECRETS / "token").read_text().strip()
    certificate = str(SECRETS / "certificate.pem") if node else ""
    manager = ManagerClient(addresses.split(","), token, name, certificate)
    balancer = Balancer(Netfilter(os.environ["IPTABLES"]), manager, name, node)
    log.info("balancer started, iptables-%s, manager at %s", os.environ["IPTABLES"], addresses)
    serve_in_thread(create_app(balancer))
    balancer.run()


if __name__ == "__main__":
    main()
