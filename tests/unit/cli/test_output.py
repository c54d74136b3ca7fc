"""Steps, signals and undo, in a process of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cli.output import Failed, Output, Undo

MANAGER = Path(__file__).parents[3] / "manager"
START = """
import os, signal, sys, time
from pathlib import Path
from cli.output import Failed, Undo, main
def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)
def run(out):
    with Undo(out) as undo:
        undo.add("undo the first", lambda: (send(signal.SIGINT, signal.SIGTERM), print("first undone")))
        undo.add("undo the second", lambda: 1 / 0)
        with out.step("Doing it") as step:
            step.log("a line")
            BODY
sys.exit(main("run.sh", Path(sys.argv[1]), "run.log", run))
"""


def program(body: str, place: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", START.replace("BODY", body), str(place)]
    return subprocess.run(
        command, capture_output=True, text=True, env={"PYTHONPATH": str(MANAGER)}, timeout=20, check=False
    )


def test_step_is_printed_with_its_seconds(tmp_path: Path) -> None:
    done = program("pass", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "Doing it … 0.0 s\n", "")
    assert (tmp_path / "run.log").read_text() == "a line\n"


def test_failed_step_is_undone_latest_first_even_where_one_undo_fails(tmp_path: Path) -> None:
    done = program("raise ValueError('no such luck')", tmp_path)
    first, undoing, failed, undone = done.stdout.splitlines()
    assert (first, undoing, undone) == ("Doing it … failed", "Undoing what this run began", "first undone")
    assert failed.startswith("  could not undo the second: division by zero (see ")
    log, *lines, _, last = done.stderr.splitlines()
    assert log == f"--- the end of {tmp_path / 'run.log'}:"
    assert lines == ["a line", "no such luck"]
    assert last == "run.sh: Doing it: failed: no such luck"
    assert done.returncode == 1


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_signal_ends_the_step_and_no_later_one_interrupts_the_undo(tmp_path: Path, name: str, status: int) -> None:
    done = program(f"send(signal.{name}); time.sleep(20)", tmp_path)
    assert done.returncode == status
    assert done.stdout.startswith("Doing it … interrupted\nUndoing what this run began\n")
    assert done.stdout.endswith("first undone\n")


def test_interrupted_program_ends_with_all_that_it_has_started(tmp_path: Path) -> None:
    clean_up = f"trap 'sleep 0.3; echo >{tmp_path}/cleaned; exit' TERM"
    child = f"{clean_up}; sleep 0.3; kill -INT {{os.getpid()}}; sleep 61 & wait"
    body = f"out.run('bash', '-c', f\"({child}); true\")"
    done = program(body, tmp_path)
    assert done.returncode == 130, done.stderr
    assert (tmp_path / "cleaned").exists(), "it had time to clean up"


def test_later_signal_does_not_interrupt_a_clean_up_within_the_step(tmp_path: Path) -> None:
    clean_up = "time.sleep(0); send(signal.SIGTERM); time.sleep(0.1); print(1234)"
    done = program(f"exec('try:\\n send(signal.SIGINT)\\nfinally:\\n {clean_up}')", tmp_path)
    assert "1234" in done.stdout
    assert done.returncode == 130


def test_signal_that_python_drops_is_raised_again_by_the_step(tmp_path: Path) -> None:
    drop = "exec('class A:\\n def __del__(self): send(signal.SIGINT); time.sleep(0)\\nA()')"
    assert program(drop, tmp_path).returncode == 130


def test_only_one_run_of_a_project_works_at_a_time(tmp_path: Path) -> None:
    body = "import subprocess; print(subprocess.run([sys.executable, '-c', 'from pathlib import Path; "
    body += 'from cli.output import main; main("stop.sh", Path("PLACE"), "x", print)\'], stderr=-1).stderr)'
    done = program(body.replace("PLACE", str(tmp_path)), tmp_path)
    assert f"another run.sh or stop.sh of project {tmp_path.name} is at work" in done.stdout


def test_program_that_fails_within_a_step_is_named_with_its_status(tmp_path: Path) -> None:
    with (
        Output(tmp_path / "log") as out,
        pytest.raises(Failed, match="Doing it: failed: sh ended with status 3") as caught,
        out.step("Doing it"),
    ):
        out.run("sh", "-c", "echo some output; exit 3")
    assert "some output" in caught.value.log


def test_log_that_an_earlier_program_still_writes_to_has_no_gap(tmp_path: Path) -> None:
    with Output(tmp_path / "log") as first:
        first.log.write("a long line of the first run\n")
        with Output(tmp_path / "log"):
            first.log.write("late\n")
    assert (tmp_path / "log").read_text() == "late\n"


def test_success_undoes_nothing(tmp_path: Path) -> None:
    undone: list[int] = []
    with Output(tmp_path / "log") as out, Undo(out) as undo:
        undo.add("nothing", lambda: undone.append(1))
    assert undone == []


def test_long_step_prints_that_it_still_runs(tmp_path: Path) -> None:
    done = program("time.sleep(5.5)", tmp_path)
    assert done.stdout == "Doing it … 5 s: a line … 5.5 s\n"
