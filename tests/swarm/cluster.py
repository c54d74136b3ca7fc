"""A cluster on one machine: three engines, each in its own network namespace, and a registry.

A bridge in one more namespace connects them. Addresses are of 198.18.0.0/15, which is reserved for tests.
`Cluster.close` ends every process that the cluster started, by pid.
"""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import loads

from waiting import wait_until

T = TypeVar("T")
_libc = ctypes.CDLL(None, use_errno=True)
REGISTRY = "198.18.0.254:5005"
BRIDGE_SYSCTL = "/proc/sys/net/bridge/bridge-nf-call-iptables"


def sh(command: str) -> str:
    done = subprocess.run(["/bin/bash", "-euc", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout.strip()


def in_namespace(namespace: str, call: Callable[[], T]) -> T:
    """The result of `call`, run by a thread in that network namespace."""
    results: list[T] = []

    def enter() -> None:
        with Path(f"/run/netns/{namespace}").open() as file:
            assert _libc.setns(file.fileno(), 0x40000000) == 0, os.strerror(ctypes.get_errno())
        results.append(call())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert results, "the call raised"
    return results[0]


class Node:
    """One engine in its namespace."""

    def __init__(self, cluster: Cluster, number: int) -> None:
        self.name = f"{cluster.prefix}n{number}"
        self.ip = f"198.18.0.{number}"
        self.place = cluster.place / f"n{number}"
        self.socket = self.place / "docker.sock"
        self.env = {**os.environ, "DOCKER_HOST": f"unix://{self.socket}"}
        self.link = f"{cluster.prefix}l{number}"
        self._fabric = cluster.fabric
        self._engine: subprocess.Popen[bytes] | None = None
        sh(f"""ip netns add {self.name}
               ip link add eth0 netns {self.name} type veth peer name {self.link} netns {self._fabric}
               ip -n {self._fabric} link set {self.link} master br0 up
               ip -n {self.name} link set lo up
               ip -n {self.name} addr add {self.ip}/24 dev eth0
               ip -n {self.name} link set eth0 up
               ip -n {self.name} route add default via 198.18.0.254""")
        self.place.mkdir()

    def namespace_command(self, *command: str) -> list[str]:
        """`command`, in this node's network (and with this host's cgroups, which `ip netns exec` would hide)."""
        return ["nsenter", f"--net=/run/netns/{self.name}", *command]

    def run(self, *command: str, timeout: float = 300, status: int = 0) -> str:
        done = subprocess.run(
            self.namespace_command(*command), env=self.env, capture_output=True, text=True, timeout=timeout, check=False
        )
        assert done.returncode == status, f"{command}\n{done.stdout}{done.stderr}{self.end_of_engine()}"
        return done.stdout.strip()

    def end_of_engine(self) -> str:
        """The end of the engine's log, if it has ended by itself."""
        if self._engine is None or self._engine.poll() is None:
            return ""
        return "\n".join(["the engine has ended:", *(self.place / "dockerd.log").read_text().splitlines()[-40:]])

    def get(self, url: str) -> str:
        """The body of an HTTP answer, asked from this node; empty where there is none."""

        def ask() -> str:
            try:
                with urllib.request.urlopen(url, timeout=5) as answer:
                    return str(answer.read().decode())
            except (OSError, http.client.HTTPException):  # nobody answers, or it ended within its answer
                return ""

        return in_namespace(self.name, ask)

    def docker(self, *arguments: str) -> str:
        return self.run("docker", *arguments)

    def pull(self, tag: str) -> None:
        """Gets an image from the cluster's registry, under its name without the registry."""
        self.docker("pull", f"{REGISTRY}/{tag}")
        self.docker("tag", f"{REGISTRY}/{tag}", tag)

    def try_docker(self, *arguments: str) -> str:
        """The same, empty where a Swarm that has just lost a node does not answer."""
        with suppress(subprocess.TimeoutExpired):
            done = subprocess.run(
                ["docker", *arguments], env=self.env, capture_output=True, text=True, timeout=20, check=False
            )
            return done.stdout.strip() if done.returncode == 0 else ""
        return ""

    def start_engine(self) -> None:
        """Tries again, because an engine that was killed may still hold what the next one needs."""
        for pause in (1, 2, 4):
            self.launch_engine()
            with suppress(AssertionError):
                return self.wait_for_engine()
            self.end_engine(signal.SIGKILL)
            time.sleep(pause)
        raise AssertionError(f"the engine of {self.name} does not start: {self.place / 'dockerd.log'}")

    def launch_engine(self) -> None:
        # With a higher priority, because on a busy machine Swarm's agents lose their leader and replace healthy tasks.
        command = self.namespace_command(
            "nice", "-n", "-10", "unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', self.name,
            "dockerd", "--host", f"unix://{self.socket}", "--data-root", str(self.place / "data"),
            "--exec-root", str(self.place / "exec"), "--pidfile", str(self.place / "dockerd.pid"),
            "--insecure-registry", REGISTRY,
        )  # fmt: skip
        with (self.place / "dockerd.log").open("ab") as log:
            self._engine = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def wait_for_engine(self) -> None:
        def answers() -> bool:
            assert self._engine is not None
            assert self._engine.poll() is None, f"the engine of {self.name} has ended"
            done = subprocess.run(["docker", "info"], env=self.env, capture_output=True, check=False)
            return done.returncode == 0

        wait_until(answers, f"the engine of {self.name} answers")

    def kill_engine(self) -> None:
        """What others see of a machine that fails: no engine, no containers, no link."""
        self.cut()
        self.end(signal.SIGKILL)

    def end_engine(self, how: int) -> None:
        """Ends the engine alone. Its containers go on if it is killed."""
        if self._engine is not None:
            self._engine.send_signal(how)
            self._engine.wait(60)
            self._engine = None

    def end(self, how: int = signal.SIGTERM) -> None:
        if self._engine is None:
            return
        self.end_engine(how)
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """Kills everything and removes the node. An orderly end would only take time."""
        containers = self.containers()
        self.end(signal.SIGKILL)
        sh(f"grep -F {self.place} /proc/mounts | cut -d' ' -f2 | sort -r | xargs -r -n1 umount -l || true")
        subprocess.run(["ip", "netns", "del", self.name], check=False)
        for id_ in containers:  # the control groups, which the engine did not remove
            sh(f"rmdir /sys/fs/cgroup/docker/{id_} /sys/fs/cgroup/*/docker/{id_} 2>/dev/null || true")
        shutil.rmtree(self.place, ignore_errors=True)

    def containers(self) -> list[str]:
        """Their ids, from the engine's files."""
        place = self.place / "data" / "containers"
        return [entry.name for entry in place.iterdir()] if place.is_dir() else []

    def processes(self) -> list[int]:
        """What this node's engine leaves behind when it is killed: its containerd, and what is in its containers."""
        containers, found = self.containers(), []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes().decode(errors="replace")
                groups = (process / "cgroup").read_text()
            except OSError:  # it has ended
                continue
            if f"{self.place}/" in words or any(f"/docker/{id_}" in groups for id_ in containers):
                found.append(int(process.name))
        return found

    def cut(self) -> None:
        sh(f"ip -n {self._fabric} link set {self.link} down")

    def reconnect(self) -> None:
        sh(f"ip -n {self._fabric} link set {self.link} up")


class Cluster:
    def __init__(self, place: Path, count: int = 3) -> None:
        self.place, self.prefix = place, f"lb{os.getpid() % 100000}"
        self.fabric = f"{self.prefix}f"
        self.nodes: list[Node] = []
        self._registry: subprocess.Popen[bytes] | None = None
        self._count = count

    def open(self) -> None:
        sh(f"""ip netns add {self.fabric}
               ip -n {self.fabric} link set lo up
               ip -n {self.fabric} link add br0 type bridge
               ip -n {self.fabric} addr add 198.18.0.254/24 dev br0
               ip -n {self.fabric} link set br0 up
               [ ! -e {BRIDGE_SYSCTL} ] || nsenter --net=/run/netns/{self.fabric} sh -c 'echo 0 >{BRIDGE_SYSCTL}'""")
        self._start_registry()
        self.nodes = [Node(self, number) for number in range(1, self._count + 1)]
        for node in self.nodes:
            node.launch_engine()
        for node in self.nodes:
            node.wait_for_engine()

    def _start_registry(self) -> None:
        config = self.place / "registry.yml"
        config.write_text(
            f"version: 0.1\nlog: {{level: error}}\nhttp: {{addr: {REGISTRY}}}\n"
            f"storage: {{filesystem: {{rootdirectory: {self.place}/registry}}, delete: {{enabled: true}}}}\n"
        )
        command = ["nsenter", f"--net=/run/netns/{self.fabric}", "docker-registry", "serve", str(config)]
        with (self.place / "registry.log").open("ab") as log:
            self._registry = subprocess.Popen(command, stdout=log, stderr=log)

    def join(self) -> None:
        """Makes one Swarm of the nodes, every one a manager, so that any may be lost."""
        first, *others = self.nodes
        first.docker("swarm", "init", "--advertise-addr", first.ip, "--default-addr-pool", "198.19.0.0/16",
                     "--default-addr-pool-mask-length", "22")  # fmt: skip
        token = first.docker("swarm", "join-token", "-q", "manager")
        for node in others:
            node.docker("swarm", "join", "--advertise-addr", node.ip, "--token", token, f"{first.ip}:2377")

    def whole(self) -> bool:
        """Whether all nodes are there, as the first one sees it."""
        rows = self.nodes[0].try_docker("node", "ls", "--format", "{{.Status}} {{.ManagerStatus}}").splitlines()
        return len(rows) == self._count and all(row in ("Ready Leader", "Ready Reachable") for row in rows)

    def close(self) -> None:
        for node in self.nodes:
            node.close()
        if self._registry is not None:
            self._registry.terminate()
            self._registry.wait(10)
        subprocess.run(["ip", "netns", "del", self.fabric], check=False)


def answering_backend(node: Node) -> str:
    return node.get(f"http://{node.ip}:8000/").split(" ")[0]


def node_id(node: Node) -> str:
    return node.docker("info", "--format", "{{.Swarm.NodeID}}")


class Load:
    """hey, from the bridge between the nodes: new connections to one node at a bounded rate for a bounded time, or
    until `stop`."""

    LANES, WORKERS = 4, 5

    def __init__(self, cluster: Cluster, node: Node, seconds: int, per_second: int) -> None:
        each = per_second / self.LANES / self.WORKERS
        command = ["nsenter", f"--net=/run/netns/{cluster.fabric}", "hey", "-z", f"{seconds}s", "-c", str(self.WORKERS)]
        command += ["-q", str(each), "-t", "30", "-disable-keepalive", f"http://{node.ip}:8000/"]
        self._lanes = []
        for _ in range(self.LANES):
            self._lanes.append(loads.begin(command))
            time.sleep(self.WORKERS / per_second)

    def stop(self) -> tuple[int, list[str]]:
        """Ends the load after the requests in progress; the result."""
        for lane in self._lanes:
            lane.send_signal(signal.SIGINT)
        return self.result()

    def result(self) -> tuple[int, list[str]]:
        """(answers with status 200, one line for each other outcome)."""
        answered, others = 0, []
        for lane in self._lanes:
            text = lane.communicate(timeout=120)[0]
            answered += sum(int(n) for n in re.findall(r"\[200\]\s+(\d+) responses", text))
            others += re.findall(r"\[(?!200\])\d{3}\]\s+\d+ responses", text)
            others += [line.strip() for line in text.partition("Error distribution:")[2].splitlines() if line.strip()]
        assert answered, text
        return answered, others


def lost_in_flight(others: list[str]) -> int:
    """How many requests were lost with a node: those it had accepted. Another kind of failure among them is an error.
    They time out, or a segment that the client sends again meets no flow and is answered with a RST."""
    assert all("awaiting headers" in line or "reset by peer" in line for line in others), others
    lost = sum(int(number) for line in others for number in re.findall(r"^\[(\d+)\]", line))
    assert lost <= Load.WORKERS, f"more than the one burst that was under way: {others}"
    return lost


class System:
    """The project on a cluster, run from `tree` on one node."""

    FAST = ("--interval", "1", "--panic-window", "3", "--stable-window", "6", "--drain-timeout", "8")

    def __init__(self, cluster: Cluster, node: Node, tree: Path, project: str = "lbscaler") -> None:
        self.cluster, self.node, self.tree, self.project = cluster, node, tree, project
        self.run_dir = tree / "run" / project

    def up(self, *flags: str, status: int = 0) -> str:
        words = [
            str(self.tree / "run.sh"),
            "--project",
            self.project,
            "--orchestrator",
            "swarm",
            "--no-install",
            *flags,
        ]
        done = subprocess.run(
            self.node.namespace_command(*words), env=self.node.env, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stdout
        return done.stdout

    def down(self, *flags: str) -> str:
        return self.node.run(str(self.tree / "stop.sh"), "--project", self.project, *flags)

    def status(self) -> dict[str, Any]:
        text = self.node.get("http://127.0.0.1:5000/status")
        return dict(json.loads(text)) if text else {"backends": [], "balancers": []}

    def active(self) -> list[dict[str, Any]]:
        return [b for b in self.status()["backends"] if b["state"] == "active" and b["healthy"]]

    def wait_for_active(self, count: int, balancers: int = 3, seconds: float = 90) -> list[dict[str, Any]]:
        def all_active() -> list[dict[str, Any]]:
            status = self.status()
            rows = status["backends"]
            ready = len(rows) == count and all(b["state"] == "active" and b["healthy"] for b in rows)
            # every balancer has to have reported of all of them
            same = {b["revision"] for b in status["balancers"]} == {status.get("revision")}
            return rows if ready and same and len(status["balancers"]) == balancers else []

        rows: list[dict[str, Any]] = wait_until(all_active, f"{count} active backends, {balancers} balancers", seconds)
        return rows

    def scale(self, **limits: int) -> None:
        self.node.run(
            "curl",
            "-sf",
            "--unix-socket",
            str(self.run_dir / "manager.sock"),
            "localhost/scale",
            "-d",
            json.dumps(limits),
        )

    def log(self) -> str:
        return (self.run_dir / "manager.log").read_text()

    def replicas(self) -> int:
        template = "{{.Spec.Mode.Replicated.Replicas}}"
        return int(self.node.docker("service", "inspect", "--format", template, f"{self.project}-backend"))

    def rotation(self, node: Node) -> set[str]:
        """The addresses that the balancer on `node` sends connections to now."""
        balancer = self.balancer(node)
        if not balancer:
            return set()
        text = node.docker("exec", balancer, "python3", "-c",
            "import urllib.request as u;print(u.urlopen('http://127.0.0.1:5000/sync').read().decode())")  # fmt: skip
        return set(json.loads(text)["rotation"])

    def balancer(self, node: Node) -> str:
        return node.docker("ps", "-q", "--filter", "label=lbscaler.role=balancer").split("\n")[0]

    def manager_pid(self) -> int:
        return int((self.run_dir / "manager.pid").read_text())

    def end_manager(self) -> None:
        """Ends the manager as for an upgrade of its node; the services go on."""
        for name in ("supervisor", "manager"):
            with suppress(OSError):  # there is no such file or process, for example after stop.sh
                pid = int((self.run_dir / f"{name}.pid").read_text())
                # Otherwise another process has the number now.
                if str(self.tree) in Path(f"/proc/{pid}/cmdline").read_text():
                    os.kill(pid, signal.SIGTERM)
