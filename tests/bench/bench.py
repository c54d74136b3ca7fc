"""New connections/s and keep-alive requests/s: direct, through the balancer's own rules, and through the alternatives.

Every way in is a container on one network, loaded in turn by wrk from another container; rounds are interleaved, so
that whatever else the machine does strikes all alike. Only ratios are meant to be quoted. The 1000 backends are three
nginx with many addresses each: the cost in question is that of the rules.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

NETWORK = f"lbbench{os.getpid()}"
LABEL = f"lbscaler.bench={os.getpid()}"
SUBNET = "198.19.0.0/16"
SYSCTLS = (
    "net.ipv4.ip_local_port_range=1024 65000",
    "net.ipv4.tcp_tw_reuse=1",
    "net.ipv4.tcp_max_tw_buckets=1024",  # as the manager launches backends
)
RULES_SYSCTLS = (
    "net.ipv4.ip_forward=1",
    "net.netfilter.nf_conntrack_acct=1",
    "net.netfilter.nf_conntrack_tcp_timeout_time_wait=10",
    "net.netfilter.nf_conntrack_tcp_loose=0",
    "net.netfilter.nf_conntrack_tcp_be_liberal=1",
)
# Applies the product's own rules, in the balancer's image, to the endpoints on standard input.
APPLY = """
import sys, time, listings, netfilter, ruleset
endpoints = [ruleset.Endpoint(ip) for ip in sys.stdin.read().split()]
kernel = netfilter.Netfilter("nft")
kernel.make_sets()
for name in (ruleset.SET, ruleset.REPLIES):
    kernel.change_sets(ruleset.set_changes([e.ip for e in endpoints], listings.parse_set(kernel.sets(), name), name))
began = time.monotonic()
for table in ruleset.tables(endpoints):
    kernel.apply(ruleset.restore(table, listings.parse_table(kernel.table(table.name))))
print(time.monotonic() - began)
"""


def docker(*arguments: str, text: str | None = None) -> str:
    done = subprocess.run(["docker", *arguments], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"docker {' '.join(arguments)}: {done.stderr}")
    return done.stdout.strip()


def start(name: str, image: str, *command: str, sysctls: tuple[str, ...] = SYSCTLS) -> str:
    """A container of this run, and its address."""
    flags = [word for setting in sysctls for word in ("--sysctl", setting)]
    docker(
        *("run", "-d", "--name", f"{NETWORK}-{name}", "--network", NETWORK, "--network-alias", name, "--label", LABEL),
        *("--cap-add", "NET_ADMIN", "--tmpfs", "/run", *flags, "--entrypoint", command[0], image, *command[1:]),
    )
    time.sleep(0.3)
    if docker("inspect", "-f", "{{.State.Running}}", f"{NETWORK}-{name}") != "true":
        logs = subprocess.run(["docker", "logs", f"{NETWORK}-{name}"], capture_output=True, text=True, check=False)
        sys.exit(f"{name} ended at once: {logs.stdout}{logs.stderr}")
    return docker("inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", f"{NETWORK}-{name}")


def linear(ips: list[str]) -> str:
    """The course project's way: one list of DNAT rules, each with its chance, in PREROUTING itself."""
    head = "-A PREROUTING -p tcp --dport 8000 -m addrtype --dst-type LOCAL"
    rules = [
        f"{head} -m statistic --mode random --probability {1 / (len(ips) - i):.10f} -j DNAT --to-destination {ip}:8000"
        for i, ip in enumerate(ips)
    ]
    return "\n".join(["*nat", *rules, "-A POSTROUTING -p tcp -m conntrack --ctstate DNAT -j MASQUERADE", "COMMIT", ""])


@dataclass
class Way:
    """One way to the backends: the names wrk connects to, and what has to hold only while it is measured."""

    name: str
    hosts: tuple[str, ...]
    during: Callable[[], object] | None = None
    after: Callable[[], object] | None = None
    results: dict[str, list[float]] = field(default_factory=lambda: {"new connections": [], "keep-alive": []})


