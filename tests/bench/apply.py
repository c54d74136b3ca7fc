"""What the balancer's rules cost at 10, 100 and 1000 backends: to compute, to write, and for a new connection.

    sudo python tests/bench/apply.py

Needs root, iptables, ipset, conntrack and hey. Each balancer is a network namespace with the product's own rules, on a
bridge of its own; the backends are addresses of one server in another namespace. They are behind one route, because the
limit of the neighbour table is not the question. Rounds are interleaved, and only their ratios mean anything: client,
server and all balancers share this machine's processors. The course project's list of rules is measured, too, so that a
cost that grows is seen.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "balancer"))
import ruleset
from bench.rules import course as course_rules
from listings import Listing, parse_table
from netfilter import Netfilter
from netns.lab import Lab, Namespace
from restore import restore, set_changes
from ruleset import Endpoint

SIZES, ROUNDS, TRIES = (10, 100, 1000), 5, 5
SECONDS, CLIENTS = 3, 32
GATEWAY = "198.18.0.2"  # of the route to all backends
SYSCTLS = (
    "net.ipv4.ip_forward=1",
    "net.netfilter.nf_conntrack_acct=1",
    "net.netfilter.nf_conntrack_tcp_timeout_time_wait=10",
    "net.netfilter.nf_conntrack_tcp_loose=0",
    "net.netfilter.nf_conntrack_tcp_be_liberal=1",
)
SERVER = """
import socket
listener = socket.create_server(("", 8000), backlog=4096)
while True:
    connection, _ = listener.accept()
    connection.recv(4096)
    connection.sendall(b"HTTP/1.0 200 OK\\r\\nContent-Length: 0\\r\\n\\r\\n")
    connection.close()
