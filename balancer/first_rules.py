"""Prints the first rules of one table, `nat` or `raw`, as `iptables-restore` text: equal shares for the addresses in
ip.txt. In a Swarm there is no ip.txt: the first snapshot brings the addresses."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import ruleset
from datapath import from_environment
from listings import Listing
from restore import Table, restore
from ruleset import Endpoint


def first_table(name: str) -> Table:
    if name == "raw":
        return ruleset.raw()
    addresses = Path(__file__).with_name("ip.txt")
    ips = addresses.read_text().split() if addresses.exists() else []
    # The sets of sticky clients do not exist yet.
    path = replace(from_environment(os.environ), sticky=0)
    return ruleset.nat([Endpoint(ip) for ip in ips], path=path)


if __name__ == "__main__":
    sys.stdout.write(restore(first_table(sys.argv[1]), Listing()))
