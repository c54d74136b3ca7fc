from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

import netfilter
import ruleset
from netns.lab import Lab, Namespace
from ruleset import Endpoint, Listing

MISSING = [tool for tool in ("ip", "iptables-nft-restore", "ipset", "conntrack", "sysctl") if not shutil.which(tool)]
VIP = ("198.18.0.1", 8000)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    why = "needs root" if os.geteuid() else f"needs {', '.join(MISSING)}" if MISSING else ""
    for item in items:
        if why and "netns" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason=why))


class Balancer:
    """The product's rules and tools, in a namespace of the lab, without the client's loop around them."""

    def __init__(self, namespace: Namespace, flavour: str) -> None:
        self.namespace, self.netfilter = namespace, netfilter.Netfilter(flavour)
        for setting in (
            "ip_forward=1",
            "netfilter.nf_conntrack_acct=1",
            "netfilter.nf_conntrack_tcp_loose=0",
            "netfilter.nf_conntrack_tcp_be_liberal=1",
        ):
            prefix = "net." if setting.startswith("netfilter") else "net.ipv4."
            namespace.run("sysctl", "-qw", prefix + setting)

    def __getattr__(self, name: str) -> object:
        method = getattr(self.netfilter, name)

        def inside(*arguments: object) -> object:
            with self.namespace:
                return method(*arguments)

        return inside

    def deal_over(self, *ips: str, weights: dict[str, float] | None = None, draining: tuple[str, ...] = ()) -> None:
        """All tables and the set, as one pass of the client would leave them."""
        endpoints = [Endpoint(ip, 8000, (weights or {}).get(ip, 1.0)) for ip in ips]
        leaving = [Endpoint(ip, 8000) for ip in draining]
        present = ruleset.parse_set(self.members())
        self.change_members(ruleset.set_changes({*present, *ips}, present))
        for table in (ruleset.nat(endpoints, leaving), ruleset.filters(endpoints), ruleset.mangle()):
            self.apply(ruleset.restore(table, ruleset.parse_table(self.table(table.name))))

    def connections(self) -> dict[str, int]:
        return ruleset.connections(ruleset.parse_table(self.table("nat")))

    def traffic(self) -> dict[str, tuple[int, int]]:
        return ruleset.parse_set(self.members())

    def live(self) -> dict[str, int]:
        return ruleset.parse_flows(self.flows()).live

    def listing(self, table: str) -> Listing:
        return ruleset.parse_table(self.table(table))


@pytest.fixture
def lab() -> Iterator[Lab]:
    made = Lab()
    yield made
    made.close()


@pytest.fixture
def client(lab: Lab) -> Namespace:
    return lab.add("198.18.0.254")


@pytest.fixture(params=["nft", "legacy"])
def balancer(lab: Lab, request: pytest.FixtureRequest) -> Balancer:
    return Balancer(lab.add(VIP[0]), request.param)
