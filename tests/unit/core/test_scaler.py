"""decide(): a table with every branch and its sentence, and what holds for any load, policy and memory."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.scaler import CREATE, OK, STOP, Load, Memory, Policy, decide

NOW = 1000.0
PANIC = "panic: the load passed twice the capacity within the stable window"
WANTED = "{} wanted within the last 60 s"
FEW = ("54", "0.54")  # 270 over 5


def policy(**changes: object) -> Policy:
    return Policy(**{"min": 2, "max": 10, "target": 100.0, **changes})  # type: ignore[arg-type]


def memory(**changes: object) -> Memory:
    return Memory(**{"started": 0.0, **changes})  # type: ignore[arg-type]


# case: capacity, load, what else is given; verdict, desired, load of each and ratio as told, the limits that are told
CASES: dict[str, tuple] = {
    "on target": (4, 400, {}, OK, 4, "100", "1.00"),
    "no tolerance above": (4, 401, {}, CREATE, 5, "100.2", "1.00"),
    "tolerance below": (10, 811, {}, OK, 10, "81.1", "0.81"),
    "no tolerance left": (10, 810, {}, STOP, 9, "81", "0.81"),
    "growth by a tenth": (4, 444, {}, CREATE, 5, "111", "1.11"),
    "growth to a whole number": (4, 500, {}, CREATE, 5, "125", "1.25"),
    "growth rounds up": (4, 501, {}, CREATE, 6, "125.2", "1.25"),
    "no backend more for a binary fraction": (5, 0.1 + 0.2 + 0.3, {"target": 0.1}, CREATE, 6, "0.12", "1.20"),
    "doubling": (6, 5000, {"max": 50}, CREATE, 12, "833.3", "8.33", "at most 12 in one step"),
    "four more": (2, 1000, {}, CREATE, 6, "500", "5.00", "at most 6 in one step"),
    "two limits": (6, 5000, {}, CREATE, 10, "833.3", "8.33", "at most 12 in one step", "max 10"),
    "max": (9, 1200, {}, CREATE, 10, "133.3", "1.33", "max 10"),
    "at max already": (10, 1200, {}, OK, 10, "120", "1.20", "max 10"),
    "min": (2, 0, {}, OK, 2, "0", "0.00", "min 2"),
    "below min": (1, 100, {}, CREATE, 2, "100", "1.00", "min 2"),
    "shrink": (5, 270, {}, STOP, 3, *FEW),
    "shrink to no more than 90 % each": (5, 271, {}, STOP, 4, "54.2", "0.54"),
    "shrink to min": (5, 0, {}, STOP, 2, "0", "0.00", "min 2"),
    "shrink to the highest": (5, 270, {"wanted": ((950, 4), (990, 3))}, STOP, 4, *FEW, WANTED.format(4)),
    "held by the stable window": (5, 270, {"wanted": ((940.1, 7),)}, OK, 5, *FEW, WANTED.format(5)),
    "the stable window is over": (5, 270, {"wanted": ((940, 7),)}, STOP, 3, *FEW),
    "min, then held": (5, 0, {"wanted": ((999, 5),)}, OK, 5, "0", "0.00", "min 2", WANTED.format(5)),
    "no history": (5, 270, {"started": 970}, OK, 5, *FEW, "the history is too short: it began 30 s ago"),
    "history enough": (5, 270, {"started": 940}, STOP, 3, *FEW),
    "growth needs no history": (4, 500, {"started": 999}, CREATE, 5, "125", "1.25"),
    "load unknown": (5, 270, {"missing": "b2, b3"}, OK, 5, *FEW, "load unknown: no report from b2, b3"),
    "growth on a lower bound": (4, 500, {"missing": "b2"}, CREATE, 5, "125", "1.25"),
    "panic holds": (5, 270, {"panic": 940.1}, OK, 5, *FEW, PANIC),
    "panic is over": (5, 270, {"panic": 940}, STOP, 3, *FEW),
    "panic takes the long window if larger": (5, 300, {"panic": 999, "rates": ((950, 900),)}, CREATE, 6, "120", "1.20"),
    "panic takes the short window if larger": (5, 1500, {"rates": ((950, 0), (996, 500))}, CREATE, 10, "200", "2.00"),
    "calm takes the short window alone": (5, 270, {"rates": ((950, 900), (994, 900))}, STOP, 3, *FEW),
    "missing data is named first": (
        *(5, 270, {"missing": "b2", "started": 999, "panic": 999}, OK, 5, *FEW),
        "load unknown: no report from b2",
    ),
    "missing history is named second": (
        *(5, 270, {"started": 999, "panic": 999}, OK, 5, *FEW),
        "the history is too short: it began 1 s ago",
    ),
    "one backend, connections": (1, 5, {"min": 1, "metric": "connections"}, OK, 1, "5", "0.05"),
    "open connections": (2, 16, {"metric": "concurrency", "target": 8}, OK, 2, "8", "1.00"),
}


@pytest.mark.parametrize("case", CASES)
def test_every_branch_gives_its_number_and_its_sentence(case: str) -> None:
    capacity, load, given_, verdict, desired, share, ratio, *limits = CASES[case]
    rules = policy(**{k: v for k, v in given_.items() if k in ("min", "max", "target", "metric")})
    before = Memory(given_.get("started", 0), given_.get("rates", ()), given_.get("wanted", ()), given_.get("panic"))
    decision, _ = decide(rules, before, Load(load, given_.get("missing", "")), capacity, NOW)

    unit = {"connections": "connections/s", "concurrency": "open connections"}.get(rules.metric, "packets/s")
    rate = float(share) * capacity if given_.get("rates") else load  # averaged
    numbers = (
        f"{rate:.4g} {unit} over {capacity} backend{'s' * (capacity > 1)} = {share} each, "
        f"target {rules.target:g} ({ratio}×)"
    )
    assert decision.reason == "; ".join([numbers, *limits])
    assert (decision.verdict, decision.desired, [clamp.sentence for clamp in decision.clamps]) == (
        verdict,
        desired,
        limits,
    )
    assert (decision.at, decision.current) == (NOW, capacity)


def test_the_sentence_reads_as_a_whole() -> None:
    decision, _ = decide(policy(), Memory(970), Load(300), 5, NOW)
    assert decision.reason == (
        "300 packets/s over 5 backends = 60 each, target 100 (0.60×); the history is too short: it began 30 s ago"
    )


@pytest.mark.parametrize(("rate", "since"), [(999.9, None), (1000.0, NOW)])
def test_panic_begins_when_the_load_reaches_twice_the_capacity(rate: float, since: float | None) -> None:
    decision, after = decide(policy(), memory(), Load(rate), 5, NOW)
    assert (after.overloaded_at, decision.panic) == (since, since is not None)


def test_the_memory_keeps_one_stable_window_and_the_limited_number_not_the_held_one() -> None:
    before = memory(rates=((940.0, 1.0), (941.0, 2.0)), recommended=((940.0, 9), (941.0, 5)))
    _, after = decide(policy(), before, Load(0), 5, NOW)
    assert after.rates == ((941.0, 2.0), (NOW, 0))
    assert after.recommended == ((941.0, 5), (NOW, 2))


def pairs(values: st.SearchStrategy) -> st.SearchStrategy:
    times = st.floats(NOW - 90, NOW - 0.1)
    return st.lists(st.tuples(times, values), max_size=8).map(lambda rows: tuple(sorted(rows)))


RATES = st.floats(0, 1e5)
MEMORIES = st.builds(
    Memory,
    started=st.floats(0, NOW),
    rates=pairs(RATES),
    recommended=pairs(st.integers(1, 50)),
    overloaded_at=st.none() | st.floats(NOW - 90, NOW),
)
LIMITS = st.tuples(st.integers(1, 50), st.integers(1, 50)).map(sorted)
TARGETS = st.floats(0.001, 1e4)


@given(LIMITS, TARGETS, MEMORIES, RATES, st.sampled_from(["", "b2"]), st.data())
def test_the_desired_number_stays_within_min_and_max(
    limits: list[int], target: float, before: Memory, rate: float, missing: str, data: st.DataObject
) -> None:
    low, high = limits
    capacity = data.draw(st.integers(1, high))  # the controller clamps what it has at once when max is lowered
    decision, _ = decide(policy(min=low, max=high, target=target), before, Load(rate, missing), capacity, NOW)
    assert low <= decision.desired <= high
    assert decision.desired <= max(2 * capacity, capacity + 4, low)


@given(LIMITS, TARGETS, MEMORIES, RATES, RATES, st.integers(1, 50), st.sampled_from(["", "b2"]))
def test_more_load_never_gives_fewer_backends(
    limits: list[int], target: float, before: Memory, one: float, other: float, capacity: int, missing: str
) -> None:
    less, more = (
        decide(policy(min=limits[0], max=limits[1], target=target), before, Load(rate, missing), capacity, NOW)[0]
        for rate in sorted((one, other))
    )
    assert less.desired <= more.desired


@given(LIMITS, st.floats(0, 60), st.data())
def test_a_constant_load_settles_and_never_flaps(limits: list[int], wanted: float, data: st.DataObject) -> None:
    low, high = limits
    rules, state = policy(min=low, max=high), memory(started=NOW)
    course = [data.draw(st.integers(low, high))]
    for beat in range(100):  # of two seconds: three stable windows and more
        decision, state = decide(rules, state, Load(wanted * rules.target), course[-1], NOW + 2 * beat)
        course.append(decision.desired)
    assert course in (sorted(course), sorted(course, reverse=True)), "it turned round"
    assert len(set(course[-50:])) == 1, "it never settled"
    fewest, most = (max(low, min(high, math.ceil(round(load, 9)))) for load in (wanted, wanted / 0.9))
    assert fewest <= course[-1] <= most


@given(LIMITS, st.one_of(st.floats(0, 60), st.integers(1, 20)), st.integers(120, 400))
def test_a_load_that_varies_by_a_tenth_never_makes_the_fleet_alternate(
    limits: list[int], wanted: float, period: int
) -> None:
    low, high = limits
    rules, state = policy(min=low, max=high), memory(started=NOW)
    course = [low]
    for now in range(0, 3 * period, 2):
        load = wanted * (1 + 0.05 * math.sin(2 * math.pi * now / period))
        decision, state = decide(rules, state, Load(load * rules.target), course[-1], NOW + now)
        course.append(decision.desired)
    assert course == sorted(course), "it turned round"


@pytest.mark.parametrize(("gap", "shrinks"), [(12.0, True), (12.1, False)])
def test_nothing_shrinks_for_a_stable_window_after_a_time_without_decisions(gap: float, shrinks: bool) -> None:
    """As after the manager's process was stopped: what was remembered says nothing of the time in between."""
    decision, after = decide(policy(), memory(rates=((NOW - gap, 0.0),)), Load(0.0), 5, NOW)
    assert (decision.verdict == STOP) == shrinks
    later, _ = decide(policy(), after, Load(0.0), 5, NOW + 10)
    assert (later.verdict == STOP) == shrinks


@pytest.mark.parametrize("interval", [0.5, 2.0, 30.0, 60.0])
def test_fleet_grows_and_shrinks_at_any_interval(interval: float) -> None:
    windows = policy(panic_window=max(6.0, interval), stable_window=max(60.0, 2 * interval))
    state, capacity, now = memory(), 2, NOW
    for rate, expected in ((400.0, 4), (0.0, 2)):
        for _ in range(int(3 * windows.stable_window / interval) + 1):
            now += interval
            decision, state = decide(windows, state, Load(rate), capacity, now)
            capacity = decision.desired
        assert capacity == expected
