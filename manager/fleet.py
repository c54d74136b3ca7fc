"""The backends' states, and the plan from the actual fleet to the desired one. Pure: values in, values out.

    spare ─▶ starting ─▶ active ─▶ draining ─▶ stopped        and from anywhere ─▶ failed

Ordering, true at every step and so after a crash at any: a backend leaves rotation (`draining`) before its container
is stopped, and stays in the balancers' view until the container has ended, so that its last words reach its clients; in
an update the new one is active before an old one drains. The engine's list is the truth about containers; what it does
not know (drains, reasons) is kept here and is rebuilt harmlessly when lost: a running container of ours is adopted as
active, and the plan decides again.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

SPARE, STARTING, ACTIVE, DRAINING, STOPPED, FAILED = "spare", "starting", "active", "draining", "stopped", "failed"
STATES = (SPARE, STARTING, ACTIVE, DRAINING, STOPPED, FAILED)
PAUSED = "somebody paused its container"
LEAVING = "its engine is about to stop it"
READY_WITHIN = 60.0  # seconds a launched backend may take to be found healthy
DRAIN_GRACE = 10.0  # seconds past the drain timeout until the manager stops waiting for a balancer's word


@dataclass(frozen=True)
class Container:
    """One of our backends as the engine lists it; `ip` is empty while it has none."""

    id: str
    name: str
    ip: str
    status: str  # Docker's word: created, running, paused, restarting, exited, dead, removing
    exit_code: int | None = None
    spec: str = ""  # what it was made from: image and options, as the engine writes them
    node: str = ""  # the machine it is on, where there are several
    leaving: bool = False  # whoever runs it wants it gone, and will stop it or has begun to

    @property
    def ended(self) -> bool:
        return self.status in ("exited", "dead", "removing")


@dataclass(frozen=True)
class Backend:
    """`id` and `ip` are empty until the engine has launched it; `since` is when it entered its state. A spare is out of
    rotation; `ready` says whether a balancer has found it healthy, which for the others shows in their state."""

    name: str
    state: str
    since: float
    id: str = ""
    ip: str = ""
    reason: str = ""
    running: bool = True
    spec: str = ""
    ready: bool = False
    launched: float = 0.0
    drained_by: frozenset[str] = frozenset()  # the balancers that have seen its last connection end
    node: str = ""

    def to(self, state: str, now: float, reason: str = "") -> Backend:
        return replace(self, state=state, since=now, reason=reason)

    @property
    def short_id(self) -> str:
        """The container's, as the balancers know it: no two backends ever share one, unlike names and addresses."""
        return self.id[:12]

    @property
    def in_view(self) -> bool:
        """Whether the balancers are told of it."""
        return bool(self.ip) and self.running and self.state != FAILED


Fleet = Mapping[str, Backend]  # by name


@dataclass(frozen=True)
class Launch:
    name: str
    spare: bool = False


@dataclass(frozen=True)
class Admit:
    """Let a spare into rotation."""

    name: str


@dataclass(frozen=True)
class Drain:
    name: str
    reason: str


@dataclass(frozen=True)
class Stop:
    """Stop the container, if it still runs, and remove it."""

    name: str


@dataclass(frozen=True)
class Resize:
    """Tell an engine that keeps a number of backends by itself how many, and what they are made from."""

    count: int


Step = Launch | Admit | Drain | Stop | Resize


def live(fleet: Fleet) -> list[Backend]:
    """The capacity: all that serve or soon will."""
    return [backend for backend in fleet.values() if backend.state in (STARTING, ACTIVE)]


def observe(fleet: Fleet, containers: Iterable[Container], listed_at: float, now: float, found: str = ACTIVE) -> Fleet:
    """The fleet as it is in the light of the engine's list, begun at `listed_at`. Whatever runs and was not known is
    `found`: active when a manager adopts it; starting when an engine that launches by itself has launched it."""
    listed = {container.name: container for container in containers}
    result = {}
    for name, backend in fleet.items():
        container = listed.pop(name, None)
        if container is not None:
            result[name] = _compare(backend, container, now)
        elif not backend.id or backend.since > listed_at:
            result[name] = backend  # being launched: too young for this list
    for name, container in listed.items():
        stray = Backend(
            name, found, now, container.id, container.ip, spec=container.spec, launched=now, node=container.node
        )
        stray = replace(stray, reason="adopted") if found == ACTIVE else stray
        if container.leaving:
            stray = replace(stray, state=DRAINING, reason=LEAVING)
        if container.ended or container.status == "created":
            stray = replace(stray, state=STOPPED, reason="left over", running=False)
        result[name] = stray
    return result


def _compare(backend: Backend, container: Container, now: float) -> Backend:
    if container.status == "created" or (backend.id and backend.id != container.id):
        return backend  # our own launch, not finished yet; or a list older than what we know
    seen = replace(
        backend,
        id=container.id,
        node=container.node,
        ip=container.ip or backend.ip,
        spec=container.spec or backend.spec,
    )
    if container.ended:
        return ended(seen, container.exit_code, now)
    if container.leaving and backend.state in (SPARE, STARTING, ACTIVE):
        return seen.to(DRAINING, now, LEAVING)
    if backend.state in (SPARE, STARTING, ACTIVE) and backend.ip and (container.status == "paused" or not container.ip):
        why = PAUSED if container.ip else "its container has lost its network"
        return seen.to(FAILED, now, why)
    return seen


