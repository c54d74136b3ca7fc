"""What the manager needs of whoever runs the containers: the calls, their errors, and what a list shows. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from core.fleet import Container


class EngineError(Exception):
    """The engine refused, failed or is unreachable; the message is its own."""


class NameTaken(EngineError):
    """A container that is not ours has the name."""


class TakenOver(Exception):
    """Another manager has the fleet now, so this one ends. No EngineError: trying again is wrong."""


class BalancerState(StrEnum):
    """What the engine's list shows of the balancer, or of the service that runs one on each node."""

    RUNNING = "running"
    STOPPED = "stopped"
    MISSING = "missing"
    OUTDATED = "made from other settings"


@dataclass(frozen=True)
class Event:
    """A hint that something happened: `die` of container `id` with its exit code, `kill` with its signal, or whatever
    else is worth a look at the list."""

    action: str
    id: str
    code: int


class Engine(Protocol):
    """What the manager needs of whoever runs the backends. Every call may be slow and may raise EngineError.

    One kind of engine does as it is told, backend by backend: `replicas` is None, `launch` and `stop` are called. The
    other keeps a number of them by itself, picks who leaves and replaces what fails: `replicas` says how many it was
    told to keep when last listed, and only `resize` is called.

    As of the last list: `balancer` is the balancer's state, and `balancers` are the names by which the running ones
    report (None: the engine cannot tell).
    """

    replicas: int | None = None
    balancer: BalancerState = BalancerState.RUNNING
    balancers: frozenset[str] | None = None
    refused: str = ""  # for an engine that keeps a number: the digest of the update's spec that it has gone back from

    def list(self) -> Sequence[Container]: ...
    def spec(self) -> str: ...
    def last_log_line(self, container_id: str) -> str: ...
    def repair_balancer(self) -> None: ...

    def check_path(self) -> Mapping[str, str]:
        """Opens one connection through each balancer; for each target why it failed, or an empty text."""
        ...

    def events(self) -> Iterator[Event]: ...

    def launch(self, name: str, spec: str) -> Container:  # noqa: ARG002 - the twin uses it
        raise EngineError(f"{name}: this engine launches by itself")

    def stop(self, container_id: str) -> None:
        raise EngineError(f"{container_id}: this engine stops by itself")

    def resize(self, count: int, spec: str) -> None:  # noqa: ARG002 - the twin uses it
        raise EngineError(f"{count}: this engine keeps no number of backends by itself")
