"""Networks, routes and ports: text in, and one real socket."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from cli import host_checks

EVERYTHING = [IPv4Network(pool) for pool in host_checks.POOLS]

TABLE = """\
default via 192.0.2.1 dev eth0 proto dhcp metric 100
0.0.0.0/1 via 10.8.0.1 dev tun0
128.0.0.0/1 via 10.8.0.1 dev tun0
10.8.0.0/24 dev tun0 proto kernel scope link src 10.8.0.2
172.17.0.0/16 dev docker0 proto kernel scope link src 172.17.0.1 linkdown
203.0.113.9 via 192.0.2.1 dev eth0
blackhole 198.51.100.0/24 proto static
10.99.0.0/16 proto static
\tnexthop via 192.0.2.2 dev eth0 weight 1
local 127.0.0.1 dev lo table local proto kernel scope host src 127.0.0.1
broadcast 192.0.2.255 dev eth0 table local proto kernel scope link src 192.0.2.7
"""
ROUTES = [
    *("10.8.0.0/24", "172.17.0.0/16", "203.0.113.9/32", "198.51.100.0/24", "10.99.0.0/16"),
    *("127.0.0.1/32", "192.0.2.255/32"),
]


@pytest.mark.parametrize(
    ("taken", "expected"),
    [
        ([], "172.16.0.0/20"),
        (["172.16.0.0/20"], "172.16.16.0/20"),
        (["172.16.5.9/32"], "172.16.16.0/20"),
        (["172.16.0.0/14", "172.20.0.0/16"], "172.21.0.0/20"),
        (["172.16.0.0/12"], "10.192.0.0/20"),
        (["172.16.0.0/12", "10.0.0.0/8"], "192.168.0.0/20"),
        (["172.16.0.0/12", "10.0.0.0/8", "192.168.0.0/16"], "198.18.0.0/20"),
    ],
)
def test_the_first_network_that_overlaps_nothing_is_free(taken: list[str], expected: str) -> None:
    assert host_checks.free_subnet(map(IPv4Network, taken)) == IPv4Network(expected)


def test_no_network_is_free_when_the_pools_are_taken() -> None:
    with pytest.raises(host_checks.NoFreeSubnet, match="choose one with --subnet"):
        host_checks.free_subnet(EVERYTHING)


def test_routes_are_destinations_without_defaults_or_their_halves() -> None:
    assert list(host_checks.routes(TABLE)) == [IPv4Network(route) for route in ROUTES]


def no_ip(*_: object, **__: object) -> None:
    raise FileNotFoundError("ip")


def test_without_the_ip_tool_the_kernels_table_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    head = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT"
    rows = [
        "eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0",
        "tun0\t0000080A\t0\t1\t0\t0\t0\t00FFFFFF\t0\t0\t0",
    ]
    monkeypatch.setattr(subprocess, "run", no_ip)
    monkeypatch.setattr(Path, "read_text", lambda path: "\n".join([head, *rows]) + "\n")
    assert host_checks.host_routes() == [IPv4Network("10.8.0.0/24")]


@pytest.fixture
def port() -> Iterator[int]:
    """A port of 127.0.0.1 that this process listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_port_is_taken_while_a_process_listens(address: str, port: int) -> None:
    assert host_checks.is_taken(address, port)
    assert not host_checks.is_taken("127.0.0.2", port), "another address is free"


def test_closed_port_is_free_even_with_a_connection_in_time_wait() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            listener.accept()[0].close()  # this end closes first, so TIME_WAIT is on the port
    assert not host_checks.is_taken("127.0.0.1", port)


def test_an_address_of_another_host_is_not_a_taken_port() -> None:
    assert not host_checks.is_taken("192.0.2.1", 80)


def test_the_owner_of_a_port_is_named_with_its_process(port: int) -> None:
    name = Path("/proc/self/comm").read_text().strip()
    for address in ("127.0.0.1", "0.0.0.0"):
        assert str(host_checks.owner(address, port)) == f"{name} (pid {os.getpid()})"
    assert host_checks.owner("127.0.0.2", port).pid == 0, "of another address"


def test_client_that_connects_from_a_port_is_not_its_owner(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as client:
        assert (
            str(host_checks.owner("127.0.0.1", client.getsockname()[1])) == "a process that this user may not inspect"
        )
