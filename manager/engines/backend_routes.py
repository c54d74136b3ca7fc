"""The backends' default routes, for `--preserve-client-ip`.

With it, the balancer keeps the clients' addresses in the packets, so the backends' answers have to return through the
balancer. The manager sets the routes from the host, because the backends have no capability to do so.
"""

from __future__ import annotations

import subprocess
from collections.abc import Collection
from contextlib import suppress
from typing import Any

import docker.errors

from core.engine import EngineError
from core.fleet import Container


class BackendRoutes:
    """Sets each backend's default route once, and again when the balancer's address has changed."""

    def __init__(self, client: Any) -> None:
        self.routed: dict[str, str] = {}  # a backend's id -> the balancer's address
        self._client = client

    def point_to(self, balancer_ip: str, backends: Collection[Container]) -> None:
        """Sets the routes that are missing. Raises EngineError, and what Docker's SDK raises."""
        # Forget the backends that no longer exist.
        listed = {backend.id for backend in backends}
        self.routed = {id_: ip for id_, ip in self.routed.items() if id_ in listed}

        for backend in backends:
            if backend.status == "running" and self.routed.get(backend.id) != balancer_ip:
                self._set_route(backend, balancer_ip)

    def _set_route(self, backend: Container, balancer_ip: str) -> None:
        pid = 0
        with suppress(docker.errors.NotFound):
            pid = self._client.api.inspect_container(backend.id)["State"]["Pid"]
        if not pid:
            return  # the container has ended or was removed since it was listed
        enter_namespace = ["nsenter", f"--net=/proc/{pid}/ns/net"]
        set_route = ["ip", "route", "replace", "default", "via", balancer_ip]
        done = subprocess.run([*enter_namespace, *set_route], capture_output=True, text=True, check=False)
        if done.returncode:
            raise EngineError(f"route of {backend.name} through the balancer: {done.stderr.strip()}")
        self.routed[backend.id] = balancer_ip
