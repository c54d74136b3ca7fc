"""The interface between the manager and the engine that runs the containers: calls, errors, states. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from core.fleet import Container


class EngineError(Exception):
    """The engine refused a call, failed or is unreachable; the message is the engine's."""


class NameTaken(EngineError):
    """Another container has this name."""


class TakenOver(Exception):
    """Another manager has taken over the fleet, so this one has to end. No EngineError, because those are retried."""


class BalancerState(StrEnum):
    """The state of the balancer, or of the service that runs one on each node, according to the engine's list."""

    RUNNING = "running"
    STOPPED = "stopped"
    MISSING = "missing"
    OUTDATED = "made from other settings"


@dataclass(frozen=True)
class Event:
    """A change of a container that the engine reports: `die` of container `id` with its exit code, `kill` with the
    signal, or another action. It is only a hint to list the containers again."""

    action: str
    id: str
    code: int


class Engine(Protocol):
    """Every call may be slow and may raise EngineError.

    There are two kinds. One launches and stops single backends when the manager calls it: `replicas` is None. The other
    keeps a number of backends, chooses which ones it stops, and replaces those that fail: `replicas` is that number in
    the last list, and only `resize` is called. `made_from` is the spec that counts as carried out: the service's, or
    the wanted one if its update was refused. `refused` is the digest of a spec that must not be tried: set by the
    engine when it has given up an update, by the controller from the last manager's file.

    `balancer` is the balancer's state in the last list, and `balancers` are the names by which the running balancers
    report (None: the engine does not know them).
    """

    replicas: int | None = None
    made_from: str = ""
    balancer: BalancerState = BalancerState.RUNNING
    balancers: frozenset[str] | None = None
    refused: str = ""

    # The project's backends, running or not.
    def list(self) -> Sequence[Container]: ...
    # What new backends are created from. Backends with equal texts need no replacement.
    def spec(self) -> str: ...
    # Makes a balancer run that has the current settings.
    def repair_balancer(self) -> None: ...

    def check_path(self) -> Mapping[str, str]:
        """Opens one connection through each balancer. Returns the error of each target, empty if it worked."""
        ...

    # Blocks until the next event. Ends, or raises EngineError, when the engine becomes unreachable.
    def events(self) -> Iterator[Event]: ...

    def launch(self, name: str, spec: str) -> Container:  # noqa: ARG002 - used by the engines
        raise EngineError(f"{name}: this engine launches backends on its own")

    def last_log_line(self, container_id: str) -> str:
        raise EngineError(f"{container_id}: this engine stops backends on its own")

    def stop(self, container_id: str) -> None:
        raise EngineError(f"{container_id}: this engine stops backends on its own")

    def resize(self, count: int, spec: str) -> None:  # noqa: ARG002 - used by the engines
        raise EngineError(f"{count}: this engine keeps no number of backends")
