"""What on this host would stop run.sh or spoil its work, with the mend beside it: `./run.sh --doctor`.

    doctor.py [--doctor] [--json]

The settings come in LB_ variables, as run.sh exports them. Exit codes: 0 nothing would stop run.sh, though there may be
warnings; 1 something would; 2 bad usage. It changes nothing; where it cannot know it says "not tried". Standard library
alone, for it runs before the virtual environment exists. Each row of CHECKS is a name and a function of the `Host`.
"""

from __future__ import annotations

import argparse
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

from cli import host_checks as preflight
from core.settings import ROOT, SettingError, Settings, read

OK, WARN, FAULT = "ok", "warn", "fault"
INFO = "docker info --format '{{json .}}'"
TRY = "docker run --rm --network none --cap-drop ALL --cap-add NET_ADMIN --cap-add NET_RAW --tmpfs /run"
MATCHES = ("statistic", "addrtype", "conntrack", "connbytes", "nat", "MASQUERADE", "set")
MODULES = ("nft_compat", "ip_set_hash_ip", *(f"xt_{name}" for name in MATCHES))  # what the rules need of the kernel


class Found(NamedTuple):
    """`mend` is what to do, empty where there is nothing to mend."""

    verdict: str
    found: str
    mend: str = ""


class Host:
    """What the checks see of this host."""

    def __init__(self, settings: Settings, environ: Mapping[str, str]) -> None:
        self.settings = settings
        self.environ = {**environ, "LB_BASE_IMAGE": settings.base_image}  # for host.sh
        self.uid = os.geteuid()
        self.python: Sequence[int] = sys.version_info[:3]

    def run(self, command: str, timeout: float = 15) -> subprocess.CompletedProcess[str]:
        how: dict[str, Any] = {"capture_output": True, "text": True, "cwd": ROOT, "env": self.environ}
        try:
            return subprocess.run(shlex.split(command), timeout=timeout, check=False, **how)
        except (OSError, subprocess.TimeoutExpired) as error:
            return subprocess.CompletedProcess(command, 127, "", str(error))

    def read(self, path: Path | str) -> str:
        """A file's text; nothing where it is not there or not for this user."""
        try:
            return Path(path).read_text(errors="replace").strip()
        except OSError:
            return ""

    def clock_error(self) -> float:
        """Seconds by which the kernel holds its clock to be wrong at most."""
        told = (ctypes.c_long * 64)()  # a struct timex and room; its fourth word is maxerror, see adjtimex(2)
        ctypes.CDLL(None).adjtimex(told)
        return told[3] / 1e6

    @cached_property
    def engine(self) -> dict[str, Any]:
        """What `docker info` says; nothing when no engine answers this user."""
        done = self.run(INFO)
        told: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
        return told if told.get("ServerVersion") else {}


def judged(found: str, bad: bool, mend: str, verdict: str = WARN) -> Found:
    return Found(verdict, found, mend) if bad else Found(OK, found)


def installable(host: Host, found: str, packages: str) -> Found:
    if host.uid == 0 and shutil.which("apt-get") and not host.environ.get("NO_INSTALL"):
        return Found(WARN, found, f"run.sh installs {packages}")
    return Found(FAULT, found, f"install {packages}, or run as root where apt-get is, without --no-install")


def versions(host: Host) -> Found:
    name = re.findall(r'^PRETTY_NAME="?([^"\n]*)', host.read("/etc/os-release"), re.MULTILINE)
    told = [host.run(f"{program} --version").stdout.strip() or f"no {program}" for program in ("docker", "iptables")]
    python = f"Python {'.'.join(map(str, host.python))}"
    found = ", ".join([*name, f"Linux {platform.release()} {platform.machine()}", python, *told])
    if tuple(host.python) < (3, 10):
        return Found(FAULT, found, "install Python 3.10 or later as python3")
    if not host.read(ROOT / ".venv" / "stamp") and not importlib.util.find_spec("ensurepip"):
        return installable(host, f"{found}; no ensurepip to make .venv", "python3-venv")
    return Found(OK, found)


def engine(host: Host) -> Found:
    told, where = host.engine, host.environ.get("DOCKER_HOST", "")
    if where and not (told and where.startswith("unix:")):
        return Found(FAULT, f"none of this host at DOCKER_HOST={where}", "start it, or unset DOCKER_HOST")
    if not told:
        return no_engine(host)
    found = f"{told['ServerVersion']}, storage {told.get('Driver')}, {told.get('CgroupDriver')} cgroups"
    if any("rootless" in option for option in told.get("SecurityOptions") or ()):
        return Found(FAULT, f"{found}, rootless", "it has no bridge on this host; use a rootful engine")
    return judged(found, bool(host.settings.preserve_client_ip and host.uid), "--preserve-client-ip needs root", FAULT)


