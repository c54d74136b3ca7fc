"""What on this host would stop run.sh or spoil its work, with the mend beside it: `./run.sh --doctor`.

    doctor.py [--doctor] [--json]

The settings come in LB_ variables, as run.sh exports them. Exit codes: 0 nothing would stop run.sh, though there may be
warnings; 1 something would; 2 bad usage. It changes nothing and installs nothing; where it cannot know it says "not
tried". Standard library alone, for it runs before the virtual environment exists.

A check is a row of CHECKS: a name, and a function of the host that returns what it found. `Host` alone looks at the host.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any, NamedTuple

import preflight
from settings import ROOT, SettingError, Settings, read

OK, WARN, FAULT = "ok", "warn", "fault"
COLOURS = {OK: "\033[32m", WARN: "\033[33m", FAULT: "\033[31m"}
MIB = 1 << 20
BALANCER_MEMORY = 512 * MIB  # as run.sh limits it
INFO = ("docker", "info", "--format", "{{json .}}")
TRY = (*"docker run --rm --network none --cap-drop ALL --cap-add NET_ADMIN --cap-add NET_RAW --tmpfs /run".split(),)
MODULES = (  # what the rules need of the kernel, where the balancer's own try cannot tell
    *("nft_compat", "xt_statistic", "xt_addrtype", "xt_conntrack", "xt_connbytes", "xt_nat", "xt_MASQUERADE", "xt_set"),
    "ip_set_hash_ip",
)


class Found(NamedTuple):
    """`mend` is what to do, empty where there is nothing to mend."""

    verdict: str
    found: str
    mend: str = ""


class Done(NamedTuple):
    code: int  # 127 when there is no such program, 124 when it took too long
    out: str
    err: str


class Host:
    """What the checks see of this host. What ran once is remembered: several checks ask the engine the same."""

    def __init__(self, settings: Settings, environ: Mapping[str, str]) -> None:
        self.settings = settings
        self.environ = {**environ, "LB_BASE_IMAGE": settings.base_image}  # for host.sh
        self.uid = os.geteuid()
        self.python: Sequence[int] = sys.version_info[:3]
        self.release = platform.release()
        self._done: dict[tuple[str, ...], Done] = {}

    def run(self, *argv: str, timeout: float = 15) -> Done:
        if argv not in self._done:
            options: dict[str, Any] = {"capture_output": True, "text": True, "cwd": ROOT, "env": self.environ}
            try:
                ran = subprocess.run(argv, timeout=timeout, check=False, **options)
                self._done[argv] = Done(ran.returncode, ran.stdout.strip(), ran.stderr.strip())
            except OSError as error:
                self._done[argv] = Done(127, "", str(error))
            except subprocess.TimeoutExpired:
                self._done[argv] = Done(124, "", f"no answer within {timeout:g} s")
        return self._done[argv]

    def read(self, path: Path | str) -> str:
        """A file's text; nothing where it is not there or not for this user."""
        try:
            return Path(path).read_text(errors="replace").strip()
        except OSError:
            return ""

    def have(self, program: str) -> bool:
        return shutil.which(program) is not None

    def free(self, place: str) -> int:
        """Bytes free for files at that place, which may have yet to be made."""
        path = Path(place)
        return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free

    def clock_error(self) -> float:
        """Seconds by which the kernel holds its clock to be wrong at most."""
        told = (ctypes.c_long * 64)()  # a struct timex and room; its fourth word is maxerror, see adjtimex(2)
        ctypes.CDLL(None).adjtimex(told)
        return told[3] / 1e6

    def engine(self) -> dict[str, Any]:
        """What `docker info` says; nothing when no engine answers this user."""
        done = self.run(*INFO)
        told: dict[str, Any] = json.loads(done.out) if done.code == 0 else {}
        return told if told.get("ServerVersion") else {}

    def balancer_image(self) -> str:
        """The image that run.sh would run, where it is built already; else nothing."""
        if not self.engine():
            return ""
        image = f"lbscaler-balancer:{self.run('bash', '-c', '. manager/host.sh; digest balancer').out}"
        return image if self.run("docker", "image", "inspect", image).code == 0 else ""


