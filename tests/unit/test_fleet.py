"""The backends' states and the plan: tables of every transition, then a small world in which the manager crashes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fleet as fleets
from fleet import (
    ACTIVE,
    DRAIN_GRACE,
    DRAINING,
    FAILED,
    READY_WITHIN,
    STARTING,
    STOPPED,
    Backend,
    Container,
    Drain,
    Launch,
    Namer,
    Step,
    Stop,
)

LISTED, NOW = 90.0, 100.0
IP = "198.18.0.2"


def backend(state: str = ACTIVE, name: str = "p-1", **changes: object) -> Backend:
    return Backend(**{"name": name, "state": state, "since": 5.0, "id": f"id-{name}", "ip": IP, **changes})  # type: ignore[arg-type]


def container(status: str = "running", name: str = "p-1", **changes: object) -> Container:
    return Container(**{"id": f"id-{name}", "name": name, "ip": IP, "status": status, **changes})  # type: ignore[arg-type]


ADOPTED = backend(ACTIVE, since=NOW, reason="adopted")
LEFT_OVER = backend(STOPPED, since=NOW, reason="left over", running=False)
PLACEHOLDER = backend(STARTING, id="", ip="")
CRASHED = "its container ended with exit code 3"


def ended(state: str, reason: str, since: float = NOW) -> Backend:
    return backend(state, since=since, reason=reason, running=False)


def failed(reason: str) -> Backend:
    return backend(FAILED, since=NOW, reason=reason)


OBSERVED: dict[str, tuple[Backend | None, Container | None, Backend | None]] = {
    "a running stray is adopted": (None, container(), ADOPTED),
    "a paused one too": (None, container("paused"), ADOPTED),
    "an ended stray is to be removed": (None, container("exited"), LEFT_OVER),
    "a stray never started is to be removed": (None, container("created"), LEFT_OVER),
    "own launch, not yet listed": (PLACEHOLDER, None, PLACEHOLDER),
    "own launch, created": (PLACEHOLDER, container("created", ip=""), PLACEHOLDER),
    "own launch, runs before it is reported": (PLACEHOLDER, container(), backend(STARTING)),
    "own launch, ended at once": (PLACEHOLDER, container("exited", exit_code=3), ended(FAILED, CRASHED)),
    "a list older than the backend": (backend(since=95), None, backend(since=95)),
    "removed by somebody else": (backend(), None, None),
    "removed while it drained": (backend(DRAINING), None, None),
    "a list from before its name was taken again": (backend(), container(id="another"), backend()),
    "nothing new": (backend(), container(), backend()),
    "paused by somebody": (backend(), container("paused"), failed("somebody paused its container")),
    "cut off before it was ready": (backend(STARTING), container(ip=""), failed("its container has lost its network")),
    "cut off while it drained: the address is kept": (backend(DRAINING), container(ip=""), backend(DRAINING)),
    "paused while it was stopped": (backend(STOPPED), container("paused"), backend(STOPPED)),
    "no address yet": (PLACEHOLDER, container(ip=""), backend(STARTING, ip="")),
    "died": (backend(), container("exited", ip="", exit_code=3), ended(FAILED, CRASHED)),
    "died before it was ready": (backend(STARTING), container("dead", exit_code=3), ended(FAILED, CRASHED)),
    "left": (backend(DRAINING), container("exited"), ended(STOPPED, "its container has ended")),
    "leaving": (backend(STOPPED, reason="r"), container("removing"), ended(STOPPED, "r", since=5.0)),
    "failed before": (backend(FAILED, reason="r"), container("exited"), ended(FAILED, "r", since=5.0)),
}


@pytest.mark.parametrize(("known", "listed", "expected"), OBSERVED.values(), ids=OBSERVED)
def test_the_engines_list_is_the_truth_about_containers(
    known: Backend | None, listed: Container | None, expected: Backend | None
) -> None:
    before = {"p-1": known} if known else {}
    after = fleets.observe(before, [listed] if listed else [], LISTED, NOW)
    assert after == ({"p-1": expected} if expected else {})


@pytest.mark.parametrize(
    ("state", "after", "reason"),
    [
        (STARTING, FAILED, "its container ended with exit code 137"),
        (ACTIVE, FAILED, "its container ended with exit code 137"),
        (DRAINING, STOPPED, "its container has ended"),
        (STOPPED, STOPPED, ""),
        (FAILED, FAILED, ""),
    ],
)
def test_an_ended_container_is_a_failure_unless_it_was_leaving(state: str, after: str, reason: str) -> None:
    seen = fleets.ended(backend(state), 137, NOW)
    assert (seen.state, seen.reason, seen.running, seen.in_view) == (after, reason, False, False)
    assert seen.since == (NOW if state != after else 5.0)


@pytest.mark.parametrize(
    ("state", "in_view"), [(STARTING, True), (ACTIVE, True), (DRAINING, True), (STOPPED, True), (FAILED, False)]
)
def test_balancers_see_a_backend_until_its_container_has_ended_or_it_failed(state: str, in_view: bool) -> None:
    assert backend(state).in_view is in_view
    assert not backend(state, ip="").in_view
    assert not backend(state, running=False).in_view


LATE = 5.0 + READY_WITHIN


HEARD = {
    "ready": (backend(STARTING), True, True, 10, ACTIVE),
    "not yet": (backend(STARTING), False, True, 10, STARTING),
    "in time still": (backend(STARTING), None, True, LATE, STARTING),
    "never ready": (backend(STARTING), None, True, LATE + 1, FAILED),
    "ill from the start": (backend(STARTING), False, True, LATE + 1, FAILED),
    "ready late is ready": (backend(STARTING), True, True, LATE + 1, ACTIVE),
    "nobody probes": (backend(STARTING), None, False, LATE + 1, STARTING),
    "still being launched": (PLACEHOLDER, None, True, LATE + 1, STARTING),
    **{
        f"{state}, {healthy}": (backend(state), healthy, True, LATE + 1, state)
        for state in (ACTIVE, DRAINING, STOPPED, FAILED)
        for healthy in (True, False)
    },
}


@pytest.mark.parametrize(("known", "healthy", "probed", "now", "state"), HEARD.values(), ids=HEARD)
def test_balancers_say_who_has_become_ready_and_who_never_does(
    known: Backend, healthy: bool | None, probed: bool, now: float, state: str
) -> None:
    after = fleets.hear({"p-1": known}, lambda _: healthy, probed, now)["p-1"]
    assert after == (known if state == known.state else known.to(state, now, after.reason))
    assert after.reason == ("not ready within 60 s" if state == FAILED != known.state else "")


def fleet_of(*states: str, **changes: object) -> dict[str, Backend]:
    return {f"p-{n}": backend(state, f"p-{n}", **changes) for n, state in enumerate(states, 1)}


def drains(*numbers: int, to: int) -> list[Step]:
    return [Drain(f"p-{number}", f"scale-in to {to}") for number in numbers]


OVERDUE = 5.0 + 30 + DRAIN_GRACE


PLANS: dict[str, tuple[dict[str, Backend], int, float, list[Step]]] = {
    "nothing is enough": ({}, 0, 10, []),
    "from nothing": ({}, 2, 10, [Launch("p-1"), Launch("p-2")]),
    "there already, one starting": (fleet_of(ACTIVE, STARTING), 2, 10, []),
    "grow": (fleet_of(ACTIVE, ACTIVE), 3, 10, [Launch("p-3")]),
    "lowest free numbers": ({"p-2": backend(name="p-2")}, 3, 10, [Launch("p-1"), Launch("p-3")]),
    "a leaver is no capacity, nor is its name free": (fleet_of(ACTIVE, DRAINING), 2, 10, [Launch("p-3")]),
    "the dead are replaced and removed": (fleet_of(FAILED, ACTIVE), 2, 10, [Launch("p-3"), Stop("p-1")]),
    "who has drained is stopped": (fleet_of(STOPPED, ACTIVE), 1, 10, [Stop("p-1")]),
    "nothing there to stop yet": (fleet_of(STOPPED, FAILED, DRAINING, STARTING, id="", ip=""), 1, 1e9, []),
    "the youngest first, by number": (fleet_of(*[ACTIVE] * 11), 9, 10, drains(11, 10, to=9)),
    "those not yet ready before all": (fleet_of(STARTING, ACTIVE, STARTING, ACTIVE), 1, 10, drains(3, 1, 4, to=1)),
    "draining in time": (fleet_of(ACTIVE, DRAINING), 1, OVERDUE, []),
    "draining overdue": (fleet_of(ACTIVE, DRAINING), 1, OVERDUE + 0.1, [Stop("p-2")]),
}


@pytest.mark.parametrize(("known", "desired", "now", "steps"), PLANS.values(), ids=PLANS)
def test_the_plan_leads_from_the_fleet_to_the_desired_number(
    known: dict[str, Backend], desired: int, now: float, steps: list[Step]
) -> None:
    assert fleets.plan(known, desired, Namer("p-"), 30, now) == steps


def test_a_name_that_a_stranger_bears_is_passed_over() -> None:
    assert fleets.plan({}, 2, Namer("p-", {"p-1", "p-3"}), 30, NOW) == [Launch("p-2"), Launch("p-4")]


def test_names_sort_by_their_number() -> None:
    assert sorted(["p-10", "p-2", "other", "p-1"], key=fleets.by_number) == ["other", "p-1", "p-2", "p-10"]


class World:
    """An engine, a balancer, and a manager that may crash after any of its acts; only containers outlive a crash.

    After every act the world checks what has to hold always: between the old number of backends and the new one are
    serving, none more runs, and none in rotation is stopped.
    """

    def __init__(self, running: int, desired: int) -> None:
        names = [f"p-{n}" for n in range(1, running + 1)]
        self.containers = {name: container(name=name, ip=f"198.18.0.{n}") for n, name in enumerate(names, 2)}
        self.desired, self.bounds = desired, sorted((running, desired))
        self.fleet: fleets.Fleet = {}
        self.now, self.acts, self.launched = NOW, 0, running

    def live_until_done(self, crashes: Callable[[int], bool]) -> None:
        for _ in range(100):
            self.now += 1
            before = self.acts
            for _ in self.manage():
                self.acts += 1
                self.check()
                if crashes(self.acts):
                    self.fleet = {}
                    break
            else:
                if self.acts == before:
                    return
        raise AssertionError(f"never done: {self.fleet}, {self.containers}")

    def manage(self) -> Iterator[None]:
        """One pass of the manager, with a pause after each of its acts."""
        seen = fleets.observe(self.fleet, self.containers.values(), self.now, self.now)
        self.fleet = fleets.hear(seen, lambda one: one.in_view, True, self.now)
        for step in fleets.plan(self.fleet, self.desired, Namer("p-"), 30, self.now):
            yield from {Launch: self.launch, Drain: self.drain, Stop: self.stop}[type(step)](step)
        for leaver in [b for b in self.fleet.values() if b.state == DRAINING]:  # the balancer: no flows left
            self.put(leaver.to(STOPPED, self.now, "drained"))
            yield

    def launch(self, step: Launch) -> Iterator[None]:
        assert step.name not in self.containers, f"{step.name} doubled"
        self.put(Backend(step.name, STARTING, self.now))
        yield
        self.launched += 1
        made = container("created", step.name, id=f"id-{self.launched}", ip="")
        self.containers[step.name] = made
        yield
        self.containers[step.name] = made = replace(made, status="running", ip=f"198.18.1.{self.launched}")
        yield
        self.put(replace(self.fleet[step.name], id=made.id, ip=made.ip, since=self.now))
        yield

    def drain(self, step: Drain) -> Iterator[None]:
        self.put(self.fleet[step.name].to(DRAINING, self.now, step.reason))
        yield

    def stop(self, step: Stop) -> Iterator[None]:
        assert step.name not in self.serving(), f"{step.name} stopped in rotation"
        self.containers[step.name] = replace(self.containers[step.name], status="exited", ip="")
        yield
        del self.containers[step.name]
        yield
        self.fleet = {name: b for name, b in self.fleet.items() if name != step.name}
        yield

    def put(self, one: Backend) -> None:
        self.fleet = {**self.fleet, one.name: one}

    def serving(self) -> set[str]:
        running = {c.name for c in self.containers.values() if c.status == "running"}
        return running - {b.name for b in self.fleet.values() if b.state in (DRAINING, STOPPED, FAILED)}

    def check(self) -> None:
        running = [c for c in self.containers.values() if c.status == "running"]
        assert len(running) <= self.bounds[1], "more run than ever were wanted"
        assert len(self.serving()) >= self.bounds[0], "fewer serve than ever were wanted"

    def check_the_end(self) -> None:
        assert sorted(self.fleet) == sorted(self.containers), "an orphan, or a ghost"
        assert {c.status for c in self.containers.values()} == {"running"}
        assert [b.state for b in self.fleet.values()] == [ACTIVE] * self.desired
        assert {(b.id, b.ip) for b in self.fleet.values()} == {(c.id, c.ip) for c in self.containers.values()}


@pytest.mark.parametrize(("running", "desired"), [(0, 2), (2, 5), (5, 2), (3, 3)])
def test_a_manager_that_crashes_after_any_single_act_still_comes_to_the_desired_number(
    running: int, desired: int
) -> None:
    calm = World(running, desired)
    calm.live_until_done(lambda _: False)
    calm.check_the_end()
    assert calm.acts == 4 * max(0, desired - running) + 5 * max(0, running - desired)
    for crash in range(1, calm.acts + 1):
        world = World(running, desired)
        world.live_until_done(lambda act, crash=crash: act == crash)
        world.check_the_end()


@given(st.integers(0, 6), st.integers(1, 6), st.sets(st.integers(1, 60)))
def test_a_manager_that_crashes_again_and_again_still_comes_to_the_desired_number(
    running: int, desired: int, crashes: set[int]
) -> None:
    world = World(running, desired)
    world.live_until_done(crashes.__contains__)
    world.check_the_end()
