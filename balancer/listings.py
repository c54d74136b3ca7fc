"""Parses the output of `iptables-save` and `ipset save`. Pure. Lines that have another form are skipped."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

COUNTER = "([0-9]{1,20})"  # the kernel's counters have 64 bits
RULE = re.compile(rf"\[{COUNTER}:[0-9]+\] -A (\S+) ?(.*)")


@dataclass(frozen=True)
class Listing:
    """One table, by chain: the rules, the packets that its DNAT rules counted, and the built-in chains' policies. And
    the packets that its DROP rules counted, by their text."""

    chains: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    packets: Mapping[str, int] = field(default_factory=dict)
    policies: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)


def parse_table(text: str) -> Listing:
    """Parses `iptables-save -c -t TABLE`."""
    chains: dict[str, list[str]] = {}
    packets: dict[str, int] = {}
    policies: dict[str, str] = {}
    dropped: dict[str, int] = {}
    for line in text.splitlines():
        if line.startswith(":"):  # a chain, and its policy if it is built in
            chain, _, counted = line[1:].partition(" ")
            policy = counted.partition(" ")[0]
            chains.setdefault(chain, [])
            if policy not in ("", "-"):
                policies[chain] = policy
        # A rule, with its packet and byte counters.
        elif match := RULE.match(line):
            counted, chain, rule = match.groups()
            chains.setdefault(chain, []).append(rule)
            if "-j DNAT" in rule:
                packets[chain] = packets.get(chain, 0) + int(counted)
            elif rule.endswith("-j DROP"):
                dropped[rule] = dropped.get(rule, 0) + int(counted)
    return Listing({chain: tuple(rules) for chain, rules in chains.items()}, packets, policies, dropped)


def connections(listing: Listing, prefix: str = "LB-B-") -> dict[str, int]:
    """New connections to each backend since its chain was written, by address. `prefix`: of the backends' chains."""
    counted = {}
    for chain in listing.chains:
        if chain.startswith(prefix):
            counted[chain.removeprefix(prefix)] = listing.packets.get(chain, 0)
    return counted


def parse_set(text: str, name: str) -> dict[str, tuple[int, int]]:
    """Parses `ipset save`: (packets, bytes) of each member of the set `name`, by address."""
    members = re.finditer(rf"^add {name} (\S+) packets {COUNTER} bytes {COUNTER}\b", text, re.MULTILINE)
    return {match[1]: (int(match[2]), int(match[3])) for match in members}
