"""The rules in the host's namespace: clients outside, on the host and among the backends, beside Docker's rules."""

from __future__ import annotations

import contextlib
import errno
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import shutdown
from datapath import DataPath
from host_network import PortHolder, route_loopback
from netns.conftest import Balancer
from netns.lab import Lab, Namespace, Server, connect, request, requests
from netns.test_failures import answers_despite_lost_hosts, eventually

HOST, OUTSIDE = "198.18.0.1", "198.18.0.254"
GATEWAY, ONE, TWO, THREE = "198.19.0.1", "198.19.1.1", "198.19.1.2", "198.19.1.3"
PATH = DataPath(prefix="LB-0a1b2c-", bridge="br0", subnet="198.19.0.0/16")
SERVICE = HOST, 8000
# Docker's rules for a network without published ports, as Docker 20.10 and 26.1 write them.
DOCKER = """
*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 198.19.0.0/16 ! -o br0 -j MASQUERADE
COMMIT
*filter
:FORWARD DROP [0:0]
:DOCKER - [0:0]
:DOCKER-USER - [0:0]
-A DOCKER-USER -j RETURN
-A FORWARD -j DOCKER-USER
-A FORWARD -o br0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o br0 -j DOCKER
-A FORWARD -i br0 ! -o br0 -j ACCEPT
-A FORWARD -i br0 -o br0 -j ACCEPT
COMMIT
"""


class Host(Balancer):
    """A host with Docker's rules and a bridge with backends."""

    def __init__(self, lab: Lab, flavour: str, path: DataPath = PATH) -> None:
        super().__init__(lab.add(HOST), flavour, path)
        self.flavour = flavour
        # As on a host: the balancer changes none of these.
        self.namespace.run("sysctl", "-qw", "net.netfilter.nf_conntrack_tcp_loose=1")
        self.namespace.run("sysctl", "-qw", "net.netfilter.nf_conntrack_tcp_be_liberal=0")
        self.backends = Lab(self.namespace)
        self.namespace.run("ip", "addr", "add", f"{GATEWAY}/16", "dev", "br0")
        self.apply(DOCKER)
        with self.namespace:
            route_loopback("br0")

    def launch(self, ip: str) -> Namespace:
        backend = self.backends.add(ip)
        backend.run("ip", "route", "add", "default", "via", GATEWAY)
        return backend

    def rules(self) -> str:
        """All rules and sets, without counters."""
        saved = self.namespace.run(self.netfilter._save)
        lines = [line.partition(" [")[0] for line in saved.splitlines() if not line.startswith("#")]
        sets = self.namespace.run("ipset", "list")
        return "\n".join(lines) + re.sub(r"packets \d+ bytes \d+", "", sets)

    def close(self) -> None:
        for member in self.backends.members:
            member.close()


@pytest.fixture(params=["nft", "legacy"])
def host(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Host]:
    made = Host(lab, request.param)
    yield made
    made.close()


@pytest.fixture
def outside(lab: Lab) -> Namespace:
    return lab.add(OUTSIDE)


def echo(connection: socket.socket) -> None:
    while data := connection.recv(65536):
        connection.sendall(data)


def name_peer(connection: socket.socket) -> None:
    connection.sendall(connection.getpeername()[0].encode() + b"\n")


def peer(client: Namespace, address: tuple[str, int]) -> str:
    """The client's address as its backend sees it."""
    with connect(client, address) as connection:
        return connection.makefile().readline().strip()


def test_all_clients_are_served_and_outside_clients_keep_their_address(host: Host, outside: Namespace) -> None:
    backends = [host.launch(ip) for ip in (ONE, TWO)]
    for backend in backends:
        Server(backend, talk=name_peer, greet=False)
    host.dispatch_over(ONE, TWO)
    assert {peer(outside, SERVICE) for _ in range(20)} == {OUTSIDE}
    assert {peer(host.namespace, ("127.0.0.1", 8000)) for _ in range(20)} == {GATEWAY}
    assert {peer(host.namespace, SERVICE) for _ in range(20)} == {HOST}
    # A backend's own calls of the service, some of which come back to itself.
    assert {peer(backends[0], (GATEWAY, 8000)) for _ in range(20)} == {GATEWAY}
    assert sum(host.connections().values()) == 80


def test_traffic_is_counted_exactly_and_probes_are_not(host: Host, outside: Namespace) -> None:
    Server(host.launch(ONE), talk=echo)
    host.dispatch_over(ONE)
    for client, address in ((outside, SERVICE), (host.namespace, ("127.0.0.1", 8000)), (host.namespace, (ONE, 8000))):
        with connect(client, address) as connection:
            connection.sendall(b"x" * 100)
            assert connection.makefile("rb").read(len(ONE) + 101)
    eventually(lambda: _equal(host.first_replies(), {ONE: 2}))
    assert host.connections() == {ONE: 2}
    packets, size = host.traffic()[ONE]
    assert 8 <= packets <= 16
    assert size > 200