"""
Result = TypeVar("Result")


def backends(count: int, first: int = 1) -> list[Endpoint]:
    return [Endpoint(f"198.19.{n >> 8}.{n & 255}") for n in range(first, first + count)]


def timed(call: Callable[[], Result]) -> tuple[float, Result]:
    """Milliseconds, and the result."""
    began = time.perf_counter()
    result = call()
    return 1000 * (time.perf_counter() - began), result


class Balancer:
    """The product's rules in a namespace, without the client's loop around them."""

    def __init__(self, lab: Lab, ip: str) -> None:
        self.ip, self.namespace, self.kernel = ip, lab.add(ip), Netfilter("nft")
        self.namespace.run("sysctl", "-qw", *SYSCTLS)
        self.namespace.run("ip", "route", "add", "198.19.0.0/16", "via", GATEWAY)

    def read(self) -> Listing:
        with self.namespace:
            return parse_table(self.kernel.table("nat"))

    def apply(self, text: str) -> None:
        with self.namespace:
            self.kernel.apply(text)

    def dispatch_over(self, endpoints: Sequence[Endpoint]) -> None:
        with self.namespace:
            self.kernel.make_sets()
            for name in self.kernel.path.backend_sets:
                present = self.kernel.members(name)
                self.kernel.change_sets(set_changes([endpoint.ip for endpoint in endpoints], present, name))
        for table in ruleset.tables(endpoints):
            self.apply(restore(table, Listing()))


@dataclass
class Change:
    """What one kind of change took, each time: lines of text, ms to read what is there, to write the text, to apply."""

    lines: list[int] = field(default_factory=list)
    read: list[float] = field(default_factory=list)
    text: list[float] = field(default_factory=list)
    apply: list[float] = field(default_factory=list)

    def make(self, balancer: Balancer, endpoints: Sequence[Endpoint]) -> None:
        read, listing = timed(balancer.read)
        text_ms, text = timed(lambda: restore(ruleset.nat(endpoints), listing))
        apply, _ = timed(lambda: balancer.apply(text))
        for name, value in (("lines", len(text.splitlines())), ("read", read), ("text", text_ms), ("apply", apply)):
            getattr(self, name).append(value)

    def row(self) -> str:
        return f"{statistics.median(self.lines):6.0f} " + " ".join(
            f"{statistics.median(values):9.1f}" for values in (self.read, self.text, self.apply)
        )


def changes(lab: Lab, size: int) -> tuple[int, dict[str, Change]]:
    """The rules of the nat table at this size, and what each kind of change to it takes."""
    made = {name: Change() for name in ("first rules", "one replaced", "all weights")}
    for attempt in range(TRIES):
        balancer, all_ = Balancer(lab, f"198.18.2.{len(lab.members)}"), backends(size)
        made["first rules"].make(balancer, all_)
        all_ = [*all_[1:], *backends(1, first=2000)]
        made["one replaced"].make(balancer, all_)
        weighted = [Endpoint(one.ip, 1 + (number + attempt) % 7) for number, one in enumerate(all_)]
        made["all weights"].make(balancer, weighted)
    return sum(map(len, balancer.read().chains.values())), made


def balancers_by_size(lab: Lab) -> dict[str, Balancer]:
    """A balancer for each size, and one with the greatest in one list."""
    made = {f"{size}": Balancer(lab, f"198.18.1.{n}") for n, size in enumerate(SIZES, 1)}
    for name, balancer in made.items():
        balancer.dispatch_over(backends(int(name)))
    made["1000, one list"] = course = Balancer(lab, "198.18.1.99")
    course.apply(course_rules([endpoint.ip for endpoint in backends(1000)]))
    return made


def start_server(lab: Lab) -> subprocess.Popen[bytes]:
    namespace = lab.add(GATEWAY)
    namespace.run(
        "ip", "route", "add", "local", "198.19.0.0/16", "dev", "lo"
    )  # every address of it is this namespace's
    namespace.run("sysctl", "-qw", "net.ipv4.tcp_max_tw_buckets=1024")
    with namespace:
        return subprocess.Popen([sys.executable, "-c", SERVER])


def new_connections(client: Namespace, balancer: Balancer) -> float:
    """Per second, each with one request and its answer."""
    url = f"http://{balancer.ip}:8000/"
    output = client.run("hey", "-z", f"{SECONDS}s", "-c", f"{CLIENTS}", "-disable-keepalive", url)
    balancer.namespace.run("conntrack", "-F")
    answers = re.findall(r"^ *\[(\d+)\]\s+(\d+) responses", output, re.MULTILINE)
    if [status for status, _ in answers] != ["200"] or "Error distribution" in output:
        sys.exit(f"not every connection was served:\n{output}")
    return int(answers[0][1]) / SECONDS


def rates(lab: Lab) -> dict[str, list[float]]:
    """New connections/s of every round, by balancer."""
    client, balancers, server = lab.add("198.18.0.254"), balancers_by_size(lab), start_server(lab)
    client.run("sysctl", "-qw", "net.ipv4.ip_local_port_range=1024 65000", "net.ipv4.tcp_tw_reuse=1")
    seen: dict[str, list[float]] = {name: [] for name in balancers}
    try:
        time.sleep(0.5)
        new_connections(client, balancers["10"])  # warm
        for _ in range(ROUNDS):
            for name, balancer in balancers.items():
                seen[name].append(new_connections(client, balancer))
    finally:
        server.kill()
        server.wait()
    return seen


def main() -> int:
    if os.geteuid():
        print("this needs root, for network namespaces", file=sys.stderr)
        return 2
    lab = Lab()
    print(f"{'backends':>14} {'rules':>6}  {'change':12} {'lines':>6} {'read ms':>9} {'text ms':>9} {'apply ms':>9}")
    for size in SIZES:
        rules, made = changes(lab, size)
        for name, change in made.items():
            print(f"{size:14} {rules:6}  {name:12} {change.row()}", flush=True)
    seen = rates(lab)
    print(f"\n{'backends':>14} {'new connections/s':>18}  as a ratio to 10 backends, by round, and its median")
    for name, values in seen.items():
        ratios = [value / base for value, base in zip(values, seen["10"], strict=True)]
        by_round = " ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"{name:>14} {statistics.median(values):18.0f}  {by_round}  {statistics.median(ratios):.2f}")
    lab.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
