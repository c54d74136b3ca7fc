"""What a client gets when a backend refuses, fails, or is replaced: real packets, both flavours of iptables."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable

import pytest

from netns.conftest import VIP, Balancer
from netns.lab import Lab, Namespace, Server, connect, request

ONE, TWO = "198.18.1.1", "198.18.1.2"


def eventually(body: Callable[[], None], seconds: float = 5.0) -> None:
    """Runs `body` until its assertions hold: counters and sockets of other threads are late."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return body()
        except AssertionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def test_refused_connection_is_sent_to_another_backend(lab: Lab, client: Namespace, balancer: Balancer) -> None:
    others = ["198.18.1.3", "198.18.1.4"]
    backends = lab.add(ONE, TWO, *others)
    for address in (ONE, *others):  # nothing listens on TWO: its kernel answers SYNs with RST
        Server(backends, address)
    balancer.dispatch_over(ONE, TWO, *others)
    began = time.monotonic()
    while not balancer.connections()[TWO]:
        assert request(client, VIP, timeout=60) != TWO
        assert time.monotonic() - began < 100, "no connection was sent to TWO"


def _assert(truth: bool) -> None:
    assert truth


def test_refusal_of_the_only_backend_reaches_the_client(lab: Lab, client: Namespace, balancer: Balancer) -> None:
    lab.add(ONE)
    balancer.dispatch_over(ONE)
    with pytest.raises(ConnectionRefusedError):
        request(client, VIP)


