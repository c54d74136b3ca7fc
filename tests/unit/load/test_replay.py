"""The replay of loads: on the traces that are shipped, the claim of the README; and what is no trace."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.replay import compare, main, read_trace

TRACES = sorted((Path(__file__).parents[2] / "bench" / "traces").glob("*.csv"))
TARGET = 10.0  # the course project's


def test_all_traces_are_there() -> None:
    assert [path.stem for path in TRACES] == ["daily-wave", "flash-crowd", "ramp", "step"]


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_ours_is_over_the_target_for_less_time_at_hardly_more_than_the_cheapest_price(path: Path) -> None:
    outcomes = compare(read_trace(path), TARGET)
    ours = outcomes.pop("ours")
    assert len(outcomes) == 2
    assert ours.over < min(other.over for other in outcomes.values())
    assert ours.hours <= 1.1 * min(other.hours for other in outcomes.values())


def test_a_load_that_never_changes_is_served_by_as_many_as_it_needs() -> None:
    for name, outcome in compare([45.0] * 600, TARGET).items():
        assert outcome.sizes[-1] == 5, name
        assert outcome.over < 60, name
    (still,) = {outcome.hours for outcome in compare([20.0] * 360, TARGET).values()}
    assert still == pytest.approx(0.2), "two backends, for a tenth of an hour"


def test_the_lines_between_the_points_are_straight(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("0,10\n2,20\n6,0\n")
    assert read_trace(trace) == [10, 15, 20, 15, 10, 5]


def test_a_trace_that_begins_amid_a_second_tells_no_load_that_was_not(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"  # as the manager keeps it
    trace.write_text("1700000000.9,0\n1700000002.9,100\n1700000004.9,100\n")
    assert all(0 <= load <= 100 for load in read_trace(trace))


@pytest.mark.parametrize(
    "text",
    ["", "0,1\n", "0,1\n0,2\n", "5,1\n3,2\n", "0,1\n2\n", "0,1,2\n1,2,3\n", "0,x\n1,2\n", "second,load\n0,1\n1,1\n"],
)
def test_what_is_no_trace_is_refused(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(text)
    with pytest.raises(ValueError, match=r"."):
        read_trace(trace)
    monkeypatch.setattr("sys.argv", ["replay.py", str(trace)])
    assert main() == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"{trace}: ")


@pytest.mark.parametrize("text", ["0,nan\n1,nan\n", "0,-5\n1,-5\n", "0,inf\n1,1\n"])
def test_a_load_that_is_no_amount_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "trace.csv").write_text(text)
    with pytest.raises(ValueError, match=r"."):
        read_trace(tmp_path / "trace.csv")


def test_the_picture_shows_the_need_and_the_three_fleets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "step.html"
    monkeypatch.setattr("sys.argv", ["replay.py", str(TRACES[-1]), "--plot", str(picture)])
    assert main() == 0
    drawn = picture.read_text()
    assert all(f'"name":{json.dumps(name)}' in drawn for name in ("needed", "course, ±1", "HPA", "ours"))
    assert not re.search(r"<script[^>]*\ssrc=", drawn), "the page needs nothing else"
    assert "ours" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "status", "errors"), [([], 0, ""), (["--plot", "x"], 2, "--plot needs plotly: .venv/bin/python has it\n")]
)
def test_without_a_picture_the_standard_library_will_do(
    words: list[str], status: int, errors: str, tmp_path: Path
) -> None:
    script = Path(__file__).parents[2] / "bench" / "replay.py"
    command = [sys.executable, "-I", "-S", str(script), str(TRACES[-1]), *words]  # -S: no installed package is found
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (status, errors)
    assert "ours" in done.stdout
