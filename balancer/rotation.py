"""Which backends get new connections. Pure.

An unhealthy backend leaves rotation at once while at least half of the candidates are healthy. Below half all of them
stay, which is called panic: it is then more likely that the health checks are wrong or that the load is too high, and
fewer backends would make an overload worse. (Envoy's panic threshold, at its default of 50 %.)

Dead backends leave in panic, too, as when half of the nodes are lost: nothing can be connected to them, and they answer
no client, while others do. An overloaded backend is not dead: it still answers some of its clients.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ruleset import Endpoint
from snapshot import Backend, Snapshot

FAR_WEIGHT = 0.1  # of a backend on another node, where near ones are preferred


@dataclass(frozen=True)
class Rotation:
    """The endpoints that get new connections, and the numbers that decided on panic."""

    endpoints: tuple[Endpoint, ...] = ()
    healthy: int = 0
    candidates: int = 0

    @property
    def panic(self) -> bool:
        return 2 * self.healthy < self.candidates


def rotation(
    snapshot: Snapshot, healthy: Mapping[str, bool | None], node: str = "", dead: Collection[str] = ()
) -> Rotation:
    """`healthy` is by id: None, or no entry, where no probe has been answered yet. `dead` are ids.

    Candidates are the active backends, and starting ones that a probe found healthy; never spares or draining ones.
    An active backend without a verdict counts as healthy: it was in rotation before this client began."""
    candidates = [b for b in snapshot.backends if _is_candidate(b, healthy.get(b.id))]
    good = [b for b in candidates if healthy.get(b.id) is not False]
    panic = Rotation((), len(good), len(candidates)).panic
    alive = [b for b in candidates if b.id not in dead]
    chosen = (alive or candidates) if panic else good
    return Rotation(_endpoints(snapshot, chosen, node), len(good), len(candidates))


def _is_candidate(backend: Backend, healthy: bool | None) -> bool:
    return backend.state == "active" or (backend.state == "starting" and healthy is True)


def _endpoints(snapshot: Snapshot, chosen: list[Backend], node: str) -> tuple[Endpoint, ...]:
    """Where the snapshot prefers near backends, and there is one, those on other nodes get little."""
    some_are_near = any(backend.node == node for backend in chosen)
    far = FAR_WEIGHT if snapshot.locality and some_are_near else 1.0
    return tuple(Endpoint(b.ip, snapshot.port, b.weight * (1.0 if b.node == node else far)) for b in chosen)
