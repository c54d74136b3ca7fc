"""The balancer's loop: sync backends → converge rules → probe → sample → report.

Four threads meet in two values, the view (what the manager wants) and the probes' health (what we see); `converge` is
the only writer of rules. An ordering holds throughout, grow first, shrink last:

    in:   probed ready → its address forgotten by the kernel → in the set → its chain and its share, in one step
    out:  share and chain gone, in one step → its flows deleted → out of the set

Fails static: without the manager the last view stands; when every backend looks ill, all are kept.
"""

from __future__ import annotations

import json
import logging
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import requests
import waitress
from flask import Flask, Response

import ruleset
from exposition import APPLY_SECONDS, FAILED_PASSES, REPAIRS, exposition
from netfilter import Netfilter, NetfilterError
from probe import Health, Prober
from ruleset import Endpoint
from weights import Learner
from wire import Backend, Manager, View

HERE = Path(__file__).parent
SECRETS = Path("/run/secrets")  # where a Swarm puts them
SYNC_PORT = 5000
LOOK, LOOK_COST = 0.5, 0.05  # seconds between looks at the flows, and the most of the time that looking may take
FULL = 0.9  # of the connection table: worth a warning
FAR = 0.1  # weight of a backend on another node, where near ones are preferred
DEAD_AFTER = 10.0  # seconds of failed probes until the manager is asked to replace a backend
ALL_ILL_AFTER = 30.0  # seconds: the same where no backend is well, and then for one at a time

log = logging.getLogger("balancer")


def rotation(view: View, health: Mapping[str, Health], node: str = "") -> tuple[Endpoint, ...]:
    """Who gets new connections: the ready ones; where none is, all that ever were (better a chance than none). Where
    the view prefers what is near, those on other nodes than ours get little."""

    def ready(backend: Backend) -> bool:
        healthy = health.get(backend.id, Health()).healthy
        return healthy is True or (healthy is None and backend.state == "active")

    ours = [backend for backend in view.backends if backend.state in ("starting", "active")]
    chosen = [backend for backend in ours if ready(backend)] or [b for b in ours if b.state == "active"]
    far = FAR if view.locality and any(backend.node == node for backend in chosen) else 1.0
    return tuple(Endpoint(b.ip, view.port, b.weight * (1.0 if b.node == node else far)) for b in chosen)


