"""Checks this host for what would stop run.sh or disturb a running project, and says how to fix it.

`./run.sh --doctor` runs and prints all of CHECKS; a start runs those in REQUIRED. They change nothing, except
that the container of the kernel check may load modules. A check that cannot be performed reports "not tried". This
module uses the standard library only, because it runs before the virtual environment exists.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any, NamedTuple

from cli import host_checks, images, processes
from core.settings import ROOT, Settings

OK, WARN, FAULT = "ok", "warn", "fault"
OLDEST_PYTHON = (3, 11)  # that the manager and its packages run on
INFO = "docker info --format '{{json .}}'"
MATCHES = ("statistic", "addrtype", "conntrack", "connbytes", "nat", "MASQUERADE", "set")
MODULES = ("nft_compat", "ip_set_hash_ip", *(f"xt_{name}" for name in MATCHES))  # the kernel modules the rules need
MAX_CLOCK_ERROR = 16.0  # seconds; systemd calls a clock synchronised below it
MIN_FREE_DISK = 1.0  # GiB
CONNTRACK_LIMIT = 0.8  # share of the connection table in use
BALANCER_MEMORY = 0.5  # GiB, its container's limit


class Found(NamedTuple):
    """The result of one check. `fix` says what to do; it is empty if nothing is wrong."""

    verdict: str
    found: str
    fix: str = ""


class Host:
    """Everything that the checks read from this host."""

    def __init__(self, settings: Settings, environ: Mapping[str, str], may_install: bool = True) -> None:
        self.settings = settings
        self.environ = environ
        self.uid = os.geteuid()
        self.may_install = may_install and self.uid == 0
        self.python: Sequence[int] = sys.version_info[:3]

    def run(self, command: str, timeout: float = 15) -> subprocess.CompletedProcess[str]:
        options: dict[str, Any] = {"capture_output": True, "text": True, "cwd": ROOT, "env": self.environ}
        try:
            return subprocess.run(shlex.split(command), timeout=timeout, check=False, **options)
        except (OSError, subprocess.TimeoutExpired) as error:
            return subprocess.CompletedProcess(command, 127, "", str(error))

    def read(self, path: Path | str) -> str:
        """A file's text; empty if it does not exist or this user may not read it."""
        try:
            return Path(path).read_text(errors="replace").strip()
        except OSError:
            return ""

    def clock_error(self) -> float:
        """The kernel's estimate of its clock's greatest error, in seconds."""
        # Larger than a struct timex, whose fourth word is maxerror in microseconds, see adjtimex(2).
        timex = (ctypes.c_long * 64)()
        ctypes.CDLL(None).adjtimex(timex)
        return timex[3] / 1e6

    @cached_property
    def engine(self) -> dict[str, Any]:
        """The output of `docker info`; empty if no engine answers this user."""
        done = self.run(INFO)
        info: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
        return info if info.get("ServerVersion") else {}

    @cached_property
    def network(self) -> dict[str, Any]:
        """The engine's network with the project's name; empty if there is none."""
        return self.inspect_network(self.settings.project)

    def inspect_network(self, name: str) -> dict[str, Any]:
        found = json.loads(self.run(f"docker network inspect {name}").stdout or "[]")
        return dict(found[0]) if found else {}


def result_of(found: str, bad: bool, fix: str, verdict: str = WARN) -> Found:
    return Found(verdict, found, fix) if bad else Found(OK, found)


def installable(host: Host, found: str, packages: str) -> Found:
    if host.may_install and shutil.which("apt-get"):
        return Found(WARN, found, f"run.sh installs {packages}")
    return Found(FAULT, found, f"install {packages}, or run as root where apt-get is, without --no-install")


# -- what a start needs -----------------------------------------------------------------------------------------------


def versions(host: Host) -> Found:
    system = re.findall(r'^PRETTY_NAME="?([^"\n]*)', host.read("/etc/os-release"), re.MULTILINE)
    system += [f"Linux {platform.release()} {platform.machine()}", f"Python {'.'.join(map(str, host.python))}"]
    for program in ("docker", "iptables"):
        system.append(host.run(f"{program} --version").stdout.strip() or f"no {program}")
    found = ", ".join(system)
    if tuple(host.python) < OLDEST_PYTHON:
        return Found(FAULT, found, "install Python 3.11 or later as python3")
    if not host.read(ROOT / ".venv" / "stamp") and not importlib.util.find_spec("ensurepip"):
        return installable(host, f"{found}; no ensurepip to make .venv", "python3-venv")
    return Found(OK, found)


