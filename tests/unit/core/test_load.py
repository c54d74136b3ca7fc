"""Counters in, load out: rates are differences, a decrease is a restart, and silence is not zero."""

from __future__ import annotations

from dataclasses import replace

import hypothesis
import pytest
from hypothesis import strategies as st

from core.fleet import ACTIVE, Backend, Verdict
from core.load import SILENT_AFTER, Finding, LoadTracker, Sample
from core.scaler import Load
from fakes import report, sample

TWO = Backend("p-1", ACTIVE, 0, id="a" * 64, ip="198.18.0.2")


def tracked(*reports: tuple) -> LoadTracker:
    """A tracker that took (time, report) pairs."""
    tracker = LoadTracker()
    for at, given in reports:
        tracker.add(given, at)
    return tracker


@pytest.mark.parametrize(
    ("metric", "expected"), [("packets", (300 + 50) / 2), ("connections", (30 + 5) / 2), ("concurrency", 7 + 2)]
)
def test_rates_are_differences_of_absolute_counters_over_the_time_between(metric: str, expected: float) -> None:
    tracker = tracked(
        (100, report(_2=sample(1000, connections=100, active=90), _3=sample(50, connections=10, active=90))),
        (102, report(_2=sample(1300, connections=130, active=7), _3=sample(100, connections=15, active=2))),
    )
    assert tracker.load(metric, 102) == Load(expected)


def test_there_is_no_load_without_a_report_or_with_one_report() -> None:
    tracker = LoadTracker()
    assert tracker.load("packets", 0) is None
    assert tracker.add(report(_2=sample(1000)), 100) is False
    assert tracker.load("packets", 100) is None


def test_a_counter_that_went_down_was_restarted_and_counts_from_zero() -> None:
    tracker = tracked((100, report(_2=sample(1000, connections=90))), (102, report(_2=sample(60, connections=100))))
    assert tracker.load("packets", 102) == Load(30)
    assert tracker.load("connections", 102) == Load(5), "each counter for itself"


def test_a_new_backend_counts_from_zero_and_a_removed_one_no_more() -> None:
    tracker = tracked((100, report(_2=sample(1000))), (102, report(_3=sample(400))))
    assert tracker.load("packets", 102) == Load(200)


def test_a_report_that_comes_too_soon_brings_health_but_no_rate() -> None:
    tracker = tracked((100, report(_2=sample(1000))), (102, report(_2=sample(1200))))
    assert tracker.add(report(_2=sample(1290, healthy=False)), 102.9) is False
    assert tracker.verdict(TWO).healthy is False
    assert tracker.load("packets", 102.9) == Load(100), "the rate before"
    assert tracker.backend("198.18.0.2")["packets"] == 1290
    assert tracker.add(report(_2=sample(1500)), 104) is True
    assert tracker.load("packets", 104) == Load(150), "measured from the report before the early one"


def test_half_an_interval_is_long_enough_to_measure_by() -> None:
    tracker = tracked((100, report(_2=sample(0))))
    assert tracker.add(report(_2=sample(100)), 101) is True
    assert tracker.load("packets", 101) == Load(100)


def test_several_balancers_add_up() -> None:
    tracker = tracked(
        (100, report("a", _2=sample(0, connections=5))),
        (101, report("b", _2=sample(50), _3=sample(0))),
        (102, report("a", _2=sample(200, connections=9, active=3))),
        (103, report("b", _2=sample(90), _3=sample(20, healthy=None))),
    )
    assert tracker.load("packets", 103) == Load(100 + 20 + 10)
    total = tracker.backend("198.18.0.2")
    assert (total["packets"], total["connections"], total["active"], total["bytes"]) == (290, 9, 3, 29000)
    assert (total["packets_rate"], total["connections_rate"]) == (120, 2)
    assert set(tracker.backend("198.18.0.9").values()) == {0.0}


