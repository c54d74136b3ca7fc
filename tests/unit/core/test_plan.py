"""The plan: tables of fleets and steps, then a simulated engine, on which the manager crashes after any step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import fleet as fleets
from core.fleet import (
    ACTIVE,
    DRAINING,
    FAILED,
    SPARE,
    STARTING,
    STOPPED,
    Backend,
    Verdict,
)
from core.launch_backoff import MAX_UPDATE_FAILURES, LaunchBackoff
from core.plan import (
    DRAIN_GRACE,
    MAX_TAKEN_NAMES,
    REPLACE_AFTER,
    Admit,
    Drain,
    Goal,
    Launch,
    Namer,
    Step,
    Stop,
    is_complete,
    plan,
)
from core.reasons import Cause, Reason
from fakes_fleet import backend, container

NOW = 100.0
READY_TIMEOUT = 60.0
DRAINED = Reason(Cause.BALANCER_REPORT, detail="drained")


def fleet_of(*states: str, **changes: object) -> dict[str, Backend]:
    return {f"p-{n}": backend(state, f"p-{n}", **changes) for n, state in enumerate(states, 1)}


def drains(*numbers: int, to: int) -> list[Step]:
    return [Drain(f"p-{number}", Reason(Cause.SCALE_IN, to)) for number in numbers]


OVERDUE = 5.0 + 30 + DRAIN_GRACE
LONG = REPLACE_AFTER + 0.1


def unhealthy(count: int, *numbers: int, since: float) -> dict[str, Backend]:
    """So many active backends, of which those with these numbers are unhealthy since then."""
    fleet = fleet_of(*[ACTIVE] * count)
    for n in numbers:
        fleet[f"p-{n}"] = replace(fleet[f"p-{n}"], unhealthy_since=since, unhealthy_why="a why")
    return fleet


PLANS: dict[str, tuple[dict[str, Backend], int, float, list[Step]]] = {
    "nothing is enough": ({}, 0, 10, []),
    "from nothing": ({}, 2, 10, [Launch("p-1"), Launch("p-2")]),
    "there already, one starting": (fleet_of(ACTIVE, STARTING), 2, 10, []),
    "grow": (fleet_of(ACTIVE, ACTIVE), 3, 10, [Launch("p-3")]),
    "lowest free numbers": ({"p-2": backend(name="p-2")}, 3, 10, [Launch("p-1"), Launch("p-3")]),
    "a draining is no capacity, nor is its name free": (fleet_of(ACTIVE, DRAINING), 2, 10, [Launch("p-3")]),
    "failed ones are replaced and removed": (fleet_of(FAILED, ACTIVE), 2, 10, [Launch("p-3"), Stop("p-1")]),
    "a drained one is stopped": (fleet_of(STOPPED, ACTIVE), 1, 10, [Stop("p-1")]),
    "nothing there to stop yet": (fleet_of(STOPPED, FAILED, DRAINING, STARTING, id="", ip=""), 1, 1e9, []),
    "the youngest first, by number": (fleet_of(*[ACTIVE] * 11), 9, 10, drains(11, 10, to=9)),
    "the unhealthy before those not yet ready": (
        {**fleet_of(ACTIVE, STARTING, ACTIVE), "p-1": backend(name="p-1", unhealthy_since=8.0)},
        2,
        10,
        drains(1, to=2),
    ),
    "the unhealthy before the youngest": (
        {**fleet_of(*[ACTIVE] * 4), "p-2": backend(name="p-2", unhealthy_since=8.0)},
        2,
        10,
        drains(2, 4, to=2),
    ),
    "unhealthy, but not for long enough": (unhealthy(2, 1, since=0.0), 2, REPLACE_AFTER, []),
    "unhealthy for too long: a substitute first": (unhealthy(2, 1, since=0.0), 2, LONG, [Launch("p-3")]),
    "the substitute is not ready yet": (
        {**unhealthy(2, 1, since=0.0), "p-3": backend(STARTING, "p-3")},
        2,
        LONG,
        [],
    ),
    "the substitute is ready": (
        {**unhealthy(2, 1, since=0.0), "p-3": backend(ACTIVE, "p-3")},
        2,
        LONG,
        [Drain("p-1", Reason(Cause.UNHEALTHY, LONG, "a why"))],
    ),
    "one in ten at a time": (
        unhealthy(30, *range(1, 9), since=0.0),
        30,
        LONG,
        [Launch(f"p-{n}") for n in (31, 32, 33)],
    ),
    "at least one at a time": (unhealthy(3, 1, 2, 3, since=0.0), 3, LONG, [Launch("p-4")]),
    "scale-in while one is replaced": (
        {**unhealthy(2, 1, since=0.0), "p-3": backend(ACTIVE, "p-3")},
        1,
        LONG,
        [Drain("p-1", Reason(Cause.UNHEALTHY, LONG, "a why")), *drains(3, to=1)],
    ),
    "those not yet ready before all": (fleet_of(STARTING, ACTIVE, STARTING, ACTIVE), 1, 10, drains(3, 1, 4, to=1)),
    "draining in time": (fleet_of(ACTIVE, DRAINING), 1, OVERDUE, []),
    "draining overdue": (fleet_of(ACTIVE, DRAINING), 1, OVERDUE + 0.1, [Stop("p-2")]),
}


@pytest.mark.parametrize(("known", "desired", "now", "steps"), PLANS.values(), ids=PLANS)
def test_the_plan_leads_from_the_fleet_to_the_desired_number(
    known: dict[str, Backend], desired: int, now: float, steps: list[Step]
) -> None:
    assert plan(known, Goal(desired), Namer("p-"), 30, now) == steps


def test_name_of_a_foreign_container_is_skipped() -> None:
    assert plan({}, Goal(2), Namer("p-", {"p-1", "p-3"}), 30, NOW) == [Launch("p-2"), Launch("p-4")]


def test_only_so_many_names_of_foreign_containers_are_remembered() -> None:
    namer = Namer("p-")
    for number in range(1, 3 * MAX_TAKEN_NAMES):
        namer.mark_taken(f"p-{number}")
        assert namer.free_names({}, 1) == [f"p-{number + 1}"] or len(namer.taken) < number
    assert len(namer.taken) <= MAX_TAKEN_NAMES


def crew(*words: str) -> dict[str, Backend]:
    """One backend for each word: its state and, after a colon, `ready`, `unhealthy` for long enough to be replaced, or
    `old` (else it is made from "new")."""
    made = {}
    for n, word in enumerate(words, 1):
        state, _, more = word.partition(":")
        spec = "old" if "old" in more else "new"
        one = backend(state, f"p-{n}", spec=spec, ready="ready" in more or state == ACTIVE)
        made[one.name] = replace(one, unhealthy_since=10 - LONG if "unhealthy" in more else None)
    return made


def unwanted(*numbers: int) -> list[Step]:
    return [Drain(f"p-{number}", Reason(Cause.SURPLUS_SPARE)) for number in numbers]


def replaced(*numbers: int) -> list[Step]:
    return [Drain(f"p-{number}", Reason(Cause.UPDATE)) for number in numbers]


WITH_SPARES: dict[str, tuple[dict[str, Backend], int, int, list[Step]]] = {
    "none there": (crew(ACTIVE, ACTIVE), 2, 2, [Launch("p-3", spare=True), Launch("p-4", spare=True)]),
    "all there": (crew(ACTIVE, SPARE), 1, 1, []),
    "backends first, then spares": (crew(ACTIVE), 2, 1, [Launch("p-2"), Launch("p-3", spare=True)]),
    "the ready one is admitted, and replaced": (
        *(crew(ACTIVE, SPARE, "spare:ready"), 2, 2),
        [Admit("p-3"), Launch("p-4", spare=True)],
    ),
    "all that are missing": (
        *(crew(ACTIVE, "spare:ready", SPARE), 4, 2),
        [Admit("p-2"), Admit("p-3"), Launch("p-4"), Launch("p-5", spare=True), Launch("p-6", spare=True)],
    ),
    "one that died is made good by a spare": (
        *(crew(FAILED, ACTIVE, "spare:ready"), 2, 1),
        [Admit("p-3"), Launch("p-4", spare=True), Stop("p-1")],
    ),
    "a failed spare is replaced and removed": (crew(ACTIVE, FAILED), 1, 1, [Launch("p-3", spare=True), Stop("p-2")]),
    "a surplus drains, those not ready first": (crew(ACTIVE, SPARE, "spare:ready", "spare:ready"), 1, 2, unwanted(2)),
    "none wanted any more": (crew(ACTIVE, SPARE, "spare:ready"), 1, 0, unwanted(3, 2)),
    "a stale one drains and is replaced, not admitted": (
        *(crew(ACTIVE, "spare:old,ready"), 2, 1),
        [Launch("p-3"), Launch("p-4", spare=True), *replaced(2)],
    ),
    "scale-in does not touch them": (crew(ACTIVE, ACTIVE, "spare:ready"), 1, 1, drains(2, to=1)),
}


@pytest.mark.parametrize(("known", "desired", "spares", "steps"), WITH_SPARES.values(), ids=WITH_SPARES)
def test_spares_are_launched_admitted_when_needed_and_replaced(
    known: dict[str, Backend], desired: int, spares: int, steps: list[Step]
) -> None:
    assert plan(known, Goal(desired, spares, "new"), Namer("p-"), 30, 10) == steps


OLD, OLD_STARTING, OLD_UNHEALTHY = "active:old", "starting:old", "active:old,unhealthy"
UNHEALTHY = "active:unhealthy"

UPDATES: dict[str, tuple[dict[str, Backend], Goal, list[Step]]] = {
    "one more first": (crew(OLD, OLD), Goal(2, 0, "new"), [Launch("p-3")]),
    "wait until it is active": (crew(OLD, OLD, STARTING), Goal(2, 0, "new"), []),
    "then one old one goes, the youngest": (crew(OLD, OLD, ACTIVE), Goal(2, 0, "new"), replaced(2)),
    "an old one that is not ready goes before": (
        *(crew(OLD, OLD_STARTING, ACTIVE, ACTIVE), Goal(2, 0, "new")),
        replaced(2),
    ),
    "the last": (crew(OLD, ACTIVE, DRAINING), Goal(2, 0, "new"), [Launch("p-4")]),
    "over": (crew(ACTIVE, ACTIVE), Goal(2, 0, "new"), []),
    "a ready spare of the new spec shortens it": (
        *(crew(OLD, OLD, "spare:ready"), Goal(2, 1, "new")),
        [Admit("p-3"), Launch("p-4", spare=True)],
    ),
    "scale-out amid it": (crew(OLD, OLD, STARTING), Goal(4, 0, "new"), [Launch("p-4"), Launch("p-5")]),
    "scale-in amid it takes the old": (crew(OLD, OLD, OLD, ACTIVE), Goal(2, 0, "new"), replaced(3, 2)),
    "scale-in amid it leaves as many active": (crew(OLD, OLD, OLD, STARTING), Goal(2, 0, "new"), replaced(3)),
    "scale-in below the new ones too": (
        *(crew(OLD, ACTIVE, ACTIVE, ACTIVE), Goal(1, 0, "new")),
        [*replaced(1), *drains(4, 3, to=1)],
    ),
    "going back from one that is not ready": (crew(ACTIVE, ACTIVE, OLD_STARTING), Goal(2, 0, "new"), []),
    "an unhealthy old one drains first": (crew(OLD, OLD_UNHEALTHY, OLD, ACTIVE), Goal(3, 0, "new"), replaced(2)),
    "all old ones are unhealthy": (crew(OLD_UNHEALTHY, OLD_UNHEALTHY, ACTIVE), Goal(2, 0, "new"), replaced(2)),
    "the only old one is unhealthy": (crew(OLD_UNHEALTHY, ACTIVE), Goal(1, 0, "new"), replaced(1)),
    "an unhealthy new one is replaced": (
        *(crew(OLD, OLD, UNHEALTHY), Goal(2, 0, "new")),
        [Drain("p-3", Reason(Cause.UNHEALTHY, LONG))],
    ),
}


@pytest.mark.parametrize(("known", "goal", "steps"), UPDATES.values(), ids=UPDATES)
def test_an_update_has_a_new_one_active_before_an_old_one_drains(
    known: dict[str, Backend], goal: Goal, steps: list[Step]
) -> None:
    assert plan(known, goal, Namer("p-"), 30, 10) == steps


WORDS = [ACTIVE, UNHEALTHY, STARTING, OLD, OLD_UNHEALTHY, OLD_STARTING, "spare:ready", "spare:old,ready"]


def test_no_fleet_stops_changing_before_the_goal_and_no_plan_drains_healthy_backends_that_are_needed() -> None:
    crews = itertools.chain(*(itertools.combinations_with_replacement(WORDS, size) for size in range(6)))
    for words, desired, spares in itertools.product(crews, range(1, 6), (0, 1)):
        known, goal = crew(*words), Goal(desired, spares, "new")
        steps = plan(known, goal, Namer("p-"), 30, 10)
        waits = STARTING in words or OLD_STARTING in words
        assert steps or waits or is_complete(known, goal), f"{words}, {desired} desired: stays so for ever"
        serving = {name for name, one in known.items() if one.serves}
        left = serving - {step.name for step in steps if isinstance(step, Drain)}
        assert len(left) >= min(desired, len(serving)), f"{words}, {desired} desired: {steps}"


class World:
    """An engine, a balancer, and a manager that may crash after any of its acts; only containers outlive a crash.

    What runs is made from `old`, what is launched from the manager's spec; what is made from "bad" is never ready.
    After every act the world checks what has to hold always: between the old number of backends and the new one are
    serving, none more runs than that, the spares, and in an update one above and one on its way out, and none in
    rotation is stopped. Each crash adds one: a spare that was being launched is taken for a backend, and the stop of a
    backend that has drained is delayed.
    """

    def __init__(self, running: int, desired: int, spares: int = 0, old: str = "", new: str = "") -> None:
        names = [f"p-{n}" for n in range(1, running + 1)]
        self.containers = {name: container(name=name, ip=f"198.18.0.{n}", spec=old) for n, name in enumerate(names, 2)}
        self.desired, self.spares, self.old, self.new = desired, spares, old, new
        self.bounds = [min(running, desired), max(running, desired) + spares + 2 * (old != new)]
        self.fleet: fleets.Fleet = {}
        self.saved = {one.id: ACTIVE for one in self.containers.values()}
        self.backoff = LaunchBackoff(new, previous=old if old != new else "")
        self.now, self.acts, self.launched, self.warm_up = NOW, 0, running, 0

    def live_until_done(self, crashes: Callable[[int], bool]) -> None:
        quiet = 0
        for _ in range(400):
            self.now += 1
            before = self.acts
            for _ in self.manage():
                self.acts += 1
                self.check()
                if crashes(self.acts):
                    self.crash()
                    break
            quiet = quiet + 1 if self.acts == before else 0
            if quiet > READY_TIMEOUT + 1:
                return
        raise AssertionError(f"never done: {self.fleet}, {self.containers}")

    def crash(self) -> None:
        others = [c.spec for c in self.containers.values() if c.spec != self.new]
        self.bounds[1] += bool(self.spares) + (self.old != self.new)
        self.fleet, self.backoff = {}, LaunchBackoff(self.new, previous=others[0] if others else "")

    def manage(self) -> Iterator[None]:
        """One pass of the manager, with a pause after each of its acts."""
        seen = fleets.observe(self.fleet, self.containers.values(), self.now, self.now, self.saved)
        self.fleet = fleets.apply_health(seen, self.verdict, 0, READY_TIMEOUT, self.now)
        self.save()
        for one in self.fleet.values():
            if one.state == FAILED and seen[one.name].state != FAILED:
                self.backoff.failed(one.spec, one.reason, self.now, 0.5)
            if one.state == ACTIVE and one.ready:
                self.backoff.mark_stable(one.spec, one.since, self.now)
        goal = Goal(self.desired, self.spares, self.backoff.spec)
        for step in plan(self.fleet, goal, Namer("p-"), 30, self.now):
            if not (isinstance(step, Launch) and self.backoff.wait(self.now)):
                yield from {Launch: self.launch, Admit: self.admit, Drain: self.drain, Stop: self.stop}[type(step)](
                    step
                )
        for draining in [b for b in self.fleet.values() if b.state == DRAINING]:  # the balancer: no flows left
            self.put(draining.to(STOPPED, self.now, DRAINED))
            yield

    def verdict(self, one: Backend) -> Verdict:
        return Verdict(one.known_to_balancers and one.spec != "bad" and self.now - one.since >= self.warm_up)

    def launch(self, step: Launch) -> Iterator[None]:
        assert step.name not in self.containers, f"{step.name} doubled"
        spec = self.backoff.spec
        self.put(Backend(step.name, SPARE if step.spare else STARTING, self.now, spec=spec))
        yield
        self.launched += 1
        made = container("created", step.name, id=f"id-{self.launched}", ip="", spec=spec)
        self.containers[step.name] = made
        yield
        self.containers[step.name] = made = replace(made, status="running", ip=f"198.18.1.{self.launched}")
        yield
        self.put(replace(self.fleet[step.name], id=made.id, ip=made.ip, since=self.now))
        yield

    def admit(self, step: Admit) -> Iterator[None]:
        spare = self.fleet[step.name]
        assert spare.state == SPARE
        self.put(spare.to(ACTIVE if spare.ready else STARTING, self.now))
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
        self.save()

    def save(self) -> None:
        self.saved = {one.id: one.state for one in self.fleet.values() if one.id}

    def serving(self) -> set[str]:
        """Those that run, can answer and are not known to be out of rotation."""
        able = {c.name for c in self.containers.values() if c.status == "running" and c.spec != "bad"}
        return able - {b.name for b in self.fleet.values() if b.state in (SPARE, STARTING, DRAINING, STOPPED, FAILED)}

    def check(self) -> None:
        running = [c for c in self.containers.values() if c.status == "running"]
        assert len(running) <= self.bounds[1], "more run than ever were wanted"
        assert len(self.serving()) >= self.bounds[0], "fewer serve than ever were wanted"

    def check_the_end(self, spec: str) -> None:
        assert sorted(self.fleet) == sorted(self.containers), "an orphan, or a ghost"
        assert {c.status for c in self.containers.values()} == {"running"}
        states = sorted(b.state for b in self.fleet.values())
        assert states == [ACTIVE] * self.desired + [SPARE] * self.spares
        assert {c.spec for c in self.containers.values()} == {spec}
        assert {(b.id, b.ip) for b in self.fleet.values()} == {(c.id, c.ip) for c in self.containers.values()}


# running, desired, spares, old and new spec; the acts it takes: 4 a launch, 5 a removal, 1 an admission
COURSES: dict[str, tuple[tuple[int, int, int, str, str], int]] = {
    "from nothing": ((0, 2, 0, "", ""), 8),
    "scale-out": ((2, 5, 0, "", ""), 12),
    "scale-in": ((5, 2, 0, "", ""), 15),
    "nothing to do": ((3, 3, 0, "", ""), 0),
    "spares": ((2, 2, 2, "", ""), 8),
    "spares, and scale-out": ((1, 3, 1, "", ""), 12),
    "update": ((3, 3, 0, "old", "new"), 3 * 9),
    "update with a spare": ((2, 2, 1, "old", "new"), 3 * 4 + 1 + 2 * 5),
    "update and scale-out": ((2, 4, 0, "old", "new"), 2 * 4 + 2 * 9),
    "update and scale-in": ((4, 2, 0, "old", "new"), 2 * 5 + 2 * 9),
}


@pytest.mark.parametrize(("course", "acts"), COURSES.values(), ids=COURSES)
def test_manager_that_crashes_after_any_step_reaches_the_desired_number(
    course: tuple[int, int, int, str, str], acts: int
) -> None:
    calm = World(*course)
    calm.live_until_done(lambda _: False)
    calm.check_the_end(course[-1])
    assert calm.acts == acts
    for crash in range(1, calm.acts + 1):
        world = World(*course)
        world.live_until_done(lambda act, crash=crash: act == crash)
        world.check_the_end(course[-1])


@given(st.integers(0, 6), st.integers(1, 6), st.integers(0, 2), st.booleans(), st.sets(st.integers(1, 60)))
def test_manager_that_crashes_repeatedly_reaches_the_desired_number(
    running: int, desired: int, spares: int, update: bool, crashes: set[int]
) -> None:
    world = World(running, desired, spares, "old" if update else "new", "new")
    world.live_until_done(crashes.__contains__)
    world.check_the_end("new")


@pytest.mark.parametrize("size", [1, 2, 6])
def test_an_update_amid_which_another_size_is_wanted_never_has_fewer_in_rotation_than_that(size: int) -> None:
    for moment in range(1, 30):
        world = World(3, 3, 0, "old", "new")
        world.warm_up, world.bounds = 3, [min(3, size), max(3, size) + 2]

        def turn(act: int, world: World = world, moment: int = moment) -> bool:
            world.desired = size if act >= moment else 3
            return False

        world.live_until_done(turn)
        world.desired = size
        world.live_until_done(lambda _: False)
        world.check_the_end("new")


@pytest.mark.parametrize("spares", [0, 1])
def test_an_update_that_is_never_ready_goes_back_and_ends_with_all_of_the_old(spares: int) -> None:
    world = World(3, 3, spares, "old", "bad")
    world.live_until_done(lambda _: False)
    world.check_the_end("old")
    assert (world.backoff.spec, world.backoff.refusal) == ("old", Reason(Cause.NOT_READY, READY_TIMEOUT))
    assert world.launched - 3 == MAX_UPDATE_FAILURES * (1 + spares) + spares, "so many tries, and no more"
    assert {f"p-{n}" for n in (1, 2, 3)} <= world.containers.keys(), "the old ones never left"
