"""The past for charts: bounded, in order, and with every peak."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.history import COARSE_MINUTES, FINE_MINUTES, MAX_CHANGES, MAX_SHARES, MINUTE, History, Point
from core.scaler import CREATE, OK, Decision

START = 1_700_000_000.5
GAPS = st.floats(0.375, 70) | st.floats(0.375, 4000)
STEPS = st.lists(st.tuples(GAPS, st.integers(0, 9)), min_size=1, max_size=200)


def walked(steps: list[tuple[float, int]]) -> tuple[History, list[Point]]:
    """A history of points so far apart and of such rates, and the points."""
    history, time, points = History(), START, []
    for gap, rate in steps:
        time = round(time + gap, 3)
        points.append(Point(time, rate, 100 * rate, rate, rate))
        history.add(points[-1])
    return history, points


def decided(verdict: str) -> Decision:
    return Decision(7.0, verdict, 2, 3, 250.0, 1.25, 3, (), "why")


@given(STEPS)
def test_points_are_listed_oldest_first_and_each_minute_once(steps: list[tuple[float, int]]) -> None:
    history, points = walked(steps)
    listed = [point["time"] for point in history.since(0)["points"]]
    assert listed == sorted(set(listed))
    fine = {time // MINUTE for time in listed if time % MINUTE}
    assert not fine & {time // MINUTE for time in listed if time not in {point.time for point in points}}


@given(STEPS)
def test_no_peak_of_the_last_day_is_lost(steps: list[tuple[float, int]]) -> None:
    history, points = walked(steps)
    listed = history.since(0)["points"]
    day = [point for point in points if point.minute >= points[-1].minute - COARSE_MINUTES]
    for name in ("rate", "capacity"):
        assert max(point[name] for point in listed) == max(getattr(point, name) for point in day)


@given(STEPS)
def test_every_decision_of_the_last_half_hour_is_listed(steps: list[tuple[float, int]]) -> None:
    history, points = walked(steps)
    listed = [point["time"] for point in history.since(0)["points"]]
    assert {point.time for point in points if point.time > points[-1].time - FINE_MINUTES * MINUTE} <= set(listed)


@pytest.mark.slow
def test_two_days_at_the_shortest_interval_take_no_more_than_a_day() -> None:
    history = History()
    for number in range(2 * 24 * 3600 * 8 // 3):
        history.add(Point(START + 0.375 * number, 1, 1, 1, 1))
    assert len(history.coarse) <= COARSE_MINUTES + 1
    assert len(history.fine) <= (FINE_MINUTES + 1) * MINUTE / 0.375
    listed = history.since(0)["points"]
    assert listed[-1]["time"] - listed[0]["time"] >= 86400


def test_older_minute_has_its_peaks_and_its_last_fleet() -> None:
    history = History()
    for point in (
        Point(60, 5, 100, 1, 2),
        Point(62, 9, 300, 2, 3),
        Point(64, 4, 200, 3, 1),
        Point(60 * 40, 0, 0, 0, 0),
    ):
        history.add(point)
    first = {"time": 60, "rate": 9, "capacity": 300, "backends": 3, "desired": 1}
    assert history.since(0)["points"][0] == first


def test_only_newer_points_are_listed() -> None:
    history = History()
    assert history.since(0) == {"points": [], "decisions": []}
    history.add(Point(100.00049, 1, 1, 1, 1))
    history.note(decided(CREATE), 100.00049)
    (point,), (change,) = history.since(99).values()
    assert (point["time"], change["time"]) == (100, 100)
    assert history.since(100) == {"points": [], "decisions": []}


def test_the_last_decisions_that_changed_something_are_kept() -> None:
    history = History()
    for number in range(MAX_CHANGES + 10):
        history.note(decided(CREATE), 10 + number)
        history.note(decided(OK), 10.5 + number)
    listed = history.since(0)["decisions"]
    assert [change["time"] for change in listed] == list(range(20, 20 + MAX_CHANGES))
    assert listed[0] == {"time": 20, "verdict": CREATE, "current": 2, "desired": 3, "reason": "why"}


def test_a_backend_has_its_shares_of_the_last_half_hour() -> None:
    history = History()
    for number in range(200):
        assert history.needs_shares(START + 10 * number)
        history.add_shares({"a": number / 1000, **({"b": 0.5} if number >= 198 else {})}, START + 10 * number)
    assert not history.needs_shares(START + 1999)
    a, b = history.shares_of("a"), history.shares_of("b")
    assert (len(a.times), a.shares[0], a.shares[-1]) == (MAX_SHARES, 0.02, 0.199)
    assert (b.times, b.shares) == (a.times[-2:], [0.5, 0.5])
    assert history.shares_of("c").times == []


def test_shares_of_a_removed_backend_are_forgotten() -> None:
    history = History()
    history.add_shares({"a": 0.5, "b": 0.5}, START)
    history.add_shares({"b": 1.0}, START + 10)
    history.add_shares({"a": 0.2, "b": 0.8}, START + 20)
    assert history.shares_of("a").shares == [0.2]
    assert history.shares.keys() == {"a", "b"}
