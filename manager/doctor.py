"""What on this host would stop run.sh or spoil its work, with the mend beside it: `./run.sh --doctor`.

    doctor.py [--doctor] [--json]

The settings come in LB_ variables, as run.sh exports them. Exit codes: 0 nothing would stop run.sh, though there may be
warnings; 1 something would; 2 bad usage. It changes nothing and installs nothing; where it cannot know it says "not
tried". Standard library alone, for it runs before the virtual environment exists.

Parsers are pure: a listing's text in, a value out. A check is a function of the host and the settings that returns a
`Check`; it sees the host through `Host` alone.
"""

from __future__ import annotations

import argparse
import ctypes
import gzip
import hashlib
import importlib.util
import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any, NamedTuple

import preflight
from settings import ROOT, SettingError, Settings, read

OK, WARN, FAULT = "ok", "warn", "fault"
COLOURS = {OK: "\033[32m", WARN: "\033[33m", FAULT: "\033[31m"}
WIDTHS = {"check": 12, "verdict": 7, "found": 36, "mend": 39}  # with two blanks between them, 100 columns
PYTHON = (3, 10)
GIB = 1 << 30
BALANCER_MEMORY = 512 << 20  # bytes, as run.sh limits it
INSIDE = 8000  # the service's port in the balancer's container, which is what Docker's rules see
FILES = 1024  # open files that the manager may want

# What the rules need of the kernel: a module, and the option that builds it.
MODULES = {
    "nft_compat": "CONFIG_NFT_COMPAT",
    "xt_statistic": "CONFIG_NETFILTER_XT_MATCH_STATISTIC",
    "xt_addrtype": "CONFIG_NETFILTER_XT_MATCH_ADDRTYPE",
    "xt_conntrack": "CONFIG_NETFILTER_XT_MATCH_CONNTRACK",
    "xt_connbytes": "CONFIG_NETFILTER_XT_MATCH_CONNBYTES",
    "xt_nat": "CONFIG_NETFILTER_XT_NAT",
    "xt_MASQUERADE": "CONFIG_NETFILTER_XT_TARGET_MASQUERADE",
    "xt_set": "CONFIG_NETFILTER_XT_SET",
    "ip_set_hash_ip": "CONFIG_IP_SET_HASH_IP",
}


@dataclass(frozen=True)
class Check:
    """`mend` is what to do, empty where there is nothing to mend."""

    name: str
    verdict: str
    found: str
    mend: str = ""


class Done(NamedTuple):
    code: int  # 127 when there is no such program, 124 when it took too long
    out: str
    err: str


class _Timex(ctypes.Structure):
    """The head of the kernel's struct timex, see adjtimex(2); the rest is room."""

    _fields_ = (
        *(("modes", ctypes.c_uint), ("offset", ctypes.c_long), ("freq", ctypes.c_long), ("maxerror", ctypes.c_long)),
        ("rest", ctypes.c_byte * 256),
    )


class Host:
    """What the checks see of this host. What ran once is remembered: several checks ask the engine the same."""

    def __init__(self, settings: Settings, environ: Mapping[str, str]) -> None:
        self.settings = settings
        self.environ = {**environ, "LB_BASE_IMAGE": settings.base_image}  # for host.sh
        self.uid = os.geteuid()
        self.python: Sequence[int] = sys.version_info[:3]
        self.release = platform.release()
        self.open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._done: dict[tuple[str, ...], Done] = {}

    def run(self, *argv: str, timeout: float = 15) -> Done:
        if argv not in self._done:
            try:
                ran = subprocess.run(
                    argv, capture_output=True, text=True, timeout=timeout, check=False, cwd=ROOT, env=self.environ
                )
                self._done[argv] = Done(ran.returncode, ran.stdout.strip(), ran.stderr.strip())
            except OSError as error:
                self._done[argv] = Done(127, "", str(error))
            except subprocess.TimeoutExpired:
                self._done[argv] = Done(124, "", f"no answer within {timeout:g} s")
        return self._done[argv]

    def read(self, path: str) -> str:
        """A file's text, unpacked; nothing where it is not there or not for this user."""
        try:
            content = Path(path).read_bytes()
        except OSError:
            return ""
        return (gzip.decompress(content) if path.endswith(".gz") else content).decode(errors="replace")

    def have(self, program: str) -> bool:
        return shutil.which(program) is not None

    def free(self, place: str) -> int:
        """Bytes free for files at that place, which may have yet to be made."""
        path = Path(place)
        return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free

    def clock_error(self) -> float:
        """Seconds by which the kernel holds its clock to be wrong at most."""
        told = _Timex()
        ctypes.CDLL(None).adjtimex(ctypes.byref(told))
        return float(told.maxerror) / 1e6

    def may_install(self) -> bool:
        return self.uid == 0 and self.have("apt-get") and not self.environ.get("NO_INSTALL")

    def engine(self) -> dict[str, Any]:
        """What `docker info` says; nothing when no engine answers this user."""
        done = self.run("docker", "info", "--format", "{{json .}}")
        told = json.loads(done.out) if done.code == 0 else {}
        return told if told.get("ServerVersion") else {}


