"""The plan follows from the seed and the minutes alone."""

from __future__ import annotations

from collections import Counter

import pytest

from chaos.fault import PATHS, SWARM
from chaos.plan import LARGEST, PAIRS, plan
from chaos.table import FAULTS, MISSING, of_path

SEEDS = range(30)


def test_same_seed_gives_the_same_plan_and_another_seed_another_one() -> None:
    assert plan(7, 5, FAULTS) == plan(7, 5, FAULTS)
    assert plan(7, 5, FAULTS) != plan(8, 5, FAULTS)


@pytest.mark.parametrize("datapath", [*PATHS, SWARM])
def test_every_fault_comes_once_before_any_comes_again(datapath: str) -> None:
    usable = of_path(datapath)
    for seed in SEEDS:
        times = Counter(name for one in plan(seed, 60, usable) for name in one.faults)
        assert set(times) == {fault.name for fault in usable}
        assert max(times.values()) - min(times.values()) <= 1


def test_pairs_are_of_different_groups_and_never_with_a_fault_that_stands_alone() -> None:
    faults = {fault.name: fault for fault in FAULTS}
    rounds = [one for seed in SEEDS for one in plan(seed, 20, FAULTS)]
    pairs = [one for one in rounds if len(one.faults) == 2]
    for one in pairs:
        first, second = (faults[name] for name in one.faults)
        assert first.group != second.group
        assert not (first.alone or second.alone)
    assert PAIRS / 3 < len(pairs) / len(rounds) < PAIRS


def test_plan_ends_with_its_minutes_and_leaves_out_what_is_too_long_for_them() -> None:
    budgets = {fault.name: fault.budget for fault in FAULTS}
    for seed in SEEDS:
        rounds = plan(seed, 3, FAULTS)
        assert sum(max(budgets[name] for name in one.faults) for one in rounds) <= 3 * 60
        assert all(budgets[name] <= LARGEST * 3 * 60 for one in rounds for name in one.faults)
        assert len(rounds) >= 5
    assert plan(1, 0.1, FAULTS) == []
    assert plan(1, 3, []) == []


def test_every_fault_has_a_name_of_its_own_and_states_why_requests_may_fail() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert all(fault.why and fault.bound > 0 for fault in FAULTS)
    assert not set(MISSING) & {fault.name for fault in FAULTS}