def engine(host: Host) -> Found:
    info, address = host.engine, host.environ.get("DOCKER_HOST", "")
    if address and not (info and address.startswith("unix:")):
        return Found(FAULT, f"no engine of this host at DOCKER_HOST={address}", "start it, or unset DOCKER_HOST")
    if not info:
        return no_engine(host)
    found = f"{info['ServerVersion']}, storage {info.get('Driver')}, {info.get('CgroupDriver')} cgroups"
    if any("rootless" in option for option in info.get("SecurityOptions") or ()):
        return Found(FAULT, f"{found}, rootless", "a rootless engine has no bridge on this host; use a rootful one")
    # With its nftables backend, Docker drops packets in its own chains, and an iptables rule cannot accept them again.
    firewall = (info.get("FirewallBackend") or {}).get("Driver", "iptables")
    unusable = host.settings.datapath == "host" and "iptables" not in firewall
    return result_of(found, unusable, f"its firewall backend is {firewall}: leave out --datapath host", FAULT)


def no_engine(host: Host) -> Found:
    for program, packages in {"dockerd": "docker.io iptables", "docker": "docker-cli"}.items():
        if not shutil.which(program):
            return installable(host, f"no {program}", packages)
    error = host.run(INFO).stderr.strip() or "no reason given"
    found = f"no engine answers: {error.splitlines()[-1]}"
    if host.uid:
        return Found(FAULT, found, "start it, join the docker group, or run as root")
    return Found(WARN, found, "run.sh starts it")


def check_rules(image: str, project: str) -> list[str]:
    """The command that tries the balancer's rules in a container with a network namespace of its own."""
    labels = ["--label", f"lbscaler.project={project}", "--label", "lbscaler.role=check"]
    rights = ["--network", "none", "--cap-drop", "ALL", "--cap-add", "NET_ADMIN", "--cap-add", "NET_RAW"]
    return ["docker", "run", "--rm", *labels, *rights, "--tmpfs", "/run", image, "check"]


def kernel(host: Host) -> Found:
    """Tries the rules if the balancer's image exists. Otherwise checks that the kernel has the modules that they need;
    whether these are loaded does not matter, because the kernel loads them on demand."""
    # The balancer's own test is the most reliable one: it loads modules as the real rules do.
    image = images.tag("balancer", host.settings.base_image)
    if host.run(f"docker image inspect {image}").returncode == 0:
        done = host.run(shlex.join(check_rules(image, host.settings.project)), timeout=60)
        result = "; ".join((done.stdout or done.stderr).splitlines())
        return result_of(f"tried: {result}", done.returncode != 0, "load or build what is missing", FAULT)
    # Without the image: every module has to be part of the kernel or to have a file.
    tree = Path("/lib/modules", platform.release())
    listing = f"{host.read(tree / 'modules.builtin')}\n{host.read(tree / 'modules.dep')}"
    built = set(re.findall(r"(\w+)\.ko\b", listing))
    if not built:
        return Found(WARN, "not tried: no balancer image, no list of modules", "run.sh tries before it starts")
    missing = [module for module in MODULES if module not in built]
    found = f"without {', '.join(missing)}" if missing else "built with what the rules need; no rule tried yet"
    return result_of(f"{found} ({tree})", bool(missing), "use a kernel that has them", FAULT)


def service_port(host: Host) -> Found:
    try:
        socket.create_server((host.settings.bind, 0)).close()
    except OSError as error:
        return Found(FAULT, f"{host.settings.bind}: {error.strerror}", "give an address of this host with --bind")
    flag = "--publish PORT:BACKEND-PORT" if host.settings.publish else "--port PORT"
    results = [port(host, host.settings.bind, number, flag) for number, _ in host.settings.ports]
    return next((result for result in results if result.verdict == FAULT), results[0])


def manager_port(host: Host) -> Found:
    return port(host, "127.0.0.1", host.settings.manager_port, "--manager-port PORT")


def port(host: Host, address: str, number: int, flag: str) -> Found:
    # The project itself may use the port: its balancer or its manager.
    if not host_checks.is_taken(address, number):
        return Found(OK, f"port {number} is free")
    owner, project = host_checks.owner(address, number), host.settings.project
    running = f"docker ps --quiet --filter label=lbscaler.project={project}"
    project_runs = bool(host.run(running).stdout)
    published = bool(host.run(f"{running} --filter publish={number}").stdout)
    # On the host path, the balancer has bound the port without listening.
    reserved = project_runs and datapath_of(host) == "host" and not host_checks.is_listening(address, number)
    if reserved or published or owner.pid in processes.find(project, processes.MANAGER):
        return Found(OK, f"port {number} is used by this project")
    fix = f"end that, or choose another with {flag}"
    return Found(FAULT, f"port {number} is taken by {owner}", fix)


