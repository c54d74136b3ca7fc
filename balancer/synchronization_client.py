"""The balancer's threads: one each to follow the manager, to write the rules, to sample flows, to report, and to serve
the HTTP interface; and the prober's. Their work is in the modules of those names, and decisions in the pure modules.

Traffic does not depend on this process: the kernel keeps the last rules when it ends.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests

from app import create_app, serve_in_thread
from datapath import from_environment
from exposition import FAILED_PASSES, exposition
from features import ON_HOST, OPTIONAL, Feature
from host_network import PortHolder, route_loopback
from manager_client import ManagerClient, TextFile
from netfilter import Netfilter, NetfilterError
from reconciler import Reconciler
from reporter import Reporter
from sampler import Sampler
from schedule import SAMPLE_PERIOD
from snapshot import Snapshot
from state import State

HERE = Path(__file__).parent
SECRETS = Path("/run/secrets")  # where the engine mounts them
# A loop that begins no pass for this time plus an interval is stuck. One pass with a long poll takes up to 38 s.
LOOP_SECONDS = 120.0

log = logging.getLogger("balancer")


class Balancer:
    """Connects the parts, runs their loops, and reports their state."""

    def __init__(self, netfilter: Netfilter, manager: ManagerClient, name: str, node: str = "") -> None:
        self.state = State(netfilter)
        self.reconciler = Reconciler(self.state, node)
        self.sampler = Sampler(self.state, manager)
        self.reporter = Reporter(self.state, manager, name)
        self._path = netfilter.path
        self._port_holder = PortHolder(self._path)
        self._manager = manager
        self._beats: dict[str, float] = {}  # when each loop began its last pass; each thread has its own key

    def run(self) -> None:
        """Runs the loops until the process ends."""
        self.state.missing = self.state.netfilter.missing(ON_HOST if self._path.on_host else OPTIONAL)
        log_missing(self.state.missing)
        if self._path.on_host:
            try_to_route_loopback(self._path.bridge)
        self.state.prober.start()
        loops = {
            "follow": self.follow,
            "report": self.reporter.wait_and_report,
            "sample": self.sample,
        }
        for name, body in loops.items():
            self.beat(name)
            threading.Thread(target=self._forever, args=(name, body), name=name, daemon=True).start()
        # In the main thread: a daemon thread alone would not keep the process running.
        self._forever("reconcile", self.reconcile)

    def _forever(self, name: str, body: Callable[[], None]) -> None:
        while True:
            self.beat(name)
            attempt(body)

    def reconcile(self) -> None:
        self._port_holder.hold()
        self.reconciler.wait_and_reconcile()

    def sample(self) -> None:
        """Takes the samples that are due."""
        time.sleep(SAMPLE_PERIOD)
        for take in self.sampler.samples():
            attempt(take)

    def beat(self, name: str) -> None:
        self._beats[name] = time.monotonic()

    def follow(self) -> None:
        """Takes the manager's next snapshot. Logs when the manager becomes unreachable and reachable again."""
        state = self.state
        try:
            # After an error, request the snapshot as if for the first time: the manager then answers immediately.
            message = self._manager.sync(state.snapshot.revision if state.manager_reachable else "")
            if message is not None:
                snapshot = state.snapshot = Snapshot.parse(message)
                state.prober.watch(snapshot)
                state.reconcile_due.set()
        except requests.RequestException as error:
            if state.manager_reachable:
                log.warning("manager unreachable, keeping the last rules: %s", error)
            self._wait_for_manager()
        except (KeyError, TypeError, ValueError) as error:
            if state.manager_reachable:
                log.warning("malformed snapshot, keeping the last rules: %r", error)
            self._wait_for_manager()
        else:
            if not state.manager_reachable:
                log.info("manager reachable again")
            state.manager_reachable = True

    def _wait_for_manager(self) -> None:
        self.state.manager_reachable = False
        time.sleep(random.uniform(0.2, 1.0))  # noqa: S311 - spreads the balancers' requests

    def sync(self) -> tuple[dict[str, Any], int]:
        """The answer to GET /sync, and its status: 503 when a loop is stuck or the dispatch rules are missing, but
        not when the manager becomes unreachable: traffic flows without it."""
        state, now = self.state, time.monotonic()
        longest = LOOP_SECONDS + state.snapshot.interval
        loops_alive = all(now - beat < longest for beat in dict(self._beats).values())
        healthy = loops_alive and state.rules_in_place
        message = {
            "converged_s_ago": round(state.since_converged(), 3),
            "revision": state.snapshot.revision,
            "rotation": sorted(state.rotation.ips),
            "panic": state.rotation.panic,
            "loops_alive": loops_alive,
            "rules_in_place": state.rules_in_place,
        }
        return message, 200 if healthy else 503


def log_missing(features: tuple[Feature, ...]) -> None:
    for feature in features:
        log.warning("no %s in this kernel: %s", feature.name, feature.lost)


def try_to_route_loopback(bridge: str) -> None:
    try:
        route_loopback(bridge)
    except OSError as error:
        log.warning("clients on the loopback interface are not served: route_localnet of %s: %s", bridge, error)


def attempt(body: Callable[[], None]) -> None:
    """Runs one pass of a loop. Logs every error instead of raising it, because the loop must not end."""
    try:
        with FAILED_PASSES.count_exceptions():
            body()
    except requests.RequestException as error:
        log.warning("manager: %s", error)
    except NetfilterError as error:
        log.error("%s", error)
    except Exception:
        log.exception("this pass failed; trying again")
        # An error at the start of every pass must not fill the log.
        time.sleep(1)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)
    flavour, node = os.environ["IPTABLES"], os.environ.get("LB_NODE", "")
    # On one host the address is in a file that run.sh replaces; in a Swarm, a variable has all that are possible.
    managers = os.environ.get("LB_MANAGERS")
    addresses = managers.split(",") if managers else TextFile(HERE / "hostip.txt")
    token_file = Path(os.environ.get("LB_TOKEN_FILE", SECRETS / "token"))
    certificate = str(SECRETS / "certificate.pem") if node else ""
    name = socket.gethostname()
    manager = ManagerClient(addresses, TextFile(token_file), certificate)
    balancer = Balancer(Netfilter(flavour, from_environment(os.environ)), manager, name, node)
    log.info("balancer started, iptables-%s, manager at %s", flavour, ",".join(addresses))
    address, _, port = os.environ.get("LB_HTTP", "0.0.0.0:5000").partition(":")
    serve_in_thread(create_app(balancer.sync, lambda: exposition(balancer.state)), address, int(port))
    balancer.run()


if __name__ == "__main__":
    main()