def human(count: float) -> str:
    return f"{count / MIB / 1024:.1f} GiB" if count >= 1024 * MIB else f"{count / MIB:.0f} MiB"


def installable(host: Host, found: str, packages: str) -> Found:
    if host.uid == 0 and host.have("apt-get") and not host.environ.get("NO_INSTALL"):
        return Found(WARN, found, f"run.sh installs {packages}")
    return Found(FAULT, found, f"install {packages}, or run as root where apt-get is, without --no-install")


def system(host: Host) -> Found:
    name = re.search(r'^PRETTY_NAME="?([^"\n]*)', host.read("/etc/os-release"), re.MULTILINE)
    return Found(OK, f"{name[1] if name else 'unknown system'}, Linux {host.release}, {platform.machine()}")


def python(host: Host) -> Found:
    found = ".".join(map(str, host.python))
    if tuple(host.python) < (3, 10):
        return Found(FAULT, found, "install Python 3.10 or later as python3")
    if not host.read(ROOT / ".venv" / "stamp") and not importlib.util.find_spec("ensurepip"):
        return installable(host, f"{found}, without ensurepip for .venv", "python3-venv")
    return Found(OK, found)


def client(host: Host) -> Found:
    done = host.run("docker", "--version")
    return Found(OK, done.out) if done.code == 0 else installable(host, "no docker program", "docker-cli")


def iptables(host: Host) -> Found:
    return Found(OK, host.run("iptables", "--version").out or "none found; the balancer's image has its own")


def engine(host: Host) -> Found:
    where, told = host.environ.get("DOCKER_HOST", ""), host.engine()
    if not told or not (where or "unix:").startswith("unix:"):
        return _no_engine(host, where)
    found = f"{told['ServerVersion']}, storage {told.get('Driver')}, {told.get('CgroupDriver')} cgroups"
    if any("rootless" in option for option in told.get("SecurityOptions") or ()):
        return Found(FAULT, f"{found}, rootless", "it has no bridge on this host; use a rootful engine")
    if host.settings.preserve_client_ip and host.uid:
        return Found(FAULT, f"{found}; this user is not root", "--preserve-client-ip needs root: sudo ./run.sh")
    return Found(OK, found)


def _no_engine(host: Host, where: str) -> Found:
    found = f"none answers: {(host.run(*INFO).err.splitlines() or ['no word why'])[-1]}"
    if where:
        return Found(FAULT, f"none of this host at DOCKER_HOST={where}", "start it, or unset DOCKER_HOST")
    if not host.have("dockerd"):
        return installable(host, "not installed", "docker.io iptables")
    if host.uid:
        return Found(FAULT, found, "start it, join the docker group, or run as root")
    return Found(WARN, found, "run.sh starts it")


def kernel(host: Host) -> Found:
    """By the balancer's own try where its image is there, else by what is built; never by what happens to be loaded."""
    if image := host.balancer_image():
        done = host.run(*TRY, image, "check", timeout=60)
        if done.code == 0:
            return Found(OK, f"tried: {done.out.splitlines()[-1]}")
        return Found(FAULT, "; ".join(done.out.splitlines()) or done.err, "load or build what is missing")
    tree = f"/lib/modules/{host.release}"
    listing = host.read(f"{tree}/modules.builtin") + "\n" + host.read(f"{tree}/modules.dep")
    there = {name.replace("-", "_") for name in re.findall(r"([\w-]+)\.ko\b", listing)}
    if not there:
        return Found(WARN, "not tried: no balancer image, no list of modules", "run.sh tries before it starts")
    if missing := [module for module in MODULES if module not in there]:
        return Found(FAULT, f"without {', '.join(missing)} ({tree})", "use a kernel that has them")
    return Found(OK, f"has what the rules need ({tree}); rules not tried: no balancer image yet")


