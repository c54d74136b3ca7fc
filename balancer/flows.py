"""The kernel's connection table in ctnetlink's messages: renders requests, and counts the flows in the answers. Pure.

Messages are those of linux/netfilter/nfnetlink_conntrack.h: a header of 16 bytes, nfgenmsg of 4, then attributes. Each
attribute is its length and type (native byte order) and a payload (network byte order). A listing comes in blocks of
whole messages, so memory does not grow with the table.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import NamedTuple

from datapath import CHECK_PORTS
from ruleset import REPLY_MARK, REQUEST_MARK

# Attribute types (enum ctattr_type and its nested ones).
ORIGINAL, REPLY, PROTOINFO, TIMEOUT, MARK, ID, MARK_MASK, FILTER = 1, 2, 4, 7, 8, 12, 21, 25
TUPLE_IP, TUPLE_PROTO = 1, 2
IP_SOURCE = 1
PROTO_NUMBER, PROTO_DESTINATION_PORT = 1, 3
FILTER_ORIGINAL, FILTER_REPLY = 1, 2
MATCH_IP_SOURCE, MATCH_PROTO_NUMBER, MATCH_DESTINATION_PORT = 1 << 0, 1 << 3, 1 << 5
NESTED = 0x8000
TYPE_MASK = 0x3FFF
GET, DELETE = 1, 2
SUBSYSTEM = 1 << 8  # NFNL_SUBSYS_CTNETLINK
REQUEST, ACK, DUMP = 0x1, 0x4, 0x300  # flags
IPV4, TCP = 2, 6
HEADERS = 20  # bytes before a message's attributes

# enum tcp_conntrack. A flow in one of the last three states has ended; in the others it may still carry data.
SYN_SENT, SYN_RECV, ESTABLISHED, FIN_WAIT, CLOSE_WAIT, LAST_ACK, TIME_WAIT, CLOSE = range(1, 9)
OVER = (LAST_ACK, TIME_WAIT, CLOSE)
HALF_OPEN = (SYN_SENT, SYN_RECV)  # the handshake is not complete
# The backend's kernel has accepted the connection. FIN_WAIT and CLOSE_WAIT count, too: a client that gives up waiting
# sends its FIN.
ACCEPTED = (ESTABLISHED, FIN_WAIT, CLOSE_WAIT)
STATE_NAMES = ("syn_sent", "syn_recv", "established", "fin_wait", "close_wait", "last_ack", "time_wait", "close")

SILENT_SECONDS = 10  # without a packet in either direction: the flow counts as silent

MESSAGE = struct.Struct("=IHHII")
_NFGEN = struct.Struct("=BBH")
_ATTRIBUTE = struct.Struct("=HH")
_LENGTH = struct.Struct("=I")
_NUMBER = struct.Struct("!I")
# A tuple of IPv4 and TCP is 48 bytes: source and destination address, protocol, source and destination port.
_TUPLE = struct.Struct("!8x4s4x4s8xB7xH6xH2x")
_STATE_OFFSET = 8  # in PROTOINFO: behind the headers of its TCP part and of the state


class Flow(NamedTuple):
    """One TCP connection to the service. Addresses as 4 bytes; `remaining`: seconds until the entry expires."""

    source: bytes
    source_port: int
    backend: bytes  # the source of its replies
    state: int
    remaining: int
    mark: int


@dataclass(frozen=True)
class Timeouts:
    """The connection table's timeouts in seconds: by state, and for a flow with unacknowledged data."""

    by_state: Mapping[int, int]
    unacknowledged: int = 300

    def idle(self, flow: Flow) -> int:
        """Seconds since the flow's last packet. Each packet sets the entry's timeout to that of the flow's state, or to
        the shorter one for unacknowledged data (nf_conntrack_proto_tcp.c)."""
        full = self.by_state.get(flow.state, self.by_state[SYN_SENT])
        if flow.remaining <= self.unacknowledged < full:
            full = self.unacknowledged
        return max(0, full - flow.remaining)


