"""Where the balancer's rules are, and which connections are the service's. Pure.

There are two data paths. By default the rules are in a network namespace of the balancer's own. With a `bridge` they
are in the host's namespace, beside the rules of Docker, of other projects and of other programs: the chains have the
project's own prefix, and the rules match only packets to the service's address and of the backends' bridge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

CHECK_PORTS = 61000, 61063  # source ports of the manager's self-check connections


@dataclass(frozen=True)
class DataPath:
    """`ports`: each port of the service, as it is in this namespace, and the backends' port that it leads to.
    `sticky`: seconds for which a client keeps its backend; 0: it does not."""

    ports: tuple[tuple[int, int], ...] = ((8000, 8000),)
    prefix: str = "LB-"  # of all chains and sets
    bridge: str = ""  # interface of the backends' network on the host
    subnet: str = ""  # the backends' network, in CIDR notation
    address: str = ""  # the service's; empty: every address of this host
    sticky: int = 0

    @property
    def on_host(self) -> bool:
        return bool(self.bridge)

    @property
    def service_ports(self) -> frozenset[int]:
        return frozenset(port for port, _ in self.ports)

    # Chains and sets. A chain's name has at most 28 characters, so a prefix has at most ten.

    def chain(self, name: str) -> str:
        return self.prefix + name

    def backend_chain(self, ip: str) -> str:
        return f"{self.prefix}B-{ip}"

    @property
    def dispatch(self) -> str:
        return self.prefix + "DISPATCH"

    @property
    def traffic_set(self) -> str:
        """The set of all backends; it counts the packets and bytes to each."""
        return self.prefix + "BACKENDS"

    @property
    def replies_set(self) -> str:
        """The set of all backends; it counts the connections that got a first reply from each."""
        return self.prefix + "REPLIES"

    def sticky_set(self, ip: str) -> str:
        """The set of the clients that keep this backend."""
        return f"{self.prefix}S-{ip}"

    @property
    def clients_set(self) -> str:
        """The set of all clients that keep a backend."""
        return self.prefix + "CLIENTS"

    @property
    def backend_sets(self) -> tuple[str, str]:
        return self.traffic_set, self.replies_set


OWN_NAMESPACE = DataPath()


def from_environment(environ: Mapping[str, str]) -> DataPath:
    """The data path in the variables that the manager sets. Raises ValueError for a malformed one.

    LB_PORTS is a list such as 80:8080,443:8443; without LB_BRIDGE, the rules are in the balancer's own namespace."""
    ports = []
    for pair in environ.get("LB_PORTS", "8000:8000").split(","):
        port, backend_port = pair.split(":")
        ports.append((int(port), int(backend_port)))
    return DataPath(
        ports=tuple(ports),
        prefix=environ.get("LB_PREFIX", "LB-"),
        bridge=environ.get("LB_BRIDGE", ""),
        subnet=environ.get("LB_SUBNET", ""),
        address=environ.get("LB_ADDRESS", ""),
        sticky=int(environ.get("LB_STICKY", "0")),
    )
