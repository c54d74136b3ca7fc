"""The kernel's connection table over a netlink socket: lists it in blocks, and deletes flows. Needs NET_ADMIN.

The program conntrack does the same, but it filters by address outside the kernel, needs a scan for each address, and
prints text: six seconds and 160 MB for a million flows, where the kernel's own filter takes 0.4 s.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import Iterable, Iterator
from itertools import islice

import flows

NETLINK_NETFILTER = 12
BLOCK = 1 << 16  # bytes; the kernel's own blocks are half of that
RECEIVE_BUFFER = 1 << 20
BATCH = 100  # deletions a send
SCAN_SECONDS = 30.0  # the most that one listing may take
NLMSG_ERROR, NLMSG_DONE = 2, 3
DONE_WITH_CODE = 20  # bytes of an NLMSG_DONE that has an error number


class ConntrackError(Exception):
    """The kernel refused a request, or a listing took longer than SCAN_SECONDS."""


def listing(request: bytes) -> Iterator[bytes]:
    """The answer to a request of `flows.listing_request`, block by block."""
    deadline = time.monotonic() + SCAN_SECONDS
    with _opened() as netlink:
        netlink.send(request)
        while True:
            block = _receive(netlink, deadline)
            kind = _kind(block)
            if kind == NLMSG_DONE:
                if len(block) >= DONE_WITH_CODE and _code(block):
                    raise ConntrackError(f"listing of flows: {os.strerror(_code(block))}")
                return
            if kind == NLMSG_ERROR:
                raise ConntrackError(f"listing of flows: {os.strerror(_code(block))}")
            yield block


def delete(deletions: Iterable[bytes]) -> int:
    """Deletes the flows that `flows.deletions` found, and returns how many messages were sent. A flow that has ended
    by itself meanwhile is no error."""
    sent = 0
    remaining = iter(deletions)
    deadline = time.monotonic() + SCAN_SECONDS
    with _opened() as netlink:
        while batch := list(islice(remaining, BATCH)):
            last = len(batch) - 1
            messages = [
                flows.message(flows.DELETE, flows.ACK if i == last else 0, i, attributes)
                for i, attributes in enumerate(batch)
            ]
            netlink.send(b"".join(messages))
            _read_answers(netlink, last, deadline)
            sent += len(batch)
    return sent


def _read_answers(netlink: socket.socket, last: int, deadline: float) -> None:
    """The kernel answers a deletion that failed, and the last one of a batch in any case."""
    number = -1
    while number != last:
        answer = _receive(netlink, deadline)
        (number,) = struct.unpack_from("=I", answer, 8)
        if _code(answer) not in (0, errno.ENOENT):
            raise ConntrackError(f"deletion of a flow: {os.strerror(_code(answer))}")


def _opened() -> socket.socket:
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
    netlink.bind((0, 0))
    netlink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
    return netlink


def _receive(netlink: socket.socket, deadline: float) -> bytes:
    remaining = deadline - time.monotonic()
    late = ConntrackError(f"no end after {SCAN_SECONDS:g} s")
    if remaining <= 0:
        raise late
    netlink.settimeout(remaining)
    try:
        return netlink.recv(BLOCK)
    except TimeoutError:
        raise late from None


def _kind(block: bytes) -> int:
    return int(struct.unpack_from("=H", block, 4)[0])


def _code(block: bytes) -> int:
    """The error number of an answer, 0 for an acknowledgement."""
    return -int(struct.unpack_from("=i", block, 16)[0])
