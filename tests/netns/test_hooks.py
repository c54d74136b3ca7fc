"""Our rules are first, the balancer's own connections are not tracked, and self-checks are not counted."""

from __future__ import annotations

import select
import socket
import time

import pytest

from features import OPTIONAL, REQUIRED
from netns.conftest import VIP, Balancer
from netns.lab import Lab, Namespace, Server, connect, request
from netns.test_failures import eventually

ONE, TWO = "198.18.1.1", "198.18.1.2"
CLIENT = "198.18.0.254"
RANGE = "net.ipv4.ip_local_port_range=60000 65535"


def tracked(balancer: Balancer, what: str) -> list[str]:
    lines = balancer.namespace.run("conntrack", "-L", "-p", "tcp").splitlines()
    return [line for line in lines if what in line]


@pytest.fixture
def served(lab: Lab, balancer: Balancer) -> Namespace:
    backends = lab.add(ONE)
    Server(backends)
    balancer.dispatch_over(ONE)
    return backends


# -- hooks -----------------------------------------------------------------------------------------------------------


def test_foreign_rule_before_ours_gets_no_traffic_after_the_next_pass(
    lab: Lab, served: Namespace, client: Namespace, balancer: Balancer
) -> None:
    Server(lab.add(TWO))
    foreign = f"-p tcp -m tcp --dport 8000 -j DNAT --to-destination {TWO}:8000"
    balancer.apply(f"*nat\n-I PREROUTING 1 {foreign}\nCOMMIT\n")
    assert request(client, VIP) == TWO
    balancer.dispatch_over(ONE)
    assert request(client, VIP) == ONE
    chains = balancer.listing("nat").chains
    assert chains["PREROUTING"][0].endswith("-j LB-DISPATCH")
    assert chains["PREROUTING"][1:] == (foreign,)


@pytest.mark.parametrize("deleted", [True, False])
def test_connection_that_a_foreign_rule_sent_nowhere_is_dispatched_once_its_flow_is_deleted(
    served: Namespace, client: Namespace, balancer: Balancer, deleted: bool
) -> None:
    foreign = "-p tcp -m tcp --dport 8000 -j DNAT --to-destination 198.18.1.77:9"  # nobody has that address
    balancer.apply(f"*nat\n-I PREROUTING 1 {foreign}\nCOMMIT\n")
    with client:
        connection = socket.socket()
    with connection:
        connection.setblocking(False)
        connection.connect_ex(VIP)
        time.sleep(0.3)
        balancer.dispatch_over(ONE)
        if deleted:
            balancer.delete_misdirected_flows([ONE])
        time.sleep(1.5)  # the client sends its SYN again after one second
        error = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        connected = not error and bool(select.select([], [connection], [], 0)[1])
    assert connected == deleted


def test_moved_and_duplicate_hooks_are_repaired_in_every_table(served: Namespace, balancer: Balancer) -> None:
    tables = ("nat", "filter", "raw")
    intact = {table: balancer.listing(table).chains for table in tables}
    for table, chain, hook in (
        ("nat", "POSTROUTING", "-j LB-MASQ"),
        ("filter", "FORWARD", "-j LB-FORWARD"),
        ("raw", "PREROUTING", "-j LB-OWN-IN"),
    ):
        balancer.apply(f"*{table}\n-I {chain} 1 -p udp -j ACCEPT\n-A {chain} {hook}\nCOMMIT\n")
    balancer.dispatch_over(ONE)
    for table in tables:
        chains = {
            chain: tuple(rule for rule in rules if rule != "-p udp -j ACCEPT")
            for chain, rules in balancer.listing(table).chains.items()
        }
        assert chains == intact[table]


def test_trying_features_leaves_no_rules(served: Namespace, balancer: Balancer) -> None:
    tables = ("nat", "filter", "raw")
    intact = {table: balancer.listing(table).chains for table in tables}
    assert balancer.missing((*REQUIRED, *OPTIONAL)) == ()
    assert {table: balancer.listing(table).chains for table in tables} == intact


