"""The states of the backends, according to the engine's list, its events, and the balancers' reports. Pure.

    spare ─▶ starting ─▶ active ─▶ draining ─▶ stopped

A spare that is ready when it is admitted becomes active at once. Spare, starting and active backends may become failed.
A draining one whose container ends becomes stopped.

Which containers exist is known from the engine's list alone. A new manager adopts every running container of the
project, in the state that the manager before it has saved, and plans from there (see `plan`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from core.reasons import NO_REASON, Cause, Reason

SPARE, STARTING, ACTIVE, DRAINING, STOPPED, FAILED = "spare", "starting", "active", "draining", "stopped", "failed"
STATES = (SPARE, STARTING, ACTIVE, DRAINING, STOPPED, FAILED)
IN_USE = (SPARE, STARTING, ACTIVE)  # may serve now or later
SIGTERM = 15
SIGNAL_EFFECT = 15.0  # seconds after a signal in which the end of a container counts as its effect


@dataclass(frozen=True)
class Verdict:
    """What the balancers report about a backend. `healthy` is None until one of them has probed it; `why` is the result
    of a failed probe."""

    healthy: bool | None = None
    why: str = ""


@dataclass(frozen=True)
class Container:
    """One of the project's backends as the engine lists it; `ip` is empty if it has no address."""

    id: str
    name: str
    ip: str
    status: str  # Docker's: created, running, paused, restarting, exited, dead, removing
    exit_code: int | None = None
    spec: str = ""  # the image and options it was made from, as the engine writes them
    node: str = ""  # the machine it is on, if there are several
    stopping: bool = False  # the engine is about to stop it, or has begun to
    disconnected: bool = False  # from the project's network

    @property
    def ended(self) -> bool:
        return self.status in ("exited", "dead", "removing")


@dataclass(frozen=True)
class Backend:
    """`id` and `ip` are empty until the engine has launched it. `since` is the time at which it entered its state, and
    `reason` why it did. `ready`: a balancer has reported it healthy. A spare is out of rotation, ready or not."""

    name: str
    state: str
    since: float
    id: str = ""
    ip: str = ""
    reason: Reason = NO_REASON
    running: bool = True
    spec: str = ""
    ready: bool = False
    launched: float = 0.0
    node: str = ""
    unhealthy_since: float | None = None  # of an active backend: since when the balancers report it unhealthy
    unhealthy_why: str = ""
    external: bool = False  # another program ended or paused it, which is no failure of the backend
    signalled: float | None = None  # when another program last sent it a signal, except SIGTERM

    def to(self, state: str, now: float, reason: Reason = NO_REASON) -> Backend:
        return replace(self, state=state, since=now, reason=reason)

    @property
    def short_id(self) -> str:
        """The container's id as the balancers know it: unlike names and addresses, it is never used again."""
        return self.id[:12]

    @property
    def serves(self) -> bool:
        """Whether it is in rotation and a balancer reports it healthy."""
        return self.state == ACTIVE and self.healthy

    @property
    def healthy(self) -> bool:
        """Whether a balancer has reported it healthy and the balancers do not report it unhealthy now."""
        return self.ready and self.unhealthy_since is None

    def unhealthy_for(self, now: float) -> float:
        """Seconds since the balancers began to report it unhealthy; 0 while they do not."""
        return 0.0 if self.unhealthy_since is None else now - self.unhealthy_since

    @property
    def known_to_balancers(self) -> bool:
        """Whether it is in the snapshot for the balancers."""
        return bool(self.ip) and self.running and self.state != FAILED


Fleet = Mapping[str, Backend]  # by name


def capacity_of(fleet: Fleet) -> list[Backend]:
    """The backends that the scaler counts: those that serve or soon will."""
    return [backend for backend in fleet.values() if backend.state in (STARTING, ACTIVE)]


def with_address(fleet: Fleet, ip: str) -> Backend | None:
    """The running backend with this address, if there is one."""
    return next((backend for backend in fleet.values() if backend.ip == ip and backend.running), None)


