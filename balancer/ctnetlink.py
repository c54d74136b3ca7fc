"""Lists the kernel's connection table over a netlink socket, block by block, and deletes flows. Needs NET_ADMIN.

Errors of the kernel are OSErrors; a listing or deletion that takes longer than SCAN_SECONDS is a TimeoutError.

The program conntrack does the same, but it filters by address outside the kernel, needs a scan for each address, and
prints text. For a million flows it needs six seconds and 160 MB; the kernel's own filter needs 0.4 s.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import islice

import flows

NETLINK_NETFILTER = 12
BLOCK = 1 << 16  # bytes; the kernel's own blocks are half of that
RECEIVE_BUFFER = 1 << 20
BATCH = 100  # deletions in one send
SCAN_SECONDS = 30.0
HEADER = 16  # bytes of the shortest answer
NLMSG_ERROR, NLMSG_DONE = 2, 3
MAX_ERRNO = 4095  # linux/err.h


def listing(request: bytes) -> Iterator[bytes]:
    """The answer to a request of `flows.listing_request`, block by block."""
    deadline = time.monotonic() + SCAN_SECONDS
    with _open_socket() as netlink:
        netlink.send(request)
        while True:
            block = _receive(netlink, deadline)
            # DONE ends a listing; a request that the kernel refuses gets only an ERROR.
            if kind_of(block) in (NLMSG_ERROR, NLMSG_DONE):
                raise_error(block)
                return
            yield block


def delete(deletions: Iterable[bytes]) -> None:
    """Deletes the flows that `flows.deletions` found. A flow that has ended since then is no error."""
    remaining = iter(deletions)
    deadline = time.monotonic() + SCAN_SECONDS
    with _open_socket() as netlink:
        while batch := list(islice(remaining, BATCH)):
            last = len(batch) - 1
            messages = bytearray()
            # Only the last deletion asks for an acknowledgement: one answer per batch instead of one per flow.
            for i, attributes in enumerate(batch):
                messages += flows.message(flows.DELETE, flows.ACK if i == last else 0, i, attributes)
            netlink.send(messages)
            # The kernel answers every deletion that failed, and the last one of the batch in any case.
            number = -1
            while number != last:
                answer = _receive(netlink, deadline)
                (number,) = struct.unpack_from("=I", answer, 8)
                raise_error(answer, accept=errno.ENOENT)


def _open_socket() -> socket.socket:
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
    netlink.bind((0, 0))
    netlink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
    return netlink


def _receive(netlink: socket.socket, deadline: float) -> bytes:
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError(f"not finished after {SCAN_SECONDS:g} s")
    netlink.settimeout(remaining)
    answer = netlink.recv(BLOCK)
    if len(answer) < HEADER:
        raise OSError(errno.EBADMSG, os.strerror(errno.EBADMSG))
    return answer


def kind_of(answer: bytes) -> int:
    """The type of an answer's first message."""
    return int.from_bytes(answer[4:6], sys.byteorder)


def raise_error(answer: bytes, accept: int = 0) -> None:
    """Raises the error in an answer, except `accept`. An acknowledgement has the code 0; the end of a listing may have
    no code."""
    code = min(MAX_ERRNO, -struct.unpack_from("=i", answer, 16)[0]) if len(answer) >= 20 else 0
    if code not in (0, accept):
        raise OSError(code, os.strerror(code))