def no_engine(host: Host) -> Found:
    for program, packages in {"dockerd": "docker.io iptables", "docker": "docker-cli"}.items():
        if not shutil.which(program):
            return installable(host, f"no {program}", packages)
    found = f"none answers: {(host.run(INFO).stderr.strip() or 'no word why').splitlines()[-1]}"
    if host.uid:
        return Found(FAULT, found, "start it, join the docker group, or run as root")
    return Found(WARN, found, "run.sh starts it")


def kernel(host: Host) -> Found:
    """By the balancer's own try where its image is there, else by what is built; never by what happens to be loaded."""
    image = "lbscaler-balancer:" + host.run("bash -c '. manager/host.sh; digest balancer'").stdout.strip()
    if host.run(f"docker image inspect {image}").returncode == 0:
        done = host.run(f"{TRY} {image} check", timeout=60)
        said = "; ".join((done.stdout or done.stderr).splitlines())
        return judged(f"tried: {said}", done.returncode != 0, "load or build what is missing", FAULT)
    tree = Path("/lib/modules", platform.release())
    listing = f"{host.read(tree / 'modules.builtin')}\n{host.read(tree / 'modules.dep')}"
    there = set(re.findall(r"(\w+)\.ko\b", listing))
    if not there:
        return Found(WARN, "not tried: no balancer image, no list of modules", "run.sh tries before it starts")
    missing = [module for module in MODULES if module not in there]
    found = f"without {', '.join(missing)}" if missing else "built with what the rules need; no rule tried yet"
    return judged(f"{found} ({tree})", bool(missing), "use a kernel that has them", FAULT)


def bind(host: Host) -> Found:
    try:
        socket.create_server((host.settings.bind, 0)).close()
    except OSError as error:
        return Found(FAULT, f"{host.settings.bind}: {error.strerror}", "name an address of this host with --bind")
    return port(host, host.settings.bind, host.settings.port, "--port")


def port(host: Host, address: str, number: int, flag: str) -> Found:
    if not preflight.is_taken(address, number):
        return Found(OK, f"{number}: free")
    owner, pid = preflight.owner(number), host.read(host.settings.run_dir / "manager.pid")
    shown = host.run(f"docker ps --filter label=lbscaler.project={host.settings.project} --format '{{{{.Ports}}}}'")
    if f":{number}->" in shown.stdout or owner.endswith(f"(pid {pid})"):
        return Found(OK, f"{number}: held by this project")
    return Found(FAULT, f"{number}: taken by {owner}", f"end that, or choose another with {flag}")


def network(host: Host) -> Found:
    """The project's own network where it is there, else the one it is to have, against the routes that are not its own.
    A narrower route than ours takes our traffic; a wider one loses what it has in common with ours."""
    name, wanted, routes = host.settings.project, host.settings.subnet, preflight.host_routes()
    there = json.loads(host.run(f"docker network inspect {name}").stdout or "[]")
    if there and (there[0].get("Labels") or {}).get("lbscaler.project") != name:
        return Found(FAULT, f"{name} is there and not ours", "choose another name with --project")
    text = there[0]["IPAM"]["Config"][0]["Subnet"] if there else wanted or preflight.free_subnet(routes)
    if not text:
        return Found(FAULT, "every network of the pools overlaps a route", "name one with --subnet")
    if wanted not in ("", str(text)):
        return Found(FAULT, f"{name} is {text}", f"./stop.sh first to have it be --subnet {wanted}")
    subnet = IPv4Network(text)
    own = [subnet, *(IPv4Network(subnet[n]) for n in (0, 1, -1))] if there else []  # the bridge's and its address's
    over = [route for route in routes if route.overlaps(subnet) and route not in own]
    verdict = FAULT if any(route.prefixlen >= subnet.prefixlen for route in over) else WARN
    found = f"{subnet} overlaps {' and '.join(map(str, over)) or 'no other route'} of this host"
    return judged(found, bool(over), "./stop.sh where it runs, then another --subnet", verdict)


