"""The simulation simulates what it says; and what it measures, a report's work, is counted where clocks would waver."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from werkzeug.exceptions import HTTPException

from bench.simulate import COLUMNS, PACKETS, Site, Times, hear_all, main, measure, read_shape, table

MANAGER = str(Path(__file__).parents[3] / "manager")


@pytest.fixture(autouse=True)
def loud_again() -> Iterator[None]:
    yield
    logging.disable(logging.NOTSET)  # the simulation is silent, the tests after it are not


def work(call: Callable[[], object]) -> int:
    """How many of the interpreter's instructions `call` takes within the manager's own code."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        if event == "call" and not frame.f_code.co_filename.startswith(MANAGER):
            return None
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    # Python 3.12 reports instructions only if a frame asks for them before the function is set.
    sys._getframe().f_trace_opcodes = True
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def work_of_a_report(nodes: int, backends: int, place: Path) -> int:
    """Of one between two decisions, with six rows, in a fleet where nothing is new."""
    site = Site(nodes, backends, 6, place)
    for round_ in range(2):
        hear_all(site, Times(), round_)
        site.controller.step()
    site.clock.pass_by(2)
    decision = site.controller.report(site.report(0, 2))
    second = site.report(1, 2)
    counted = work(lambda: site.controller.report(second))
    assert decision is not None
    assert site.controller.decisions[-1] is decision, "none at the second"
    return counted


def test_work_of_a_report_hardly_grows_with_the_other_balancers_or_with_the_fleet(
    tmp_path: Path,
) -> None:
    least = work_of_a_report(2, 12, tmp_path)
    assert least > 300, "something is counted"
    assert work_of_a_report(60, 12, tmp_path) < 1.5 * least  # with a sum over the balancers it would be 30 times
    assert work_of_a_report(2, 400, tmp_path) < 1.2 * least


def test_the_load_is_just_under_the_target_so_that_the_fleet_stays_as_it_is(tmp_path: Path) -> None:
    site = Site(4, 40, 20, tmp_path)
    for round_ in range(8):
        hear_all(site, Times(), round_)
        site.controller.step()
    decision = site.controller.decisions[-1]
    assert (decision.rate, decision.desired) == (pytest.approx(40 * PACKETS / 2, rel=0.05), 40)
    assert {backend["healthy"] for backend in site.controller.status()["backends"]} == {True}


@pytest.mark.parametrize("shape", ["2x6", "5x20x8", "3x7x3"])
def test_all_balancers_together_know_every_backend_and_each_as_many_as_asked(shape: str, tmp_path: Path) -> None:
    nodes, backends, rows = read_shape(shape)
    site = Site(nodes, backends, rows, tmp_path)
    known = [{row["ip"] for row in site.message(node, 1)["backends"]} for node in range(nodes)]
    assert {len(ips) for ips in known} == {rows}
    assert len(set.union(*known)) == backends


def test_a_moved_task_changes_the_snapshot_of_the_balancers(tmp_path: Path) -> None:
    site = Site(1, 3, 3, tmp_path)
    before = site.controller.wait_for_snapshot("", 0)
    site.controller.step()
    assert site.controller.wait_for_snapshot("", 0) == before
    site.engine.move()
    site.controller.step()
    assert site.controller.wait_for_snapshot("", 0) != before


def test_a_manager_of_nobody_says_so_from_the_start(tmp_path: Path) -> None:
    (tmp_path / "ip.txt").write_text("198.18.0.2\n")  # of a manager before it
    view = Site(1, 0, 0, tmp_path).controller.wait_for_snapshot("", 0)
    assert view is not None
    assert (view["backends"], (tmp_path / "ip.txt").read_text()) == ([], "")


def test_every_column_has_a_figure() -> None:
    row = measure(2, 4, 3)
    assert row.keys() == set(COLUMNS)
    assert all(value > 0 for value in row.values())
    assert (row["nodes"], row["backends"], row["rows"]) == (2, 4, 3)
    heading, figures = table([row]).splitlines()
    assert heading.count("|") == figures.count("|") == len(COLUMNS) + 1


def test_a_report_longer_than_the_route_takes_is_refused_here_too() -> None:
    with pytest.raises(HTTPException):
        measure(1, 9_000, 9_000)


@pytest.mark.parametrize("shape", ["", "3", "0x3", "3x0", "3x4x5", "2x9x4", "axb", "1x2x2x2"])
def test_what_is_no_shape_is_refused(
    shape: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["simulate.py", shape])
    assert main() == 2
    assert capsys.readouterr().err
