"""Subnets, routes and ports of this host, for cli.doctor and cli.network. Uses the standard library only."""

from __future__ import annotations

import contextlib
import errno
import re
import socket
import subprocess
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Network
from pathlib import Path
from typing import NamedTuple

# Private ranges, then the one for benchmarks (RFC 2544), each cut into /20s: room for 4,000 backends.
POOLS = ("172.16.0.0/12", "10.192.0.0/10", "192.168.0.0/16", "198.18.0.0/15")
PREFIX = 20
LISTENING = "0A"  # TCP_LISTEN in /proc/net/tcp


class NoFreeSubnet(Exception):
    """Every subnet of the pools overlaps a route of this host or a network of the engine."""


def free_subnet(taken: Iterable[IPv4Network]) -> IPv4Network:
    """The first network of the pools that overlaps none of `taken`. Raises NoFreeSubnet."""
    taken = list(taken)
    for pool in POOLS:
        for candidate in IPv4Network(pool).subnets(new_prefix=PREFIX):
            if not any(candidate.overlaps(other) for other in taken):
                return candidate
    raise NoFreeSubnet("no free network is left; choose one with --subnet")


def routes(table: str) -> Iterator[IPv4Network]:
    """The destinations in the output of `ip -4 route show table all`, without default routes, also those that a VPN
    splits into 0.0.0.0/1 and 128.0.0.0/1."""
    for word in re.findall(r"^(?:\w+ )?(\d+\.\d+\.\d+\.\d+(?:/\d+)?) ", table, re.MULTILINE):
        network = IPv4Network(word, strict=False)
        if network.prefixlen > 1:
            yield network


def host_routes() -> list[IPv4Network]:
    """The routes of all tables if `ip` is installed, else those of the main table, from /proc."""
    try:
        done = subprocess.run(["ip", "-4", "route", "show", "table", "all"], capture_output=True, text=True, check=True)
        return list(routes(done.stdout))
    except (OSError, subprocess.CalledProcessError):
        return list(_kernel_routes(Path("/proc/net/route").read_text()))


def _kernel_routes(table: str) -> Iterator[IPv4Network]:
    """The destinations in /proc/net/route, whose addresses are hexadecimal in the host's byte order."""
    for line in table.splitlines()[1:]:
        row = line.split()
        address, mask = (bytes.fromhex(row[column])[::-1] for column in (1, 7))
        network = IPv4Network((address, int.from_bytes(mask, "big").bit_count()))
        if network.prefixlen > 1:
            yield network


def is_taken(address: str, port: int) -> bool:
    # Other errors, such as a missing permission, do not mean that the port is taken.
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
        return False


class Owner(NamedTuple):
    """The process that listens on a port; `pid` is 0 if this user may not read it."""

    pid: int
    name: str

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid})" if self.pid else self.name


def owner(address: str, port: int) -> Owner:
    """The process that listens on this port at this address or, if that is 0.0.0.0, at any."""
    # /proc/net/tcp names sockets by inode, and each process has links to its sockets.
    sockets = _listening_sockets(address, port)
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            for link in (process / "fd").iterdir():
                if str(link.readlink()) in sockets:
                    return Owner(int(process.name), (process / "comm").read_text().strip())
    return Owner(0, "a process that this user may not inspect")


def is_listening(address: str, port: int) -> bool:
    return bool(_listening_sockets(address, port))


def _listening_sockets(address: str, port: int) -> set[str]:
    """The sockets that listen on the port, named as in /proc/PID/fd: socket:[INODE]."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:] if Path(table).exists() else ():
            _, local, _, state, *_ = row = line.split()
            host, _, number = local.partition(":")
            # IPv4 addresses are hexadecimal in the host's byte order. One of IPv6 is usually a wildcard.
            at = "0.0.0.0" if len(host) > 8 else socket.inet_ntoa(bytes.fromhex(host)[::-1])
            matches = at == address or "0.0.0.0" in (at, address)
            if state == LISTENING and int(number, 16) == port and matches:
                found.add(f"socket:[{row[9]}]")
    return found
