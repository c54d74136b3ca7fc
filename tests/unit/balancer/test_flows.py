"""The kernel's messages about connections: requests, and how flows are counted."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address

import pytest

import flows
from fakes_netfilter import STATES, TIMEOUTS, flow, waiting
from flows import FlowCounts, attribute, count, deletions, misdirected, of_backends
from ruleset import REPLY_MARK, REQUEST_MARK

A, B = "198.18.0.2", "198.18.0.3"
PORTS = frozenset({8000})


def entry(
    backend: str = A,
    state: int = flows.ESTABLISHED,
    port: int = 8000,
    mark: int | None = 0,
    remaining: int = 86000,
    protocol: int = 6,
    target: str = "198.18.0.254",
    before: bytes = b"",
) -> bytes:
    """One message of a listing, as the kernel writes it; `before`: attributes ahead of those that are read."""

    def tuple_(source: str, target: str, ports: tuple[int, int]) -> bytes:
        ip = attribute(1, IPv4Address(source).packed) + attribute(2, IPv4Address(target).packed)
        numbers = b"".join(attribute(kind, struct.pack("!H", port)) for kind, port in enumerate(ports, 2))
        return attribute(0x8001, ip) + attribute(0x8002, attribute(1, bytes([protocol])) + numbers)

    attributes = before + attribute(0x8001, tuple_("203.0.113.9", target, (40000, port)))
    attributes += attribute(0x8002, tuple_(backend, "198.18.0.254", (8000, 1024)))
    attributes += attribute(3, struct.pack("!I", 0xE)) + attribute(7, struct.pack("!I", remaining))
    attributes += attribute(0x8004, attribute(0x8001, attribute(1, bytes([state])) + attribute(2, b"\7")))
    attributes += b"" if mark is None else attribute(8, struct.pack("!I", mark))
    attributes += attribute(12, struct.pack("!I", 77))
    return flows.message(0, 0, 0, attributes)


def counted(*messages: bytes) -> FlowCounts:
    return count(flows.flows(b"".join(messages), PORTS), TIMEOUTS)


def test_block_of_messages_is_parsed_into_flows() -> None:
    block = entry(A, mark=REQUEST_MARK) + entry(B, state=flows.TIME_WAIT, mark=None, before=attribute(99, b"xyz"))
    assert list(flows.flows(block, PORTS)) == [
        (IPv4Address("203.0.113.9").packed, 40000, IPv4Address(A).packed, flows.ESTABLISHED, 86000, REQUEST_MARK),
        (IPv4Address("203.0.113.9").packed, 40000, IPv4Address(B).packed, flows.TIME_WAIT, 86000, 0),
    ]


def test_only_tcp_connections_to_the_service_are_counted() -> None:
    udp = entry(A, protocol=17)
    assert counted(entry(A, port=53), udp, entry(B)).live == {B: 1}
    assert list(flows.flows(b"", PORTS)) == []


def test_connection_that_was_not_dispatched_is_not_the_services() -> None:
    """On the host, probes and other programs connect to a backend at the same port."""
    assert counted(entry(A, target=A, port=8000), entry(B, target=A, port=8000)).live == {B: 1}


@pytest.mark.parametrize(
    ("state", "live"),
    [
        ("SYN_SENT", True),
        ("SYN_RECV", True),
        ("ESTABLISHED", True),
        ("FIN_WAIT", True),
        ("CLOSE_WAIT", True),
        ("LAST_ACK", False),
        ("TIME_WAIT", False),
        ("CLOSE", False),
    ],
)
def test_flow_is_live_until_both_sides_have_closed(state: str, live: bool) -> None:
    assert counted(entry(A, state=STATES[state])).live == ({A: 1} if live else {})


@pytest.mark.parametrize(
    ("mark", "waits"),
    [
        (0, False),  # connected, nothing sent: a preconnect
        (REQUEST_MARK, True),
        (REPLY_MARK, False),  # the server sends first
        (REQUEST_MARK | REPLY_MARK, False),
        (REQUEST_MARK | 0x8000, True),  # other marks do not matter
        (0x8000, False),
    ],
)
def test_flow_waits_from_its_request_to_its_first_reply(mark: int, waits: bool) -> None:
    assert counted(entry(A, mark=mark)).waiting == ({A: 1} if waits else {})


@pytest.mark.parametrize(
    ("state", "remaining", "idle"),
    [
        ("ESTABLISHED", 86400, 0),
        ("ESTABLISHED", 86388, 12),
        ("ESTABLISHED", 300, 0),  # unacknowledged data
        ("ESTABLISHED", 289, 11),
        ("ESTABLISHED", 90000, 0),  # the timeout was lowered meanwhile
        ("CLOSE_WAIT", 48, 12),
        ("SYN_SENT", 120, 0),
    ],
)
def test_time_since_the_last_packet_follows_from_the_remaining_timeout(state: str, remaining: int, idle: int) -> None:
    seen = next(flows.flows(entry(A, state=STATES[state], remaining=remaining), PORTS))
    assert TIMEOUTS.idle(seen) == idle


def test_flow_that_waits_and_is_silent_is_stalled() -> None:
    seen = [waiting(A, idle=10), waiting(A, idle=9), flow(A, idle=10), flow(B, "SYN_SENT", mark=REQUEST_MARK, idle=9)]
    counts = count(seen, TIMEOUTS)
    assert counts == FlowCounts(live={A: 3, B: 1}, silent={A: 2}, waiting={A: 2, B: 1}, stalled={A: 1})


@pytest.mark.parametrize("state", ["SYN_SENT", "SYN_RECV"])
def test_silent_half_open_flow_is_not_counted(state: str) -> None:
    """A SYN flood leaves such flows, for a minute each. A drain would wait for them."""
    seen = [flow(A, state, idle=9), flow(A, state, idle=10), flow(A, state, idle=10, mark=REQUEST_MARK)]
    assert count(seen, TIMEOUTS) == FlowCounts(live={A: 1})


def test_self_check_connections_are_not_counted() -> None:
    seen = [flow(A, client="198.18.0.1", client_port=port) for port in (60999, 61000, 61063, 61064)]
    assert count(seen, TIMEOUTS, "198.18.0.1").live == {A: 2}
    assert count(seen, TIMEOUTS, "198.18.0.9").live == {A: 4}
    assert count(seen, TIMEOUTS).live == {A: 4}


def test_flow_is_deleted_by_its_original_tuple_and_its_id() -> None:
    block = entry(A) + entry(B) + entry(A, state=flows.SYN_SENT)
    one, two = deletions(block, PORTS, of_backends([A], False))
    assert one == two == block[20:72] + attribute(12, struct.pack("!I", 77))
    assert len(list(deletions(block, PORTS, of_backends([A, B], False)))) == 3
    assert len(list(deletions(block, PORTS, of_backends([A, B], unanswered_only=True)))) == 1
    assert list(deletions(block, PORTS, of_backends(["198.18.0.9"], False))) == []
    assert len(list(deletions(block, PORTS, misdirected([B])))) == 1
    assert list(deletions(block, PORTS, misdirected([A, B]))) == []


def test_request_has_the_service_and_the_filters_of_the_kernel() -> None:
    everything, one, waits = (
        flows.listing_request(PORTS),
        flows.listing_request(PORTS, backend=A),
        flows.listing_request(PORTS, waiting_only=True),
    )
    assert all(struct.unpack_from("=IHH", r) == (len(r), 0x101, 0x301) for r in (everything, one, waits))
    assert IPv4Address(A).packed in one
    assert IPv4Address(A).packed not in everything + waits
    assert struct.pack("!I", REQUEST_MARK | REPLY_MARK) in waits
    assert struct.pack("!I", REQUEST_MARK | REPLY_MARK) not in everything + one


@pytest.mark.parametrize("state", ["FIN_WAIT", "CLOSE_WAIT"])
def test_connection_that_its_client_has_closed_can_be_stalled(state: str) -> None:
    """Clients with timeouts shorter than ten seconds would hide a frozen backend otherwise."""
    assert count([flow(A, state, mark=REQUEST_MARK, idle=10)], TIMEOUTS).stalled == {A: 1}


def test_flow_in_a_state_without_its_own_timeout_is_counted() -> None:
    simultaneous_open = flow(A)._replace(state=9, remaining=50)
    assert count([simultaneous_open], TIMEOUTS).live == {A: 1}
