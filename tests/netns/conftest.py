from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

import listings
import netfilter
import restore
import ruleset
from datapath import OWN_NAMESPACE, DataPath
from netns.lab import Lab, Namespace
from ruleset import Endpoint

MISSING = [tool for tool in ("ip", "iptables-nft-restore", "ipset", "conntrack", "sysctl") if not shutil.which(tool)]
VIP = ("198.18.0.1", 8000)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    why = "needs root" if os.geteuid() else f"needs {', '.join(MISSING)}" if MISSING else ""
    for item in items:
        if why and "netns" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason=why))


class Balancer:
    """The balancer's rules and Netfilter in a namespace of the lab, without the client's loops. Its other methods are
    those of Netfilter."""

    def __init__(self, namespace: Namespace, flavour: str, path: DataPath = OWN_NAMESPACE) -> None:
        self.namespace, self.netfilter, self.path = namespace, netfilter.Netfilter(flavour, path), path
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

        def in_namespace(*arguments: object) -> object:
            with self.namespace:
                return method(*arguments)

        return in_namespace

    def dispatch_over(
        self,
        *ips: str,
        weights: dict[str, float] | None = None,
        draining: tuple[str, ...] = (),
        check_source: str = "",
    ) -> None:
        """Writes all tables and sets, as one pass of the client does."""
        endpoints = [Endpoint(ip, (weights or {}).get(ip, 1.0)) for ip in ips]
        others = [Endpoint(ip) for ip in draining]
        self.make_sets()
        for name in self.path.backend_sets:
            present = self.members(name)
            self.change_sets(restore.set_changes({*present, *ips}, present, name))
        self.make_client_sets(ips)
        if self.path.on_host:
            self.enable_hairpin()
        for table in ruleset.tables(endpoints, others, self.path, check_source):
            self.apply(restore.restore(table, self.listing(table.name)))

    def connections(self) -> dict[str, int]:
        return listings.connections(self.listing("nat"), self.path.backend_chain(""))

    def traffic(self) -> dict[str, tuple[int, int]]:
        return self.members(self.path.traffic_set)

    def first_replies(self) -> dict[str, int]:
        return {ip: packets for ip, (packets, _) in self.members(self.path.replies_set).items()}

    def live(self) -> dict[str, int]:
        return self.all_flows().live


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