def test_connections_that_a_backend_opens_are_not_counted(host: Host, outside: Namespace) -> None:
    backend = host.launch(ONE)
    Server(backend, talk=echo)
    Server(outside, talk=echo)
    host.dispatch_over(ONE)
    with connect(backend, (OUTSIDE, 8000)) as connection:
        connection.sendall(b"x" * 100)
        assert connection.makefile("rb").read(len(OUTSIDE) + 101)
    assert (host.connections(), host.traffic(), host.first_replies()) == ({ONE: 0}, {ONE: (0, 0)}, {ONE: 0})


def test_refused_connection_is_sent_to_another_backend(host: Host, outside: Namespace) -> None:
    host.launch(ONE)  # nothing listens there
    serving = [TWO, THREE]
    for ip in serving:
        Server(host.launch(ip))
    # Each of a client's tries, seven in 20 s, is refused with a chance of one third.
    host.dispatch_over(ONE, *serving)
    for client, address in ((outside, SERVICE), (host.namespace, ("127.0.0.1", 8000))):
        answers = list(requests(client, address, 3, timeout=20))
        assert (len(answers), set(answers) - {*serving}) == (3, set())


def test_rules_of_docker_user_stay_in_force(host: Host, outside: Namespace) -> None:
    Server(host.launch(ONE))
    host.dispatch_over(ONE)
    assert request(outside, SERVICE) == ONE
    host.apply(f"*filter\n-I DOCKER-USER 1 -s {OUTSIDE}/32 -j DROP\nCOMMIT\n")
    # Docker moves its hook to the first place when a network is created.
    host.apply("*filter\n-D FORWARD -j DOCKER-USER\n-I FORWARD 1 -j DOCKER-USER\nCOMMIT\n")
    host.dispatch_over(ONE)
    with pytest.raises(TimeoutError):
        request(outside, SERVICE, timeout=1.5)
    assert request(host.namespace, SERVICE) == ONE


@pytest.mark.parametrize("chain", ["FORWARD", "INPUT"])
def test_firewall_that_drops_by_default_does_not_stop_clients(host: Host, outside: Namespace, chain: str) -> None:
    accept = "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"
    host.apply(f"*filter\n:{chain} DROP [0:0]\n-A INPUT -i lo -j ACCEPT\n-A INPUT {accept}\nCOMMIT\n")
    Server(host.launch(ONE))
    host.dispatch_over(ONE)
    assert request(outside, SERVICE) == request(host.namespace, ("127.0.0.1", 8000)) == ONE


def test_rules_are_complete_after_a_flush_of_the_firewall(host: Host, outside: Namespace) -> None:
    Server(host.launch(ONE))
    host.dispatch_over(ONE)
    before = host.rules()
    for table, chains in (("nat", "PREROUTING POSTROUTING OUTPUT"), ("filter", "FORWARD INPUT OUTPUT")):
        for chain in [*chains.split(), *(chain for chain in host.listing(table).chains if chain.startswith("LB-"))]:
            host.namespace.run(f"iptables-{host.flavour}", "-t", table, "-F", chain)
    # Docker's rules are missing, too. Ours are all there again.
    host.dispatch_over(ONE)
    ours = [line for line in before.splitlines() if host.path.prefix in line]
    assert set(ours) <= set(host.rules().splitlines())
    assert request(outside, SERVICE) == ONE


def test_removal_leaves_the_hosts_rules_and_sets_as_before(host: Host, outside: Namespace) -> None:
    Server(host.launch(ONE))
    before = host.rules()
    host.dispatch_over(ONE)
    assert request(outside, SERVICE) == ONE
    assert host.rules() != before
    with host.namespace:
        shutdown.remove(host.netfilter)
    assert host.rules() == before
    with host.namespace:
        shutdown.remove(host.netfilter)  # there is nothing to remove
    assert host.rules() == before


def test_two_projects_share_the_namespace(host: Host, outside: Namespace) -> None:
    path = DataPath(((9000, 8000),), "LB-ffffff-", "br0", PATH.subnet)
    other = Balancer(host.namespace, host.flavour, path)
    Server(host.launch(ONE))
    Server(host.launch(TWO))
    alone = host.rules()
    other.dispatch_over(TWO)
    with_other = host.rules()
    host.dispatch_over(ONE)
    both = host.rules()
    assert request(outside, SERVICE) == ONE
    assert request(outside, (HOST, 9000)) == TWO
    # Neither moves the other's hooks.
    host.dispatch_over(ONE)
    other.dispatch_over(TWO)
    assert host.rules() == both
    with host.namespace:
        shutdown.remove(host.netfilter)
        assert host.rules() == with_other
        shutdown.remove(other.netfilter)
    assert host.rules() == alone


