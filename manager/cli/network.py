"""Creates the project's network, and adds and removes the rules that it has on the host."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import docker.errors
from docker.types import IPAMConfig, IPAMPool

from cli import host_checks
from cli.output import Failed, Output
from cli.project import Project

DATAPATH = "lbscaler.datapath"  # label: what --datapath was when the project was started
# The engine's own default may be another mode since Docker 27, and then the service's port would not be published.
GATEWAY_MODE = {"com.docker.network.bridge.gateway_mode_ipv4": "nat"}
TRIES = 30  # how often another start may take the chosen subnet first


def make(project: Project, subnet: str, overlay: bool, datapath: str) -> None:
    """Creates the network unless it exists. If `subnet` is empty, a free one is chosen."""
    if project.network() is not None:
        return
    wanted = f", {subnet}" if subnet else ""
    with project.output.step(f"Creating the network {project.name}{wanted}") as step:
        refused: list[IPv4Network] = []
        while True:
            chosen = IPv4Network(subnet) if subnet else host_checks.free_subnet([*_taken(project), *refused])
            step.log(f"subnet {chosen}")
            try:
                _create(project, chosen, overlay, datapath)
            except docker.errors.APIError as error:
                # Another start took this subnet first. The engine has no error code of its own for that.
                taken_meanwhile = "Pool overlaps" in str(error.explanation)
                if subnet or not taken_meanwhile or len(refused) + 1 == TRIES:
                    raise
                refused.append(chosen)
            else:
                return


def _taken(project: Project) -> list[IPv4Network]:
    """The subnets of the engine's networks and the routes of this host."""
    taken = host_checks.host_routes()
    for network in project.docker.networks.list():
        for pool in network.attrs["IPAM"]["Config"] or ():
            if ":" not in pool.get("Subnet", ":"):  # IPv6
                taken.append(IPv4Network(pool["Subnet"], strict=False))
    return taken


def _create(project: Project, subnet: IPv4Network, overlay: bool, datapath: str) -> None:
    pool = IPAMPool(subnet=str(subnet), gateway=str(subnet[1]))
    project.docker.networks.create(
        project.name,
        driver="overlay" if overlay else "bridge",
        options={} if overlay else GATEWAY_MODE,
        attachable=overlay,
        ipam=IPAMConfig(pool_configs=[pool]),
        labels={**project.labels("network"), DATAPATH: datapath},
    )


def is_on_host(network: Any) -> bool:
    """Whether the project's rules are in the host's namespace."""
    return bool(network.attrs["Labels"].get(DATAPATH) == "host")


def gateway(network: Any) -> str:
    return str(network.attrs["IPAM"]["Config"][0]["Gateway"])


# -- the host's rules -------------------------------------------------------------------------------------------------
# With bridge netfilter, each packet between balancer and backends passes the host's tables. These two rules make that
# cost less. They match only packets of our subnet that stay on our bridge, which Docker accepts anyway.


def add_host_rules(project: Project) -> None:
    network = project.network()
    if os.geteuid() or not shutil.which("iptables") or network is None:
        return
    if network.attrs["Driver"] != "bridge" or is_on_host(network):
        return
    bridge, subnet = f"br-{network.id[:12]}", network.attrs["IPAM"]["Config"][0]["Subnet"]
    for table, chain, *rule in host_rules(bridge, subnet, project.name):
        command = ["iptables", "-w", "-t", table]
        # The rule may exist from an earlier start. Without it everything works, so an error does not stop the start.
        try:
            if subprocess.run([*command, "-C", chain, *rule], capture_output=True, check=False).returncode:
                project.output.run(*command, "-I", chain, str(place_in(chain, _saved(table))), *rule)
        except Failed:
            project.output.say(f"Without a rule in the host's {table} table: packets to backends cost a little more")


def host_rules(bridge: str, subnet: str, project: str) -> list[list[str]]:
    """Each rule as table, chain and arguments of iptables. Its comment says whose it is."""
    inside = ["-i", bridge, "-s", subnet, "-d", subnet, "-m", "comment", "--comment", f"lbscaler.project={project}"]
    return [
        ["raw", "PREROUTING", *inside, "-m", "addrtype", "!", "--dst-type", "LOCAL", "-j", "CT", "--notrack"],
        # Docker has a rule with the same effect, as the last one of many.
        ["filter", "FORWARD", *inside, "-o", bridge, "-j", "ACCEPT"],
    ]


def place_in(chain: str, saved: Iterable[str]) -> int:
    """The place for a rule in `chain`: the first one, or the first one after Docker's hook for its users' own rules.
    `saved`: lines of iptables-save."""
    rules = [line for line in saved if line.startswith(f"-A {chain} ")]
    users = f"-A {chain} -j DOCKER-USER"
    return rules.index(users) + 2 if users in rules else 1


def remove_host_rules(project: Project) -> None:
    """Removes the project's rules, even if its network no longer exists."""
    if os.geteuid() or not shutil.which("iptables-save"):
        return
    removed = 0
    for table in ("raw", "filter"):
        for line in _saved(table):
            words = shlex.split(line)
            if words[:1] == ["-A"] and f"lbscaler.project={project.name}" in words:
                command = ["iptables", "-w", "-t", table, "-D", *words[1:]]
                removed += not subprocess.run(command, capture_output=True, check=False).returncode
    if removed:
        project.output.say(f"Removed the host's rules for {project.name}")


def _saved(table: str) -> list[str]:
    done = subprocess.run(["iptables-save", "-t", table], capture_output=True, text=True, check=False)
    return done.stdout.splitlines()


if __name__ == "__main__":  # the systemd unit calls this, because a reboot removes the rules
    with Output(Path(os.devnull)) as out:
        add_host_rules(Project(sys.argv[1], out))