def clock(host: Host) -> Found:
    """As systemd judges it: synchronised while the greatest error is less than 16 s."""
    error = host.clock_error()
    return judged(f"within {error:.2g} s", error >= 16, "install systemd-timesyncd or chrony: logs bear its times")


def disk(host: Host) -> Found:
    """Where the engine keeps images, and where the logs go."""
    places = (host.engine.get("DockerRootDir", str(ROOT)), str(ROOT))
    free = {place: shutil.disk_usage(place).free / 2**30 for place in places}
    found = ", ".join(f"{count:.1f} GiB free for {place}" for place, count in free.items())
    return judged(found, min(free.values()) < 1, "have 1 GiB free to build images in and for logs")


def connections(host: Host) -> Found:
    used, most = (int(host.read(f"/proc/sys/net/netfilter/nf_conntrack_{name}") or 0) for name in ("count", "max"))
    if not most:
        return Found(OK, "not tried: no connection tracking is seen here yet")
    return judged(f"{used} of {most} entries", used > 0.8 * most, f"sysctl net.netfilter.nf_conntrack_max={4 * most}")


def neighbours(host: Host) -> Found:
    """The balancer knows each backend and each backend the balancer: two entries, in one table for all namespaces."""
    most = int(host.read("/proc/sys/net/ipv4/neigh/default/gc_thresh3") or 0)
    if not most:
        return Found(WARN, "not tried: no thresholds are shown here", "run the doctor on the host itself")
    wanted = 2 * (host.settings.max + host.settings.spares) + 24
    sizes = " ".join(f"net.ipv4.neigh.default.gc_thresh{n}={wanted * n}" for n in (1, 2, 3))
    return judged(f"room for {most}, --max {host.settings.max} wants {wanted}", wanted > most, f"sysctl {sizes}")


def memory(host: Host) -> Found:
    free = int(re.findall(r"^MemAvailable: +(\d+) kB", host.read("/proc/meminfo"), re.MULTILINE)[0]) / 2**20
    limit, count = host.settings.memory, host.settings.max + host.settings.spares
    each = int(limit[:-1]) / {"k": 2**20, "m": 2**10, "g": 1}[limit[-1]]  # in GiB, as all here
    wanted = count * each + 0.5  # the balancer's, as run.sh limits it
    found = f"{free:.1f} GiB available; {count} backends of {limit} and the balancer may use {wanted:.1f} GiB"
    mend = f"{max(0, free - 0.5) // each:g} fit: lower --max or --memory, or trust that they use less"
    return judged(found, host.settings.orchestrator == "docker" and wanted > free, mend)


CHECKS: Mapping[str, Callable[[Host], Found]] = {
    **{"versions": versions, "engine": engine, "kernel": kernel, "service port": bind},
    "manager port": lambda host: port(host, "127.0.0.1", host.settings.manager_port, "--manager-port"),
    **{"network": network, "clock": clock, "disk": disk, "conntrack": connections, "neighbours": neighbours},
    "memory": memory,
}


def heard(host: Host, check: Callable[[Host], Found]) -> Found:
    """A check's word; one that fails itself says so, and keeps no other from being heard."""
    try:
        return check(host)
    except Exception as error:
        return Found(WARN, f"not tried: {type(error).__name__}: {error}")


def row(name: str, one: Found) -> str:
    """In 100 columns; what is longer goes on below itself."""
    said = f"{name:<14}{one.verdict:<7}{one.found}{f' -> {one.mend}' if one.mend else ''}"
    return textwrap.fill(said, 100, subsequent_indent=" " * 21, break_on_hyphens=False)


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    parser = argparse.ArgumentParser(prog="doctor.py", description="Looks this host over; changes nothing.")
    parser.add_argument("--json", action="store_true", help="the same, for programs")
    parser.add_argument("--doctor", action="store_true", help="what run.sh calls it by")
    as_json = parser.parse_args(arguments).json
    try:
        host = Host(read(environ), environ)
    except SettingError as error:
        print(f"doctor.py: {error}", file=sys.stderr)
        return 2
    told = {name: heard(host, check) for name, check in CHECKS.items()}
    faults, warnings = (sum(one.verdict == verdict for one in told.values()) for verdict in (FAULT, WARN))
    if as_json:
        rows = [{"name": name, **one._asdict()} for name, one in told.items()]
        print(json.dumps({"healthy": not faults, "checks": rows}, indent=1))
    else:
        print(*(row(name, one) for name, one in told.items()), sep="\n")
        print(f"\nwould stop run.sh: {faults}; warnings: {warnings}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