def test_packet_of_an_unknown_connection_is_refused_and_reaches_no_backend(host: Host, outside: Namespace) -> None:
    Server(host.launch(ONE), talk=echo)
    host.dispatch_over(ONE)
    connection = connect(outside, SERVICE)
    connection.recv(100)
    host.delete_flows([ONE])
    with connection, pytest.raises(ConnectionResetError):
        connection.sendall(b"x")
        connection.recv(10)
    assert host.connections() == {ONE: 1}


def test_without_a_backend_clients_try_again_until_there_is_one(host: Host, outside: Namespace) -> None:
    Server(host.launch(ONE))
    host.dispatch_over()
    with pytest.raises(TimeoutError):
        request(outside, SERVICE, timeout=0.5)
    host.dispatch_over(ONE)
    assert request(outside, SERVICE) == ONE


def test_service_at_one_address_leaves_the_others_alone(lab: Lab, outside: Namespace) -> None:
    host = Host(lab, "nft", DataPath(prefix="LB-0a1b2c-", bridge="br0", subnet=PATH.subnet, address=HOST))
    Server(host.launch(ONE))
    host.dispatch_over(ONE)
    Server(host.namespace, "127.0.0.1")
    assert request(outside, SERVICE) == ONE
    assert request(host.namespace, ("127.0.0.1", 8000)) == "127.0.0.1"
    host.close()


def test_backends_cannot_reach_the_hosts_loopback_addresses(host: Host) -> None:
    """Not even one with the rights to send such packets."""
    backend = host.launch(ONE)
    Server(host.namespace, "127.0.0.1", 7000)
    backend.run("sysctl", "-qw", "net.ipv4.conf.eth0.route_localnet=1")
    backend.run("ip", "addr", "del", "127.0.0.1/8", "dev", "lo")
    backend.run("ip", "route", "add", "127.0.0.1/32", "via", GATEWAY, "dev", "eth0", "src", ONE)
    loopback = "127.0.0.1", 7000
    assert request(backend, loopback, timeout=3) == "127.0.0.1", "without our rules it reaches the host"
    host.dispatch_over(ONE)
    with pytest.raises(TimeoutError):
        request(backend, loopback, timeout=1.5)


def test_reserved_port_cannot_be_taken_and_answers_nothing(host: Host, outside: Namespace) -> None:
    with host.namespace, contextlib.closing(PortHolder(PATH)) as holder:
        holder.hold()
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with pytest.raises(OSError, match="Address already in use") as caught:
                other.bind(("0.0.0.0", 8000))
        assert caught.value.errno == errno.EADDRINUSE
        with pytest.raises(ConnectionRefusedError):
            request(outside, SERVICE)