def test_silent_balancer_keeps_its_last_known_load_and_is_named_as_missing() -> None:
    tracker = tracked((100, report("a", _2=sample(0))), (102, report("a", _2=sample(200))))
    for at, packets in ((102, 0), (104, 100), (106, 200), (108, 300), (110, 400)):
        tracker.add(report("b", _2=sample(packets)), at)
    assert tracker.load("packets", 102 + SILENT_AFTER * 2) == Load(150), "late is not silent"
    assert tracker.load("packets", 102 + SILENT_AFTER * 2 + 0.1) == Load(150, "a")
    for at in range(112, 202, 2):
        tracker.add(report("b", _2=sample(400 + 50 * (at - 110))), at)
    assert tracker.load("packets", 200) == Load(150, "a"), "however long the engine lists it"


def test_all_silent_balancers_are_named_and_without_any_report_there_is_no_load() -> None:
    tracker = tracked(*((at, report(name, _2=sample(at))) for at in (100, 102) for name in ("b", "a")))
    assert tracker.load("packets", 110) is None
    for at in (110, 112):
        tracker.add(report("c", _2=sample(at)), at)
    assert tracker.load("packets", 112) == Load(3, "a, b")


def test_balancer_that_the_engine_no_longer_lists_is_forgotten() -> None:
    tracker = tracked((100, report("a", _2=sample(0))), (102, report("a", _2=sample(200))))
    tracker.keep({"a"}, 103)
    assert tracker.balancers.keys() == {"a"}
    tracker.keep({"b"}, 103)
    assert tracker.balancers == {}
    assert tracker.load("packets", 103) is None
    assert tracker.verdict(TWO) == Verdict()


def test_balancer_that_reported_after_the_list_began_is_kept() -> None:
    tracker = tracked((100, report("a", _2=sample(0))), (102, report("a", _2=sample(200))))
    tracker.keep(set(), 101)
    assert tracker.balancers.keys() == {"a"}


@pytest.mark.parametrize("interval", [0.5, 2.0, 30.0, 60.0])
def test_rate_is_measured_at_any_interval(interval: float) -> None:
    tracker = LoadTracker()
    for n in range(4):
        now = 100 + n * interval
        tracker.keep({"b1"}, now)
        tracker.add(replace(report(_2=sample(int(100 * n * interval))), interval=interval), now)
        assert tracker.load("packets", now + interval) == (Load(100) if n else None)


def test_delayed_report_changes_no_rate() -> None:
    """As after the manager's process was stopped: a report of long ago is read together with a new one."""
    tracker = LoadTracker()
    for at, uptime, packets in ((100, 50, 0), (102, 52, 200), (110, 54, 400), (110.1, 60, 1000)):
        tracker.add(replace(report(_2=sample(packets)), uptime=float(uptime)), at)
        load = tracker.load("packets", at)
        assert load is None or load.rate == 100


def test_rate_is_measured_by_our_clock_after_a_restart_of_the_sender() -> None:
    tracker = LoadTracker()
    for at, uptime, packets in ((100, 500, 0), (102, 1, 200), (104, 3, 500)):
        tracker.add(replace(report(_2=sample(packets)), uptime=float(uptime)), at)
    assert tracker.load("packets", 104) == Load(150)


def test_panic_and_findings_are_those_of_the_newest_reports() -> None:
    found = Finding("ip_forward_off")
    tracker = tracked(
        (100, replace(report("b"), panic=True, findings=(found, Finding("foreign_rule", "-j DROP")))),
        (100, replace(report("a"), findings=(found,))),
    )
    assert tracker.panic == ["b"]
    assert tracker.findings == [found, Finding("foreign_rule", "-j DROP")]
    tracker.add(report("b"), 101)
    assert (tracker.panic, tracker.findings) == ([], [found])


def test_traffic_of_a_replaced_balancer_is_counted_until_the_engine_no_longer_lists_it() -> None:
    tracker = tracked((100, report("old", _2=sample(0))), (102, report("old", _2=sample(200))))
    for at, packets in ((106, 0), (108, 200), (110, 400)):
        tracker.keep({"new"}, at)
        tracker.add(report("new", _2=sample(packets)), at)
    assert tracker.load("packets", 110) == Load(100)


@pytest.mark.parametrize(
    ("opinions", "healthy"),
    [
        ([None], None),
        ([None, None], None),
        ([True], True),
        ([False], False),
        ([False, True], True),
        ([False, None], False),
    ],
)
def test_a_backend_is_healthy_when_any_balancer_finds_it_so(opinions: list, healthy: bool | None) -> None:
    tracker = tracked(*((100, report(f"b{n}", _2=sample(healthy=opinion))) for n, opinion in enumerate(opinions)))
    assert tracker.verdict(TWO).healthy is healthy
    assert tracker.verdict(replace(TWO, ip="198.18.0.3")) == Verdict()


