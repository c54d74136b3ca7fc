"""A million flows are counted and deleted in blocks, with constant memory."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

import flows
from ctnetlink import NETLINK_NETFILTER
from flows import NESTED, attribute
from netns.lab import Namespace
from ruleset import REPLY_MARK, REQUEST_MARK

FLOWS, BACKENDS, BATCH = 1_000_000, 10, 100
LIMIT = Path("/proc/sys/net/netfilter/nf_conntrack_max")
BALANCER = Path(__file__).parents[2] / "balancer"
CREATE, PORTS = 0x400, 50_000  # flows of each client
FIRST_CLIENT = IPv4Address("198.19.255.1").packed
VIP = IPv4Address("198.18.0.1").packed

# The program of the process that reads the table. It prints one line of JSON.
READER = """
import json, resource, sys, time
from netfilter import Netfilter
netfilter = Netfilter("nft")
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def timed(name, call):
    began = time.monotonic()
    results[name] = call()
    seconds[name] = round(time.monotonic() - began, 2)
results, seconds = {}, {}
before = peak()
timed("all", lambda: netfilter.all_flows().live)
timed("waiting", lambda: netfilter.waiting_flows().waiting)
timed("one", lambda: netfilter.flows_of(["198.18.1.3"]).live)
timed("none", lambda: netfilter.flows_of(["198.18.9.9"]).live)
timed("delete", lambda: netfilter.delete_flows(["198.18.1.3", "198.18.1.4", "198.18.1.5"]))
timed("rest", lambda: netfilter.all_flows().live)
timed("delete many", lambda: netfilter.delete_flows([f"198.18.1.{n}" for n in range(2, 12)]))
timed("last", lambda: netfilter.all_flows().live)
print(json.dumps({"results": results, "seconds": seconds, "growth": peak() - before}))
"""


def backend(number: int) -> str:
    return f"198.18.1.{1 + number % BACKENDS}"


def entry(number: int) -> bytes:
    """An established connection of the first client; one in a thousand waits for its first reply."""
    client, port = FIRST_CLIENT, struct.pack("!H", 1024 + number)
    to = IPv4Address(backend(number)).packed
    service = struct.pack("!H", 8000)
    mark = REQUEST_MARK if number % 1000 == 0 else REQUEST_MARK | REPLY_MARK
    body = attribute(NESTED | flows.ORIGINAL, _tuple(client, VIP, port, service))
    body += attribute(NESTED | flows.REPLY, _tuple(to, client, service, port))
    body += attribute(flows.TIMEOUT, struct.pack("!I", 86400))
    body += attribute(NESTED | flows.PROTOINFO, attribute(NESTED | 1, attribute(1, bytes([flows.ESTABLISHED]))))
    body += attribute(flows.MARK, struct.pack("!I", mark))
    last = number % BATCH == BATCH - 1
    return flows.message(0, CREATE | (flows.ACK if last else 0), number, body)


def _tuple(source: bytes, target: bytes, source_port: bytes, target_port: bytes) -> bytes:
    ip = attribute(1, source) + attribute(2, target)
    protocol = attribute(1, bytes([flows.TCP])) + attribute(2, source_port) + attribute(3, target_port)
    return attribute(NESTED | 1, ip) + attribute(NESTED | 2, protocol)


def fill() -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as netlink:
        netlink.bind((0, 0))
        netlink.settimeout(30)
        for first in range(0, PORTS, BATCH):
            batch = b"".join(entry(number) for number in range(first, first + BATCH))
            assert batch.count(FIRST_CLIENT) == 2 * BATCH
            for client in range(FLOWS // PORTS):  # the others' flows have another address and are otherwise the same
                netlink.send(batch.replace(FIRST_CLIENT, IPv4Address(f"198.19.255.{client + 1}").packed))
                answer = netlink.recv(65536)
                assert struct.unpack_from("=i", answer, 16) == (0,), "the kernel refused an entry"


@pytest.fixture
def full_table() -> Iterator[Namespace]:
    """A namespace with a million flows. The limit, which all namespaces share, is raised for that time."""
    before = LIMIT.read_text()
    LIMIT.write_text(str(max(int(before), 2 * FLOWS)))
    namespace = Namespace()
    try:
        with namespace:
            fill()
        yield namespace
    finally:
        namespace.close()
        LIMIT.write_text(before)


@pytest.mark.paired  # raises a limit that all namespaces share, and needs much memory
def test_million_flows_are_counted_and_deleted_with_constant_memory(
    full_table: Namespace, figure: Callable[[str], None]
) -> None:
    with full_table:
        done = subprocess.run(
            [sys.executable, "-c", READER],
            env={"PYTHONPATH": str(BALANCER)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    results, seconds = report["results"], report["seconds"]
    each = FLOWS // BACKENDS
    all_backends = {backend(number): each for number in range(BACKENDS)}
    assert results["all"] == all_backends
    assert results["waiting"] == {backend(0): FLOWS // 1000}
    assert results["one"] == {"198.18.1.3": each}
    assert results["none"] == {}
    deleted = ("198.18.1.3", "198.18.1.4", "198.18.1.5")
    assert results["rest"] == {ip: each for ip in all_backends if ip not in deleted}
    assert results["last"] == {backend(0): each}
    assert report["growth"] < 100 * 2**20
    assert seconds["none"] < seconds["all"]
    figure(
        f"a million flows: all counted in {seconds['all']} s, those that wait in {seconds['waiting']} s, those of one "
        f"backend of ten in {seconds['one']} s, of a backend without any in {seconds['none']} s; the flows of three "
        f"deleted in {seconds['delete']} s, then of all others but one in {seconds['delete many']} s; "
        f"{report['growth'] / 2**20:.0f} MB more memory"
    )
