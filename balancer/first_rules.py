"""Prints the first rules of one table, `nat` or `raw`, as `iptables-restore` text: equal shares for the addresses in
ip.txt. In a Swarm there is no ip.txt: the first snapshot brings the addresses."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import ruleset
from listings import Listing
from ruleset import Endpoint, Table


def first_table(name: str) -> Table:
    if name == "raw":
        return ruleset.raw()
    addresses = Path(__file__).with_name("ip.txt")
    ips = addresses.read_text().split() if addresses.exists() else []
    port = int(os.environ.get("LB_BACKEND_PORT", "8000"))
    return ruleset.nat([Endpoint(ip, port) for ip in ips], backend_subnet=os.environ.get("LB_BACKEND_SUBNET", ""))


if __name__ == "__main__":
    sys.stdout.write(ruleset.restore(first_table(sys.argv[1]), Listing()))
