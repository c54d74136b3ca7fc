"""Which backends get new connections. Pure.

An unhealthy backend leaves rotation immediately while at least half of the candidates are healthy. Below half, all
of them stay, which is called panic: the health checks are then likely to be wrong, or the load too high, and fewer
backends would make an overload worse. (Envoy's panic threshold, at its default of 50 %.)

Unreachable backends leave even in panic, for example when half of the nodes fail. They cannot answer any client, and
other backends can. An overloaded backend stays, because it still answers some of its clients.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from health import Cause, Health
from ruleset import Endpoint
from snapshot import Backend, Snapshot

REMOTE_WEIGHT = 0.1  # of a backend on another node, if the balancer's own node is preferred


@dataclass(frozen=True)
class Rotation:
    """The endpoints that get new connections, and the numbers that decided on panic."""

    endpoints: tuple[Endpoint, ...] = ()
    healthy: int = 0
    candidates: int = 0

    @property
    def panic(self) -> bool:
        return 2 * self.healthy < self.candidates

    @cached_property
    def ips(self) -> frozenset[str]:
        return frozenset(endpoint.ip for endpoint in self.endpoints)


def rotation(
    snapshot: Snapshot,
    health: Mapping[str, Health],
    node: str = "",
    answering: Collection[str] = (),
    before: Collection[str] | None = None,
) -> Rotation:
    """`health` is by id, for every backend of the snapshot; `answering` are the ids of those that answer clients now,
    `before` of those in rotation before. None: any active one may have been, before this client started.

    Candidates are the active backends, and starting ones that a probe found healthy; never spare or draining ones.
    An active backend whose health is unknown counts as healthy if it was in rotation before. Else it is no candidate:
    in a Swarm, a new one may be active before this balancer reaches it."""
    candidates = []
    for backend in snapshot.backends:
        probed = health[backend.id].healthy is not None
        is_active = backend.state == "active" and (probed or before is None or backend.id in before)
        if is_active or (backend.state == "starting" and health[backend.id].healthy):
            candidates.append(backend)
    healthy = [backend for backend in candidates if health[backend.id].healthy is not False]
    panic = 2 * len(healthy) < len(candidates)
    chosen = _reachable(candidates, health, answering) if panic else healthy
    return Rotation(_endpoints(snapshot, chosen, node), len(healthy), len(candidates))


def _reachable(
    candidates: Sequence[Backend], health: Mapping[str, Health], answering: Collection[str]
) -> Sequence[Backend]:
    """`candidates` without the unreachable ones. If no backend is known to answer, all of them: the fault may be
    in this node's own network."""
    some_answer = bool(answering) or any(one.healthy for one in health.values())
    reachable = [b for b in candidates if b.id in answering or health[b.id].cause is not Cause.UNREACHABLE]
    return reachable if some_answer and reachable else candidates


def _endpoints(snapshot: Snapshot, chosen: Sequence[Backend], node: str) -> tuple[Endpoint, ...]:
    # Without a local backend, there is nothing to prefer.
    some_are_local = any(backend.node == node for backend in chosen)
    remote_weight = REMOTE_WEIGHT if snapshot.locality and some_are_local else 1.0
    endpoints = []
    for backend in chosen:
        weight = 1.0 if backend.node == node else remote_weight
        endpoints.append(Endpoint(backend.ip, weight))
    return tuple(endpoints)
