"""Opens the manager's own connections through the balancers, on the clients' way. `core.path_check` judges them."""

from __future__ import annotations

import errno
import itertools
import socket
from collections.abc import Iterable

TIMEOUT = 3.0  # seconds: one lost SYN is sent again after one second, and that is no failure
# Source ports that no other program of this host uses by default (Linux gives out 32768 to 60999). The balancer knows
# our connections by them, and counts them as no load.
SOURCE_PORTS = range(61000, 61064)

_ports = itertools.cycle(SOURCE_PORTS)

Target = tuple[str, int]  # address and port


def check(targets: Iterable[Target], source: str) -> dict[str, str]:
    """One connection to each target from the address `source`; ADDRESS:PORT -> why it failed, or an empty text."""
    return {f"{address}:{port}": connect((address, port), source) for address, port in targets}


def connect(target: tuple[str, int], source: str) -> str:
    """Opens and closes one connection; why it failed, or nothing. A backend has accepted it, for the balancer itself
    accepts none on this port."""
    for _ in SOURCE_PORTS:
        with socket.socket() as connection:
            connection.settimeout(TIMEOUT)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                _bind(connection, source)
                connection.connect(target)
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL:
                    continue  # this port was used for the same target less than a minute ago
                return error.strerror or str(error)
        return ""
    return "no free source port"


def _bind(connection: socket.socket, source: str) -> None:
    """To the next source port that is free. Raises OSError where none is."""
    for _ in SOURCE_PORTS:
        try:
            connection.bind((source, next(_ports)))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return
    raise OSError(errno.EADDRINUSE, "all source ports of these connections are in use")
