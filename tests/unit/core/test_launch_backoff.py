"""Launch backoff: how long it waits, within which bounds, what ends the waiting, and which updates are given up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.launch_backoff import (
    FIRST_WAIT,
    FORGET_AFTER,
    LONGEST_WAIT,
    MAX_UPDATE_FAILURES,
    STABLE,
    TOGETHER,
    LaunchBackoff,
)
from core.reasons import Cause, Reason

NOW = 1000.0


def because(detail: str) -> Reason:
    return Reason(Cause.LAUNCH_ERROR, detail=detail)


def fail(backoff: LaunchBackoff, times: int, spec: str = "new", chance: float = 0.5) -> float:
    """Failures, each as soon as a launch may be tried again; when the last was."""
    now = NOW
    for n in range(1, times + 1):
        now += backoff.wait(now)
        backoff.failed(spec, because(f"reason {n}"), now, chance)
    return now


def test_without_a_failure_there_is_no_wait() -> None:
    assert LaunchBackoff("new").wait(0.0) == 0


@pytest.mark.parametrize(
    ("times", "wait"),
    [(1, 0.5), (2, 1), (3, 2), (4, 4), (5, 8), (6, 16), (7, 30), (8, 30), (10_000, 30)],
)
def test_wait_doubles_with_every_failure_up_to_its_limit(times: int, wait: float) -> None:
    backoff = LaunchBackoff("new")
    last = fail(backoff, times)
    assert (backoff.failures, backoff.why) == (times, f"reason {times}")
    assert backoff.wait(last) == pytest.approx(wait)
    assert backoff.wait(last + 0.75 * wait) == pytest.approx(wait / 4)
    assert backoff.wait(last + wait) == backoff.wait(last + wait + 99) == 0


@given(st.integers(1, 20), st.floats(0, 1))
def test_jitter_changes_the_wait_by_half_at_most(times: int, chance: float) -> None:
    backoff = LaunchBackoff("new")
    wait = backoff.wait(fail(backoff, times, chance=chance))
    assert wait == pytest.approx(min(LONGEST_WAIT, FIRST_WAIT * 2 ** (times - 1)) * (0.5 + chance))


def test_launches_that_fail_together_count_as_one_failure() -> None:
    backoff = LaunchBackoff("new", previous="old")
    last = fail(backoff, 1)
    for _ in range(9):
        backoff.failed("new", because("another reason"), last + 0.9 * FIRST_WAIT, 0.5)
    assert (backoff.failures, backoff.spec, backoff.why) == (1, "new", "another reason")
    assert backoff.wait(last) == FIRST_WAIT


def test_first_failure_of_a_serving_backend_costs_no_wait() -> None:
    backoff = LaunchBackoff("new")
    backoff.failed("new", because("killed"), NOW, 0.5, served=True)
    assert (backoff.failures, backoff.why, backoff.wait(NOW)) == (1, "killed", 0)


def test_serving_backends_that_fail_within_a_second_count_as_one_failure() -> None:
    backoff = LaunchBackoff("new")
    for n in range(5):
        backoff.failed("new", because("killed"), NOW + n * 0.9 * TOGETHER, 0.5, served=True)
    assert (backoff.failures, backoff.wait(NOW + 4)) == (1, 0)


def test_serving_backends_that_fail_repeatedly_back_off() -> None:
    backoff = LaunchBackoff("new")
    now, waits = NOW, []
    for _ in range(8):
        backoff.failed("new", because("killed"), now, 0.5, served=True)
        waits.append(backoff.wait(now))
        for second in range(1, 26):  # it serves for 25 s: the fleet is at its size, but not for long
            backoff.settle(True, now + backoff.wait(now) + second)
        now += backoff.wait(now) + 25
    assert waits == [0, 1, 2, 4, 8, 16, 30, 30]


def test_failures_are_forgotten_after_a_minute_at_the_desired_size() -> None:
    backoff = LaunchBackoff("new")
    last = fail(backoff, 5)
    backoff.settle(False, last + 1000)
    assert backoff.failures == 5, "not at the desired size"
    backoff.settle(True, last + 1001)
    backoff.settle(True, last + 1000 + FORGET_AFTER)
    assert (backoff.failures, backoff.why) == (5, "reason 5"), "not for long enough"
    backoff.settle(False, last + 1001 + FORGET_AFTER)
    backoff.settle(True, last + 2000)
    backoff.settle(True, last + 2000 + FORGET_AFTER)
    assert (backoff.failures, backoff.why, backoff.wait(last)) == (0, "", 0)
    backoff.failed("new", because("again"), last + 3000, 0.5)
    assert backoff.wait(last + 3000) == FIRST_WAIT


def test_update_that_fails_again_and_again_is_given_up_at_once() -> None:
    backoff = LaunchBackoff("new", previous="old")
    last = fail(backoff, MAX_UPDATE_FAILURES - 1)
    assert (backoff.spec, backoff.given_up, backoff.refused) == ("new", "", "")
    last += backoff.wait(last)
    backoff.failed("new", because("exit code 3"), last, 0.5)
    assert (backoff.spec, backoff.previous) == ("old", "")
    assert (backoff.given_up, backoff.refused) == ("exit code 3", "new")
    assert backoff.wait(last) == 0, "the old spec has not failed"
    fail(backoff, 10, "old")
    assert (backoff.spec, backoff.given_up) == ("old", "exit code 3"), "there is nothing else to go back to"


def test_failure_of_an_old_backend_does_not_count_against_the_update() -> None:
    backoff = LaunchBackoff("new", previous="old")
    last = fail(backoff, 10, "old")
    assert (backoff.spec, backoff.previous) == ("new", "old")
    backoff.failed("new", because("not ready"), last + 60, 0.5)
    assert (backoff.spec, backoff.given_up) == ("new", ""), "its first failure"
    backoff.failed("new", because("not ready"), last + 120, 0.5)
    assert (backoff.spec, backoff.given_up) == ("old", "not ready")


def test_proven_update_is_not_given_up() -> None:
    backoff = LaunchBackoff("new", previous="old")
    backoff.mark_stable("old", 0, 1000)
    assert backoff.previous == "old", "old backends prove nothing"
    backoff.mark_stable("new", 0, STABLE)
    assert backoff.previous == "old", "not stable yet"
    backoff.mark_stable("new", 0, STABLE + 0.1)
    fail(backoff, 10)
    assert (backoff.spec, backoff.given_up) == ("new", "")


def test_last_log_line_is_added_to_the_newest_failure_and_to_the_refusal_it_caused() -> None:
    backoff = LaunchBackoff("new", previous="old")
    fail(backoff, MAX_UPDATE_FAILURES)
    backoff.explain("no such file")
    assert backoff.why == backoff.given_up == "reason 2; last log line: no such file"
    backoff.failed("old", because("another"), NOW + 100, 0.5)
    backoff.explain("killed")
    assert (backoff.why, backoff.given_up) == (
        "another; last log line: killed",
        "reason 2; last log line: no such file",
    )


def test_last_log_line_after_the_failure_was_forgotten_is_ignored() -> None:
    backoff = LaunchBackoff("new")
    backoff.explain("killed")
    assert (backoff.why, backoff.given_up) == ("", "")