# -- parsers ---------------------------------------------------------------------------------------------------------


def missing_modules(listing: str) -> list[str]:
    """Those of MODULES that neither modules.builtin nor modules.dep has."""
    there = {name.replace("-", "_") for name in re.findall(r"([\w-]+)\.ko\b", listing)}
    return [module for module in MODULES if module not in there]


def unbuilt(config: str) -> tuple[list[str], list[str]]:
    """The modules that the kernel's configuration leaves out, and those it builds to be loaded."""
    set_ = dict(re.findall(r"^(CONFIG_\w+)=([ym])$", config, re.MULTILINE))
    built = {module: set_.get(option, "") for module, option in MODULES.items()}
    return [m for m, how in built.items() if not how], [m for m, how in built.items() if how == "m"]


def interfering(rules: str, port: int, manager_port: int) -> list[str]:
    """What in the output of iptables-save may keep reports from the manager or clients from the service, unless a rule
    lets the manager's port in. That FORWARD drops what no rule takes is Docker's way, and no fault."""
    let_in = re.search(rf"^-A .*--dport {manager_port} .*-j ACCEPT", rules, re.MULTILINE)
    found, table = [], ""
    for line in rules.splitlines():
        table = line[1:] if line.startswith("*") else table
        wall = table == "filter" and (line.startswith(":INPUT DROP") or _drops(line, "INPUT", manager_port))
        theft = table == "nat" and re.match(rf"-A PREROUTING .*--dport {port} ", line)
        if (wall and not let_in) or theft or _drops(line, "DOCKER-USER", INSIDE):
            found.append(line)
    return found


def _drops(rule: str, chain: str, port: int) -> bool:
    """Whether the rule may drop new TCP connections to the port."""
    parts = re.match(rf"-A {chain}\b(.*) -j (DROP|REJECT)\b", rule)
    if not parts or re.search(r"-p (udp|icmp)|INVALID", parts[1]):
        return False
    ports = re.search(r"--dports? (\S+)", parts[1])
    return not ports or str(port) in re.split("[,:]", ports[1])


def dropping_chains(chains: str) -> list[str]:
    """Input chains, in the output of `nft list chains`, that drop what no rule takes; those of iptables apart."""
    found, table, chain = [], "", ""
    for line in chains.splitlines():
        words = line.split()
        if words[:1] == ["table"]:
            table = " ".join(words[1:3])
        elif words[:1] == ["chain"]:
            chain = words[1]
        elif "hook input" in line and "policy drop" in line and table != "ip filter":
            found.append(f"{table} {chain}")
    return found


def fields(text: str) -> dict[str, int]:
    """The numbers of /proc/meminfo, in bytes."""
    return {name: int(value) << 10 for name, value in re.findall(r"^(\w+): +(\d+) kB$", text, re.MULTILINE)}


def size(text: str) -> int:
    """Bytes in a size such as 256m."""
    return int(text[:-1]) << {"k": 10, "m": 20, "g": 30}[text[-1]]


def human(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / (1 << 20):.0f} MiB"


