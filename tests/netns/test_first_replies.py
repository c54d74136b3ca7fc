"""Marks show which connections wait for a first reply: real connections, both flavours of iptables."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

import flows
import ruleset
from features import MARKS
from netns.conftest import VIP, Balancer
from netns.lab import Lab, Namespace, Server, connect
from netns.test_failures import eventually
from restore import restore

ONE, TWO = "198.18.1.1", "198.18.1.2"


def silent(connection: socket.socket) -> None:
    """Reads and never answers."""
    connection.settimeout(20)
    with contextlib.suppress(OSError):
        while connection.recv(65536):
            pass


def echo(connection: socket.socket) -> None:
    connection.settimeout(20)
    with contextlib.suppress(OSError):
        while data := connection.recv(100):
            connection.sendall(data)


@pytest.fixture
def backends(lab: Lab, balancer: Balancer) -> Iterator[Namespace]:
    balancer.dispatch_over(ONE)
    yield lab.add(ONE, TWO)


def waiting(balancer: Balancer) -> dict[str, int]:
    return dict(balancer.waiting_flows().waiting)


def test_connection_without_a_request_does_not_wait(backends: Namespace, client: Namespace, balancer: Balancer) -> None:
    Server(backends, ONE, talk=silent, greet=False)
    with connect(client, VIP):
        eventually(lambda: _equal(balancer.live(), {ONE: 1}))
        assert waiting(balancer) == {}


def test_request_waits_until_a_small_first_reply(backends: Namespace, client: Namespace, balancer: Balancer) -> None:
    go = threading.Event()

    def ok(connection: socket.socket) -> None:
        connection.recv(100)
        go.wait(10)
        connection.sendall(b"+OK\r\n")
        connection.recv(1)

    Server(backends, ONE, talk=ok, greet=False)
    with connect(client, VIP) as connection:
        connection.sendall(b"PING\r\n")
        eventually(lambda: _equal(waiting(balancer), {ONE: 1}))
        assert balancer.first_replies() == {ONE: 0}
        go.set()
        assert connection.recv(100) == b"+OK\r\n"
        eventually(lambda: _equal(waiting(balancer), {}))
        assert balancer.first_replies() == {ONE: 1}
        assert balancer.live() == {ONE: 1}


def test_only_the_first_reply_of_a_connection_is_counted(
    backends: Namespace, client: Namespace, balancer: Balancer
) -> None:
    Server(backends, ONE, talk=echo, greet=False)
    for _ in range(3):
        with connect(client, VIP) as connection:
            for _ in range(5):
                connection.sendall(b"again")
                assert connection.recv(100) == b"again"
    assert balancer.first_replies() == {ONE: 3}
    assert balancer.traffic()[ONE][0] > 15  # the packets towards the backend are counted as before


def test_server_that_sends_first_has_replied(backends: Namespace, client: Namespace, balancer: Balancer) -> None:
    Server(backends, ONE, talk=silent)
    with connect(client, VIP) as connection:
        assert connection.recv(100)
        connection.sendall(b"hello")
        eventually(lambda: _equal(balancer.first_replies(), {ONE: 1}))
        assert waiting(balancer) == {}


def test_other_bits_of_the_mark_are_kept(backends: Namespace, client: Namespace, balancer: Balancer) -> None:
    balancer.apply("*mangle\n-A PREROUTING -p tcp -j CONNMARK --set-xmark 0x8000/0x8000\nCOMMIT\n")
    Server(backends, ONE, talk=echo, greet=False)
    with connect(client, VIP) as connection:
        connection.sendall(b"x")
        assert connection.recv(10) == b"x"
        listed = balancer.namespace.run("conntrack", "-L", "-p", "tcp", "--dst-nat")
    assert f"mark={0x8000 | 0x60000000} " in listed


def test_connections_of_a_frozen_backend_are_stalled_and_an_upload_is_not(
    backends: Namespace, client: Namespace, balancer: Balancer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process never accepts, like a stopped one; its kernel does."""
    monkeypatch.setattr(flows, "SILENT_SECONDS", 2)
    with backends:
        frozen = socket.create_server((ONE, 8000), backlog=16)
    with frozen, contextlib.ExitStack() as stack:
        stuck = [stack.enter_context(connect(client, VIP)) for _ in range(4)]
        upload = stack.enter_context(connect(client, VIP))
        for connection in stuck:
            connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        end = time.monotonic() + 3.5
        while time.monotonic() < end:
            upload.sendall(b"x" * 100)
            time.sleep(0.2)
        assert waiting(balancer) == {ONE: 5}
        assert balancer.waiting_flows().stalled == {ONE: 4}


def test_without_marks_no_connection_waits_and_packets_are_counted(
    backends: Namespace, client: Namespace, balancer: Balancer
) -> None:
    tables = {table.name: table for table in ruleset.tables([ruleset.Endpoint(ONE)], missing=(MARKS,))}
    balancer.apply(restore(tables["filter"], balancer.listing("filter")))
    assert [name for name in balancer.listing("filter").chains if name.startswith("LB-")] == [
        "LB-FORWARD",
        "LB-INPUT",
        "LB-UNREACHABLE",
    ]
    Server(backends, ONE, talk=echo, greet=False)
    with connect(client, VIP) as connection:
        connection.sendall(b"x")
        assert connection.recv(10) == b"x"
    assert waiting(balancer) == {}
    assert balancer.first_replies() == {ONE: 0}
    assert balancer.traffic()[ONE][0] > 0


def _equal(seen: object, expected: object) -> None:
    assert seen == expected
