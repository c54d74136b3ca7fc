"""What the system looks like from outside: the engine's containers, the kernel's rules, the manager's HTTP, /proc.

Shares no code with the product, so an error of the product cannot hide itself here. `observe` collects; the functions
that read texts are pure.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

from chaos.product import PROJECT, Product
from chaos.site import Site, call

LABEL = f"lbscaler.project={PROJECT}"
DNAT = re.compile(r"^\[(\d+):\d+\] -A LB-(?:\w{6}-)?B-[\d.]+ .*--to-destination ([\d.]+):\d+", re.MULTILINE)
JUMP = re.compile(r"^(?:\[\d+:\d+\] )?-A (LB-\S+) .*-[jg] (LB-\S+)$", re.MULTILINE)
TASK = re.compile(r"\.\w{25}\b")  # in a container's name: the id of the Swarm's task
MEMBER = re.compile(r"^add LB-(?:\w{6}-)?BACKENDS ([\d.]+)", re.MULTILINE)


@dataclass(frozen=True)
class Container:
    id: str
    name: str
    role: str
    running: bool
    ip: str
    task: str = ""  # of a Swarm
    pid: int = 0


@dataclass(frozen=True)
class Process:
    """`identity` differs when another process has the same role or id."""

    role: str
    identity: str
    memory: int  # bytes
    files: int


@dataclass(frozen=True)
class Observation:
    at: float  # monotonic clock
    status: dict[str, Any]  # of the manager; empty if it does not answer
    containers: list[Container]
    managers: int
    supervisors: int
    connections: dict[str, int]  # address: connections, of every DNAT rule
    dispatched: set[str]  # addresses that new connections can reach
    members: set[str]  # of the set that counts packets
    foreign: list[str]  # what belongs to others
    processes: list[Process] = field(default_factory=list)

    @property
    def backends(self) -> list[Container]:
        return [one for one in self.containers if one.role == "backend"]

    @property
    def balancer(self) -> str:
        """The id of the balancer's container."""
        return next((one.id for one in self.containers if one.role == "balancer"), "")


def observe(product: Product, others: bool = True) -> Observation:
    """`others`: also what belongs to others, and the processes' sizes."""
    rules, sets = rules_of(product.rules_namespace), sets_of(product.rules_namespace)
    seen = Observation(
        at=time.monotonic(),
        status=product.status(),
        containers=containers(product.site),
        managers=len(product.manager_pids()),
        supervisors=len(product.supervisor_pids()),
        connections=dnat_counters(rules),
        dispatched=reachable(rules),
        members=set(MEMBER.findall(sets)),
        foreign=foreign(product.site) if others else [],
        processes=measured(product) if others else [],
    )
    record(product, seen)
    return seen


def record(product: Any, seen: Observation) -> None:
    """A line for whoever looks into a violation: the time, the addresses in the rules, the containers and the manager's
    rows of the backends. In a Swarm, of one node."""
    rows = [[row["ip"], row["state"], row["healthy"]] for row in seen.status.get("backends", [])]
    containers = [[one.name, one.ip, one.running] for one in seen.containers]
    line = json.dumps([seen.at, sorted(seen.dispatched), containers, rows])
    with (product.site.place / "observations.jsonl").open("a") as file:
        file.write(line + "\n")


def rules_of(namespace: Callable[[], list[str]]) -> str:
    """All rules where the product's are, with their counters; empty where that place does not exist."""
    with suppress(Exception):
        return saved(namespace(), "-c")
    return ""


def sets_of(namespace: Callable[[], list[str]]) -> str:
    with suppress(Exception):
        return call(*namespace(), "ipset", "save")
    return ""


def saved(prefix: list[str], *flags: str) -> str:
    """The rules of both flavours. Without a table's name, the legacy program creates none."""
    text = ""
    for flavour in ("legacy", "nft"):
        command = [*prefix, f"iptables-{flavour}-save", *flags]
        text += subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return text