def wrk(way: Way, kind: str, seconds: int) -> float:
    """Requests per second answered: 48 connections of three wrk, one a backend where they are called directly."""
    close = ["-H", "Connection: close"] if kind == "new connections" else []
    each = str(48 // len(way.hosts))
    loads = [
        subprocess.Popen(
            [
                "docker",
                "exec",
                f"{NETWORK}-client",
                "wrk",
                "-t1",
                "-c",
                each,
                f"-d{seconds}s",
                *close,
                f"http://{host}:8000/",
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        for host in way.hosts
    ]
    outputs = [load.communicate()[0] for load in loads]
    bad = sum(int(n) for text in outputs for n in re.findall(r"(?:connect|timeout|responses:) (\d+)", text))
    rates = [float(match[1]) for text in outputs if (match := re.search(r"Requests/sec:\s+([\d.]+)", text))]
    if len(rates) < len(loads) or bad > 50:
        print(f"    {way.name}, {kind}: {bad} failed", file=sys.stderr)
    return sum(rates)


@contextmanager
def room_on_the_host() -> Iterator[None]:
    """The kernel's neighbour table is one for all namespaces and holds 1024 by default: too few for 1000 backends. And
    its connection table, where every connection over a bridge is noted for two minutes, would be full in the midst."""
    limits = [Path(f"/proc/sys/net/ipv4/neigh/default/gc_thresh{i}") for i in (3, 2, 1)]
    limits.append(Path("/proc/sys/net/netfilter/nf_conntrack_max"))
    before = [limit.read_text() for limit in limits]
    for limit, value in zip(limits, ("16384", "8192", "4096", "4000000"), strict=True):
        limit.write_text(value)
    try:
        yield
    finally:
        for limit, value in reversed(list(zip(limits, before, strict=True))):
            limit.write_text(value)


@contextmanager
def containers() -> Iterator[None]:
    docker("network", "create", "--subnet", SUBNET, "--label", LABEL, NETWORK)
    try:
        yield
    finally:
        ids = docker("ps", "-aq", "--filter", f"label={LABEL}").split()
        if ids:
            docker("rm", "-f", *ids)
        docker("network", "rm", NETWORK)


def notrack(add: bool) -> None:
    bridge = f"br-{docker('network', 'inspect', '-f', '{{.Id}}', NETWORK)[:12]}"
    rule = ["-i", bridge, "-s", SUBNET, "-d", SUBNET, "-j", "CT", "--notrack"]
    subprocess.run(["iptables", "-w", "-t", "raw", "-A" if add else "-D", "PREROUTING", *rule], check=True)


def set_up(balancer_image: str, bench_image: str) -> list[Way]:
    firsts = [start(f"backend-{i}", bench_image, "nginx", "-c", "/bench/backend.conf") for i in (1, 2, 3)]
    many = [f"198.19.{100 + i // 250}.{1 + i % 250}" for i in range(1000)]
    for i in range(3):
        batch = "".join(f"addr add {ip}/16 dev eth0\n" for ip in many[i::3])
        docker("exec", "-i", f"{NETWORK}-backend-{i + 1}", "ip", "-batch", "-", text=batch)
    for name, ips in (("balancer-3", firsts), ("balancer-1000", many)):
        start(name, balancer_image, "sleep", "infinity", sysctls=(*SYSCTLS, *RULES_SYSCTLS))
        took = docker("exec", "-i", "-w", "/balancer", f"{NETWORK}-{name}", "python3", "-c", APPLY, text="\n".join(ips))
        print(f"  {name}: all rules applied in {1000 * float(took):.0f} ms")
    for name, ips in (("linear-3", firsts), ("linear-1000", many)):
        start(name, balancer_image, "sleep", "infinity", sysctls=(*SYSCTLS, *RULES_SYSCTLS))
        docker("exec", "-i", f"{NETWORK}-{name}", "iptables-restore", "--noflush", text=linear(ips))
    start("haproxy", bench_image, "haproxy", "-f", "/bench/haproxy.cfg")
    start("stream", bench_image, "nginx", "-c", "/bench/stream.conf")
    start("client", bench_image, "sleep", "infinity")
    return [
        Way("direct", ("backend-1", "backend-2", "backend-3")),
        Way("balancer, 3 backends", ("balancer-3",) * 3),
        Way("balancer, 3, host NOTRACK", ("balancer-3",) * 3, lambda: notrack(True), lambda: notrack(False)),
        Way("balancer, 1000 backends", ("balancer-1000",) * 3),
        Way("linear list, 3", ("linear-3",) * 3),
        Way("linear list, 1000", ("linear-1000",) * 3),
        Way("HAProxy, TCP mode", ("haproxy",) * 3),
        Way("nginx stream", ("stream",) * 3),
    ]


def measure(ways: list[Way], rounds: int, seconds: int) -> None:
    for round_ in range(rounds):
        print(f"  round {round_ + 1} of {rounds}", flush=True)
        for kind in ("new connections", "keep-alive"):
            # Each round begins with another way, so that none always follows the same one.
            for way in ways[round_ % len(ways) :] + ways[: round_ % len(ways)]:
                if way.during:
                    way.during()
                try:
                    way.results[kind].append(wrk(way, kind, seconds))
                finally:
                    if way.after:
                        way.after()


def table(ways: list[Way]) -> str:
    lines = []
    for kind in ("new connections", "keep-alive"):
        medians = {way.name: statistics.median(way.results[kind]) for way in ways}
        lines.append(f"\n{kind + '/s':28} {'median':>8} {'least':>8} {'most':>8}   of direct   of HAProxy")
        for way in ways:
            low, high, mid = min(way.results[kind]), max(way.results[kind]), medians[way.name]
            ratios = f"{mid / medians['direct']:9.2f}   {mid / (medians['HAProxy, TCP mode'] or 1):9.2f}"
            lines.append(f"{way.name:28} {mid:8.0f} {low:8.0f} {high:8.0f}   {ratios}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests/bench/run.sh", description=__doc__.split("\n")[0])
    parser.add_argument("--balancer-image", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--bench-image", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="one round of one second instead of five of two")
    parser.add_argument("--json", type=Path, help="write every single result there")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(130))  # through every finally: nothing of ours stays on the host
    rounds, seconds = (1, 1) if options.quick else (5, 2)
    with room_on_the_host(), containers():
        ways = set_up(options.balancer_image, options.bench_image)
        measure(ways, rounds, seconds)
    print(table(ways))
    if options.json:
        options.json.write_text(json.dumps({way.name: way.results for way in ways}, indent=1))


if __name__ == "__main__":
    main()
