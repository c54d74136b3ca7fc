"""What the manager wants of a balancer: the backends it knows and how to serve them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any


@dataclass(frozen=True)
class Backend:
    id: str  # the container's: tells a new backend from an old one on the same address
    ip: str
    state: str  # starting | active | draining | spare
    weight: float
    node: str = ""  # the machine it is on, where there are several


@dataclass(frozen=True)
class Snapshot:
    """One answer of the manager to GET /sync. Times in seconds."""

    revision: str = ""
    backends: tuple[Backend, ...] = ()
    port: int = 8000
    health: str = "sync"
    interval: float = 2.0
    drain_timeout: float = 30.0
    weights: str = "equal"  # equal | adaptive
    backend_subnet: str = ""  # the backends' network, where they are to see their clients' own addresses
    locality: str = ""  # prefer: the balancer's own node first
    check_source: str = ""  # the address from which the manager checks the path through the balancer; "": it does not

    @classmethod
    def parse(cls, message: Mapping[str, Any]) -> Snapshot:
        """Reads the manager's answer to GET /sync. Raises KeyError, TypeError or ValueError when it is not one."""
        service = dict(message["service"])
        backends = (
            Backend(b["id"], str(IPv4Address(b["ip"])), b["state"], float(b["weight"]), b.get("node", ""))
            for b in message["backends"]
        )
        check_source = service.get("check_source", "")
        return cls(
            message["revision"],
            tuple(backends),
            int(service["port"]),
            service["health"],
            float(service["interval"]),
            float(service["drain_timeout"]),
            service["weights"],
            service["backend_subnet"],
            service.get("locality", ""),
            str(IPv4Address(check_source)) if check_source else "",
        )
