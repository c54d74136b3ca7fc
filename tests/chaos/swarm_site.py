"""A Swarm of three nodes with the project: each an engine in a network namespace of its own, with a checkout.

tests/swarm/cluster.py makes the nodes. The clients are on the bridge between them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from chaos.product import FAST, FIXED, PORT, PROJECT, Load, clients_in, running
from chaos.site import copy_images, wait_for
from checkout import ROOT, copy_tree
from swarm.cluster import REGISTRY, Cluster, Node, System

BACKENDS, MORE = 6, 8
RATE = 0.5  # of load.py's, for each node
SERVICES = {role: f"{PROJECT}-{role}" for role in ("backend", "balancer")}
LABELS = ["--filter", f"label=lbscaler.project={PROJECT}", "--filter"]


class SwarmSite:
    """`lost` and `drained` are names of nodes in that state, as long as a fault keeps them there."""

    def __init__(self, place: Path) -> None:
        self.place, self.cluster = place, Cluster(place)
        self.lost: set[str] = set()
        self.drained: set[str] = set()

    def open(self, images: list[str]) -> None:
        self.cluster.open()
        self.cluster.join()
        first = self.nodes[0]
        copy_images(images, first.namespace_command("docker", "load"), first.env)

    def share_image(self, name: str) -> None:
        """Gives an image of the first node to the others."""
        first, *others = self.nodes
        first.docker("tag", name, f"{REGISTRY}/{name}")
        first.docker("push", "-q", f"{REGISTRY}/{name}")
        for node in others:
            node.pull(name)

    @property
    def nodes(self) -> list[Node]:
        return self.cluster.nodes

    def reachable(self) -> list[Node]:
        return [node for node in self.nodes if node.name not in self.lost]

    def serving(self) -> list[Node]:
        return [node for node in self.reachable() if node.name not in self.drained]

    def on_outside(self, *command: str) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self.cluster.fabric}", *command]

    def swarm(self, *arguments: str) -> str:
        """Asks the Swarm for something; empty where no node answers, for example without a leader."""
        return next(filter(None, (node.try_docker(*arguments) for node in self.reachable())), "")

    def members(self) -> dict[str, str]:
        """The state of each node in the Swarm."""
        rows = self.swarm("node", "ls", "--format", "{{.Hostname}} {{.Status}} {{.Availability}} {{.ManagerStatus}}")
        return dict(row.split(" ", 1) for row in rows.splitlines())

    def leader(self) -> Node | None:
        members = self.members()
        return next((node for node in self.nodes if "Leader" in members.get(node.name, "")), None)

    def wait_for_leader(self) -> Node:
        leader: Node = wait_for(self.leader, "the Swarm has a leader", 90)
        return leader

    def close(self) -> None:
        self.cluster.close()
        shutil.rmtree(self.place, ignore_errors=True)


class SwarmProduct:
    """The project, with the manager on the node of `system`."""

    def __init__(self, site: SwarmSite, image: str) -> None:
        self.site, self.image, self.wanted = site, image, BACKENDS
        self.flags = ("--image", image, "--health", "http:/ok", "--memory", "128m", "--registry", REGISTRY)
        self.flags += ("--min", str(BACKENDS), "--max", str(MORE), *FAST, *FIXED)
        self._changes: tuple[str, ...] = ()  # by the last update: a node without saved flags has to get them, too
        self.systems: list[System] = []

    def install(self) -> None:
        """A checkout on each node."""
        for node in self.site.nodes:
            tree = copy_tree(node.place / "a checkout")
            shutil.copytree(ROOT / ".venv", tree / ".venv", symlinks=True)
            self.systems.append(System(self.site.cluster, node, tree, PROJECT))
        self.system = self.systems[0]

    def fetch_images(self, balancer: str) -> None:
        """Gives the other nodes the images that the services use, by the names that run.sh looks for."""
        for role, name in (("balancer", balancer), ("backend", self.image)):
            used = "{{.Spec.TaskTemplate.ContainerSpec.Image}}"
            reference = self.system.node.docker("service", "inspect", "-f", used, SERVICES[role])
            for node in self.site.nodes[1:]:
                node.docker("pull", "-q", reference)
                node.docker("tag", reference, name)

    # -- commands -----------------------------------------------------------------------------------------------------

    def up(self, *flags: str) -> str:
        self._changes = flags or self._changes
        return self.system.up(*self.flags, *self._changes)

    def move(self, node: Node) -> None:
        """Starts the manager on another node. The one before has to end by itself."""
        self.system = next(one for one in self.systems if one.node is node)
        self.up()

    def down(self) -> str:
        return self.system.down()

    def scale(self, number: int) -> None:
        self.wanted = number
        self.system.scale(min=number, max=number)

    # -- state --------------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """The body of /status; empty where the manager does not answer."""
        text = self.system.node.get("http://127.0.0.1:5000/status")
        return dict(json.loads(text)) if text.startswith("{") else {}

    def serves(self) -> bool:
        """Whether every node answers a client, without a SYN that has to be sent again."""
        return all(self._answers(node) for node in self.site.serving())

    def _answers(self, node: Node) -> bool:
        url = f"http://{node.ip}:{PORT}/"
        command = self.site.on_outside("curl", "-sf", "-o", "/dev/null", "-m", "0.9", url)
        return not subprocess.run(command, check=False).returncode

    def manager_pids(self) -> list[int]:
        return self._running("manager/script.py")

    def supervisor_pids(self) -> list[int]:
        return self._running("manager/supervise.sh")

    def _running(self, program: str) -> list[int]:
        reachable = self.site.reachable()
        return [pid for one in self.systems if one.node in reachable for pid in running(program, one.tree)]

    def client_pids(self) -> list[int]:
        return clients_in({name for node in self.site.serving() for name in containers_on(node, "balancer")})

    def logs(self) -> dict[str, str]:
        """The text of each log."""
        found = {}
        for number, one in enumerate(self.systems, 1):
            with suppress(OSError):
                found[f"manager-{number}.log"] = one.log()
            with suppress(OSError):
                found[f"engine-{number}.log"] = (one.node.place / "dockerd.log").read_text(errors="replace")
            for name in containers_on(one.node, "balancer"):
                found[f"balancer-{number}.log"] = one.node.run("sh", "-c", f"docker logs {name} 2>&1")
        return found


def containers_on(node: Node, role: str) -> list[str]:
    """The ids of the project's running containers there."""
    return sorted(node.try_docker("ps", "-q", "--no-trunc", *LABELS, f"label=lbscaler.role={role}").split())


class SwarmLoad:
    """A load for each node."""

    def __init__(self, site: SwarmSite) -> None:
        self._loads = {}
        for node in site.nodes:
            file = site.place / f"requests-{node.ip}.jsonl"
            self._loads[node.ip] = Load(site.on_outside(), node.ip, file, "--rate", str(RATE))

    def records(self) -> list[list[Any]]:
        """[kind, start, end, outcome, backend, node] of each request that has ended."""
        return [[*record, node] for node, load in self._loads.items() for record in load.records()]

    def stop(self) -> list[list[Any]]:
        for load in self._loads.values():
            load.end()
        return [[*record, node] for node, load in self._loads.items() for record in load.stop()]

    def kill(self) -> None:
        for load in self._loads.values():
            load.kill()
