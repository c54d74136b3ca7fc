"""A soak that flaps, stays incomplete or drifts is found."""

from __future__ import annotations

from chaos import soak
from chaos.allowances import Request
from chaos.soak import Watched


def watched(*desired: int, violated: tuple[str, ...] = ()) -> list[Watched]:
    return [Watched(10.0 * number, count, violated) for number, count in enumerate(desired)]


def test_number_that_turns_often_is_found() -> None:
    assert soak.flapping(watched(4, 3, 4, 3), soak.STEADY) != []
    assert soak.flapping(watched(4, 3, 3), soak.STEADY) == []
    waves = [2, 6] * soak.WAVES + [2]
    assert soak.flapping(watched(*waves), soak.WAVE) == []
    assert soak.flapping(watched(*waves, 6, 2, 6), soak.WAVE) != []
    assert soak.most_and_least(watched(3, 6, 2)) == (2, 6)


def test_violation_that_lasts_is_found_and_one_that_passes_is_not() -> None:
    assert soak.unsettled_for_long(watched(*[4] * 5, violated=("x",))) == []
    assert soak.unsettled_for_long(watched(*[4] * 8, violated=("x",))) == ["for 70 s: x"]
    passing = [*watched(*[4] * 5, violated=("x",)), Watched(50.0, 4, ())]
    assert soak.unsettled_for_long([*passing, *(Watched(at, 4, ("x",)) for at in (60.0, 100.0))]) == []


def test_share_that_drifts_is_found() -> None:
    even = [Request("new", at / 10, at / 10, "ok", f"b{at % 4}") for at in range(1800)]
    assert soak.judge(watched(*[4] * 19), even, soak.STEADY) == []
    drifted = [Request("new", r.start, r.end, "ok", "b0") if r.start > 150 else r for r in even]
    assert soak.judge(watched(*[4] * 19), drifted, soak.STEADY)[0].startswith("minute 3: b0 answered ")
