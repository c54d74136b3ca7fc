"""A backend and a container, with every value that a test does not state."""

from __future__ import annotations

from core.fleet import ACTIVE, Backend, Container

IP = "198.18.0.2"


def backend(state: str = ACTIVE, name: str = "p-1", **changes: object) -> Backend:
    return Backend(**{"name": name, "state": state, "since": 5.0, "id": f"id-{name}", "ip": IP, **changes})  # type: ignore[arg-type]


def container(status: str = "running", name: str = "p-1", **changes: object) -> Container:
    return Container(**{"id": f"id-{name}", "name": name, "ip": IP, "status": status, **changes})  # type: ignore[arg-type]
