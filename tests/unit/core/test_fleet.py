"""The states of the backends: a table of every transition."""

from __future__ import annotations

from dataclasses import replace

import pytest

from core import fleet as fleets
from core.fleet import (
    ACTIVE,
    DRAINING,
    FAILED,
    SPARE,
    STARTING,
    STOPPED,
    Backend,
    Container,
    Verdict,
)
from core.reasons import NO_REASON, Cause, Reason
from fakes_fleet import backend, container

LISTED, NOW = 90.0, 100.0
READY_TIMEOUT = 60.0
SAVED = {"id-a": ACTIVE, "id-d": DRAINING, "id-s": SPARE, "id-x": STOPPED}  # by the manager before this one
ADOPTED = backend(STARTING, since=NOW, reason=Reason(Cause.ADOPTED), launched=NOW)
LEFT_OVER = backend(STOPPED, since=NOW, reason=Reason(Cause.LEFT_OVER), running=False, launched=NOW)
PLACEHOLDER = backend(STARTING, id="", ip="")
CRASHED = Reason(Cause.ENDED, 3)
EARLIER = Reason(Cause.BALANCER_REPORT, detail="drained")


def ended(state: str, reason: Reason, since: float = NOW) -> Backend:
    return backend(state, since=since, reason=reason, running=False)


def failed_by_others(cause: Cause) -> Backend:
    return backend(FAILED, since=NOW, reason=Reason(cause), external=True)


OBSERVED: dict[str, tuple[Backend | None, Container | None, Backend | None]] = {
    "a running container of ours is adopted as starting": (None, container(), ADOPTED),
    "as active if it was": (None, container(id="id-a"), replace(ADOPTED, id="id-a", state=ACTIVE)),
    "as a spare if it was": (None, container(id="id-s"), replace(ADOPTED, id="id-s", state=SPARE)),
    "a drain is not taken back": (None, container(id="id-d"), replace(ADOPTED, id="id-d", state=DRAINING)),
    "nor a stop": (None, container(id="id-x"), replace(ADOPTED, id="id-x", state=STOPPED)),
    "one that has ended since is removed": (None, container("exited", id="id-a"), replace(LEFT_OVER, id="id-a")),
    "a paused one too": (None, container("paused"), ADOPTED),
    "cut off before this manager started": (
        None,
        container(ip="", disconnected=True),
        replace(ADOPTED, state=FAILED, ip="", reason=Reason(Cause.NETWORK_LOST)),
    ),
    "one that has no address yet is adopted": (None, container(ip=""), replace(ADOPTED, ip="")),
    "adopted with its spec": (None, container(spec="old"), replace(ADOPTED, spec="old")),
    "renamed by somebody": (
        backend(),
        container(name="another-name", id="id-p-1"),
        replace(backend(), name="another-name"),
    ),
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
    "a list that tells no spec": (backend(spec="old"), container(), backend(spec="old")),
    "a spare is listed like any other": (backend(SPARE), container(), backend(SPARE)),
    "a spare died": (backend(SPARE), container("exited", ip="", exit_code=3), ended(FAILED, CRASHED)),
    "a spare paused": (backend(SPARE), container("paused"), failed_by_others(Cause.PAUSED)),
    "paused by somebody": (backend(), container("paused"), failed_by_others(Cause.PAUSED)),
    "cut off before it was ready": (backend(STARTING), container(ip=""), failed_by_others(Cause.NETWORK_LOST)),
    "cut off while it drained: the address is kept": (backend(DRAINING), container(ip=""), backend(DRAINING)),
    "paused while it was stopped": (backend(STOPPED), container("paused"), backend(STOPPED)),
    "no address yet": (PLACEHOLDER, container(ip=""), backend(STARTING, ip="")),
    "died": (backend(), container("exited", ip="", exit_code=3), ended(FAILED, CRASHED)),
    "died before it was ready": (backend(STARTING), container("dead", exit_code=3), ended(FAILED, CRASHED)),
    "left": (backend(DRAINING), container("exited"), ended(STOPPED, Reason(Cause.ENDED_IN_DRAIN))),
    "leaving": (backend(STOPPED, reason=EARLIER), container("removing"), ended(STOPPED, EARLIER, since=5.0)),
    "failed before": (backend(FAILED, reason=EARLIER), container("exited"), ended(FAILED, EARLIER, since=5.0)),
}


@pytest.mark.parametrize(("known", "listed", "expected"), OBSERVED.values(), ids=OBSERVED)
def test_the_engines_list_is_the_truth_about_containers(
    known: Backend | None, listed: Container | None, expected: Backend | None
) -> None:
    before = {"p-1": known} if known else {}
    after = fleets.observe(before, [listed] if listed else [], LISTED, NOW, SAVED)
    assert after == ({expected.name: expected} if expected else {})


def test_backend_with_a_name_that_another_one_had_is_kept() -> None:
    """One was removed after the list began, and before that list the other got its name."""
    removed, renamed = backend(since=LISTED + 1), replace(backend(), name="p-2", id="id-p-2")
    listed = [container(name="p-1", id="id-p-2")]
    for known in ({"p-1": removed, "p-2": renamed}, {"p-2": renamed, "p-1": removed}):
        after = fleets.observe(known, listed, LISTED, NOW)
        assert after == {"p-1": replace(renamed, name="p-1")}