def other_routes(table: str, bridge: str) -> list[IPv4Network]:
    """The destinations in `ip -4 route show table all` that do not lead to that bridge."""
    lines = [line for line in table.splitlines() if f" dev {bridge} " not in f"{line} "]
    return list(preflight.routes("\n".join(lines)))


# -- checks ----------------------------------------------------------------------------------------------------------


def system(host: Host) -> Check:
    name = re.search(r'^PRETTY_NAME="?([^"\n]*)', host.read("/etc/os-release"), re.MULTILINE)
    found = f"{name[1] if name else 'unknown system'}, Linux {host.release}, {platform.machine()}"
    lacking = [tool for tool in ("flock", "setsid", "timeout", "sha256sum", "find", "xargs") if not host.have(tool)]
    if lacking:
        found += f"; without {', '.join(lacking)}"
        return Check("system", FAULT, found, "install util-linux, coreutils and findutils")
    return Check("system", OK, found)


def user(host: Host) -> Check:
    if host.settings.preserve_client_ip and host.uid:
        return Check("user", FAULT, "not root", "--preserve-client-ip needs root: sudo ./run.sh")
    if host.uid == 0:
        return Check("user", OK, "root")
    if host.engine():
        return Check("user", OK, "not root, but the engine answers; nothing can be installed")
    return Check("user", FAULT, "neither root nor heard by an engine", "sudo ./run.sh, or join the docker group")


def python(host: Host) -> Check:
    found, wanted = (".".join(map(str, version)) for version in (host.python, PYTHON))
    if tuple(host.python) < PYTHON:
        return Check("Python", FAULT, found, f"install Python {wanted} or later as python3")
    return Check("Python", OK, found)


def environment(host: Host) -> Check:
    wanted = hashlib.sha256(host.read(str(ROOT / "manager" / "requirements.txt")).encode()).hexdigest()
    if host.read(str(ROOT / ".venv" / "stamp")).startswith(wanted):
        return Check("environment", OK, ".venv is there, with what the manager needs")
    if importlib.util.find_spec("ensurepip") and importlib.util.find_spec("venv"):
        return Check("environment", OK, "run.sh makes .venv and loads its packages (not tried)")
    return _installable(host, "environment", "Python has no venv with ensurepip", "python3-venv")


def client(host: Host) -> Check:
    done = host.run("docker", "--version")
    if done.code == 0:
        return Check("client", OK, done.out)
    return _installable(host, "client", "no docker program", "docker-cli")


def engine(host: Host) -> Check:
    where, told = host.environ.get("DOCKER_HOST", ""), host.engine()
    if where and not where.startswith("unix:"):
        return Check("engine", FAULT, f"DOCKER_HOST is {where}", "the engine has to be on this host: unset DOCKER_HOST")
    if not told:
        return _no_engine(host, where)
    found = f"{told['ServerVersion']}, storage {told.get('Driver')}, {told.get('CgroupDriver')} cgroups"
    if any("rootless" in option for option in told.get("SecurityOptions") or ()):
        return Check("engine", FAULT, f"{found}, rootless", "it has no bridge on this host; use a rootful engine")
    if host.settings.orchestrator == "swarm":
        found += f", swarm {told.get('Swarm', {}).get('LocalNodeState', 'unknown')}"
    if told.get("Driver") == "vfs":
        return Check("engine", WARN, found, "vfs copies whole images: slow, and hungry for disk; better overlay2")
    return Check("engine", OK, found)


def _no_engine(host: Host, where: str) -> Check:
    why = host.run("docker", "info", "--format", "{{json .}}").err.splitlines()[-1:] or ["no answer"]
    found = f"none answers{f' at {where}' if where else ''}: {why[0]}"
    if where:
        return Check("engine", FAULT, found, "start it, or unset DOCKER_HOST")
    if not host.have("dockerd"):
        return _installable(host, "engine", "not installed", "docker.io iptables")
    if host.uid:
        return Check("engine", FAULT, found, "start it, join the docker group, or run as root")
    return Check("engine", WARN, found, "run.sh starts it")


def _installable(host: Host, name: str, found: str, packages: str) -> Check:
    if host.may_install():
        return Check(name, WARN, found, f"run.sh installs {packages}")
    return Check(name, FAULT, found, f"install {packages}, or run as root where apt-get is, without --no-install")


