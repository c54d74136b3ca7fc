"""Fills the connection table of its network namespace with connections that nobody has. They expire by themselves.

python3 connections.py PART SECONDS      up to PART of the limit
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

NETLINK_NETFILTER, NESTED = 12, 0x8000
NEW, REQUEST, ACK, CREATE = 1 << 8, 1, 4, 0x400  # a new entry of the connection table, and flags of a message
ESTABLISHED = 3
FIRST_CLIENT, SERVER, PORT = IPv4Address("198.19.255.1"), IPv4Address("198.19.254.1"), 9
PORTS, BATCH = 50_000, 100  # connections of a client; entries in a message to the kernel
NETFILTER = Path("/proc/sys/net/netfilter")


def attribute(kind: int, content: bytes) -> bytes:
    padding = b"\0" * (-len(content) % 4)
    return struct.pack("=HH", 4 + len(content), kind) + content + padding


def nested(kind: int, *parts: bytes) -> bytes:
    return attribute(NESTED | kind, b"".join(parts))


def flow(source: IPv4Address, source_port: int, target: IPv4Address, target_port: int) -> bytes:
    addresses = nested(1, attribute(1, source.packed), attribute(2, target.packed))
    ports = (attribute(2, struct.pack("!H", source_port)), attribute(3, struct.pack("!H", target_port)))
    return addresses + nested(2, attribute(1, bytes([socket.IPPROTO_TCP])), *ports)


def entry(number: int, seconds: int, acknowledged: bool) -> bytes:
    """The message that adds one established connection."""
    client, port = FIRST_CLIENT + number // PORTS, 1024 + number % PORTS
    body = struct.pack("!BBH", socket.AF_INET, 0, 0)
    body += nested(1, flow(client, port, SERVER, PORT)) + nested(2, flow(SERVER, PORT, client, port))
    body += attribute(7, struct.pack("!I", seconds))
    body += nested(4, nested(1, attribute(1, bytes([ESTABLISHED]))))
    flags = REQUEST | CREATE | (ACK if acknowledged else 0)
    return struct.pack("=IHHII", 16 + len(body), NEW, flags, number, 0) + body


def batches(count: int, seconds: int) -> Iterator[bytes]:
    for first in range(0, count, BATCH):
        last = min(first + BATCH, count) - 1
        yield b"".join(entry(number, seconds, number == last) for number in range(first, last + 1))


def fill(part: float, seconds: int) -> None:
    limit = int((NETFILTER / "nf_conntrack_max").read_text())
    present = int((NETFILTER / "nf_conntrack_count").read_text())
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as netlink:
        netlink.bind((0, 0))
        netlink.settimeout(30)
        for batch in batches(max(0, int(limit * part) - present), seconds):
            netlink.send(batch)
            (error,) = struct.unpack_from("=i", netlink.recv(65536), 16)
            if error:
                sys.exit(f"the kernel refused an entry: error {-error}")


if __name__ == "__main__":
    fill(float(sys.argv[1]), int(sys.argv[2]))