# -- the engine's list and events -------------------------------------------------------------------------------------


def observe(
    fleet: Fleet, containers: Iterable[Container], listed_at: float, now: float, saved: Mapping[str, str] | None = None
) -> Fleet:
    """The fleet according to the engine's list, which began at `listed_at`.

    A running container that was not known is adopted: in its state in `saved`, the states by the id that the manager
    before this one has saved; else as starting, until a balancer reports it healthy. A backend whose container was
    renamed gets the new name.
    """
    known_names = {backend.id: backend.name for backend in fleet.values() if backend.id}
    # By id first: a renamed container is still the same backend.
    listed = {known_names.get(container.id, container.name): container for container in containers}
    result = {}
    for name, backend in fleet.items():
        container = listed.pop(name, None)
        if container is not None:
            seen = _compare(backend, container, now)
            name_now = container.name if container.id == backend.id else name
            result[name_now] = replace(seen, name=name_now)
        elif not backend.id or backend.since > listed_at:
            result.setdefault(name, backend)  # its launch has not ended, or ended after this list began
    for name, container in listed.items():
        result[name] = _adopt(name, container, saved or {}, now)
    return result


def _adopt(name: str, container: Container, saved: Mapping[str, str], now: float) -> Backend:
    # A container that was created and not started is of no use: the manager that launched it has ended.
    ended = container.ended or container.status == "created"
    if ended:
        state, cause = STOPPED, Cause.LEFT_OVER
    elif container.stopping:
        state, cause = DRAINING, Cause.ENGINE_STOP
    elif container.disconnected:
        state, cause = FAILED, Cause.NETWORK_LOST
    else:
        state, cause = saved.get(container.id, STARTING), Cause.ADOPTED
    adopted = Backend(name, state, now, container.id, container.ip, Reason(cause), running=not ended, launched=now)
    return replace(adopted, spec=container.spec, node=container.node)


def _compare(backend: Backend, container: Container, now: float) -> Backend:
    other_container = bool(backend.id) and backend.id != container.id
    if container.status == "created" or other_container:
        return backend  # our own launch is not finished, or the list is older than what is known here
    # The list shows no address for a container that has ended or lost its network, so the known one is kept.
    ip, spec = container.ip or backend.ip, container.spec or backend.spec
    seen = replace(backend, id=container.id, node=container.node, ip=ip, spec=spec)
    if container.ended:
        return ended(seen, container.exit_code, now)
    if backend.state in IN_USE and container.stopping:
        return seen.to(DRAINING, now, Reason(Cause.ENGINE_STOP))
    # What another program does to a container is no failure of the backend.
    by_others = replace(seen, external=True)
    if backend.state in IN_USE and backend.ip and not container.ip:
        return by_others.to(FAILED, now, Reason(Cause.NETWORK_LOST))
    if backend.state in IN_USE and backend.ip and container.status == "paused":
        return by_others.to(FAILED, now, Reason(Cause.PAUSED))
    return seen


def ended(backend: Backend, exit_code: int | None, now: float) -> Backend:
    """The backend after the end of its container: a failure, unless it was draining or being stopped."""
    # Later than that, it may have ended by itself: SIGHUP usually makes a program only read its settings again.
    by_signal = backend.signalled is not None and now - backend.signalled < SIGNAL_EFFECT
    external = backend.external or by_signal
    not_running = replace(backend, running=False, unhealthy_since=None, external=external)
    if backend.state in (STOPPED, FAILED):
        return not_running
    if backend.state == DRAINING:
        return not_running.to(STOPPED, now, Reason(Cause.ENDED_IN_DRAIN))
    return not_running.to(FAILED, now, Reason(Cause.ENDED, exit_code))


