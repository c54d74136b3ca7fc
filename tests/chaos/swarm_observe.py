"""What the system on a Swarm looks like from outside, and what has to be true of it.

Each node that serves is observed like a single host: its own balancer's rules, with the backends of all nodes. So each
invariant of a single host has to hold on each node. What takes only what was seen is pure.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from chaos.allowances import Request
from chaos.invariants import fallen_counters, unsettled
from chaos.observe import (
    MEMBER,
    Container,
    Observation,
    Process,
    containers_of,
    dnat_counters,
    foreign_of,
    measured,
    reachable,
    record,
    rules_of,
    sets_of,
)
from chaos.product import PROJECT
from chaos.rounds import shares
from chaos.swarm_site import SERVICES, SwarmProduct, SwarmSite

GATEWAY = "docker_gwbridge"  # the bridge of a node's published ports
WHOLE = {"Ready Active Leader", "Ready Active Reachable"}  # states of a node


@dataclass(frozen=True)
class SwarmSeen:
    """`nodes`: the address of each node that serves, and what was seen there."""

    at: float  # monotonic clock
    nodes: Mapping[str, Observation]
    tasks: frozenset[str]  # ids of those that run on these nodes, as the Swarm reports it
    members: Mapping[str, str]  # the state of every node in the Swarm
    foreign: Sequence[str] = ()
    processes: Sequence[Process] = ()

    @property
    def backends(self) -> list[Container]:
        return next((one.backends for one in self.nodes.values()), [])

    @property
    def dispatched(self) -> set[str]:
        """Addresses that new connections can reach on some node."""
        return {address for one in self.nodes.values() for address in one.dispatched}

    @property
    def balancers(self) -> list[Container]:
        return [own for one in self.nodes.values() for own in one.containers if own.role == "balancer"]


def observe(product: SwarmProduct, others: bool = True) -> SwarmSeen:
    """`others`: also what belongs to others, and the processes' sizes."""
    at, site = time.monotonic(), product.site
    found = {node.ip: [short(one) for one in containers_of(node.try_docker)] for node in site.serving()}
    backends = [one for listed in found.values() for one in listed if one.role == "backend"]
    common = {
        "at": at,
        "status": by_container(product.status(), backends),
        "managers": len(product.manager_pids()),
        "supervisors": len(product.supervisor_pids()),
        "foreign": [],
    }
    nodes = {}
    for node in site.serving():
        balancers = [one for one in found[node.ip] if one.role == "balancer"]
        rules, sets = read_rules(balancers)
        nodes[node.ip] = Observation(
            containers=[*backends, *balancers],
            connections=dnat_counters(rules),
            dispatched=reachable(rules),
            members=set(MEMBER.findall(sets)),
            **common,
        )
        record(product, nodes[node.ip])
    foreign, processes = (foreign_everywhere(site), measured(product)) if others else ([], [])
    return SwarmSeen(at, nodes, running_tasks(site), site.members(), foreign, processes)


def read_rules(balancers: Sequence[Container]) -> tuple[str, str]:
    """Rules and sets of a node's balancer; empty where none runs."""

    def namespace() -> list[str]:
        return ["nsenter", f"--net=/proc/{balancers[0].pid}/ns/net"]

    return rules_of(namespace), sets_of(namespace)


def running_tasks(site: SwarmSite) -> frozenset[str]:
    serving = {node.name for node in site.serving()}
    format_ = "{{.ID}} {{.Node}} {{.CurrentState}}"
    wanted = ["--no-trunc", "--filter", "desired-state=running", "--format", format_]
    rows = [row.split() for row in site.swarm("service", "ps", *wanted, *SERVICES.values()).splitlines()]
    return frozenset(row[0] for row in rows if row[1] in serving and row[2] == "Running")


def foreign_everywhere(site: SwarmSite) -> list[str]:
    """Each node's, and services and labels of nodes of others in the Swarm."""
    found = []
    for node in site.reachable():
        found += [f"{node.ip}: {line}" for line in foreign_of(node.namespace_command(), node.try_docker, GATEWAY)]
    services = site.swarm("service", "ls", "--format", "{{.Name}}").split()
    for name in services:
        if name not in SERVICES.values():
            found.append(f"service {name} version {site.swarm('service', 'inspect', '-f', '{{.Version.Index}}', name)}")
    for node in site.nodes:
        labels = json.loads(site.swarm("node", "inspect", "-f", "{{json .Spec.Labels}}", node.name) or "{}")
        found += [f"{node.ip}: label {name}={value}" for name, value in labels.items() if PROJECT not in name]
    return found


# -- pure -------------------------------------------------------------------------------------------------------------


def short(one: Container) -> Container:
    """Named as the campaign's backend names itself: by its host name, which is the start of its id."""
    return replace(one, name=one.id[:12])


def by_container(status: Mapping[str, Any], backends: Sequence[Container]) -> dict[str, Any]:
    """/status with the names of containers in place of those of tasks, such as lbchaos-backend-3.x7k2p."""
    if not status:
        return {}
    names = {one.task[:5]: one.name for one in backends}
    rows = [{**row, "name": names.get(row["name"].rpartition(".")[2], row["name"])} for row in status["backends"]]
    return {**status, "backends": rows}


def violated(seen: SwarmSeen, desired: int, away: set[str]) -> list[str]:
    """What has to hold again after a fault, and does not. `away`: names of nodes that a fault keeps away."""
    found = [f"{node}: {sentence}" for node, one in seen.nodes.items() for sentence in unsettled(one, desired)]
    for name, state in seen.members.items():
        if state not in WHOLE and name not in away:
            found.append(f"node {name} is {state}")
    if not seen.members:
        found.append("the Swarm does not answer")
    return found + _tasks(seen) + _reports(seen)


def _tasks(seen: SwarmSeen) -> list[str]:
    """Each task that should run has its container, and no other container runs."""
    containers = {one.task for one in (*seen.backends, *seen.balancers)}
    found = [f"a container of the task {task}, which should not run" for task in containers - seen.tasks]
    return found + [f"no container of the task {task}" for task in seen.tasks - containers]


def _reports(seen: SwarmSeen) -> list[str]:
    status = next((one.status for one in seen.nodes.values()), {})
    reporting = sorted(row["id"] for row in status.get("balancers", []))
    running = sorted(one.name for one in seen.balancers)
    return [] if reporting == running else [f"balancers that report: {reporting}, that run: {running}"]


def fallen(before: SwarmSeen, after: SwarmSeen, resets: bool) -> list[str]:
    """The manager's counters are sums over the balancers, so they may fall when one of these has started again."""
    same = {one.id for one in before.balancers} == {one.id for one in after.balancers}
    found = []
    for node in before.nodes.keys() & after.nodes.keys():
        earlier, later = before.nodes[node], after.nodes[node]
        if not same:
            earlier = replace(earlier, status={})
        found += [f"{node}: {sentence}" for sentence in fallen_counters(earlier, later, resets)]
    return found


def unfair(before: SwarmSeen, after: SwarmSeen, requests: Sequence[Request]) -> list[str]:
    """On each node, what its own clients got."""
    found = []
    for node in before.nodes.keys() & after.nodes.keys():
        own = [request for request in requests if request.node == node]
        found += [f"{node}: {sentence}" for sentence in shares(before.nodes[node], after.nodes[node], own)]
    return found
