"""Networks, routes and ports: text in, and one real socket."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from cli import host_checks as preflight

EVERYTHING = [IPv4Network(pool) for pool in preflight.POOLS]

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
    assert preflight.free_subnet(map(IPv4Network, taken)) == IPv4Network(expected)


def test_no_network_is_free_when_the_pools_are_taken() -> None:
    assert preflight.free_subnet(EVERYTHING) is None


def test_routes_are_destinations_without_defaults_or_their_halves() -> None:
    assert list(preflight.routes(TABLE)) == [IPv4Network(route) for route in ROUTES]


def no_ip(*_: object, **__: object) -> None:
    raise FileNotFoundError("ip")


def test_without_the_ip_tool_the_kernels_own_table_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    head = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT"
    rows = [
        "eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0",
        "tun0\t0000080A\t0\t1\t0\t0\t0\t00FFFFFF\t0\t0\t0",
    ]
    monkeypatch.setattr(subprocess, "run", no_ip)
    monkeypatch.setattr(Path, "read_text", lambda path: "\n".join([head, *rows]) + "\n")
    assert preflight.host_routes() == [IPv4Network("10.8.0.0/24")]


@pytest.fixture
def port() -> Iterator[int]:
    """A port of 127.0.0.1 that this process listens on."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        yield door.getsockname()[1]


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_a_port_is_taken_while_somebody_listens_and_no_longer(address: str, port: int) -> None:
    assert preflight.is_taken(address, port)
    assert not preflight.is_taken("127.0.0.2", port), "another address is free"


def test_a_port_that_was_closed_is_free_even_with_a_connection_that_lingers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            door.accept()[0].close()  # this end closes first, so TIME_WAIT is on the port
    assert not preflight.is_taken("127.0.0.1", port)


def test_an_address_of_another_host_is_not_a_taken_port() -> None:
    assert not preflight.is_taken("192.0.2.1", 80)


def test_the_owner_of_a_port_is_named_with_its_process(port: int) -> None:
    name = Path("/proc/self/comm").read_text().strip()
    assert preflight.owner(port) == f"{name} (pid {os.getpid()})"


def test_a_port_that_nobody_listens_on_is_not_blamed_on_who_merely_connects_from_it(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as client:
        assert preflight.owner(client.getsockname()[1]) == "a process this user may not see"


def test_each_taken_port_is_one_line_with_its_owner_and_the_flag_that_moves_it(
    port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{Path('/proc/self/comm').read_text().strip()} (pid {os.getpid()})"
    arguments = ["ports", f"127.0.0.1:{port}:--port", f"127.0.0.2:{port}:--nobody"]
    assert preflight.main(arguments) == 1
    assert capsys.readouterr() == (
        "",
        f"port {port} is taken by {name}; end that, or choose another with --port PORT\n",
    )
    assert preflight.main(["ports", arguments[2]]) == 0
    assert capsys.readouterr() == ("", "")


def test_the_subnet_command_avoids_routes_and_what_it_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preflight, "host_routes", lambda: [IPv4Network("172.16.0.0/12")])
    assert preflight.main(["subnet", "10.192.0.5/16"]) == 0
    assert capsys.readouterr().out == "10.193.0.0/20\n"
    monkeypatch.setattr(preflight, "host_routes", lambda: EVERYTHING)
    assert preflight.main(["subnet"]) == 1
    assert capsys.readouterr() == ("", "no free network is left; name one with --subnet\n")
    assert preflight.main([]) == 2