def network(host: Host) -> Found:
    """The engine's network with the project's name."""
    name, wanted = host.settings.project, host.settings.subnet
    if not host.network:
        return Found(OK, f"no network {name} yet")
    if (host.network.get("Labels") or {}).get("lbscaler.project") != name:
        return Found(FAULT, f"the network {name} is not of this project", "choose another name with --project")
    orchestrator = "swarm" if host.network["Driver"] == "overlay" else "docker"
    if orchestrator != host.settings.orchestrator:
        fix = f"give --orchestrator {orchestrator}, or ./stop.sh first"
        return Found(FAULT, f"the project exists with --orchestrator {orchestrator}", fix)
    subnet = host.network["IPAM"]["Config"][0]["Subnet"]
    if wanted not in ("", subnet):
        return Found(FAULT, f"the network {name} is {subnet}", f"./stop.sh, then --subnet {wanted} applies")
    changed = datapath_of(host) != host.settings.datapath
    fix = f"./stop.sh, then --datapath {host.settings.datapath} applies"
    return result_of(f"the network {name} is {subnet}, data path {datapath_of(host)}", changed, fix, FAULT)


def datapath_of(host: Host) -> str:
    """--datapath of the project that exists; empty if there is none."""
    labels = host.network.get("Labels") or {}
    return str(labels.get("lbscaler.datapath", "bridge")) if labels else ""


def attached(host: Host) -> Found:
    """The networks of --attach."""
    if not host.engine:
        return Found(OK, "not tried: no engine answers")
    for name in host.settings.attach:
        found, fix = _attach_obstacle(host, name, host.inspect_network(name))
        if found:
            return Found(FAULT, f"--attach {name}: {found}", fix)
    return Found(OK, f"networks besides the project's: {len(host.settings.attach)}")


def _attach_obstacle(host: Host, name: str, network: Mapping[str, Any]) -> tuple[str, str]:
    """Why the backends cannot join the network, and what to do; two empty texts if they can."""
    settings = host.settings
    if not network:
        return "there is no such network", f"docker network create {name}"
    of_swarm = network["Scope"] == "swarm"
    if settings.orchestrator == "swarm" and not of_swarm:
        return "it is on one node only", "make it with docker network create --driver overlay"
    if settings.orchestrator == "docker" and of_swarm and not network["Attachable"]:
        return "only services can join it", "make it with docker network create --driver overlay --attachable"
    # Docker takes the default route from the first network by name, and from an internal one last. Before 28.0, from
    # one with IPv6 first. On the host path, the answers to outside clients need this route.
    first = network["Name"] < settings.project or network["EnableIPv6"]
    if settings.datapath == "host" and first and not network["Internal"]:
        fix = f"give it a name that sorts after {settings.project}, without IPv6, or make it --internal"
        return "it would get the backends' default route, which --datapath host needs", fix
    return "", ""


# -- what may disturb a running project -------------------------------------------------------------------------------


def routes(host: Host) -> Found:
    """Compares the project's subnet, or the one it would get, with the other routes of this host. A narrower route
    would take traffic of the backends; a wider one would lose the addresses that the subnet covers."""
    all_routes = host_checks.host_routes()
    # The project's own routes overlap its subnet by nature.
    if host.network:
        subnet = IPv4Network(host.network["IPAM"]["Config"][0]["Subnet"])
        own = [subnet, *(IPv4Network(subnet[n]) for n in (0, 1, -1))]  # of the bridge and its addresses
    else:
        wanted = host.settings.subnet
        subnet, own = IPv4Network(wanted) if wanted else host_checks.free_subnet(all_routes), []
    over = [route for route in all_routes if route.overlaps(subnet) and route not in own]
    narrower = any(route.prefixlen >= subnet.prefixlen for route in over)
    found = f"{subnet} overlaps {' and '.join(map(str, over)) or 'no other route'} of this host"
    fix = "./stop.sh where it runs, then another --subnet"
    return result_of(found, bool(over), fix, FAULT if narrower else WARN)


def clock(host: Host) -> Found:
    error = host.clock_error()
    fix = "install systemd-timesyncd or chrony: log lines carry the clock's time"
    return result_of(f"within {error:.2g} s", error >= MAX_CLOCK_ERROR, fix)


def disk(host: Host) -> Found:
    """The free space of the engine's images and of the logs."""
    free = {}
    for place in (host.engine.get("DockerRootDir", str(ROOT)), str(ROOT)):
        free[place] = shutil.disk_usage(place).free / 2**30
    found = ", ".join(f"{count:.1f} GiB free for {place}" for place, count in free.items())
    return result_of(found, min(free.values()) < MIN_FREE_DISK, "free 1 GiB, for images and logs")


