"""The plan: the steps from the actual fleet to the desired one. Pure.

Guaranteed at every step, and so after a crash at any step: a backend is taken out of rotation and drains before its
container is stopped. The balancers know it until its container has ended, so that its last packets reach its clients.
When an update or a failed probe causes a replacement, the new backend is active before the old one drains.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from core.fleet import ACTIVE, DRAINING, FAILED, SPARE, STOPPED, Backend, Fleet, by_number, capacity_of
from core.reasons import Cause, Reason

REPLACE_AFTER = 10.0  # seconds an active backend may be unhealthy until it is replaced
REPLACED_AT_A_TIME = 0.1  # part of the desired number that may be replaced at the same time; at least one backend
MAX_TAKEN_NAMES = 1000  # names of foreign containers that are remembered
DRAIN_GRACE = 10.0  # seconds after the drain timeout until the manager stops waiting for the balancers


@dataclass(frozen=True)
class Launch:
    name: str
    spare: bool = False


@dataclass(frozen=True)
class Admit:
    """Take a spare into rotation."""

    name: str


@dataclass(frozen=True)
class Drain:
    name: str
    reason: Reason


@dataclass(frozen=True)
class Stop:
    """Stop the container, if it still runs, and remove it."""

    name: str


@dataclass(frozen=True)
class Resize:
    """Change the number of backends that the engine keeps, or what they are made from."""

    count: int


Step = Launch | Admit | Drain | Stop | Resize


@dataclass
class Namer:
    """Gives new backends the lowest free numbers; `taken` holds the names of foreign containers."""

    prefix: str
    taken: set[str] = field(default_factory=set)

    def mark_taken(self, name: str) -> None:
        """Remembers that a foreign container has this name."""
        # Start again at the limit: those containers may no longer exist, and a name that is taken is found again.
        if len(self.taken) >= MAX_TAKEN_NAMES:
            self.taken.clear()
        self.taken.add(name)

    def free_names(self, fleet: Fleet, count: int) -> list[str]:
        names: list[str] = []
        numbers = itertools.count(1)
        while len(names) < count:
            name = f"{self.prefix}{next(numbers)}"
            if name not in fleet and name not in self.taken:
                names.append(name)
        return names


@dataclass(frozen=True)
class Goal:
    """The number of backends in rotation, and the number of spares in addition. All are made from `spec`."""

    desired: int
    spares: int = 0
    spec: str = ""
    replicas: int | None = None  # the number that the engine keeps now; None: it launches and stops one by one
    made_from: str = ""  # the spec that counts as carried out there: the service's, or a wanted one that was refused


def is_complete(fleet: Fleet, goal: Goal) -> bool:
    """Whether enough backends and spares are ready, and none is starting or has to be replaced."""
    capacity = capacity_of(fleet)
    spares = sum(backend.state == SPARE and backend.ready for backend in fleet.values())
    all_serve = all(backend.serves and backend.spec == goal.spec for backend in capacity)
    return all_serve and len(capacity) >= goal.desired and spares >= goal.spares


def plan(fleet: Fleet, goal: Goal, namer: Namer, drain_timeout: float, now: float) -> list[Step]:
    """The steps from the fleet to the goal; none when it is reached."""
    # An engine that keeps a number launches and stops backends on its own.
    if goal.replicas is not None:
        up_to_date = goal.replicas == goal.desired and goal.made_from == goal.spec
        return [] if up_to_date else [Resize(goal.desired)]

    capacity = capacity_of(fleet)
    updating = any(backend.spec != goal.spec for backend in capacity)
    # Backends of an old spec are replaced by the update, the unhealthy ones first.
    current = [backend for backend in capacity if backend.spec == goal.spec]
    replacing = _overdue_unhealthy(current, goal.desired, now)
    # For a while more backends than desired, so that a new one is ready before an old or unhealthy one drains.
    surge = max(int(updating), len(replacing))
    missing = max(0, goal.desired + surge - len(capacity))
    steps = _grow(fleet, goal, namer, missing)

    drains = _drain_unhealthy(capacity, replacing, goal.desired, now)
    drained = {drain.name for drain in drains}
    remaining = [backend for backend in capacity if backend.name not in drained]
    return [
        *steps,
        *drains,
        *_scale_in(remaining, goal, surge - len(drains), updating),
        *_stops(fleet, drain_timeout, now),
    ]


def _grow(fleet: Fleet, goal: Goal, namer: Namer, missing: int) -> list[Step]:
    """Adds `missing` backends to the rotation, spares first, and keeps the wanted number of spares."""
    # A spare of an old spec is not admitted, because the update would replace it immediately.
    spares = [backend for backend in fleet.values() if backend.state == SPARE]
    usable = sorted((b for b in spares if b.spec == goal.spec), key=lambda backend: not backend.ready)
    outdated = [backend for backend in spares if backend.spec != goal.spec]
    admitted, idle = usable[:missing], usable[missing:]

    steps: list[Step] = [Admit(backend.name) for backend in admitted]
    launches = missing - len(admitted)
    new_spares = max(0, goal.spares - len(idle))
    for number, name in enumerate(namer.free_names(fleet, launches + new_spares)):
        steps.append(Launch(name, spare=number >= launches))
    steps += [Drain(backend.name, Reason(Cause.UPDATE)) for backend in outdated]
    steps += [Drain(backend.name, Reason(Cause.SURPLUS_SPARE)) for backend in idle[goal.spares :]]
    return steps


def _overdue_unhealthy(capacity: list[Backend], desired: int, now: float) -> list[Backend]:
    """The backends that have been unhealthy for too long, as many as may be replaced at a time, the longest first."""
    unhealthy = [backend for backend in capacity if backend.unhealthy_for(now) > REPLACE_AFTER]
    unhealthy.sort(key=lambda backend: (-backend.unhealthy_for(now), by_number(backend.name)))
    return unhealthy[: max(1, int(desired * REPLACED_AT_A_TIME))]


def _drain_unhealthy(capacity: list[Backend], replacing: list[Backend], desired: int, now: float) -> list[Drain]:
    """Drains unhealthy backends that have a substitute: every active backend above the desired number is one."""
    substitutes = max(0, sum(backend.state == ACTIVE for backend in capacity) - desired)
    drains = []
    for backend in replacing[:substitutes]:
        reason = Reason(Cause.UNHEALTHY, backend.unhealthy_for(now), backend.unhealthy_why)
        drains.append(Drain(backend.name, reason))
    return drains


def _scale_in(capacity: list[Backend], goal: Goal, surge: int, updating: bool) -> list[Drain]:
    """Drains the surplus: first backends of an old spec, then unhealthy ones, then those that are not active yet, then
    those with the highest numbers, which are usually the newest. Healthy ones drain only above the desired number."""

    def counts_as_serving(backend: Backend) -> bool:
        if backend.state != ACTIVE:
            return False
        # An unhealthy backend of an old spec counts as well: it drains before the healthy ones.
        if backend.spec != goal.spec:
            return True
        # An update counts a new backend only once a probe has succeeded: the new image may not work at all.
        return backend.unhealthy_since is None and (backend.ready or not updating)

    def drain_order(backend: Backend) -> tuple[bool, bool, bool, int]:
        healthy, active = backend.unhealthy_since is None, backend.state == ACTIVE
        return backend.spec == goal.spec, healthy, active, -by_number(backend.name)[0]

    # So many of those may drain without leaving fewer than desired.
    dispensable = max(0, sum(map(counts_as_serving, capacity)) - goal.desired)
    surplus = max(0, len(capacity) - goal.desired - surge)
    if updating:
        surplus = max(surplus, dispensable)
    drains: list[Drain] = []
    for backend in sorted(capacity, key=drain_order):
        if len(drains) < surplus and (not counts_as_serving(backend) or dispensable > 0):
            outdated = backend.spec != goal.spec
            reason = Reason(Cause.UPDATE) if outdated else Reason(Cause.SCALE_IN, goal.desired)
            drains.append(Drain(backend.name, reason))
            dispensable -= counts_as_serving(backend)
    return drains


def _stops(fleet: Fleet, drain_timeout: float, now: float) -> list[Stop]:
    """Stops the backends that have drained or failed, and those that have been draining for too long."""
    steps = []
    for backend in fleet.values():
        # Each balancer ends a drain at its timeout. If its report does not come, the manager stops waiting.
        overdue = backend.state == DRAINING and now - backend.since > drain_timeout + DRAIN_GRACE
        if backend.id and (backend.state in (STOPPED, FAILED) or overdue):
            steps.append(Stop(backend.name))
    return steps
