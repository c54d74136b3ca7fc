"""The backends' states, and the plan from the actual fleet to the desired one. Pure: values in, values out.

    spare ─▶ starting ─▶ active ─▶ draining ─▶ stopped        and from anywhere ─▶ failed

Ordering, true at every step and so after a crash at any step: a backend leaves rotation (`draining`) before its
container is stopped, and the balancers know of it until the container has ended, so that its last packets reach its
clients. In an update, and where an unhealthy backend is replaced, the new one is active before an old one drains.
The engine's list is the truth about containers. What it does not know (drains, reasons) is kept here. It may be lost:
a new manager adopts every running container of ours, and the plan decides again.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

SPARE, STARTING, ACTIVE, DRAINING, STOPPED, FAILED = "spare", "starting", "active", "draining", "stopped", "failed"
STATES = (SPARE, STARTING, ACTIVE, DRAINING, STOPPED, FAILED)
PAUSED = "somebody paused its container"
LEAVING = "its engine is about to stop it"
NO_ADDRESS = "its container has no address"
REPLACE_AFTER = 10.0  # seconds an active backend may be unhealthy until it is replaced
REPLACED_AT_A_TIME = 0.1  # part of the desired number that may be replaced at the same time; at least one backend
TAKEN_NAMES = 1000  # names of foreign containers that are remembered at most
DRAIN_GRACE = 10.0  # seconds past the drain timeout until the manager no longer waits for the balancers


@dataclass(frozen=True)
class Verdict:
    """What the balancers find of a backend: `healthy` is None while none has an opinion, `why` what a probe met."""

    healthy: bool | None = None
    why: str = ""


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
    unhealthy_since: float | None = None  # for an active one: since when the balancers find it unhealthy
    unhealthy_why: str = ""
    external: bool = False  # somebody else ended it, so its end says nothing about the backend itself

    def to(self, state: str, now: float, reason: str = "") -> Backend:
        return replace(self, state=state, since=now, reason=reason)

    @property
    def short_id(self) -> str:
        """The container's, as the balancers know it: no two backends ever share one, unlike names and addresses."""
        return self.id[:12]

    @property
    def serves(self) -> bool:
        """Whether it is in rotation and a balancer finds it healthy."""
        return self.state == ACTIVE and self.ready and self.unhealthy_since is None

    @property
    def known_to_balancers(self) -> bool:
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
    unhealthy: bool = False  # it drains because it is unhealthy: a failure of what it was made from


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


def observe(
    fleet: Fleet, containers: Iterable[Container], listed_at: float, now: float, serving: Collection[str] = ()
) -> Fleet:
    """The fleet as it is in the light of the engine's list, begun at `listed_at`. A running container that was not
    known is adopted: as active if its address is one of `serving`, which the manager before this one had in rotation,
    else as starting, until a balancer finds it healthy."""
    known_names = {backend.id: backend.name for backend in fleet.values() if backend.id}
    # By id first: a container that somebody renamed is still the same backend.
    listed = {known_names.get(container.id, container.name): container for container in containers}
    result = {}
    for name, backend in fleet.items():
        container = listed.pop(name, None)
        if container is not None:
            result[name] = _compare(backend, container, now)
        elif not backend.id or backend.since > listed_at:
            result[name] = backend  # being launched: too young for this list
    for name, container in listed.items():
        result[name] = _adopted(name, container, serving, now)
    return result


def _adopted(name: str, container: Container, serving: Collection[str], now: float) -> Backend:
    state, reason, running = ACTIVE if container.ip in serving else STARTING, "adopted", True
    if container.leaving:
        state, reason = DRAINING, LEAVING
    if container.ended or container.status == "created":
        state, reason, running = STOPPED, "left over", False
    return Backend(
        name,
        state,
        now,
        container.id,
        container.ip,
        reason,
        running,
        spec=container.spec,
        launched=now,
        node=container.node,
    )


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
    """Its container has ended: as it should while draining or stopping, else a failure."""
    gone = replace(backend, running=False, unhealthy_since=None)
    if backend.state in (STOPPED, FAILED):
        return gone
    if backend.state == DRAINING:
        return gone.to(STOPPED, now, "its container has ended")
    code = "" if exit_code is None else f" with exit code {exit_code}"
    return gone.to(FAILED, now, f"its container ended{code}")