def conntrack(host: Host) -> Found:
    used = int(host.read("/proc/sys/net/netfilter/nf_conntrack_count") or 0)
    size = int(host.read("/proc/sys/net/netfilter/nf_conntrack_max") or 0)
    if not size:
        return Found(OK, "not tried: connection tracking is not in use yet")
    fix = f"sysctl net.netfilter.nf_conntrack_max={4 * size}"
    return result_of(f"{used} of {size} entries", used > CONNTRACK_LIMIT * size, fix)


def neighbours(host: Host) -> Found:
    """Compares the size of the kernel's neighbour table with what --max backends need. All network namespaces share
    the table: the balancer has an entry for each backend, and each backend one for the balancer."""
    size = int(host.read("/proc/sys/net/ipv4/neigh/default/gc_thresh3") or 0)
    if not size:
        return Found(WARN, "not tried: no thresholds in /proc", "run the doctor on the host itself")
    # Some entries more for the host's own neighbours. Above gc_thresh3 the kernel refuses new entries.
    needed = 2 * (host.settings.max + host.settings.spares) + 24
    sizes = " ".join(f"net.ipv4.neigh.default.gc_thresh{n}={needed * n}" for n in (1, 2, 3))
    return result_of(f"room for {size}, --max {host.settings.max} needs {needed}", needed > size, f"sysctl {sizes}")


def memory(host: Host) -> Found:
    free = int(re.findall(r"^MemAvailable: +(\d+) kB", host.read("/proc/meminfo"), re.MULTILINE)[0]) / 2**20
    # The memory of those that run is not available any more.
    label = f"label=lbscaler.project={host.settings.project}"
    running = host.run(f"docker ps --quiet --filter {label} --filter label=lbscaler.role=backend").stdout.split()
    limit, count = host.settings.memory, max(0, host.settings.max + host.settings.spares - len(running))
    each = int(limit[:-1]) / {"k": 2**20, "m": 2**10, "g": 1}[limit[-1]]  # in GiB, as everything here
    needed = count * each + BALANCER_MEMORY
    found = f"{free:.1f} GiB available; {count} more backends of {limit} and the balancer may use {needed:.1f} GiB"
    fit = max(0, free - BALANCER_MEMORY) // each
    short = host.settings.orchestrator == "docker" and needed > free
    return result_of(found, short, f"{fit:g} more fit: lower --max or --memory, unless they use less")


CHECKS: Mapping[str, Callable[[Host], Found]] = {
    "versions": versions,
    "engine": engine,
    "kernel": kernel,
    "service port": service_port,
    "manager port": manager_port,
    "network": network,
    "attached": attached,
    "routes": routes,
    "clock": clock,
    "disk": disk,
    "conntrack": conntrack,
    "neighbours": neighbours,
    "memory": memory,
}
REQUIRED = ("engine", "service port", "manager port", "network", "attached")


def obstacles(host: Host) -> list[str]:
    """The reasons why a start cannot succeed on this host, one line each."""
    results = [CHECKS[name](host) for name in REQUIRED]
    return [f"{result.found}; {result.fix}" for result in results if result.verdict == FAULT]


def tried(host: Host, check: Callable[[Host], Found]) -> Found:
    """The result of a check. If the check raises an error, the result says so."""
    try:
        return check(host)
    except host_checks.NoFreeSubnet as error:
        return Found(FAULT, str(error), "choose one with --subnet")
    except Exception as error:
        return Found(WARN, f"not tried: {type(error).__name__}: {error}")


def row(name: str, result: Found) -> str:
    """One check as text, in lines of at most 100 columns."""
    fix = f" -> {result.fix}" if result.fix else ""
    text = f"{name:<14}{result.verdict:<7}{result.found}{fix}"
    return textwrap.fill(text, 100, subsequent_indent=" " * 21, break_on_hyphens=False)


def report(host: Host, as_json: bool) -> int:
    """Prints all checks. Returns the exit code: 1 if one of them would stop run.sh."""
    results = {name: tried(host, check) for name, check in CHECKS.items()}
    verdicts = [result.verdict for result in results.values()]
    faults = verdicts.count(FAULT)
    if as_json:
        rows = [{"name": name, **result._asdict()} for name, result in results.items()]
        print(json.dumps({"healthy": not faults, "checks": rows}, indent=1))
    else:
        print(*(row(name, result) for name, result in results.items()), sep="\n")
        print(f"\nwould stop run.sh: {faults}; warnings: {verdicts.count(WARN)}")
    return 1 if faults else 0
