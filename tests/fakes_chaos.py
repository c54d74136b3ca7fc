"""An observation in which nothing is wrong, for tests of what the campaign finds."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from chaos.observe import Container, Observation


def complete(containers: list[Container], addresses: Collection[str], **status: Any) -> Observation:
    """Of a system with these backends' addresses. Each backend has a row in /status."""
    rows: list[dict[str, Any]] = []
    for one in containers:
        if one.role == "backend":
            rows.append({"name": one.name, "state": "active", "healthy": True, "connections": 10.0})
    return Observation(
        at=100.0,
        status={"desired": len(rows), "backends": rows, "problems": [], **status},
        containers=containers,
        managers=1,
        supervisors=1,
        connections=dict.fromkeys(addresses, 10),
        dispatched=set(addresses),
        members=set(addresses),
        foreign=[],
    )
