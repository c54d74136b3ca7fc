"""Opens connections from the manager through the balancers, on the clients' path. `core.path_check` evaluates them."""

from __future__ import annotations

import errno
import itertools
import socket
from collections.abc import Iterable

TIMEOUT = 3.0  # seconds; a lost SYN is sent again after one second, and that is no failure
# Source ports that other programs on this host do not use by default (Linux assigns 32768 to 60999). The balancer
# recognizes our connections by these ports and does not count them as load.
SOURCE_PORTS = range(61000, 61064)
# Bind: another program has this port. Connect: we used it for the same target less than a minute ago.
PORT_IN_USE = (errno.EADDRINUSE, errno.EADDRNOTAVAIL)

_ports = itertools.cycle(SOURCE_PORTS)

Target = tuple[str, int]  # address and port


def check(targets: Iterable[Target], source: str) -> dict[str, str]:
    """Opens one connection to each target from the address `source`. Returns ADDRESS:PORT -> the error; empty if it
    worked."""
    return {f"{address}:{port}": connect((address, port), source) for address, port in targets}


def connect(target: Target, source: str) -> str:
    """Opens and closes one connection. Returns the error; empty if it worked.

    A success shows that a backend has accepted the connection: the balancer itself accepts none on this port.
    """
    for _ in SOURCE_PORTS:
        with socket.socket() as connection:
            connection.settimeout(TIMEOUT)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                connection.bind((source, next(_ports)))
                connection.connect(target)
            except OSError as error:
                if error.errno not in PORT_IN_USE:
                    return error.strerror or str(error)
            else:
                return ""
    return "no free source port"
