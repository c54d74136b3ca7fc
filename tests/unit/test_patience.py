"""Patience: how long it waits, within which bounds, what ends the waiting, and which updates it gives up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patience import FIRST, GIVE_UP, MOST, STEADY, Patience

NOW = 1000.0


def fail(patience: Patience, times: int, spec: str = "new", chance: float = 0.5) -> float:
    """Failures, each as soon as a launch may be tried again; when the last was."""
    now = NOW
    for n in range(1, times + 1):
        now += patience.wait(now)
        patience.failed(spec, f"reason {n}", now, chance)
    return now


def test_without_a_failure_there_is_nothing_to_wait_for() -> None:
    assert Patience("new").wait(0.0) == 0


@pytest.mark.parametrize(
    ("times", "wait"), [(1, 0.5), (2, 1), (3, 2), (4, 4), (5, 8), (6, 16), (7, MOST), (8, MOST), (10_000, MOST)]
)
def test_the_wait_doubles_with_every_failure_up_to_its_cap_and_then_is_over(times: int, wait: float) -> None:
    patience = Patience("new")
    last = fail(patience, times)
    assert (patience.failures, patience.why) == (times, f"reason {times}")
    assert patience.wait(last) == pytest.approx(wait)
    assert patience.wait(last + 0.75 * wait) == pytest.approx(wait / 4)
    assert patience.wait(last + wait) == patience.wait(last + wait + 99) == 0


@given(st.integers(1, 20), st.floats(0, 1))
def test_jitter_stretches_the_wait_by_half_at_most_either_way(times: int, chance: float) -> None:
    patience = Patience("new")
    wait = patience.wait(fail(patience, times, chance=chance))
    assert wait == pytest.approx(min(MOST, FIRST * 2 ** (times - 1)) * (0.5 + chance))


def test_those_that_were_launched_together_and_fail_together_are_one_failure() -> None:
    patience = Patience("new", previous="old")
    last = fail(patience, 1)
    for _ in range(9):
        patience.failed("new", "another reason", last + 0.9 * FIRST, 0.5)
    assert (patience.failures, patience.spec, patience.why) == (1, "new", "another reason")
    assert patience.wait(last) == FIRST


def test_a_steady_life_ends_the_waiting_and_the_next_failure_begins_anew() -> None:
    patience = Patience("new")
    last = fail(patience, 5)
    patience.lives("new", last - 1, last + 1000)
    assert patience.failures == 5, "one that is older than the last failure proves nothing"
    patience.lives("new", last, last + STEADY)
    assert (patience.failures, patience.why) == (5, "reason 5"), "not steady yet"
    patience.lives("new", last, last + STEADY + 0.1)
    assert (patience.failures, patience.why, patience.wait(last)) == (0, "", 0)
    patience.failed("new", "again", last, 0.5)
    assert patience.wait(last) == FIRST, "or it would be launched in vain without a pause"


def test_an_update_that_fails_again_and_again_is_given_up_and_goes_back_at_once() -> None:
    patience = Patience("new", previous="old")
    last = fail(patience, GIVE_UP - 1)
    assert (patience.spec, patience.given_up) == ("new", "")
    last += patience.wait(last)
    patience.failed("new", "exit code 3", last, 0.5)
    assert (patience.spec, patience.previous, patience.given_up) == ("old", "", "exit code 3")
    assert patience.wait(last) == 0, "what is gone back to is not to blame"
    fail(patience, 10, "old")
    assert (patience.spec, patience.given_up) == ("old", "exit code 3"), "there is nothing further back"


def test_the_end_of_an_old_one_is_not_held_against_the_update() -> None:
    patience = Patience("new", previous="old")
    fail(patience, 10, "old")
    assert (patience.spec, patience.previous) == ("new", "old")


def test_an_update_that_is_proven_is_not_given_up() -> None:
    patience = Patience("new", previous="old")
    patience.lives("old", 0, 1000)
    assert patience.previous == "old", "the old ones prove nothing"
    patience.lives("new", 0, STEADY)
    assert patience.previous == "old", "not steady yet"
    patience.lives("new", 0, STEADY + 0.1)
    fail(patience, 10)
    assert (patience.spec, patience.given_up) == ("new", "")