class Balancer:
    """Keeps the kernel at what the view and the probes ask for, and tells the manager what it sees."""

    def __init__(self, netfilter: Netfilter, manager: Manager, name: str, node: str = "") -> None:
        self.view = View()
        self.converged_at = time.monotonic()
        self._netfilter, self._manager, self._name, self._node = netfilter, manager, name, node
        self._wake = threading.Event()
        self._news = threading.Event()  # a backend's health turned: worth a report at once
        self._prober = Prober(self._health_turned)
        self._known: dict[str, str] | None = None  # address → id, of every backend the kernel may know
        self._in_rotation: tuple[Endpoint, ...] = ()
        self._wanted: ruleset.Table | None = None
        self._reachable = True
        self._learner = Learner()
        self._live: dict[str, int] = {}  # flows by address, at the last look
        self._look_pause = LOOK
        self._draining_since: dict[str, float] = {}
        self._ill_since: dict[str, float] = {}
        self._was_well: set[str] = set()

    def run(self) -> None:
        """Converges for ever: at once when something changed, and every interval to repair what others changed."""
        self._prober.start()
        for body in (self._follow, self._report_regularly, self._look):
            threading.Thread(target=_forever, args=(body,), daemon=True).start()
        while True:
            self._wake.wait(
                min(1.0, self.view.interval) if self._learner.ramping(time.monotonic()) else self.view.interval
            )
            self._wake.clear()
            if self.view.revision:
                _attempt(self.converge)

    def converge(self) -> None:
        """One pass over tables, set and flows towards what is wanted now; changes nothing when all is as it should."""
        view = self.view
        ids = {backend.ip: backend.id for backend in view.backends}
        verdicts = self._prober.health()
        well = [b.id for b in view.backends if verdicts.get(b.id, Health()).healthy]
        chosen = self._weighted(rotation(view, verdicts, self._node), ids, well, view)
        health = {b.ip: verdicts.get(b.id, Health()).healthy for b in view.backends}
        nat = ruleset.parse_table(self._netfilter.table("nat"))
        members = ruleset.parse_set(self._netfilter.members())
        # A client that begins finds what script.sh wrote (chains, no set) or what a client before it left halfway.
        known = dict.fromkeys((*ruleset.connections(nat), *members), "") if self._known is None else self._known
        gone = known.keys() - ids.keys()
        come_back = {ip for ip, id_ in ids.items() if known.get(ip) and known[ip] != id_}
        self._forget((ids.keys() - known.keys()) | come_back)
        self._netfilter.change_members(ruleset.set_changes(members.keys() | ids.keys(), members))
        leaving = [Endpoint(b.ip, view.port) for b in view.backends if b.ip not in {e.ip for e in chosen}]
        wanted_nat = ruleset.nat(chosen, leaving, view.inside)
        text = ruleset.restore(wanted_nat, nat)
        self._apply(text)
        for wanted in (ruleset.filters(chosen), ruleset.mangle()):
            self._apply(ruleset.restore(wanted, ruleset.parse_table(self._netfilter.table(wanted.name))))
        self._forget(gone)
        for ip in {e.ip for e in self._in_rotation if health.get(e.ip) is False} & ids.keys() - {e.ip for e in chosen}:
            self._netfilter.forget_flows(ip, unanswered_only=True)  # who waits for its first word tries another
        self._netfilter.change_members(ruleset.set_changes(ids, members.keys() | ids.keys()))

        if {e.ip for e in chosen} != {e.ip for e in self._in_rotation}:
            log.info("rotation %s", " ".join(sorted(e.ip for e in chosen)) or "empty")
        elif text and wanted_nat == self._wanted:
            log.warning("repaired the nat table: somebody else had changed it")
            REPAIRS.inc()
        self._known, self._in_rotation, self._wanted = ids, chosen, wanted_nat
        self.converged_at = time.monotonic()

    def _weighted(
        self, chosen: tuple[Endpoint, ...], ids: Mapping[str, str], well: Iterable[str], view: View
    ) -> tuple[Endpoint, ...]:
        """`chosen` with the weights learnt from their speed, and with newcomers held back a little: those that have
        not been well for long. A spare has had its time before it enters."""
        now, adaptive = time.monotonic(), view.weights == "adaptive"
        self._learner.ready({*well, *(ids[e.ip] for e in chosen)}, now)
        return tuple(replace(e, weight=e.weight * self._learner.weight(ids[e.ip], now, adaptive)) for e in chosen)

    def _apply(self, text: str) -> None:
        if text:
            with APPLY_SECONDS.time():
                self._netfilter.apply(text)

    def _forget(self, ips: Iterable[str]) -> None:
        ips = set(ips)
        live = ruleset.parse_flows(self._netfilter.flows()).live if ips else {}
        for ip in ips & live.keys():
            self._netfilter.forget_flows(ip)
        self._netfilter.forget_neighbours(ips)

    def _follow(self) -> None:
        """Takes the manager's next view; says once when the manager cannot be reached and once when it can again."""
        try:
            # After a silence ask for the view as if for the first time: the answer comes at once, and with it the news.
            message = self._manager.sync(self.view.revision if self._reachable else "")
            if message is not None:
                self.view = View.parse(message)
                backends = {b.id: b.ip for b in self.view.backends}
                self._prober.watch(backends, self.view.port, self.view.health)
                self._wake.set()
        except (requests.RequestException, KeyError, TypeError, ValueError) as error:
            if self._reachable:
                log.warning("manager out of reach, keeping the last rules: %s", error)
            self._reachable = False
            time.sleep(random.uniform(0.2, 1.0))  # noqa: S311 - spreads balancers, hides nothing
        else:
            if not self._reachable:
                log.info("manager in reach again")
            self._reachable = True

    def report(self) -> dict[str, Any]:
        """The message of POST /pkts_info: absolute counters of every backend in the view. Ends a learning interval."""
        view, health, serving = self.view, self._prober.health(), {e.ip: e.weight for e in self._in_rotation}
        connections = ruleset.connections(ruleset.parse_table(self._netfilter.table("nat")))
        traffic = ruleset.parse_set(self._netfilter.members())
        backends = [
            {
                "id": b.id,
                "ip": b.ip,
                "healthy": health.get(b.id, Health()).healthy,
                "share": serving.get(b.ip, 0.0) / (sum(serving.values()) or 1.0),
                "connections": connections.get(b.ip, 0),
                "packets": traffic.get(b.ip, (0, 0))[0],
                "bytes": traffic.get(b.ip, (0, 0))[1],
                "active": self._live.get(b.ip, 0),
                **({"why": health[b.id].why} if b.id in health and health[b.id].healthy is False else {}),
            }
            for b in view.backends
        ]
        message = {"balancer": self._name, "revision": view.revision, "interval": view.interval, "backends": backends}
        return message | {"warnings": self._warnings()}

    def _learn(self, report: Mapping[str, Any]) -> None:
        serving = {endpoint.ip for endpoint in self._in_rotation}
        self._learner.learn(
            {b["id"]: b["connections"] for b in report["backends"] if b["ip"] in serving}, time.monotonic()
        )
        self._wake.set()

    def _warnings(self) -> list[str]:
        used, limit = self._netfilter.conntrack_use()
        if used <= FULL * limit:
            return []
        return [f"connection table over {FULL:.0%} of its {limit} entries: raise net.netfilter.nf_conntrack_max"]

    def _health_turned(self) -> None:
        self._wake.set()
        self._news.set()

    def _report_regularly(self) -> None:
        early = self._news.wait(self.view.interval)
        self._news.clear()
        if self.view.revision:
            report = self.report()
            if not early:
                self._learn(report)
            if self._reachable:  # else _follow has told, and will tell when that is over
                self._manager.report(report)

    def _look(self) -> None:
        """Samples the flows; asks the manager to stop who has drained, and who has been ill for too long."""
        time.sleep(self._look_pause)
        now, view, health = time.monotonic(), self.view, self._prober.health()
        serving = {endpoint.ip for endpoint in self._in_rotation}
        flows = ruleset.parse_flows(self._netfilter.flows())
        self._live = flows.live
        self._learner.sample({b.id: flows.waiting.get(b.ip, 0) for b in view.backends})
        self._look_pause = max(LOOK, (time.monotonic() - now) / LOOK_COST)

        if self._known is None or not self._reachable:
            return  # before the first pass nobody has left dispatch yet; without a manager there is nobody to ask
        leaving = {b.ip for b in view.backends if b.state == "draining"} - serving
        self._draining_since = {ip: self._draining_since.get(ip, now) for ip in leaving}
        for ip, since in self._draining_since.items():
            if not self._live.get(ip):
                self._manager.stop(ip, f"drained in {now - since:.1f} s")
            elif now - since > view.drain_timeout:
                self._manager.stop(ip, f"{self._live[ip]} flows left at the drain deadline")

        # Whoever has never been well yet is left to the manager's patience.
        self._was_well &= {b.id for b in view.backends}
        self._was_well |= {id_ for id_, verdict in health.items() if verdict.healthy}
        judged = (b for b in view.backends if b.ip not in leaving and (b.state == "active" or b.id in self._was_well))
        ill = {b for b in judged if health.get(b.id, Health()).healthy is False}
        self._ill_since = {b.id: self._ill_since.get(b.id, now) for b in ill}
        # Where all are ill the fault may be ours: fail static, but replace one now and then, for it may be theirs.
        some_well = any(verdict.healthy for verdict in health.values())
        patience = DEAD_AFTER if some_well else ALL_ILL_AFTER
        for b in sorted(ill, key=lambda b: self._ill_since[b.id]):
            if (spell := now - self._ill_since[b.id]) > patience:
                self._manager.stop(b.ip, f"ill for {spell:.0f} s: {health[b.id].why}")
                if not some_well:
                    self._ill_since = dict.fromkeys(self._ill_since, now)
                    break

    def state(self) -> tuple[dict[str, Any], int]:
        """What GET /sync answers, and its status: 503 once three intervals went by without a good pass."""
        age = time.monotonic() - self.converged_at
        serving = sorted(endpoint.ip for endpoint in self._in_rotation)
        message = {"converged_s_ago": round(age, 3), "revision": self.view.revision, "rotation": serving}
        return message, 200 if age < 3 * self.view.interval + 5 else 503

    def gauges(self) -> dict[str, tuple[str, float]]:
        """For Prometheus: name → (meaning, value)."""
        used, limit = self._netfilter.conntrack_use()
        return {
            "rotation_backends": ("Backends that get new connections.", len(self._in_rotation)),
            "flows": ("Live flows to backends.", sum(self._live.values())),
            "conntrack_entries": ("Entries in the connection table.", used),
            "conntrack_entries_limit": ("Entries that the connection table can hold.", limit),
            "converged_seconds": ("Time since the last good pass.", time.monotonic() - self.converged_at),
        }


