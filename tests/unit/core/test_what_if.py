"""The replay of the last hour: with the same settings the same decisions, with others those of the scaler."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import what_if
from core.scaler import Load, Memory, Policy, decide
from core.settings import SettingError
from core.what_if import Course, Recorded, Recording, policy_with, replay
from fakes import settings

POLICY = Policy(2, 10, 100.0, stable_window=20.0, panic_window=6.0)
LOADS = st.builds(Load, st.floats(0, 3000), st.sampled_from(["", "", "", "b2"]))
REPORTS = st.lists(st.tuples(st.floats(1.5, 9) | st.just(40.0), LOADS), min_size=1, max_size=120)


def live(reports: list[tuple[float, Load]], policy: Policy = POLICY) -> Recording:
    """The recording of a manager that takes these reports, each so many seconds after the one before."""
    memory, now, size = Memory(started=1000.0), 1000.0, 2
    recording = Recording(memory)
    for gap, load in reports:
        now += gap
        decision, memory = decide(policy, memory, load, size, now)
        recording.add(Recorded(now, policy, load, size, decision.desired))
        size = decision.desired
    return recording


def steady(*rates: float) -> Recording:
    """A recording with a report every 30 minutes."""
    return live([(1800.0, Load(rate)) for rate in rates])


@given(REPORTS, st.integers(1, 60))
def test_with_the_same_settings_the_same_decisions_are_made(reports: list[tuple[float, Load]], kept: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(what_if, "MAX_DECISIONS", kept)
        found = replay(live(reports), POLICY, 0.0)
    assert len(found.times) <= kept
    assert found.simulated == found.actual


@given(REPORTS, st.floats(0.1, 1000), st.floats(6, 300))
def test_the_simulated_fleet_keeps_to_the_limits(
    reports: list[tuple[float, Load]], target: float, stable: float
) -> None:
    found = replay(live(reports), replace(POLICY, target=target, stable_window=stable), 0.0)
    assert len(found.simulated.backends) == len(found.times)
    assert set(found.simulated.backends) <= set(range(2, 11))
    span = found.times[-1] - found.times[0]
    assert 2 * span / 3600 - 0.001 <= found.simulated.backend_hours <= 10 * span / 3600 + 0.001


def test_half_the_target_needs_twice_the_backends() -> None:
    found = replay(steady(400, 400, 400), replace(POLICY, target=50.0), epoch=7000.0)
    assert found.times == [7000 + 1000 + 1800 * number for number in (1, 2, 3)]
    assert found.actual == Course([4, 4, 4], backend_hours=4.0, peak=4, changes=1, highest_load=200.0)
    assert found.simulated == Course([6, 8, 8], backend_hours=7.0, peak=8, changes=2, highest_load=200.0)


def test_the_replay_begins_with_the_memory_of_that_time() -> None:
    """The decision of an hour ago was made in the stable window of an earlier one, which is no longer recorded."""
    reports = [(2.0, Load(500))] * 15 + [(2.0, Load(100))] * 1790
    recording = live(reports)
    assert recording.decisions[0].before == 5
    found = replay(recording, POLICY, 0.0)
    assert found.actual.backends[0] == 5
    assert found.actual.backends[-1] == 2
    assert found.simulated == found.actual


def test_without_a_decision_the_replay_is_empty() -> None:
    found = replay(Recording(Memory(0.0)), POLICY, 0.0)
    assert (found.times, found.actual, found.simulated) == ([], Course([], 0.0, 0, 0, 0.0), found.actual)


def test_only_the_last_hour_and_a_bounded_number_of_decisions_are_kept() -> None:
    hour = live([(2.0, Load(150))] * 2500).decisions
    assert (hour[-1].at - hour[0].at, len(hour)) == (3600, 1801)
    assert len(live([(0.5, Load(150))] * 2500).decisions) == 2400


def test_the_policy_has_the_settings_that_are_given_and_keeps_the_others() -> None:
    in_force = replace(POLICY, max=7, target=30.0)
    found = policy_with(settings(), in_force, {"stable_window": "90"})
    assert found == replace(in_force, stable_window=90.0)


@pytest.mark.parametrize(
    ("texts", "line"),
    [
        ({"target": "0"}, "--target (LB_TARGET) is '0'; allowed: 0.001 to 1000000000"),
        ({"panic_window": "x"}, "--panic-window (LB_PANIC_WINDOW) is 'x'; allowed: 1 to 600 (seconds)"),
        (
            {"stable_window": "5"},
            "--interval 2, --panic-window 6 and --stable-window 5 must not decrease in this order",
        ),
    ],
)
def test_settings_that_run_sh_would_refuse_are_refused_with_the_same_line(texts: dict[str, str], line: str) -> None:
    with pytest.raises(SettingError) as refusal:
        policy_with(settings(), POLICY, texts)
    assert str(refusal.value) == line