# -- the balancer's own connections ----------------------------------------------------------------------------------


def test_only_connections_of_clients_are_tracked(served: Namespace, client: Namespace, balancer: Balancer) -> None:
    balancer.namespace.run("sysctl", "-qw", RANGE)
    Server(served, port=5000, talk=lambda connection: connection.recv(1))
    with connect(balancer.namespace, (ONE, 5000)) as probe:
        assert probe.makefile().readline() == f"{ONE}\n"
        assert tracked(balancer, "dport=5000") == []
        assert request(client, VIP) == ONE
        assert len(tracked(balancer, "dport=8000")) == 1


def test_request_to_the_balancer_itself_is_answered(served: Namespace, client: Namespace, balancer: Balancer) -> None:
    balancer.namespace.run("sysctl", "-qw", RANGE)
    client.run("sysctl", "-qw", RANGE)
    Server(balancer.namespace, port=5000)
    assert request(client, (VIP[0], 5000)) == VIP[0]
    assert request(balancer.namespace, ("127.0.0.1", 5000)) == "127.0.0.1"


def test_clients_with_high_ports_are_masqueraded_to_low_ports(
    served: Namespace, client: Namespace, balancer: Balancer
) -> None:
    balancer.namespace.run("sysctl", "-qw", RANGE)
    client.run("sysctl", "-qw", RANGE)
    assert [request(client, VIP) for _ in range(200)] == [ONE] * 200
    lines = tracked(balancer, "dport=8000")
    ports = [int(line.rpartition("dport=")[2].split()[0]) for line in lines]
    assert len(ports) >= 200
    assert all(1024 <= port <= 59999 for port in ports)


def test_dockers_dns_is_translated_from_any_port(served: Namespace, balancer: Balancer) -> None:
    """An imitation of Docker's rules for DNS over TCP: they need connection tracking."""
    balancer.namespace.run("sysctl", "-qw", RANGE)
    rule = "-d 127.0.0.11/32 -p tcp -m tcp --dport 53 -j DNAT --to-destination 127.0.0.11:39999"
    balancer.apply(f"*nat\n-A OUTPUT {rule}\nCOMMIT\n")
    Server(balancer.namespace, "127.0.0.11", 39999)
    assert request(balancer.namespace, ("127.0.0.11", 53)) == "127.0.0.11"


# -- self-checks -----------------------------------------------------------------------------------------------------


def check(client: Namespace, port: int) -> str:
    with client, socket.create_connection(VIP, 5, source_address=(CLIENT, port)) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        return connection.makefile().readline().strip()


def test_self_checks_are_served_and_not_counted(lab: Lab, client: Namespace, balancer: Balancer) -> None:
    Server(lab.add(ONE), talk=lambda connection: connection.recv(100))
    balancer.dispatch_over(ONE, check_source=CLIENT)
    balancer.namespace.run("sysctl", "-qw", RANGE)
    assert [check(client, port) for port in (61000, 61030, 61063)] == [ONE] * 3
    assert balancer.connections() == {ONE: 0}
    assert balancer.traffic() == {ONE: (0, 0)}
    assert balancer.first_replies() == {ONE: 0}
    assert len(tracked(balancer, "dport=8000")) == 3
    assert check(client, 61064) == ONE
    eventually(lambda: _equal(balancer.connections(), {ONE: 1}))
    assert balancer.traffic()[ONE][0] > 0
    assert balancer.first_replies() == {ONE: 1}


def test_self_checks_reach_all_of_a_few_backends(lab: Lab, client: Namespace, balancer: Balancer) -> None:
    backends = [f"198.18.1.{number}" for number in range(1, 4)]
    Server(lab.add(*backends), talk=lambda connection: connection.recv(100))
    balancer.dispatch_over(*backends, check_source=CLIENT)
    assert {check(client, port) for port in range(61000, 61060)} == set(backends)


def _equal(seen: object, expected: object) -> None:
    assert seen == expected
