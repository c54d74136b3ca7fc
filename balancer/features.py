"""The kernel features that the rules need, and what is lost without each. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Feature:
    name: str
    table: str
    rule: str  # a rule that only a kernel with this feature accepts
    lost: str  # what does not work without it


MARKS = Feature(
    "connmark",
    "filter",
    "-m connmark --mark 0x0/0x40000000 -j CONNMARK --set-xmark 0x40000000/0x40000000",
    "weights stay equal, and only probes find a frozen backend",
)
RETRIES = Feature(
    "connbytes",
    "filter",
    "-p tcp -m connbytes --connbytes 0:1 --connbytes-mode packets --connbytes-dir reply -j DROP",
    "clients receive a backend's refusal",
)
NOTRACK = Feature("CT target", "raw", "-p tcp -j CT --notrack", "probes and reports need room in the connection table")
OPTIONAL = (MARKS, RETRIES, NOTRACK)
ON_HOST = (MARKS, RETRIES)  # what the rules in the host's namespace use of these

_LOST_REPLIES = "replies do not reach the client"
_MATCH = "-p tcp -m conntrack --ctstate DNAT --ctorigdstport 8000"
_MASQUERADE = "-p tcp -j MASQUERADE --to-ports 1024-59999 --random-fully"
REQUIRED = (
    Feature("statistic", "nat", "-m statistic --mode random --probability 0.5", "nothing is balanced"),
    Feature("addrtype", "nat", "-m addrtype --dst-type LOCAL", "other traffic is taken for the service's"),
    Feature("conntrack", "nat", _MATCH, _LOST_REPLIES),
    Feature("DNAT", "nat", "-p tcp -j DNAT --to-destination 127.0.0.1:8000", "no connection reaches a backend"),
    Feature("MASQUERADE", "nat", _MASQUERADE, _LOST_REPLIES),
    Feature("set", "filter", "-m set --match-set LB-BACKENDS dst", "packets and bytes are not counted"),
)