def apply_health(
    fleet: Fleet, verdict: Callable[[Backend], Verdict], judged_since: float | None, ready_timeout: float, now: float
) -> Fleet:
    """The fleet in the light of what the balancers find: who has become ready, who is unhealthy and since when, and who
    has not become ready within `ready_timeout` seconds. These count from `judged_since` at the earliest: since then a
    balancer has reported without a gap. None: none reports now, and nobody is given up."""
    result = dict(fleet)
    for name, backend in fleet.items():
        found = verdict(backend)
        if backend.state == ACTIVE:
            result[name] = _active(backend, found, ready_timeout, now)
        elif backend.state == SPARE and backend.ready and found.healthy is False:
            result[name] = replace(backend, ready=False, since=now)  # not to be admitted; it gets time to recover
        elif backend.state in (SPARE, STARTING) and backend.id and not backend.ready:
            result[name] = _not_ready_yet(backend, found, judged_since, ready_timeout, now)
    return result


def _active(backend: Backend, found: Verdict, ready_timeout: float, now: float) -> Backend:
    if _has_no_address(backend, ready_timeout, now):
        return backend.to(FAILED, now, NO_ADDRESS)
    if found.healthy is not False:
        ready = backend.ready or bool(found.healthy)
        return replace(backend, ready=ready, unhealthy_since=None, unhealthy_why="")
    since = now if backend.unhealthy_since is None else backend.unhealthy_since
    return replace(backend, unhealthy_since=since, unhealthy_why=found.why)


def _not_ready_yet(
    backend: Backend, found: Verdict, judged_since: float | None, ready_timeout: float, now: float
) -> Backend:
    if _has_no_address(backend, ready_timeout, now):
        return backend.to(FAILED, now, NO_ADDRESS)
    if found.healthy and backend.ip:
        ready = replace(backend, ready=True)
        return ready.to(ACTIVE, now) if backend.state == STARTING else ready
    if judged_since is not None and backend.ip and now - max(backend.since, judged_since) > ready_timeout:
        reason = f"not ready within {ready_timeout:g} s"
        return backend.to(FAILED, now, f"{reason}: {found.why}" if found.why else reason)
    return backend


def _has_no_address(backend: Backend, ready_timeout: float, now: float) -> bool:
    """Whether it has been without one for too long, which says enough where no balancer can probe it."""
    return not backend.ip and now - backend.since > ready_timeout


def skip(fleet: Fleet, seconds: float) -> Fleet:
    """The fleet after a time in which this process was stopped and saw nothing: no deadline comes nearer by it."""

    def skipped(backend: Backend) -> Backend:
        unhealthy_since = None if backend.unhealthy_since is None else backend.unhealthy_since + seconds
        return replace(backend, since=backend.since + seconds, unhealthy_since=unhealthy_since)

    return {name: skipped(backend) for name, backend in fleet.items()}


@dataclass
class Namer:
    """Gives new backends the lowest free numbers; `taken` holds names that foreign containers have."""

    prefix: str
    taken: set[str] = field(default_factory=set)

    def take(self, name: str) -> None:
        """A foreign container has this name. Only the newest are kept: the foreign ones may be gone by then."""
        if len(self.taken) >= TAKEN_NAMES:
            self.taken.clear()
        self.taken.add(name)

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


def is_complete(fleet: Fleet, goal: Goal) -> bool:
    """Whether all that is wanted serves, and nothing is on its way in or waits to be replaced."""
    capacity = live(fleet)
    spares = [backend for backend in fleet.values() if backend.state == SPARE and backend.ready]
    all_serve = all(backend.serves and backend.spec in ("", goal.spec) for backend in capacity)
    return all_serve and len(capacity) >= goal.desired and len(spares) >= goal.spares


