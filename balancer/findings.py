"""Finds faults of the data path that are not in the balancer's own rules. Pure: listings in, findings out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from listings import Listing
from restore import is_dockers, is_ours, target_of

MAX_FINDINGS, MAX_DETAIL = 20, 300
# The built-in chains that the service's packets pass, by table.
PASSED = {
    "raw": ("PREROUTING",),
    "nat": ("PREROUTING",),
    "filter": ("FORWARD",),
}
# Targets that drop, redirect or untrack a packet.
HARMFUL = frozenset({"DROP", "REJECT", "DNAT", "REDIRECT", "TPROXY", "NETMAP", "CT", "NOTRACK", "QUEUE", "NFQUEUE"})
# A rule for one of these cannot match the service's packets, which are TCP.
OTHER_PROTOCOL = re.compile(r"(^| )-p (udp|icmp|sctp|esp|igmp)\b")


class Kind(Enum):
    IP_FORWARD_OFF = "ip_forward_off"
    FORWARD_POLICY_DROP = "forward_policy_drop"
    FOREIGN_RULE = "foreign_rule"


@dataclass(frozen=True)
class Finding:
    kind: Kind
    detail: str  # a text for operators

    def message(self) -> dict[str, str]:
        # The manager refuses a report with a longer text or other characters, and a rule may have a comment with both.
        return {"kind": self.kind.value, "detail": re.sub("[^ -~]", "?", self.detail)[:MAX_DETAIL]}


def find(ip_forward: bool, listings: Mapping[str, Listing]) -> list[Finding]:
    """At most MAX_FINDINGS. `listings` is by table; a table that this kernel lacks has no entry."""
    found = []
    if not ip_forward:
        found.append(Finding(Kind.IP_FORWARD_OFF, "net.ipv4.ip_forward is 0"))
    forward_policy = listings.get("filter", Listing()).policies.get("FORWARD")
    if forward_policy == "DROP":
        found.append(Finding(Kind.FORWARD_POLICY_DROP, "filter FORWARD has the policy DROP"))
    # Foreign rules on the path of the service's packets.
    for table, chains in PASSED.items():
        for chain in chains:
            for rule in _foreign_rules(chain, listings.get(table, Listing()), {chain}):
                found.append(Finding(Kind.FOREIGN_RULE, f"{table}: {rule}"))
    return found[:MAX_FINDINGS]


def _foreign_rules(chain: str, listing: Listing, visited: set[str]) -> Iterator[str]:
    """The rules in `chain`, and in the chains it leads to, that can drop or redirect the service's packets."""
    for rule in listing.chains.get(chain, ()):
        if is_ours(rule, "LB-") or is_dockers(rule) or OTHER_PROTOCOL.search(rule):
            continue
        target = target_of(rule)
        if target in HARMFUL:
            yield f"-A {chain} {rule}"
        # A chain can be reached by several rules; one visit is enough.
        elif target in listing.chains and target not in visited:
            visited.add(target)
            yield from _foreign_rules(target, listing, visited)
