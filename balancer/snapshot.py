"""The manager's answer to GET /sync: the backends, and how the balancer has to serve them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any

LONGEST = 3600.0  # seconds of any duration


@dataclass(frozen=True)
class Backend:
    id: str  # of its container: a new backend with the address of an old one has another id
    ip: str
    state: str  # starting | active | draining | spare
    node: str = ""  # its Swarm node; empty on a single host


@dataclass(frozen=True)
class Snapshot:
    """Times are in seconds."""

    revision: str = ""
    backends: tuple[Backend, ...] = ()
    port: int = 8000
    health: str = "sync"
    interval: float = 2.0
    drain_timeout: float = 30.0
    weights: str = "equal"  # equal | adaptive
    locality: str = ""  # prefer: the balancer's own node first
    check_source: str = ""  # the address of the manager's self-check connections; empty if there are none

    @property
    def ids(self) -> dict[str, str]:
        """Address → id of every backend."""
        return {backend.ip: backend.id for backend in self.backends}

    @classmethod
    def parse(cls, message: Mapping[str, Any]) -> Snapshot:
        """Reads the manager's message. Raises KeyError, TypeError or ValueError when it is malformed."""
        service = dict(message["service"])
        check_source = _text(service.get("check_source", ""))
        return cls(
            revision=_text(message["revision"]),
            backends=tuple(_backend(row) for row in message["backends"]),
            port=int(_number(service["port"], 1, 65535)),
            health=_text(service["health"]),
            interval=_number(service["interval"], 0.1, LONGEST),
            drain_timeout=_number(service["drain_timeout"], 0, LONGEST),
            weights=_text(service["weights"]),
            locality=_text(service.get("locality", "")),
            check_source=str(IPv4Address(check_source)) if check_source else "",
        )


def _backend(row: Mapping[str, Any]) -> Backend:
    ip = str(IPv4Address(_text(row["ip"])))
    return Backend(_text(row["id"]), ip, _text(row["state"]), _text(row.get("node", "")))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a text was expected, not {value!r}")
    return value


def _number(value: Any, low: float, high: float) -> float:
    if not low <= value <= high:  # also false for NaN; raises TypeError for what is no number
        raise ValueError(f"a number from {low:g} to {high:g} was expected, not {value!r}")
    return float(value)