def ended(backend: Backend, exit_code: int | None, now: float) -> Backend:
    """Its container has ended: as it should while leaving, else a failure."""
    gone = replace(backend, running=False)
    if backend.state in (STOPPED, FAILED):
        return gone
    if backend.state == DRAINING:
        return gone.to(STOPPED, now, "its container has ended")
    return gone.to(FAILED, now, f"its container ended with exit code {exit_code}")


def hear(
    fleet: Fleet,
    healthy: Callable[[Backend], bool | None],
    probed: bool,
    now: float,
    met: Callable[[Backend], str] = lambda _: "",
) -> Fleet:
    """What the balancers say: who has become ready, and who (while anybody probes) never does, and what they `met`."""
    result = dict(fleet)
    for name, backend in fleet.items():
        if backend.state == ACTIVE and not backend.ready and healthy(backend):
            result[name] = replace(backend, ready=True)
        if backend.state == ACTIVE and not backend.ip and now - backend.since > READY_WITHIN:
            result[name] = backend.to(FAILED, now, "its container has no address")
        if backend.state in (SPARE, STARTING) and backend.ip and not backend.ready:
            if healthy(backend):
                fit = replace(backend, ready=True)
                result[name] = fit.to(ACTIVE, now) if backend.state == STARTING else fit
            elif probed and now - backend.since > READY_WITHIN:
                why = f"not ready within {READY_WITHIN:g} s"
                result[name] = backend.to(FAILED, now, f"{why}: {told}" if (told := met(backend)) else why)
    return result


@dataclass
class Namer:
    """Gives new backends the lowest free numbers; `taken` holds names that strangers' containers bear."""

    prefix: str
    taken: set[str] = field(default_factory=set)

    def free(self, fleet: Fleet, count: int) -> list[str]:
        names = (f"{self.prefix}{number}" for number in itertools.count(1))
        return list(itertools.islice((n for n in names if n not in fleet and n not in self.taken), max(0, count)))


@dataclass(frozen=True)
class Goal:
    """So many backends in rotation, so many spares beside them, all made from `spec`."""

    desired: int
    spares: int = 0
    spec: str = ""
    replicas: int | None = None  # what an engine that keeps a number by itself keeps now; None: it does as it is told


def plan(fleet: Fleet, goal: Goal, namer: Namer, drain_timeout: float, now: float) -> list[Step]:
    """The steps that take the fleet towards the goal; none when it is there."""
    if goal.replicas is not None:
        as_wanted = goal.replicas == goal.desired and all(b.spec in ("", goal.spec) for b in fleet.values())
        return [] if as_wanted else [Resize(goal.desired)]
    capacity = live(fleet)
    updating = any(backend.spec != goal.spec for backend in capacity if backend.spec and goal.spec)
    # While some are made from an old spec there is one more than desired, so that a new one is ready before they go.
    missing = max(0, goal.desired + updating - len(capacity))
    spares = [b for b in fleet.values() if b.state == SPARE]
    fit = sorted((b for b in spares if b.spec == goal.spec), key=lambda b: not b.ready)
    steps: list[Step] = [Admit(backend.name) for backend in fit[:missing]]
    idle = fit[missing:]
    launches = missing - len(steps)
    names = namer.free(fleet, launches + max(0, goal.spares - len(idle)))
    steps += [Launch(name, spare=i >= launches) for i, name in enumerate(names)]
    unwanted = [b for b in spares if b not in fit] + idle[goal.spares :]
    steps += [Drain(backend.name, "spare no longer wanted") for backend in unwanted]
    steps += _scale_in(capacity, goal, updating)
    for backend in fleet.values():
        overdue = backend.state == DRAINING and now - backend.since > drain_timeout + DRAIN_GRACE
        if backend.id and (backend.state in (STOPPED, FAILED) or overdue):
            steps.append(Stop(backend.name))
    return steps


def _scale_in(capacity: list[Backend], goal: Goal, updating: bool) -> list[Drain]:
    """Whoever is too many: those of an old spec first; then those not yet ready and the youngest, whose loss is least
    work lost, and which a restarted manager would choose again. Never so many that fewer than desired serve."""

    def serves(b: Backend) -> bool:
        return b.state == ACTIVE and (b.ready or not updating or b.spec != goal.spec)

    dispensable = max(0, sum(map(serves, capacity)) - goal.desired)
    surplus = max(0, len(capacity) - goal.desired - updating)
    if updating:
        surplus = max(surplus, dispensable)
    leavers: list[Backend] = []
    for b in sorted(capacity, key=lambda b: (not updating or b.spec == goal.spec, *_worth(b))):
        if len(leavers) < surplus and (not serves(b) or dispensable > 0):
            leavers.append(b)
            dispensable -= serves(b)
    why = f"scale-in to {goal.desired}"
    return [Drain(b.name, "replaced by the update" if updating and b.spec != goal.spec else why) for b in leavers]


def by_number(name: str) -> tuple[int, str]:
    """Sorts backend-2 before backend-10."""
    number = re.search(r"-(\d+)(\.\w+)?$", name)
    return int(number[1]) if number else 0, name


def _worth(backend: Backend) -> tuple[bool, int]:
    return backend.state == ACTIVE, -by_number(backend.name)[0]
