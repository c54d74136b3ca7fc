"""The rendered rules with real connections through namespaces."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from netns.conftest import VIP, Balancer
from netns.lab import Lab, Namespace, Server, request, requests


def addresses(count: int) -> list[str]:
    return [f"198.18.{1 + i // 250}.{1 + i % 250}" for i in range(count)]


def assert_share(hits: int, of: int, share: float) -> None:
    """Within five standard deviations of the binomial: wrong less than once in a million runs."""
    assert abs(hits - of * share) <= 5 * math.sqrt(of * share * (1 - share)) + 1


@pytest.mark.parametrize("count", [1, 2, 5, 17])
def test_equal_weights_give_equal_shares_of_connections(
    lab: Lab, client: Namespace, balancer: Balancer, count: int
) -> None:
    backends = addresses(count)
    Server(lab.add(*backends))
    balancer.dispatch_over(*backends)
    hits = Counter(requests(client, VIP, 1000))
    assert sorted(hits) == sorted(backends)
    for backend in backends:
        assert_share(hits[backend], 1000, 1 / count)


def test_weights_give_shares_of_connections(lab: Lab, client: Namespace, balancer: Balancer) -> None:
    backends = addresses(20)
    weights = {ip: 1.0 + i % 4 for i, ip in enumerate(backends)}
    Server(lab.add(*backends))
    balancer.dispatch_over(*backends, weights=weights)
    hits = Counter(requests(client, VIP, 2000))
    for ip in backends:
        assert_share(hits[ip], 2000, weights[ip] / sum(weights.values()))


def test_counters_are_exact_after_rewrites_of_dispatch(lab: Lab, client: Namespace, balancer: Balancer) -> None:
    backends = addresses(12)
    Server(lab.add(*backends))
    hits: Counter[str] = Counter()
    for size in (3, 12, 2, 9):
        members = backends[:size]
        balancer.dispatch_over(*members, draining=tuple(backends[size:]))
        hits.update(requests(client, VIP, 100))
        assert balancer.connections() == {ip: hits[ip] for ip in backends}
    packets = {ip: count for ip, (count, _) in balancer.traffic().items()}
    for ip in backends:  # towards the backend: SYN, ACK, FIN and at most a few bare ACKs
        assert 3 * hits[ip] <= packets[ip] <= 6 * hits[ip]


def test_applied_rules_are_listed_as_rendered(lab: Lab, balancer: Balancer) -> None:
    backends = addresses(50)
    balancer.dispatch_over(*backends, weights={ip: 0.25 + 0.37 * i for i, ip in enumerate(backends)})
    before = [balancer.listing(name).chains for name in ("nat", "filter", "raw")]
    balancer.dispatch_over(*backends, weights={ip: 0.25 + 0.37 * i for i, ip in enumerate(backends)})
    assert [balancer.listing(name).chains for name in ("nat", "filter", "raw")] == before


def test_changes_of_rules_under_traffic_lose_no_connection(lab: Lab, client: Namespace, balancer: Balancer) -> None:
    backends = addresses(12)
    Server(lab.add(*backends))
    balancer.dispatch_over(*backends)
    answers = []
    for round_ in range(30):
        balancer.dispatch_over(*backends[: 3 + round_ % 10], draining=tuple(backends[3 + round_ % 10 :]))
        answers += list(requests(client, VIP, 20, timeout=0.9))  # a lost SYN would be resent after a second
    assert len(answers) == 600


def test_foreign_chains_are_kept(lab: Lab, client: Namespace, balancer: Balancer) -> None:
    """The foreign rules are like those of Docker, for its DNS in a container's nat table."""
    docker = """*nat
:DOCKER_OUTPUT - [0:0]
:DOCKER_POSTROUTING - [0:0]
-A OUTPUT -d 127.0.0.11/32 -j DOCKER_OUTPUT
-A POSTROUTING -d 127.0.0.11/32 -j DOCKER_POSTROUTING
-A DOCKER_OUTPUT -d 127.0.0.11/32 -p tcp -m tcp --dport 53 -j DNAT --to-destination 127.0.0.11:39999
-A DOCKER_POSTROUTING -s 127.0.0.11/32 -p tcp -m tcp --sport 39999 -j SNAT --to-source :53
COMMIT
"""
    balancer.apply(docker)
    backends = addresses(10)
    Server(lab.add(*backends))
    for size in (10, 3, 9):
        balancer.dispatch_over(*backends[:size])
    nat = balancer.listing("nat").chains
    for line in docker.splitlines():
        if line.startswith("-A"):
            _, chain, rule = line.split(" ", 2)
            assert rule in nat[chain]
    Server(balancer.namespace, "127.0.0.11", 39999)
    assert request(balancer.namespace, ("127.0.0.11", 53)) == "127.0.0.11"


def test_backend_gets_connections_from_the_balancers_address(lab: Lab, client: Namespace, balancer: Balancer) -> None:
    Server(lab.add("198.18.1.1"))
    balancer.dispatch_over("198.18.1.1")
    request(client, VIP)
    assert "src=198.18.1.1 dst=198.18.0.1" in balancer.namespace.run("conntrack", "-L", "-p", "tcp", "--dst-nat")