def plan(fleet: Fleet, goal: Goal, namer: Namer, drain_timeout: float, now: float) -> list[Step]:
    """The steps that take the fleet towards the goal; none when it is there."""
    if goal.replicas is not None:
        as_wanted = goal.replicas == goal.desired and all(b.spec in ("", goal.spec) for b in fleet.values())
        return [] if as_wanted else [Resize(goal.desired)]
    capacity = live(fleet)
    updating = any(backend.spec != goal.spec for backend in capacity if backend.spec and goal.spec)
    # An update takes the unhealthy ones first anyway.
    replacing = [] if updating else _to_replace(capacity, goal.desired, now)
    # So many more than desired, so that a new one is ready before an old or an unhealthy one goes.
    extra = 1 if updating else len(replacing)
    missing = max(0, goal.desired + extra - len(capacity))
    spares = [b for b in fleet.values() if b.state == SPARE]
    usable_spares = sorted((b for b in spares if b.spec == goal.spec), key=lambda b: not b.ready)
    steps: list[Step] = [Admit(backend.name) for backend in usable_spares[:missing]]
    idle = usable_spares[missing:]
    launches = missing - len(steps)
    names = namer.free(fleet, launches + max(0, goal.spares - len(idle)))
    steps += [Launch(name, spare=i >= launches) for i, name in enumerate(names)]
    unwanted = [b for b in spares if b not in usable_spares] + idle[goal.spares :]
    steps += [Drain(backend.name, "spare no longer wanted") for backend in unwanted]
    replaced = _replace(capacity, replacing, goal.desired, now)
    rest = [b for b in capacity if b.name not in {drain.name for drain in replaced}]
    steps += [*replaced, *_scale_in(rest, goal, extra - len(replaced), updating)]
    for backend in fleet.values():
        overdue = backend.state == DRAINING and now - backend.since > drain_timeout + DRAIN_GRACE
        if backend.id and (backend.state in (STOPPED, FAILED) or overdue):
            steps.append(Stop(backend.name))
    return steps


def _to_replace(capacity: list[Backend], desired: int, now: float) -> list[Backend]:
    """Who has been unhealthy for too long, the longest first; no more than may be replaced at a time."""
    ill = [b for b in capacity if b.unhealthy_since is not None and now - b.unhealthy_since > REPLACE_AFTER]
    at_a_time = max(1, int(desired * REPLACED_AT_A_TIME))
    return sorted(ill, key=lambda b: (b.unhealthy_since, by_number(b.name)))[:at_a_time]


def _replace(capacity: list[Backend], replacing: list[Backend], desired: int, now: float) -> list[Drain]:
    """Unhealthy ones drain as soon as their substitutes are in rotation: when more are active than desired."""
    substitutes = max(0, sum(b.state == ACTIVE for b in capacity) - desired)
    drains = []
    for b in replacing[:substitutes]:
        seconds = 0.0 if b.unhealthy_since is None else now - b.unhealthy_since
        drains.append(Drain(b.name, f"unhealthy for {seconds:.0f} s: {b.unhealthy_why}", unhealthy=True))
    return drains


def _scale_in(capacity: list[Backend], goal: Goal, extra: int, updating: bool) -> list[Drain]:
    """Whoever is too many: those of an old spec first; then the unhealthy, those not yet ready and the youngest, whose
    loss is least work lost. Never so many that fewer than desired serve."""

    def serves(b: Backend) -> bool:
        active = b.state == ACTIVE and b.unhealthy_since is None
        return active and (b.ready or not updating or b.spec != goal.spec)

    dispensable = max(0, sum(map(serves, capacity)) - goal.desired)
    surplus = max(0, len(capacity) - goal.desired - extra)
    if updating:
        surplus = max(surplus, dispensable)
    chosen: list[Backend] = []
    for b in sorted(capacity, key=lambda b: (not updating or b.spec == goal.spec, *_worth(b))):
        if len(chosen) < surplus and (not serves(b) or dispensable > 0):
            chosen.append(b)
            dispensable -= serves(b)
    why = f"scale-in to {goal.desired}"
    return [Drain(b.name, "replaced by the update" if updating and b.spec != goal.spec else why) for b in chosen]


def by_number(name: str) -> tuple[int, str]:
    """Sorts backend-2 before backend-10."""
    number = re.search(r"-(\d+)(\.\w+)?$", name)
    return int(number[1]) if number else 0, name


def _worth(backend: Backend) -> tuple[bool, bool, int]:
    return backend.unhealthy_since is None, backend.state == ACTIVE, -by_number(backend.name)[0]
