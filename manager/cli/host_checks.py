"""What run.sh has to know of this host before it starts anything. Standard library alone.

`preflight.py ports ADDRESS:PORT:FLAG …`: exit 1 and one line for each that is taken: by whom, and the flag to move it.
`preflight.py subnet TAKEN …`: prints a network that overlaps none of TAKEN and no route of this host.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import re
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Network
from pathlib import Path

# Private ranges, then the one kept for benchmarks (RFC 2544), each cut into /20s: room for 4,000 backends.
POOLS = ("172.16.0.0/12", "10.192.0.0/10", "192.168.0.0/16", "198.18.0.0/15")
PREFIX = 20


def free_subnet(taken: Iterable[IPv4Network]) -> IPv4Network | None:
    """The first network of the pools that overlaps none of `taken`."""
    taken = list(taken)
    candidates = (net for pool in POOLS for net in IPv4Network(pool).subnets(new_prefix=PREFIX))
    return next((net for net in candidates if not any(net.overlaps(other) for other in taken)), None)


def routes(table: str) -> Iterator[IPv4Network]:
    """The destinations in the output of `ip -4 route show table all`, but for defaults (a VPN may have two halves)."""
    for word in re.findall(r"^(?:\w+ )?(\d+\.\d+\.\d+\.\d+(?:/\d+)?) ", table, re.MULTILINE):
        network = IPv4Network(word, strict=False)
        if network.prefixlen > 1:
            yield network


def host_routes() -> list[IPv4Network]:
    """Every table's routes where `ip` is there to list them, else the main table's from /proc."""
    try:
        done = subprocess.run(["ip", "-4", "route", "show", "table", "all"], capture_output=True, text=True, check=True)
        return list(routes(done.stdout))
    except (OSError, subprocess.CalledProcessError):
        rows = [line.split() for line in Path("/proc/net/route").read_text().splitlines()[1:]]
        pairs = [(bytes.fromhex(row[1])[::-1], bytes.fromhex(row[7])[::-1]) for row in rows]
        networks = [IPv4Network((address, bin(int.from_bytes(mask, "big")).count("1"))) for address, mask in pairs]
        return [network for network in networks if network.prefixlen > 1]


def is_taken(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
        return False


def owner(port: int) -> str:
    """Who listens on the port, as `name (pid 1)`; needs root to see other users' processes."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:] if Path(table).exists() else []:
            row = line.split()
            if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{row[9]}]")
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # processes end, and others' may not be looked at
            if any(str(link.readlink()) in inodes for link in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text().strip()} (pid {process.name})"
    return "a process this user may not see"


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["ports"]:
        wanted = [argument.split(":") for argument in arguments[1:]]
        taken = [(port, flag) for address, port, flag in wanted if is_taken(address, int(port))]
        for port, flag in taken:
            advice = f"end that, or choose another with {flag} PORT"
            print(f"port {port} is taken by {owner(int(port))}; {advice}", file=sys.stderr)
        return 1 if taken else 0
    if arguments[:1] == ["subnet"]:
        subnet = free_subnet([*host_routes(), *(ipaddress.IPv4Network(net, strict=False) for net in arguments[1:])])
        if subnet is None:
            print("no free network is left; name one with --subnet", file=sys.stderr)
            return 1
        print(subnet)
        return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