def service_port(host: Host) -> Found:
    address, port, project = host.settings.bind, host.settings.port, host.settings.project
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
        except OSError as error:
            return Found(FAULT, f"{address}: {error.strerror}", "name an address of this host with --bind")
    ours = ("--filter", "label=lbscaler.role=balancer", "--filter", f"label=lbscaler.project={project}")
    if host.engine() and f":{port}->" in host.run("docker", "ps", *ours, "--format", "{{.Ports}}").out:
        return Found(OK, f"{port}: held by this project's balancer")
    return _port(address, port, "--port")


def manager_port(host: Host) -> Found:
    port, pid = host.settings.manager_port, host.read(host.settings.run_dir / "manager.pid")
    if pid and preflight.owner(port).endswith(f"(pid {pid})"):
        return Found(OK, f"{port}: held by this project's manager")
    return _port("127.0.0.1", port, "--manager-port")


def _port(address: str, port: int, flag: str) -> Found:
    if preflight.is_taken(address, port):
        return Found(FAULT, f"{port}: taken by {preflight.owner(port)}", f"end that, or choose another with {flag}")
    return Found(OK, f"{port}: free")


def network(host: Host) -> Found:
    """The project's own network where it is there, else the one it is to have, against the routes that are not its own.
    A narrower route than ours takes our traffic; a wider one loses what it has in common with ours."""
    name, wanted, routes = host.settings.project, host.settings.subnet, preflight.host_routes()
    there = json.loads(host.run("docker", "network", "inspect", name).out or "[]") if host.engine() else []
    if there and (there[0].get("Labels") or {}).get("lbscaler.project") != name:
        return Found(FAULT, f"{name} is there and not ours", "choose another name with --project")
    text = there[0]["IPAM"]["Config"][0]["Subnet"] if there else wanted or str(preflight.free_subnet(routes) or "")
    if not text:
        return Found(FAULT, "every network of the pools overlaps a route", "name one with --subnet")
    if wanted not in ("", text):
        return Found(FAULT, f"{name} is {text}", f"./stop.sh first to have it be --subnet {wanted}")
    subnet = IPv4Network(text)
    own = {subnet, *(IPv4Network(subnet[n]) for n in (0, 1, -1))} if there else ()  # the bridge's, its address's
    if over := [route for route in routes if route.overlaps(subnet) and route not in own]:
        worse = any(route.prefixlen >= subnet.prefixlen for route in over)
        found = f"{subnet} overlaps this host's route to {', '.join(map(str, over))}"
        return Found(FAULT if worse else WARN, found, "./stop.sh where it runs, and choose another with --subnet")
    return Found(OK, f"{subnet} overlaps no other route of this host")


def clock(host: Host) -> Found:
    """As systemd judges it: synchronised while the greatest error is less than 16 s."""
    error = host.clock_error()
    if error < 16:
        return Found(OK, f"synchronised, to {error:.2g} s")
    return Found(WARN, "no time server sets it", "install systemd-timesyncd or chrony: logs bear its times")


def disk(host: Host) -> Found:
    """Where the engine keeps images, and where the logs go."""
    verdict, wanted = (WARN, 128 * MIB) if host.balancer_image() else (FAULT, 1024 * MIB)
    free = {place: host.free(place) for place in (str(ROOT), host.engine().get("DockerRootDir", "/var/lib/docker"))}
    found = ", ".join(f"{human(count)} free for {place}" for place, count in free.items())
    if min(free.values()) < wanted:
        return Found(verdict, found, f"have {human(wanted)} free for images and logs")
    return Found(OK, found)


def connections(host: Host) -> Found:
    used, most = (host.read(f"/proc/sys/net/netfilter/nf_conntrack_{name}") for name in ("count", "max"))
    if not used or not most:
        return Found(OK, "not tried: no connection tracking is seen here yet")
    mend = f"sysctl net.netfilter.nf_conntrack_max={4 * int(most)}" if int(used) > 0.8 * int(most) else ""
    return Found(WARN if mend else OK, f"{used} of {most} entries used", mend)


