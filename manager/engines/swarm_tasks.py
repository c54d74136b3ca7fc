"""A task of a Swarm service: one container that Swarm has placed on a node, or will. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

RUNNING = ("starting", "running")  # starting: the process runs, and its image's health check has not passed yet
ENDED = ("complete", "shutdown", "failed", "rejected", "remove", "orphaned")


@dataclass(frozen=True)
class Task:
    id: str
    slot: int  # its number in a replicated service
    node: str  # id; empty until Swarm has placed it
    state: str
    desired_state: str
    ip: str  # on the overlay network; may be empty
    container: str  # id; empty for a task that never ran
    exit_code: int | None
    error: str

    @property
    def running(self) -> bool:
        return self.state in RUNNING

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def leaving(self) -> bool:
        """Whether Swarm is going to stop the task, or has done so."""
        return self.desired_state != "running"


def parse_task(listed: Mapping[str, Any]) -> Task:
    """A task from the Engine API's description of it."""
    status = listed["Status"]
    container = status.get("ContainerStatus", {})
    return Task(
        id=listed["ID"],
        slot=listed.get("Slot", 0),
        node=listed.get("NodeID", ""),
        state=status["State"],
        desired_state=listed["DesiredState"],
        ip=_address(listed),
        container=container.get("ContainerID", ""),
        exit_code=container.get("ExitCode"),
        error=status.get("Err", ""),
    )


def _address(listed: Mapping[str, Any]) -> str:
    # A task has one network here, and one address in it.
    for attachment in listed.get("NetworksAttachments") or ():
        for cidr in attachment.get("Addresses") or ():
            return str(cidr).split("/", maxsplit=1)[0]
    return ""