def dnat_counters(rules: str) -> dict[str, int]:
    return {ip: int(packets) for packets, ip in DNAT.findall(rules)}


def reachable(rules: str) -> set[str]:
    """The addresses whose chains can be reached from the dispatch chain."""
    jumps: dict[str, set[str]] = {}
    for chain, target in JUMP.findall(rules):
        jumps.setdefault(chain, set()).add(target)
    found: set[str] = set()
    waiting = [chain for chain in jumps if chain.endswith("DISPATCH")]
    while waiting:
        chain = waiting.pop()
        if chain not in found:
            found.add(chain)
            waiting += jumps.get(chain, set())
    return {chain.rpartition("B-")[2] for chain in found if re.search(r"B-[\d.]+$", chain)}


def containers(site: Site) -> list[Container]:
    return containers_of(site.try_docker, "-a")


def containers_of(docker: Callable[..., str], *flags: str) -> list[Container]:
    """`docker` runs a command of docker, and returns nothing where that fails."""
    ids = docker("ps", "-q", *flags, "--no-trunc", "--filter", f"label={LABEL}").split()
    text = docker("inspect", *ids) if ids else ""
    return [_container(one) for one in json.loads(text or "[]")]


def _container(found: dict[str, Any]) -> Container:
    network = found["NetworkSettings"]["Networks"].get(PROJECT, {})
    return Container(
        id=found["Id"],
        name=found["Name"].lstrip("/"),
        role=found["Config"]["Labels"]["lbscaler.role"],
        running=found["State"]["Running"] and not found["State"]["Paused"],
        ip=network.get("IPAddress", ""),
        task=found["Config"]["Labels"].get("com.docker.swarm.task.id", ""),
        pid=found["State"]["Pid"],
    )


def foreign(site: Site) -> list[str]:
    return foreign_of(site.on_host(), site.try_docker, PROJECT)


def foreign_of(host: list[str], docker: Callable[..., str], network: str) -> list[str]:
    """Rules, sets, containers and networks of others on a host. Without the order of rules and the networks' ids, which
    Docker changes at its start; without a Swarm's tasks. `network` is the bridge of the project's containers."""
    bridge = docker("network", "inspect", "-f", "{{.Id}} {{(index .IPAM.Config 0).Subnet}}", network).split()
    lines = saved(host).splitlines() + call(*host, "ipset", "save").splitlines()
    lines = [re.sub(r" \[\d+:\d+\]", "", line) for line in lines if line[:1] not in "#*"]
    found = {line for line in lines if not of_project(line, *bridge)}
    for kind, format_ in (("container", "{{.ID}} {{.Names}} {{.State}}"), ("network", "{{.Name}}")):
        command = ["ps", "-a"] if kind == "container" else ["network", "ls"]
        rows = docker(*command, "--format", format_).splitlines()
        found |= {f"{kind} {row}" for row in rows if PROJECT not in row and not TASK.search(row)}
    return sorted(found)


def of_project(line: str, network: str = "-", subnet: str = "") -> bool:
    """Whether a rule or a set has the project's prefix, its bridge, or an address of its network."""
    addresses = re.findall(r"\d+\.\d+\.\d+\.\d+", line) if subnet else []
    in_network = any(IPv4Address(one) in IPv4Network(subnet) for one in addresses)
    return in_network or "LB-" in line or f"br-{network[:12]}" in line


def measured(product: Product) -> list[Process]:
    """Memory and file descriptors of the manager and of the balancer's client."""
    found = []
    for role, pids in (("manager", product.manager_pids()), ("client", product.client_pids())):
        for pid in pids:
            with suppress(OSError):  # it has ended
                place = Path(f"/proc/{pid}")
                began = (place / "stat").read_text().rpartition(")")[2].split()[19]
                memory = re.search(r"VmRSS:\s+(\d+)", (place / "status").read_text())
                files = len(list((place / "fd").iterdir()))
                if memory:  # none: it has just ended
                    found.append(Process(role, f"{pid}-{began}", int(memory[1]) * 1024, files))
    return found
