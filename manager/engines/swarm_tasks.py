"""A task of a Swarm service: one container that Swarm has placed on a node, or will. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

RUNNING = ("starting", "running")  # starting: the process runs, and its image's health check has not passed yet
SPEC_LABEL = "lbscaler.template"  # of a task: which spec it was created from
ENDED = ("complete", "shutdown", "failed", "rejected", "remove", "orphaned")


@dataclass(frozen=True)
class Task:
    id: str
    slot: int  # its number in a replicated service
    node: str  # id; empty until Swarm has placed it
    state: str
    desired_state: str
    spec_label: str
    ip: str  # on the project's network; may be empty
    container: str  # id; empty for a task that never ran
    exit_code: int | None
    error: str

    @property
    def running(self) -> bool:
        return self.state in RUNNING

    @property
    def healthy(self) -> bool:
        """Whether it runs and its image's health check has passed."""
        return self.state == "running"

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def stopping(self) -> bool:
        """Whether Swarm is going to stop the task, or has done so."""
        return self.desired_state != "running"


def parse_task(listed: Mapping[str, Any], network: str) -> Task:
    """A task from the Engine API's description of it. `network`: the name of the project's network."""
    status = listed["Status"]
    container = status.get("ContainerStatus", {})
    return Task(
        id=listed["ID"],
        slot=listed.get("Slot", 0),
        node=listed.get("NodeID", ""),
        state=status["State"],
        desired_state=listed["DesiredState"],
        spec_label=(listed["Spec"]["ContainerSpec"].get("Labels") or {}).get(SPEC_LABEL, ""),
        ip=_address(listed, network),
        container=container.get("ContainerID", ""),
        exit_code=container.get("ExitCode"),
        error=status.get("Err", ""),
    )


def _address(listed: Mapping[str, Any], network: str) -> str:
    # A task has one address in a network. Other networks are those of --attach.
    for attachment in listed.get("NetworksAttachments") or ():
        if attachment["Network"]["Spec"]["Name"] == network:
            for cidr in attachment.get("Addresses") or ():
                return str(cidr).split("/", maxsplit=1)[0]
    return ""