def after_event(backend: Backend, action: str, code: int, now: float) -> Backend:
    """The backend after an event of the engine. `code` is the exit code after `die`, the signal after `kill`."""
    if action == "die":
        return ended(backend, code, now)
    # `docker kill` with any signal, or `docker stop` if the image names another signal than SIGTERM. If the container
    # ends soon, that is no failure. The kernel's out-of-memory kill sends no such event.
    if action == "kill" and code != SIGTERM:
        return replace(backend, signalled=now)
    if backend.state not in IN_USE:
        return backend
    if action == "pause":
        return replace(backend, external=True).to(FAILED, now, Reason(Cause.PAUSED))
    # `docker stop` gives the container a grace period, in which it can drain.
    if action == "kill" and code == SIGTERM:
        return backend.to(DRAINING, now, Reason(Cause.EXTERNAL_STOP))
    return backend


# -- the balancers' reports -------------------------------------------------------------------------------------------


def apply_health(
    fleet: Fleet, verdict: Callable[[Backend], Verdict], reports_since: float | None, ready_timeout: float, now: float
) -> Fleet:
    """The fleet according to the balancers' reports: which backends are ready, and which are unhealthy and since when.

    A backend that is not ready within `ready_timeout` seconds has failed. The time counts from `reports_since` at the
    earliest, the time from which on at least one balancer has reported without a gap. If it is None, no balancer
    reports now, and no backend fails because it is not ready.
    """
    result = dict(fleet)
    for name, backend in fleet.items():
        found = verdict(backend)
        if backend.state == ACTIVE:
            result[name] = _active(backend, found, ready_timeout, now)
        elif backend.state == SPARE and backend.ready and found.healthy is False:
            # It is not admitted, and it fails if it does not recover within the ready timeout.
            result[name] = replace(backend, ready=False, since=now)
        elif backend.state in (SPARE, STARTING) and backend.id and not backend.ready:
            result[name] = _not_ready_yet(backend, found, reports_since, ready_timeout, now)
    return result


def _active(backend: Backend, found: Verdict, ready_timeout: float, now: float) -> Backend:
    if _has_no_address(backend, ready_timeout, now):
        return backend.to(FAILED, now, Reason(Cause.NO_ADDRESS))
    if found.healthy is not False:
        ready = backend.ready or bool(found.healthy)
        return replace(backend, ready=ready, unhealthy_since=None, unhealthy_why="")
    since = now if backend.unhealthy_since is None else backend.unhealthy_since
    return replace(backend, unhealthy_since=since, unhealthy_why=found.why)


def _not_ready_yet(
    backend: Backend, found: Verdict, reports_since: float | None, ready_timeout: float, now: float
) -> Backend:
    if _has_no_address(backend, ready_timeout, now):
        return backend.to(FAILED, now, Reason(Cause.NO_ADDRESS))
    if found.healthy and backend.ip:
        ready = replace(backend, ready=True)
        return ready.to(ACTIVE, now) if backend.state == STARTING else ready
    if reports_since is None or not backend.ip:
        return backend
    if now - max(backend.since, reports_since) > ready_timeout:
        return backend.to(FAILED, now, Reason(Cause.NOT_READY, ready_timeout, found.why))
    return backend


def _has_no_address(backend: Backend, ready_timeout: float, now: float) -> bool:
    """Whether it has had no address for too long. This needs no report: no balancer can probe such a backend."""
    return not backend.ip and now - backend.since > ready_timeout


def extend_deadlines(fleet: Fleet, seconds: float, now: float) -> Fleet:
    """The fleet with every deadline `seconds` later, because this process was stopped for that time."""
    result = {}
    for name, backend in fleet.items():
        # A change since then, by a request that was handled first, must not be in the future.
        since, unhealthy_since = min(now, backend.since + seconds), backend.unhealthy_since
        if unhealthy_since is not None:
            unhealthy_since = min(now, unhealthy_since + seconds)
        result[name] = replace(backend, since=since, unhealthy_since=unhealthy_since)
    return result


def by_number(name: str) -> tuple[int, str]:
    """A sort key: backend-2 before backend-10."""
    number = re.search(r"-(\d+)(\.\w+)?$", name)
    return int(number[1]) if number else 0, name