@pytest.mark.parametrize(
    ("state", "after", "reason"),
    [
        (SPARE, FAILED, Reason(Cause.ENDED, 137)),
        (STARTING, FAILED, Reason(Cause.ENDED, 137)),
        (ACTIVE, FAILED, Reason(Cause.ENDED, 137)),
        (DRAINING, STOPPED, Reason(Cause.ENDED_IN_DRAIN)),
        (STOPPED, STOPPED, NO_REASON),
        (FAILED, FAILED, NO_REASON),
    ],
)
def test_an_ended_container_is_a_failure_unless_it_was_draining(state: str, after: str, reason: Reason) -> None:
    seen = fleets.ended(backend(state), 137, NOW)
    assert (seen.state, seen.reason, seen.running, seen.known_to_balancers) == (after, reason, False, False)
    assert seen.since == (NOW if state != after else 5.0)


@pytest.mark.parametrize(
    ("state", "known_to_balancers"),
    [(SPARE, True), (STARTING, True), (ACTIVE, True), (DRAINING, True), (STOPPED, True), (FAILED, False)],
)
def test_balancers_see_a_backend_until_its_container_has_ended_or_it_failed(
    state: str, known_to_balancers: bool
) -> None:
    assert backend(state).known_to_balancers is known_to_balancers
    assert not backend(state, ip="").known_to_balancers
    assert not backend(state, running=False).known_to_balancers


LATE = 5.0 + READY_TIMEOUT


FIT = backend(SPARE, ready=True)


def judge(fleet: fleets.Fleet, healthy: bool | None, now: float, judged: bool = True, since: float = 0) -> fleets.Fleet:
    reports_since = since if judged else None
    return fleets.apply_health(fleet, lambda _: Verdict(healthy, "a why"), reports_since, READY_TIMEOUT, now)


JUDGED = {
    "a spare not yet": (backend(SPARE), False, True, 10, SPARE),
    "a spare never ready": (backend(SPARE), False, True, LATE + 1, FAILED),
    "ready": (backend(STARTING), True, True, 10, ACTIVE),
    "not yet": (backend(STARTING), False, True, 10, STARTING),
    "in time still": (backend(STARTING), None, True, LATE, STARTING),
    "never ready": (backend(STARTING), None, True, LATE + 1, FAILED),
    "unhealthy from the start": (backend(STARTING), False, True, LATE + 1, FAILED),
    "ready late is ready": (backend(STARTING), True, True, LATE + 1, ACTIVE),
    "no balancer reports": (backend(STARTING), None, False, LATE + 1, STARTING),
    "still being launched": (PLACEHOLDER, None, True, LATE + 1, STARTING),
    **{
        f"{state}, {healthy}": (backend(state, ready=state == ACTIVE), healthy, True, LATE + 1, state)
        for state in (ACTIVE, DRAINING, STOPPED, FAILED)
        for healthy in (True, False)
    },
}


@pytest.mark.parametrize(("known", "healthy", "probed", "now", "state"), JUDGED.values(), ids=JUDGED)
def test_reports_make_a_backend_ready_or_failed(
    known: Backend, healthy: bool | None, probed: bool, now: float, state: str
) -> None:
    after = judge({"p-1": known}, healthy, now, probed)["p-1"]
    fit = replace(known, ready=known.ready or state == ACTIVE != known.state)
    if known.state == ACTIVE and healthy is False:
        fit = replace(fit, unhealthy_since=now, unhealthy_why="a why")
    assert after == (fit if state == known.state else fit.to(state, now, after.reason))
    never_ready = Reason(Cause.NOT_READY, READY_TIMEOUT, "a why")
    assert after.reason == (never_ready if state == FAILED != known.state else NO_REASON)


def test_ready_timeout_counts_from_the_first_report_after_a_time_without_any() -> None:
    """After an outage of the balancer, backends that could not be judged are not given up at once."""
    starting = {"p-1": backend(STARTING)}
    assert judge(starting, None, 200, since=195)["p-1"].state == STARTING
    assert judge(starting, None, 195 + READY_TIMEOUT + 1, since=195)["p-1"].state == FAILED


@pytest.mark.parametrize("state", [SPARE, STARTING, ACTIVE])
def test_backend_without_an_address_is_given_up_after_the_ready_timeout(state: str) -> None:
    known = {"p-1": backend(state, ip="")}
    assert judge(known, None, LATE, judged=False)["p-1"].state == state
    after = judge(known, None, LATE + 1, judged=False)["p-1"]
    assert (after.state, after.reason.cause) == (FAILED, Cause.NO_ADDRESS)


def test_spare_that_becomes_unhealthy_is_not_admitted_and_is_replaced_if_it_stays_so() -> None:
    spare = judge({"p-1": FIT}, False, 100)["p-1"]
    assert (spare.state, spare.ready, spare.since) == (SPARE, False, 100)
    assert judge({"p-1": spare}, True, 110)["p-1"].ready
    assert judge({"p-1": spare}, False, 101 + READY_TIMEOUT)["p-1"].state == FAILED


def test_deadlines_of_a_backend_that_changed_after_the_stop_of_the_process_begin_now() -> None:
    before = {"p-1": backend(since=5), "p-2": backend(since=99, unhealthy_since=99)}
    after = fleets.extend_deadlines(before, 20, NOW)
    assert [(one.since, one.unhealthy_since) for one in after.values()] == [(25, None), (NOW, NOW)]


def test_a_spare_found_healthy_is_ready_and_stays_out_of_rotation() -> None:
    after = judge({"p-1": backend(SPARE)}, True, 10)
    assert after == {"p-1": FIT}
    assert fleets.capacity_of(after) == []


@pytest.mark.parametrize(("seconds", "external"), [(1.0, True), (fleets.SIGNAL_EFFECT + 1, False)])
def test_end_counts_as_the_effect_of_a_signal_only_soon_after_it(seconds: float, external: bool) -> None:
    signalled = fleets.after_event(backend(), "kill", 1, 100.0)
    assert fleets.after_event(signalled, "die", 137, 100.0 + seconds).external is external