def balancer_image(host: Host) -> str:
    """The image that run.sh would run, where it is built already; else nothing."""
    if not host.engine():
        return ""
    image = f"lbscaler-balancer:{host.run('bash', '-c', '. manager/host.sh; digest balancer').out}"
    return image if host.run("docker", "image", "inspect", image).code == 0 else ""


def images(host: Host) -> Check:
    if image := balancer_image(host):
        return Check("images", OK, image)
    if host.engine() and host.run("docker", "image", "inspect", host.settings.base_image).code == 0:
        return Check("images", OK, f"run.sh builds them on {host.settings.base_image}, which is here")
    found = f"run.sh builds them; {host.settings.base_image} has to be pulled or made first (not tried)"
    return Check("images", OK, found)


def kernel(host: Host) -> Check:
    """By the balancer's own try where its image is there, else by what is built; never by what happens to be loaded."""
    if image := balancer_image(host):
        rights = ("--network", "none", "--cap-drop", "ALL", "--cap-add", "NET_ADMIN", "--cap-add", "NET_RAW")
        done = host.run("docker", "run", "--rm", *rights, "--tmpfs", "/run", image, "check", timeout=60)
        told = done.out.splitlines()
        if done.code == 0:
            return Check("kernel", OK, f"tried: {told[-1] if told else 'all is there'}")
        return Check("kernel", FAULT, "; ".join(told) or done.err, "load or build what is missing")
    tree = f"/lib/modules/{host.release}"
    if listing := host.read(f"{tree}/modules.builtin") + host.read(f"{tree}/modules.dep"):
        return _built(missing_modules(listing), [], tree)
    for path in ("/proc/config.gz", f"/boot/config-{host.release}"):
        if config := host.read(path):
            return _built(*unbuilt(config), path)
    return Check("kernel", WARN, "not tried: no balancer image, no list of modules", "run.sh tries before it starts")


def _built(missing: list[str], loadable: list[str], where: str) -> Check:
    if missing:
        return Check("kernel", FAULT, f"without {', '.join(missing)} ({where})", "use a kernel that has them")
    if loadable:
        found = f"not tried: {', '.join(loadable)} would have to be loaded, and no modules are seen here"
        return Check("kernel", WARN, found, "run.sh tries before it starts")
    return Check("kernel", OK, f"has what the rules need ({where}); rules not tried: no balancer image yet")


def firewall(host: Host) -> Check:
    version = host.run("iptables", "--version")
    found = version.out or "no iptables on the host"
    if host.uid:
        return Check("firewall", WARN, f"{found}; rules not tried: only root sees them", "run the doctor as root")
    bad = [
        *interfering(host.run("iptables-save").out, host.settings.port, host.settings.manager_port),
        *(f"nft {chain} drops what no rule takes" for chain in dropping_chains(host.run("nft", "list", "chains").out)),
    ]
    if bad:
        mend = f"let the project's network reach port {host.settings.manager_port}, clients port {host.settings.port}"
        return Check("firewall", WARN, f"{found}; may interfere: {'; '.join(bad)}", mend)
    return Check("firewall", OK, f"{found}; {'no rule interferes' if version.code == 0 else 'no rule seen'}")


def service_port(host: Host) -> Check:
    with socket.socket() as probe:
        try:
            probe.bind((host.settings.bind, 0))
        except OSError as error:
            found = f"{host.settings.bind}: {error.strerror}"
            return Check("service port", FAULT, found, "name an address of this host with --bind")
    ours = ("label=lbscaler.role=balancer", f"label=lbscaler.project={host.settings.project}")
    if host.engine():
        filters = [word for one in ours for word in ("--filter", one)]
        if f":{host.settings.port}->" in host.run("docker", "ps", *filters, "--format", "{{.Ports}}").out:
            return Check("service port", OK, f"{host.settings.port}: held by this project's balancer")
    return _port("service port", host.settings.bind, host.settings.port, "--port")