@pytest.mark.parametrize(("listed", "healthy"), [("", True), ("a" * 12, True), ("b" * 12, None)])
def test_health_of_an_earlier_backend_at_the_address_does_not_count(listed: str, healthy: bool | None) -> None:
    assert tracked((100, report(_2=sample(healthy=True, id=listed)))).verdict(TWO).healthy is healthy


def test_share_is_the_mean_over_the_balancers_that_report_one() -> None:
    tracker = tracked(*((100, report(f"b{n}", _2=sample(share=share))) for n, share in enumerate((0.2, 0.4, None))))
    assert tracker.share(TWO) == pytest.approx(0.3)
    assert tracker.share(replace(TWO, ip="198.18.0.3")) == 0


def test_a_failed_backend_does_not_have_the_share_of_a_backend_with_the_same_address() -> None:
    tracker = tracked((100, report("b1", _2=sample(share=0.2, id="new"))))
    assert tracker.share(replace(TWO, id="new")) == 0.2
    assert tracker.share(replace(TWO, id="old")) == 0


def test_newest_report_of_each_balancer_is_kept() -> None:
    first, second = report("a", warnings=("full",)), report("b")
    tracker = tracked((100, first), (100, second))
    assert (tracker.newest_of("a"), tracker.newest_of("b"), tracker.newest_of("c")) == (first, second, None)
    tracker.add(report("a"), 100.1)
    assert tracker.newest_of("a") == report("a")


SAMPLES = st.builds(
    Sample,
    *(st.integers(0, 2**64) for _ in range(3)),
    active=st.integers(0, 10**6),
    healthy=st.sampled_from([None, True, False]),
    share=st.none() | st.floats(0, 1),
    id=st.sampled_from(["", "a" * 12, "b" * 12]),
    why=st.sampled_from(["", "timeout", "503"]),
)
ROWS = st.dictionaries(st.sampled_from(["_2", "_3"]), SAMPLES)
# (balancer, seconds since the report before, rows): some come too soon to measure by, some after others were forgotten
REPORTS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([0.1, 0.7, 2.0, 15.0]), ROWS), max_size=12)


@hypothesis.given(REPORTS)
def test_figures_of_a_backend_are_sums_over_the_newest_reports(reports: list) -> None:
    tracker, now = LoadTracker(), 100.0
    for balancer, pause, rows in reports:
        now += pause
        if pause == 15.0:
            tracker.keep("ab", now)
        tracker.add(report(balancer, **rows), now)
    newest = [entry.report.backends.get(TWO.ip) for entry in tracker.balancers.values()]
    rows = [row for row in newest if row is not None]
    ours = [row for row in rows if row.id in ("", "a" * 12)]
    total = tracker.backend(TWO.ip)
    for name in ("connections", "packets", "bytes", "active"):
        assert total[name] == float(sum(getattr(row, name) for row in rows))
    shares = [row.share for row in ours if row.share is not None]
    assert tracker.share(TWO) == pytest.approx(sum(shares) / len(shares) if shares else 0, abs=1e-6)
    opinions = [row.healthy for row in ours if row.healthy is not None]
    assert tracker.verdict(TWO).healthy is (any(opinions) if opinions else None)
    reasons = {row.why for row in ours if row.healthy is False}
    assert tracker.verdict(TWO).why in ({""} if any(opinions) or not opinions else reasons)


def test_figures_of_a_removed_balancer_are_removed() -> None:
    tracker = tracked(*((at, report("a", _2=sample(at, share=0.5, active=3))) for at in (100, 102)))
    tracker.add(report("b", _2=sample(7, healthy=False, why="timeout")), 115)
    tracker.keep("b", 125)
    assert tracker.backend(TWO.ip) == {**dict.fromkeys(tracker.backend(TWO.ip), 0.0), "packets": 7, "bytes": 700}
    assert (tracker.share(TWO), tracker.verdict(TWO)) == (0, Verdict(False, "timeout"))
