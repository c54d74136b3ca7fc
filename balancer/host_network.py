"""What the balancer needs of the host's network when its rules are there: the service's ports are reserved, and the
bridge routes packets of loopback addresses."""

from __future__ import annotations

import logging
import socket
import struct

from ctnetlink import raise_error
from datapath import DataPath
from flows import ACK, MESSAGE, REQUEST, attribute

log = logging.getLogger("balancer")

# linux/rtnetlink.h, linux/if_link.h, linux/ip.h
RTM_NEWLINK = 16
IFLA_AF_SPEC, IFLA_INET_CONF = 26, 1
DEVCONF_ROUTE_LOCALNET = 26


class PortHolder:
    """Holds a bound socket on each port of the service. It does not listen. The rules dispatch the connections, and the
    socket keeps other programs from taking the port."""

    def __init__(self, path: DataPath) -> None:
        self._address = path.address or "0.0.0.0"
        self._ports = path.service_ports if path.on_host else frozenset()
        self._held: dict[int, socket.socket] = {}
        self._failed: dict[int, str] = {}  # the error of each port that could not be reserved; logged once

    def hold(self) -> None:
        """Reserves the ports that are not reserved yet. No connection depends on it, so a failure is only logged."""
        for port in self._ports - self._held.keys():
            # Without SO_REUSEADDR, so that no other program can bind the port, not even with that option.
            reserved = socket.socket()
            try:
                reserved.bind((self._address, port))
            except OSError as error:
                reserved.close()
                if self._failed.get(port) != str(error):
                    log.warning("port %s cannot be reserved, trying again: %s", port, error)
                self._failed[port] = str(error)
            else:
                self._held[port] = reserved

    def close(self) -> None:
        for reserved in self._held.values():
            reserved.close()
        self._held = {}


def route_loopback(bridge: str) -> None:
    """Lets `bridge` route packets of 127.0.0.0/8, so that clients on the loopback interface reach backends. The same as
    the sysctl net.ipv4.conf.BRIDGE.route_localnet=1, which cannot be written in a container. Raises OSError."""
    conf = attribute(DEVCONF_ROUTE_LOCALNET, struct.pack("=I", 1))
    families = attribute(socket.AF_INET, attribute(IFLA_INET_CONF, conf))
    link = struct.pack("=BxHiII", 0, 0, socket.if_nametoindex(bridge), 0, 0)
    body = link + attribute(IFLA_AF_SPEC, families)
    message = MESSAGE.pack(MESSAGE.size + len(body), RTM_NEWLINK, REQUEST | ACK, 1, 0) + body
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        netlink.send(message)
        raise_error(netlink.recv(4096))