@dataclass
class FlowCounts:
    """How many flows each backend has, by address."""

    live: Counter[str] = field(default_factory=Counter)
    silent: Counter[str] = field(default_factory=Counter)  # live, without a packet for SILENT_SECONDS
    waiting: Counter[str] = field(default_factory=Counter)  # live, a request sent, no first reply yet
    stalled: Counter[str] = field(default_factory=Counter)  # waiting, accepted, silent


# -- requests --------------------------------------------------------------------------------------------------------


def attribute(kind: int, payload: bytes) -> bytes:
    # The length does not include the padding to four bytes.
    length = _ATTRIBUTE.size + len(payload)
    return _ATTRIBUTE.pack(length, kind) + payload + bytes(-length % 4)


def message(kind: int, flags: int, number: int, attributes: bytes) -> bytes:
    """One request; its answers carry the same `number`."""
    body = _NFGEN.pack(IPV4, 0, 0) + attributes
    return MESSAGE.pack(MESSAGE.size + len(body), SUBSYSTEM | kind, REQUEST | flags, number, 0) + body


def listing_request(ports: Collection[int], backend: str = "", waiting_only: bool = False) -> bytes:
    """The request for all flows to the service's ports, or only for those of one backend, or those that wait for a
    first reply.

    The kernel does the filtering: by address and port since Linux 5.8, by mark in all versions. It can select one port;
    with several, and on an older kernel, it sends more flows than requested. So `flows` and `deletions` check each flow
    themselves."""
    # All flows of the service, by protocol and port.
    protocol, match = attribute(PROTO_NUMBER, bytes([TCP])), MATCH_PROTO_NUMBER
    if len(ports) == 1:
        protocol += attribute(PROTO_DESTINATION_PORT, struct.pack("!H", *ports))
        match |= MATCH_DESTINATION_PORT
    attributes = attribute(NESTED | ORIGINAL, attribute(NESTED | TUPLE_PROTO, protocol))
    flags = attribute(FILTER_ORIGINAL, _LENGTH.pack(match))
    # Of one backend: replies come from its address.
    if backend:
        source = attribute(IP_SOURCE, IPv4Address(backend).packed)
        attributes += attribute(NESTED | REPLY, attribute(NESTED | TUPLE_IP, source))
        flags += attribute(FILTER_REPLY, _LENGTH.pack(MATCH_IP_SOURCE))
    # That wait for a first reply: of the two bits of the mark, only that of the request is set.
    if waiting_only:
        attributes += attribute(MARK, _NUMBER.pack(REQUEST_MARK))
        attributes += attribute(MARK_MASK, _NUMBER.pack(REQUEST_MARK | REPLY_MARK))
    return message(GET, DUMP, 0, attributes + attribute(NESTED | FILTER, flags))


def deletions(block: bytes, ports: Collection[int], chosen: Callable[[Flow], bool]) -> Iterator[bytes]:
    """For each chosen flow to the service's ports in `block`, the attributes of the message that deletes it: its
    original tuple and its id. With the id, a newer connection with the same ports is kept. Raises ValueError for a
    malformed block."""
    with _malformed():
        for entry in _entries(block):
            flow = _flow(block, entry, ports)
            if flow is not None and chosen(flow):
                tuple_at, id_at = entry[ORIGINAL], entry[ID]
                original_tuple = attribute(NESTED | ORIGINAL, block[tuple_at : tuple_at + _TUPLE.size])
                yield original_tuple + attribute(ID, block[id_at : id_at + 4])


def of_backends(ips: Collection[str], unanswered_only: bool) -> Callable[[Flow], bool]:
    """Chooses these backends' flows; `unanswered_only`: those whose SYN the backend did not answer."""
    wanted = _packed(ips)
    return lambda flow: flow.backend in wanted and (flow.state == SYN_SENT or not unanswered_only)


def misdirected(ips: Collection[str]) -> Callable[[Flow], bool]:
    """Chooses the flows that go to none of these backends, and whose SYN nobody answered."""
    backends = _packed(ips)
    return lambda flow: flow.backend not in backends and flow.state == SYN_SENT