def manager_port(host: Host) -> Check:
    pid = host.read(str(host.settings.run_dir / "manager.pid")).strip()
    if pid and preflight.owner(host.settings.manager_port).endswith(f"(pid {pid})"):
        return Check("manager port", OK, f"{host.settings.manager_port}: held by this project's manager")
    return _port("manager port", "127.0.0.1", host.settings.manager_port, "--manager-port")


def _port(name: str, address: str, port: int, flag: str) -> Check:
    if preflight.is_taken(address, port):
        mend = f"end that, or choose another with {flag}"
        return Check(name, FAULT, f"{port}: taken by {preflight.owner(port)}", mend)
    return Check(name, OK, f"{port}: free")


def network(host: Host) -> Check:
    """The project's own network where it is there, else the one it is to have."""
    name, wanted = host.settings.project, host.settings.subnet
    there = json.loads(host.run("docker", "network", "inspect", name).out or "[]") if host.engine() else []
    if there:
        return _there(host, there[0])
    if wanted:
        return _overlap(IPv4Network(wanted), preflight.host_routes(), "choose another with --subnet, or leave it out")
    free = preflight.free_subnet(preflight.host_routes())
    if free is None:
        return Check("network", FAULT, "every network of the pools overlaps a route", "name one with --subnet")
    return Check("network", OK, f"{free} is free")


def _there(host: Host, network: Mapping[str, Any]) -> Check:
    name, wanted = host.settings.project, host.settings.subnet
    if (network.get("Labels") or {}).get("lbscaler.project") != name:
        return Check("network", FAULT, f"{name} is there and not ours", "choose another name with --project")
    subnet = IPv4Network(network["IPAM"]["Config"][0]["Subnet"])
    if wanted not in ("", str(subnet)):
        return Check("network", FAULT, f"{name} is {subnet}", f"./stop.sh first to have it be --subnet {wanted}")
    listed = host.run("ip", "-4", "route", "show", "table", "all")
    if listed.code:
        return Check("network", OK, f"{subnet}, this project's; overlaps not tried: no ip to list routes")
    return _overlap(subnet, other_routes(listed.out, f"br-{network['Id'][:12]}"), "./stop.sh, then another --subnet")


def _overlap(subnet: IPv4Network, routes: Sequence[IPv4Network], mend: str) -> Check:
    """A narrower route than ours takes our traffic; a wider one loses what it has in common with ours."""
    if over := [route for route in routes if route.overlaps(subnet)]:
        worse = any(route.prefixlen >= subnet.prefixlen for route in over)
        found = f"{subnet} overlaps this host's route to {', '.join(map(str, over))}"
        return Check("network", FAULT if worse else WARN, found, mend)
    return Check("network", OK, f"{subnet} overlaps no route of this host")


def clock(host: Host) -> Check:
    """As systemd judges it: synchronised while the greatest error is less than 16 s."""
    error = host.clock_error()
    if error < 16:
        return Check("clock", OK, f"synchronised, to {error:.2g} s")
    return Check("clock", WARN, "no time server sets it", "install systemd-timesyncd or chrony: logs bear its times")


def disk(host: Host) -> Check:
    """Where the engine keeps images, and where the logs go."""
    built = balancer_image(host)
    wanted = GIB // 8 if built else GIB
    free = {place: host.free(place) for place in (str(ROOT), host.engine().get("DockerRootDir", "/var/lib/docker"))}
    found = ", ".join(f"{human(count)} free for {place}" for place, count in free.items())
    if min(free.values()) < wanted:
        return Check("disk", WARN if built else FAULT, found, f"have {human(wanted)} free for images and logs")
    return Check("disk", OK, found)


def connections(host: Host) -> Check:
    used, most = (host.read(f"/proc/sys/net/netfilter/nf_conntrack_{name}") for name in ("count", "max"))
    if not used or not most:
        return Check("conntrack", OK, "not loaded yet")
    found = f"{int(used)} of {int(most)} entries used"
    if int(used) > 0.8 * int(most):
        return Check("conntrack", WARN, found, f"sysctl net.netfilter.nf_conntrack_max={4 * int(most)}")
    return Check("conntrack", OK, found)