def test_port_in_use_is_reserved_once_it_is_free(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    with host.namespace, contextlib.closing(PortHolder(PATH)) as holder:
        with socket.create_server(("0.0.0.0", 8000)):
            holder.hold()
            holder.hold()
        assert [record.message for record in caplog.records] == [
            "port 8000 cannot be reserved, trying again: [Errno 98] Address already in use"
        ]
        holder.hold()
        assert holder._held.keys() == {8000}


def test_drain_refuses_new_connections_and_waits_for_open_ones(
    host: Host, outside: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draining = tmp_path / "draining"
    draining.touch()
    monkeypatch.setattr(shutdown, "DRAINING", draining)
    Server(host.launch(ONE), talk=echo)
    host.dispatch_over(ONE)
    with connect(outside, SERVICE) as connection:
        connection.recv(100)
        with host.namespace:
            began = time.monotonic()
            assert shutdown.drain(host.netfilter, 0.5) == 1
            assert time.monotonic() - began >= 0.5
        with pytest.raises(ConnectionRefusedError):
            request(outside, SERVICE)
        connection.sendall(b"still here")
        assert connection.recv(100) == b"still here"
        draining.unlink()  # run.sh has been started
        with host.namespace:
            began = time.monotonic()
            assert shutdown.drain(host.netfilter, 10) == 1
            assert time.monotonic() - began < 5
    draining.touch()
    with host.namespace:
        assert shutdown.drain(host.netfilter, 10) == 0


# -- several ports, sticky clients: on both paths --------------------------------------------------------------------


def test_each_port_of_the_service_leads_to_its_own_port(lab: Lab, outside: Namespace) -> None:
    host = Host(lab, "nft", DataPath(((80, 8080), (443, 8443)), "LB-0a1b2c-", "br0", PATH.subnet))
    backend = host.launch(ONE)
    Server(backend, port=8080)
    Server(backend, port=8443, talk=name_peer, greet=False)
    host.dispatch_over(ONE)
    assert request(outside, (HOST, 80)) == ONE
    assert request(outside, (HOST, 443)) == OUTSIDE
    assert host.connections() == {ONE: 2}
    assert sum(host.live().values()) <= 2
    host.close()


def sticky_clients(lab: Lab, addresses: list[str]) -> Namespace:
    namespace = lab.add(OUTSIDE)
    for address in addresses:
        namespace.run("ip", "addr", "add", f"{address}/16", "dev", "eth0")
    return namespace


def ask_from(namespace: Namespace, source: str) -> str:
    with namespace, socket.create_connection(SERVICE, 5, source_address=(source, 0)) as connection:
        return connection.makefile().readline().strip()


@pytest.fixture(params=["host nft", "host legacy", "own nft", "own legacy"])
def sticky(lab: Lab, request: pytest.FixtureRequest) -> Iterator[tuple[Balancer, Callable[[str], object]]]:
    """A balancer on each data path, and a function that launches a backend."""
    where, _, flavour = request.param.partition(" ")
    if where == "own":
        balancer = Balancer(lab.add(HOST), flavour, DataPath(sticky=60))
        yield balancer, lambda ip: Server(lab.add(ip))
        return
    host = Host(lab, flavour, DataPath(prefix="LB-0a1b2c-", bridge="br0", subnet=PATH.subnet, sticky=60))
    yield host, lambda ip: Server(host.launch(ip))
    host.close()


def test_client_keeps_its_backend_while_it_is_in_rotation(
    lab: Lab, sticky: tuple[Balancer, Callable[[str], object]]
) -> None:
    balancer, launch = sticky
    net = "198.19" if isinstance(balancer, Host) else "198.18"
    ips = [f"{net}.1.{number}" for number in range(1, 13)]
    for ip in ips:
        launch(ip)
    clients = [f"198.18.2.{number}" for number in range(1, 21)]
    namespace = sticky_clients(lab, clients)
    balancer.dispatch_over(*ips[:6])
    kept = {client: ask_from(namespace, client) for client in clients}
    assert len(set(kept.values())) > 2
    # More backends, and other weights: clients keep theirs.
    balancer.dispatch_over(*ips, weights={ips[0]: 4.0})
    for _ in range(3):
        assert {client: ask_from(namespace, client) for client in clients} == kept
    # Without its backend, a client gets another one, and keeps that.
    gone = kept[clients[0]]
    balancer.dispatch_over(*(ip for ip in ips if ip != gone), draining=(gone,))
    moved = {client: ask_from(namespace, client) for client in clients}
    assert {c: ip for c, ip in moved.items() if kept[c] != gone} == {c: ip for c, ip in kept.items() if ip != gone}
    assert gone not in moved.values()
    assert {client: ask_from(namespace, client) for client in clients} == moved
    # Its first backend returns: the client keeps the second.
    balancer.dispatch_over(*ips)
    assert {client: ask_from(namespace, client) for client in clients} == moved


def test_new_clients_follow_the_weights(lab: Lab, sticky: tuple[Balancer, Callable[[str], object]]) -> None:
    balancer, launch = sticky
    net = "198.19" if isinstance(balancer, Host) else "198.18"
    ips = [f"{net}.1.1", f"{net}.1.2"]
    for ip in ips:
        launch(ip)
    clients = [f"198.18.2.{number}" for number in range(1, 101)]
    namespace = sticky_clients(lab, clients)
    balancer.dispatch_over(*ips, weights={ips[0]: 9.0})
    answers = [ask_from(namespace, client) for client in clients]
    assert 75 <= answers.count(ips[0]) <= 99


def _equal(seen: object, expected: object) -> None:
    assert seen == expected


@pytest.mark.parametrize("on_host", [False, True], ids=["outside", "on the host"])
def test_connection_to_a_backend_that_is_gone_waits_until_it_is_sent_to_another(
    host: Host, outside: Namespace, on_host: bool
) -> None:
    for ip in (ONE, TWO):
        Server(host.launch(ip))
    nobody = [f"198.19.1.{number}" for number in range(10, 20)]
    client = host.namespace if on_host else outside
    answers = answers_despite_lost_hosts(host, client, SERVICE, [ONE, TWO], nobody)
    assert (len(answers), set(answers) - {ONE, TWO}) == (20, set())