def _packed(ips: Collection[str]) -> frozenset[bytes]:
    return frozenset(IPv4Address(ip).packed for ip in ips)


# -- answers ---------------------------------------------------------------------------------------------------------


def flows(block: bytes, ports: Collection[int]) -> Iterator[Flow]:
    """The TCP flows to the service's ports in one block of a listing. Raises ValueError for a malformed block."""
    with _malformed():
        for entry in _entries(block):
            flow = _flow(block, entry, ports)
            if flow is not None:
                yield flow


def count(seen: Iterable[Flow], timeouts: Timeouts, check_source: str = "") -> FlowCounts:
    """Counts the flows in `seen` by backend, without the manager's self-check connections from `check_source`."""
    checker = IPv4Address(check_source).packed if check_source else None
    # First count equal combinations of these four values: a million flows have few of them.
    kinds: Counter[tuple[bytes, int, bool, bool]] = Counter()
    for flow in seen:
        is_check = flow.source == checker and CHECK_PORTS[0] <= flow.source_port <= CHECK_PORTS[1]
        if flow.state in OVER or is_check:
            continue
        waits = flow.mark & (REQUEST_MARK | REPLY_MARK) == REQUEST_MARK
        silent = timeouts.idle(flow) >= SILENT_SECONDS
        if silent and flow.state in HALF_OPEN:  # of a SYN flood, or of a client that has given up
            continue
        kinds[flow.backend, flow.state, waits, silent] += 1
    # Then add the combinations up by backend.
    counts = FlowCounts()
    for (backend, state, waits, silent), number in kinds.items():
        ip = str(IPv4Address(backend))
        counts.live[ip] += number
        if silent:
            counts.silent[ip] += number
        if waits:
            counts.waiting[ip] += number
        if waits and silent and state in ACCEPTED:
            counts.stalled[ip] += number
    return counts


@contextmanager
def _malformed() -> Iterator[None]:
    """Turns the errors of values that a message does not have, or that end behind the block, into ValueErrors."""
    try:
        yield
    except (LookupError, struct.error) as error:
        raise ValueError("the kernel's listing is malformed") from error


def _entries(block: bytes) -> Iterator[dict[int, int]]:
    """For each message in a block: attribute type → offset of its payload."""
    # Offsets, not values: most attributes are never read, and a listing may have a million messages. That is also why
    # the padding to four bytes is computed in place: a call for each attribute makes this 12 % slower.
    begin = 0
    unpack = _ATTRIBUTE.unpack_from
    while begin < len(block):
        (length,) = _LENGTH.unpack_from(block, begin)
        if length < HEADERS:  # the loops would not end
            raise ValueError("the kernel's listing has a message without headers")
        end, at = begin + length, begin + HEADERS
        entry = {}
        while at < end:
            size, kind = unpack(block, at)
            if size < _ATTRIBUTE.size:
                raise ValueError("the kernel's listing has an attribute without a header")
            entry[kind & TYPE_MASK] = at + _ATTRIBUTE.size
            at += (size + 3) & ~3
        yield entry
        begin = (end + 3) & ~3


def _flow(block: bytes, entry: dict[int, int], ports: Collection[int]) -> Flow | None:
    """The flow of one message; None if it is no TCP connection to one of these ports, or no rule has dispatched it."""
    if PROTOINFO not in entry or TIMEOUT not in entry:
        return None
    source, target, protocol, source_port, port = _TUPLE.unpack_from(block, entry[ORIGINAL])
    if protocol != TCP or port not in ports:
        return None
    backend, _, _, backend_port, _ = _TUPLE.unpack_from(block, entry[REPLY])
    if (backend, backend_port) == (target, port):  # not dispatched: a probe, or another program's own connection
        return None
    state = block[entry[PROTOINFO] + _STATE_OFFSET]
    (remaining,) = _NUMBER.unpack_from(block, entry[TIMEOUT])
    mark = _NUMBER.unpack_from(block, entry[MARK])[0] if MARK in entry else 0
    return Flow(source, source_port, backend, state, remaining, mark)