def neighbours(host: Host) -> Found:
    """The balancer knows each backend and each backend the balancer: two entries, in one table for all namespaces."""
    most = int(host.read("/proc/sys/net/ipv4/neigh/default/gc_thresh3") or 0)
    wanted = 2 * (host.settings.max + host.settings.spares) + 24
    if not most:
        return Found(WARN, "not tried: no thresholds are shown here", "run the doctor on the host itself")
    mend = "sysctl " + " ".join(f"net.ipv4.neigh.default.gc_thresh{n}={wanted * n}" for n in (1, 2, 3))
    found = f"room for {most}, --max {host.settings.max} wants {wanted}"
    return Found(WARN, found, mend) if wanted > most else Found(OK, found)


def memory(host: Host) -> Found:
    told = re.search(r"^MemAvailable: +(\d+) kB", host.read("/proc/meminfo"), re.MULTILINE)
    if not told:
        return Found(WARN, "not tried: /proc/meminfo does not say what is available")
    free, limit, count = int(told[1]) << 10, host.settings.memory, host.settings.max + host.settings.spares
    each = int(limit[:-1]) << {"k": 10, "m": 20, "g": 30}[limit[-1]]
    wanted = count * each + BALANCER_MEMORY
    found = f"{human(free)} available; {count} backends of {limit} and the balancer may use {human(wanted)}"
    if host.settings.orchestrator == "docker" and wanted > free:
        fit = max(0, (free - BALANCER_MEMORY) // each)
        return Found(WARN, found, f"{fit} fit: lower --max or --memory, or trust that they use less")
    return Found(OK, found)


CHECKS: Mapping[str, Callable[[Host], Found]] = {
    **{"system": system, "Python": python, "client": client, "iptables": iptables, "engine": engine, "kernel": kernel},
    **{"service port": service_port, "manager port": manager_port, "network": network, "clock": clock, "disk": disk},
    **{"conntrack": connections, "neighbours": neighbours, "memory": memory},
}


def examine(host: Host, checks: Mapping[str, Callable[[Host], Found]] = CHECKS) -> dict[str, Found]:
    """Every check's word; one that fails itself says so and keeps no other from being heard."""
    told = {}
    for name, check in checks.items():
        try:
            told[name] = check(host)
        except Exception as error:
            told[name] = Found(WARN, f"not tried: {type(error).__name__}: {error}")
    return told


def row(name: str, one: Found, colour: bool = False) -> str:
    """In 100 columns; what is longer goes on below itself."""
    said = f"{name:<14}{one.verdict:<7}{one.found}{f' → {one.mend}' if one.mend else ''}"
    lines = textwrap.fill(said, 100, subsequent_indent=" " * 21, break_on_hyphens=False)
    return f"{lines[:14]}{COLOURS[one.verdict]}{lines[14:21]}\033[0m{lines[21:]}" if colour else lines


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    parser = argparse.ArgumentParser(prog="doctor.py", description="Looks this host over; changes nothing.")
    parser.add_argument("--json", action="store_true", help="the same, for programs")
    parser.add_argument("--doctor", action="store_true", help="what run.sh calls it by")
    as_json = parser.parse_args(arguments).json
    try:
        told = examine(Host(read(environ), environ))
    except SettingError as error:
        print(f"doctor.py: {error}", file=sys.stderr)
        return 2
    faults, warnings = (sum(one.verdict == verdict for one in told.values()) for verdict in (FAULT, WARN))
    if as_json:
        rows = [{"name": name, **one._asdict()} for name, one in told.items()]
        print(json.dumps({"well": not faults, "checks": rows}, indent=1))
    else:
        print("\n".join(row(name, one, sys.stdout.isatty()) for name, one in told.items()))
        print(f"\nwould stop run.sh: {faults}; warnings: {warnings}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
