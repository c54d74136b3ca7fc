"""When reports are sent and samples are taken."""

from __future__ import annotations

import pytest

from schedule import EARLY_GAP, Pace, ReportSchedule


def test_early_reports_do_not_move_regular_ones() -> None:
    schedule = ReportSchedule(0.0, 2.0)
    assert [schedule.send(at, 2.0) for at in (0.5, 1.0, 1.9)] == [False] * 3
    assert schedule.until_regular(1.9) == pytest.approx(0.1)
    assert schedule.send(2.0, 2.0)
    assert schedule.until_regular(2.0) == 2.0


def test_early_report_is_sent_a_quarter_of_a_second_after_the_last_one() -> None:
    schedule = ReportSchedule(0.0, 2.0)
    assert schedule.early_pause(0.1) == 0.0
    schedule.send(0.1, 2.0)
    assert schedule.early_pause(0.15) == pytest.approx(EARLY_GAP - 0.05)
    assert schedule.early_pause(0.5) == 0.0


def test_early_report_does_not_delay_the_regular_one() -> None:
    schedule = ReportSchedule(0.0, 2.0)
    schedule.send(1.9, 2.0)
    assert schedule.early_pause(1.95) == pytest.approx(0.05)


def test_late_report_skips_missed_deadlines() -> None:
    schedule = ReportSchedule(0.0, 2.0)
    assert schedule.send(9.0, 2.0)
    assert schedule.until_regular(9.0) == 1.0, "a shorter interval would count few connections"
    assert not schedule.send(9.06, 2.0)
    assert schedule.send(10.0, 2.0)
    assert schedule.until_regular(10.0) == 2.0


def test_report_after_a_late_one_is_sent_at_the_next_deadline() -> None:
    schedule = ReportSchedule(0.0, 2.0)
    assert schedule.send(3.0, 2.0)
    assert schedule.until_regular(3.0) == 1.0


@pytest.mark.parametrize(("cost", "pause"), [(0.001, 0.5), (0.01, 0.5), (0.4, 20.0), (4.0, 200.0)])
def test_pause_after_a_sample_grows_with_its_cost(cost: float, pause: float) -> None:
    pace = Pace()
    assert pace.is_due(0.0)
    pace.done(7.0, cost, 0.02)
    assert not pace.is_due(7.0 + pause - 0.01)
    assert pace.is_due(7.0 + pause + 0.01)