def neighbours(host: Host) -> Check:
    """The balancer knows each backend and each backend the balancer: two entries, in one table for all namespaces."""
    most = int(host.read("/proc/sys/net/ipv4/neigh/default/gc_thresh3") or 0)
    wanted = 2 * (host.settings.max + host.settings.spares) + 24
    found = f"room for {most}, --max {host.settings.max} wants {wanted}"
    if not most:
        return Check("neighbours", WARN, "not tried: no thresholds are shown here", "run the doctor on the host itself")
    if wanted > most:
        sizes = " ".join(f"net.ipv4.neigh.default.gc_thresh{n}={wanted * n}" for n in (1, 2, 3))
        return Check("neighbours", WARN, found, f"sysctl {sizes}")
    return Check("neighbours", OK, found)


def memory(host: Host) -> Check:
    free = fields(host.read("/proc/meminfo")).get("MemAvailable", 0)
    each, count = size(host.settings.memory), host.settings.max + host.settings.spares
    found = f"{human(free)} available; {count} backends of {host.settings.memory} and the balancer may use "
    found += human(count * each + BALANCER_MEMORY)
    if host.settings.orchestrator == "docker" and count * each + BALANCER_MEMORY > free:
        fit = max(0, (free - BALANCER_MEMORY) // each)
        return Check("memory", WARN, found, f"{fit} fit: lower --max or --memory, or trust that they use less")
    return Check("memory", OK, found)


def open_files(host: Host) -> Check:
    if 0 <= host.open_files < FILES:
        return Check("open files", WARN, f"{host.open_files} a process", f"ulimit -n {FILES}")
    return Check("open files", OK, "no limit" if host.open_files < 0 else f"{host.open_files} a process")


CHECKS: Sequence[Callable[[Host], Check]] = (
    *(system, user, python, environment, client, engine, images, kernel, firewall),
    *(service_port, manager_port, network, clock, disk, connections, neighbours, memory, open_files),
)


def examine(host: Host, checks: Sequence[Callable[[Host], Check]] = CHECKS) -> list[Check]:
    """Every check's word; one that fails itself says so and keeps no other from being heard."""
    found = []
    for check in checks:
        try:
            found.append(check(host))
        except Exception as error:
            name = check.__name__.replace("_", " ")
            found.append(Check(name, WARN, f"not tried: {type(error).__name__}: {error}"))
    return found


def table(checks: Sequence[Check], colour: bool = False) -> str:
    """Aligned, in 100 columns; what is longer goes on below itself."""
    lines = ["  ".join(title.ljust(width) for title, width in WIDTHS.items()).rstrip()]
    for check in checks:
        cells = [
            [part.ljust(width) for part in textwrap.wrap(text, width, break_on_hyphens=False)] or [" " * width]
            for text, width in zip(vars(check).values(), WIDTHS.values())  # noqa: B905 - older Pythons are to run this
        ]
        if colour:
            cells[1] = [f"{COLOURS[check.verdict]}{cells[1][0]}\033[0m"]
        blank = [" " * width for width in WIDTHS.values()]
        for row in range(max(map(len, cells))):
            parts = [cell[row] if row < len(cell) else blank[column] for column, cell in enumerate(cells)]
            lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def verdict(checks: Sequence[Check]) -> str:
    faults, warnings = (sum(check.verdict == word for check in checks) for word in (FAULT, WARN))
    return f"{faults} fault{'s' * (faults != 1)} that would stop run.sh, {warnings} warning{'s' * (warnings != 1)}"


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    parser = argparse.ArgumentParser(prog="doctor.py", description="Looks this host over; changes nothing.")
    parser.add_argument("--json", action="store_true", help="the same, for programs")
    parser.add_argument("--doctor", action="store_true", help="what run.sh calls it by; changes nothing")
    as_json = parser.parse_args(arguments).json
    try:
        settings = read(environ)
    except SettingError as error:
        print(f"doctor.py: {error}", file=sys.stderr)
        return 2
    checks = examine(Host(settings, environ))
    well = all(check.verdict != FAULT for check in checks)
    if as_json:
        print(json.dumps({"well": well, "checks": [vars(check) for check in checks]}, indent=1))
    else:
        print(f"{table(checks, sys.stdout.isatty())}\n\n{verdict(checks)}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
