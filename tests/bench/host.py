"""What the bench creates on this host, and its removal: a network, containers, a client outside, some sysctls.

Everything has the name or the label of this run. `prepared` removes it again, also after an error or a signal.
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

RUN = f"lbbench{os.getpid()}"
LABEL = f"lbscaler.bench={RUN}"
SUBNET = "198.19.0.0/17"  # of the bench's containers
MANY = "198.19.64.0/20"  # all of these are addresses of one container
# The link to the client. Each of the client's addresses is the source of connections to one of the host's.
HOST, CLIENTS = "198.19.252.1", 16
PROC = Path("/proc/sys/net")
# The connection table forgets closed connections quickly: otherwise each measurement would find it fuller than the one
# before. And its limit, which is for a host with one service, is raised.
HOST_SETTINGS = {"netfilter/nf_conntrack_max": "2000000", "netfilter/nf_conntrack_tcp_timeout_time_wait": "1"}
CLIENT_SYSCTLS = {"net.ipv4.ip_local_port_range": "1024 65000", "net.ipv4.tcp_tw_reuse": "1"}


class BenchError(Exception):
    """A program failed; the message has its output."""


def run(*command: str, text: str | None = None, env: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise BenchError(f"{' '.join(command)[:300]}: status {done.returncode}: {done.stdout[-2000:]}{done.stderr}")
    return done.stdout.strip()


def docker(*arguments: str, text: str | None = None) -> str:
    return run("docker", *arguments, text=text)


def free_port() -> int:
    """A free port, below the range of outgoing connections."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def start(
    name: str,
    image: str,
    command: Iterable[str] = ("sleep", "infinity"),
    *,
    network: str = RUN,
    publish: Mapping[int, int] | None = None,
    sysctls: Mapping[str, str] | None = None,
    address: str = "",
    environment: Mapping[str, str] | None = None,
) -> str:
    """Starts a container of this run and returns its name. `publish` has a port of the host for each of its ports."""
    program, *arguments = command
    flags = [
        "--cap-add",
        "NET_ADMIN",
        "--cap-add",
        "NET_RAW",
        "--tmpfs",
        "/run",
        "--tmpfs",
        "/tmp",
        "--network",
        network,
        "--label",
        LABEL,
    ]
    for port, own_port in (publish or {}).items():
        flags += ["-p", f"0.0.0.0:{port}:{own_port}"]
    flags += ["--ip", address] if address else []
    for key, value in (sysctls or {}).items():
        flags += ["--sysctl", f"{key}={value}"]
    for key, value in (environment or {}).items():
        flags += ["--env", f"{key}={value}"]
    full = f"{RUN}-{name}"
    docker("run", "-d", "--name", full, *flags, "--entrypoint", program, image, *arguments)
    return full


def address_of(container: str) -> str:
    return docker("inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", container)


def pid_of(container: str) -> str:
    return docker("inspect", "-f", "{{.State.Pid}}", container)


def bridge() -> str:
    """The interface of the bench's network on the host."""
    return f"br-{docker('network', 'inspect', '-f', '{{.Id}}', RUN)[:12]}"


class Client:
    """A host outside, connected by a link of its own. Programs of its image run in it without `docker exec`, whose
    processor time would count."""

    def __init__(self, image: str) -> None:
        self._container = start("client", image, network="none", sysctls=CLIENT_SYSCTLS)
        self._pid = pid_of(self._container)
        link = f"lbb{os.getpid()}"
        run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", self._pid)
        run("ip", "-batch", "-", text=self._addresses(link, 0))
        inside = self._addresses("eth0", 100)
        for number in range(1, CLIENTS + 1):
            inside += f"route add 198.19.252.{number}/32 dev eth0 src 198.19.252.{100 + number}\n"
        run(*self.command("ip", "-batch", "-"), text=inside)

    @staticmethod
    def _addresses(interface: str, offset: int) -> str:
        lines = [f"addr add 198.19.252.{offset + n}/24 dev {interface}\n" for n in range(1, CLIENTS + 1)]
        return "".join([*lines, f"link set {interface} up\n"])

    def command(self, *program: str) -> list[str]:
        """The command that runs a program of the image there."""
        return ["nsenter", "--target", self._pid, "--net", "--mount", *program]

    def python(self, script: Path, *arguments: str) -> list[str]:
        """The command that runs a script of this checkout there, with this Python."""
        return ["nsenter", "--target", self._pid, "--net", sys.executable, str(script), *arguments]


@contextmanager
def prepared() -> Iterator[None]:
    """The network and the settings; at the end everything of this run is removed."""
    before = _change_settings(HOST_SETTINGS)
    try:
        docker("network", "create", "--subnet", SUBNET, "--label", LABEL, RUN)
        yield
    finally:
        _change_settings(before)
        remove()


def _change_settings(wanted: Mapping[str, str]) -> dict[str, str]:
    """Writes sysctls and returns their values before. In a namespace of its own, the limit cannot be written."""
    before = {}
    for name, value in wanted.items():
        setting = PROC / name
        if setting.exists() and setting.stat().st_mode & 0o200:
            before[name] = setting.read_text()
            setting.write_text(value)
    return before


def remove() -> None:
    """Removes all containers and the network of this run. The link ends with the client's namespace."""
    ids = docker("ps", "-aq", "--filter", f"label={LABEL}").split()
    if ids:
        docker("rm", "-f", *ids)
    if docker("network", "ls", "-q", "--filter", f"label={LABEL}"):
        docker("network", "rm", RUN)