def _forever(body: Callable[[], None]) -> None:
    while True:
        _attempt(body)


def _attempt(body: Callable[[], None]) -> None:
    """Runs one pass of a loop; a pass that fails is told and followed by the next, for the loop must not die."""
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


def doors(balancer: Balancer) -> Flask:
    """The balancer's own HTTP interface: for Docker's health check and for people."""
    app = Flask(__name__)

    @app.get("/sync")
    def sync() -> Response:
        message, status = balancer.state()
        return Response(json.dumps(message) + "\n", status, mimetype="application/json")

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(exposition(balancer.gauges()), mimetype="text/plain; version=0.0.4")

    return app


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)
    addresses = os.environ.get("LB_MANAGERS") or (HERE / "hostip.txt").read_text().strip()
    name, node = socket.gethostname(), os.environ.get("LB_NODE", "")
    token = os.environ.get("LB_TOKEN") or (SECRETS / "token").read_text().strip()
    certificate = str(SECRETS / "manager.pem") if node else ""
    manager = Manager(addresses.split(","), token, name, certificate)
    balancer = Balancer(Netfilter(os.environ["IPTABLES"]), manager, name, node)
    log.info("balancer started, iptables-%s, manager at %s", os.environ["IPTABLES"], addresses)
    threading.Thread(
        target=waitress.serve,
        args=(doors(balancer),),
        kwargs={"host": "0.0.0.0", "port": SYNC_PORT, "threads": 2, "ident": None, "_quiet": True},
        daemon=True,
    ).start()
    balancer.run()


if __name__ == "__main__":
    main()
