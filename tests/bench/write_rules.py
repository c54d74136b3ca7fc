"""Runs in a container of the balancer's image: writes the product's own rules for a list of backends, or removes them.

Standard input is JSON: `path`, the fields of a DataPath; `ips`; `known`, how many clients each sticky set gets before.
With `ips` null, everything with the path's prefix is removed.
"""

import json
import subprocess
import sys

import restore
import ruleset
import shutdown
from datapath import DataPath
from netfilter import Netfilter


def flavour(path: DataPath) -> str:
    """As script.sh chooses it: on the host that of Docker's rules, in a namespace of its own legacy if possible."""
    if path.on_host:
        return "nft" if "\n:DOCKER " in _run("iptables-nft-save", "-t", "nat").stdout else "legacy"
    return "nft" if _run("iptables-legacy", "-t", "nat", "-S").returncode else "legacy"


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def write(kernel: Netfilter, ips: list[str], known: int) -> None:
    endpoints = [ruleset.Endpoint(ip) for ip in ips]
    kernel.make_sets()
    for name in kernel.path.backend_sets:
        kernel.change_sets(restore.set_changes(ips, kernel.members(name), name))
    kernel.make_client_sets(ips)
    if known:
        kernel.change_sets("".join(known_clients(kernel.path, ips, known)))
    for table in ruleset.tables(endpoints, path=kernel.path):
        kernel.apply(restore.restore(table, kernel.listing(table.name)))


def known_clients(path: DataPath, ips: list[str], known: int) -> list[str]:
    """`ipset restore` lines that put `known` clients into the sets, the same number for each backend. All lines of a
    set follow each other: ipset sends its buffer to the kernel when the set changes."""
    clients = [f"198.{18 + (number >> 16)}.{number >> 8 & 255}.{number & 255}" for number in range(known)]
    lines = [f"add {path.clients_set} {client}\n" for client in clients]
    for number, ip in enumerate(ips):
        lines += [f"add {path.sticky_set(ip)} {client}\n" for client in clients[number :: len(ips)]]
    return lines


def main() -> None:
    order = json.load(sys.stdin)
    fields = order["path"]
    fields["ports"] = tuple(tuple(pair) for pair in fields["ports"])
    path = DataPath(**fields)
    kernel = Netfilter(flavour(path), path)
    if order["ips"] is None:
        shutdown.remove(kernel)
    else:
        write(kernel, order["ips"], order.get("known", 0))


main()
