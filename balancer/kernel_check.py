"""Tries each flavour of iptables, legacy first, until one has all features. Prints what each of them lacks."""

from __future__ import annotations

import sys

from features import OPTIONAL, REQUIRED
from netfilter import Netfilter, NetfilterError


def check() -> bool:
    """Whether one flavour of iptables has all features."""
    try:
        Netfilter("legacy").make_sets()
    except NetfilterError:
        print("missing: ipset: packets and bytes are not counted")
    for flavour in ("legacy", "nft"):
        missing = Netfilter(flavour).missing((*REQUIRED, *OPTIONAL))
        for feature in missing:
            print(f"missing in iptables-{flavour}: {feature.name}: {feature.lost}")
        if not missing:
            print(f"iptables-{flavour} has all that is needed")
            return True
    return False


if __name__ == "__main__":
    sys.exit(not check())