def test_reset_of_an_answered_connection_reaches_the_client(lab: Lab, client: Namespace, balancer: Balancer) -> None:
    def reset(connection: socket.socket) -> None:
        connection.recv(1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    Server(lab.add(ONE, TWO), talk=reset, greet=False)
    balancer.dispatch_over(ONE, TWO)
    with connect(client, VIP) as connection:
        connection.sendall(b"x")
        with pytest.raises(ConnectionResetError):
            connection.recv(1)


def test_connection_without_a_ready_backend_waits_for_one(lab: Lab, client: Namespace, balancer: Balancer) -> None:
    Server(lab.add(ONE))
    balancer.dispatch_over()
    answers: list[str] = []
    caller = threading.Thread(target=lambda: answers.append(request(client, VIP, timeout=20)))
    caller.start()
    time.sleep(0.3)
    balancer.dispatch_over(ONE)
    caller.join(20)
    assert answers == [ONE]


def test_unanswered_connection_is_sent_to_another_backend_after_its_flow_is_deleted(
    lab: Lab, client: Namespace, balancer: Balancer
) -> None:
    Server(lab.add(TWO))
    balancer.dispatch_over(ONE)  # no namespace has this address: SYNs are lost
    answers: list[str] = []
    caller = threading.Thread(target=lambda: answers.append(request(client, VIP, timeout=30)))
    caller.start()
    eventually(lambda: _assert(balancer.live() == {ONE: 1}))
    balancer.dispatch_over(TWO)
    balancer.delete_flows([ONE])
    caller.join(30)
    assert answers == [TWO]


def answers_despite_lost_hosts(
    balancer: Balancer, client: Namespace, address: tuple[str, int], healthy: list[str], nobody: list[str]
) -> list[str]:
    """Connects while rotation has addresses that nobody has, and for longer than the kernel takes to find that out."""
    balancer.dispatch_over(*healthy, *nobody)
    answers: list[str] = []

    def call() -> None:
        try:
            answers.append(request(client, address, timeout=30))
        except OSError as error:
            answers.append(str(error))

    callers = [threading.Thread(target=call) for _ in range(20)]
    for caller in callers:
        caller.start()
    time.sleep(4.5)
    balancer.dispatch_over(*healthy)
    balancer.delete_flows(nobody)
    for caller in callers:
        caller.join(30)
    return answers


def test_connection_to_a_backend_without_a_host_waits_until_it_is_sent_to_another(
    lab: Lab, client: Namespace, balancer: Balancer
) -> None:
    """Reported to the client, a lost host would end the attempt before three probes have failed."""
    backends = lab.add(ONE, TWO)
    for address in (ONE, TWO):
        Server(backends, address)
    nobody = [f"198.18.1.{number}" for number in range(10, 20)]
    answers = answers_despite_lost_hosts(balancer, client, VIP, [ONE, TWO], nobody)
    assert (len(answers), set(answers) - {ONE, TWO}) == (20, set())


def test_unanswered_connection_stays_with_its_backend_while_its_flow_exists(
    lab: Lab, client: Namespace, balancer: Balancer
) -> None:
    """So the deletion in the test above is needed."""
    Server(lab.add(TWO))
    balancer.dispatch_over(ONE)
    began = time.monotonic()

    def swap() -> None:
        eventually(lambda: _assert(balancer.live() == {ONE: 1}))
        balancer.dispatch_over(TWO)

    threading.Thread(target=swap).start()
    with pytest.raises(OSError, match=r"No route|timed out"):
        request(client, VIP, timeout=2.5)
    assert time.monotonic() - began > 1


def test_packet_of_a_deleted_flow_is_answered_with_a_reset(lab: Lab, client: Namespace, balancer: Balancer) -> None:
    Server(lab.add(ONE), talk=lambda _: time.sleep(3))
    balancer.dispatch_over(ONE)
    with connect(client, VIP) as connection:
        connection.recv(100)
        balancer.dispatch_over()
        balancer.delete_flows([ONE])
        began = time.monotonic()
        connection.sendall(b"hello")
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
        assert time.monotonic() - began < 2


def test_new_backend_on_an_old_address_has_no_old_flows_and_no_old_neighbour_entry(
    lab: Lab, client: Namespace, balancer: Balancer
) -> None:
    old = lab.add(ONE)
    Server(old, talk=lambda _: time.sleep(5))
    balancer.dispatch_over(ONE)
    with connect(client, VIP) as connection:
        connection.recv(100)
        old.run("ip", "link", "set", "eth0", "down")
        new = lab.add(ONE)  # same address, another link-layer address
        before = new.run("cat", "/proc/thread-self/net/snmp")
        Server(new)
        balancer.delete_flows([ONE])
        balancer.delete_neighbours([ONE])
        assert balancer.live() == {}
        assert request(client, VIP, timeout=2) == ONE  # a stale neighbour entry would lose this SYN for seconds
        connection.sendall(b"hello")
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
        assert resets_sent(new) == resets_sent_in(before), "a packet of the old flow reached the new backend"


def resets_sent(namespace: Namespace) -> int:
    return resets_sent_in(namespace.run("cat", "/proc/thread-self/net/snmp"))


def resets_sent_in(snmp: str) -> int:
    names, values = [line.split() for line in snmp.splitlines() if line.startswith("Tcp:")]
    return int(values[names.index("OutRsts")])


def test_waiting_flows_are_counted_until_their_first_reply(lab: Lab, client: Namespace, balancer: Balancer) -> None:
    go = threading.Event()

    def talk(connection: socket.socket) -> None:
        connection.recv(100)
        go.wait(10)
        connection.sendall(b"done\n" * 20)
        connection.recv(1)

    Server(lab.add(ONE), talk=talk, greet=False)
    balancer.dispatch_over(ONE)
    with connect(client, VIP) as connection:
        connection.sendall(b"please")
        eventually(lambda: _assert(balancer.waiting_flows().waiting == {ONE: 1} == balancer.live()))
        go.set()
        connection.recv(1000)
        eventually(lambda: _assert(balancer.waiting_flows().waiting == {} and balancer.live() == {ONE: 1}))
    eventually(lambda: _assert(balancer.live() == {}))


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def stray_segment(source: tuple[str, int], target: tuple[str, int], sent: int, received: int) -> bytes:
    """A TCP segment far past the window, with its IP header; `sent` and `received`: the numbers due next."""
    ends = socket.inet_aton(source[0]) + socket.inet_aton(target[0])
    head = struct.pack("!HHIIBBHHH", source[1], target[1], (sent + 2**30) % 2**32, received, 5 << 4, 0x10, 1000, 0, 0)
    total = checksum(ends + struct.pack("!BBH", 0, socket.IPPROTO_TCP, len(head)) + head)
    head = head[:16] + struct.pack("!H", total) + head[18:]
    return struct.pack("!BBHHHBBH", 0x45, 0, 40, 1, 0, 64, socket.IPPROTO_TCP, 0) + ends + head


def next_numbers(tap: socket.socket, port: int) -> tuple[int, int]:
    """The sequence numbers the client at `port` sends and expects next, from the last packet to it."""
    numbers = 0, 0
    tap.settimeout(0.3)
    try:
        while True:
            packet = tap.recv(2000)[14:]
            size, offset = struct.unpack("!H", packet[2:4])[0], (packet[32] >> 4) * 4
            _, target, sequence, acknowledged = struct.unpack("!HHII", packet[20:32])
            if packet[9] == socket.IPPROTO_TCP and target == port:
                numbers = acknowledged, sequence + size - 20 - offset
    except TimeoutError:
        return numbers


@pytest.mark.parametrize("liberal", ["1", "0"])
def test_packet_outside_the_window_does_not_reset_a_live_connection(
    lab: Lab, client: Namespace, balancer: Balancer, liberal: str
) -> None:
    """With conntrack's default ("0") it does: the packet is INVALID and not translated, and the balancer's own kernel
    answers it with a RST. So run.sh sets nf_conntrack_tcp_be_liberal."""
    balancer.namespace.run("sysctl", "-qw", f"net.netfilter.nf_conntrack_tcp_be_liberal={liberal}")

    def echo(connection: socket.socket) -> None:
        for _ in range(2):
            connection.sendall(connection.recv(100))

    Server(lab.add(ONE), talk=echo, greet=False)
    balancer.dispatch_over(ONE)
    with client:
        tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
    with tap, connect(client, VIP) as connection:
        connection.sendall(b"one")
        assert connection.recv(10) == b"one"
        numbers = next_numbers(tap, connection.getsockname()[1])
        with client, socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
            raw.sendto(stray_segment(connection.getsockname(), VIP, *numbers), (VIP[0], 0))
        time.sleep(0.2)
        if liberal == "1":
            connection.sendall(b"two")
            assert connection.recv(10) == b"two"
        else:
            with pytest.raises(ConnectionResetError):
                connection.recv(10)


def test_client_that_has_closed_its_side_gets_its_whole_answer(lab: Lab, client: Namespace, balancer: Balancer) -> None:
    def trickle(connection: socket.socket) -> None:
        for _ in range(20):
            time.sleep(0.05)
            connection.sendall(b"x" * 1000)

    Server(lab.add(ONE), talk=trickle)
    balancer.dispatch_over(ONE)
    with connect(client, VIP) as connection:
        connection.shutdown(socket.SHUT_WR)
        time.sleep(0.2)
        assert balancer.live() == {ONE: 1}, "a half-closed connection is live: a drain waits for it"
        size = 0
        while piece := connection.recv(65536):
            size += len(piece)
    assert size == len(ONE) + 1 + 20_000
