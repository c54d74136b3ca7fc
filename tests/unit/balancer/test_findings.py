"""Which foreign rules and settings are faults of the data path, and which are not."""

from __future__ import annotations

import pytest

import restore
import ruleset
from fakes_netfilter import FakeNetfilter
from findings import MAX_FINDINGS, Finding, Kind, find
from listings import Listing, parse_table


def found(kernel: FakeNetfilter, ip_forward: bool = True) -> list[Finding]:
    names = ("nat", "filter", "raw")
    return find(ip_forward, {name: parse_table(kernel.table(name)) for name in names})


@pytest.fixture
def kernel() -> FakeNetfilter:
    """A kernel with our rules and Docker's."""
    made = FakeNetfilter()
    made.make_sets()
    for table in ruleset.tables([ruleset.Endpoint("198.18.0.2")], check_source="198.18.0.1"):
        made.apply(restore.restore(table, parse_table(made.table(table.name))))
    return made


def test_our_rules_and_dockers_rules_are_no_findings(kernel: FakeNetfilter) -> None:
    assert found(kernel) == []


def test_disabled_forwarding_is_found(kernel: FakeNetfilter) -> None:
    assert found(kernel, ip_forward=False) == [Finding(Kind.IP_FORWARD_OFF, "net.ipv4.ip_forward is 0")]


def test_forward_policy_drop_is_found() -> None:
    listings = {
        "filter": parse_table("*filter\n:INPUT DROP [0:0]\n:FORWARD DROP [9:540]\n:LB-FORWARD - [0:0]\nCOMMIT\n")
    }
    assert [finding.kind for finding in find(True, listings)] == [Kind.FORWARD_POLICY_DROP]


@pytest.mark.parametrize(
    ("table", "chain", "rule", "is_finding"),
    [
        ("filter", "FORWARD", "-j DROP", True),
        ("filter", "FORWARD", "-s 203.0.113.0/24 -p tcp -m tcp -j REJECT --reject-with tcp-reset", True),
        ("filter", "FORWARD", "-p udp -j DROP", False),
        ("filter", "FORWARD", "-i eth0 -p udp -m udp -j DROP", False),
        ("filter", "FORWARD", "-j ACCEPT", False),
        ("filter", "FORWARD", '-m comment --comment "count" ', False),
        ("filter", "INPUT", "-j DROP", False),
        ("nat", "PREROUTING", "-p tcp -m tcp --dport 8000 -j REDIRECT --to-ports 80", True),
        ("nat", "POSTROUTING", "-j MASQUERADE", False),
        ("filter", "FORWARD", "-p tcp -j TCPMSS --clamp-mss-to-pmtu", False),
        ("raw", "PREROUTING", "-p tcp -j CT --notrack", True),
        ("nat", "PREROUTING", "-d 127.0.0.11/32 -j DOCKER_OUTPUT", False),
    ],
)
def test_foreign_rules_that_can_drop_or_redirect_packets_of_the_service_are_found(
    kernel: FakeNetfilter, table: str, chain: str, rule: str, is_finding: bool
) -> None:
    kernel.tables[table][chain].append((0, rule))
    expected = [Finding(Kind.FOREIGN_RULE, f"{table}: -A {chain} {rule}")] if is_finding else []
    assert found(kernel) == expected


def test_loops_of_foreign_chains_are_followed_once(kernel: FakeNetfilter) -> None:
    kernel.tables["filter"]["FORWARD"] += [(0, "-j X"), (0, "-j X")]
    kernel.tables["filter"]["X"] = [(0, "-j Y")]
    kernel.tables["filter"]["Y"] = [(0, "-j X"), (0, "-j DROP")]
    assert [finding.detail for finding in found(kernel)] == ["filter: -A Y -j DROP"]


def test_number_of_findings_is_limited(kernel: FakeNetfilter) -> None:
    kernel.tables["filter"]["FORWARD"] += [(0, f"-s 203.0.113.{n}/32 -j DROP") for n in range(100)]
    assert len(found(kernel, ip_forward=False)) == MAX_FINDINGS


def test_missing_table_has_no_findings() -> None:
    assert find(True, {"nat": Listing()}) == []


def test_message_of_a_finding_has_kind_and_detail() -> None:
    assert Finding(Kind.FOREIGN_RULE, "text").message() == {"kind": "foreign_rule", "detail": "text"}
