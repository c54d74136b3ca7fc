"""The command lines of run.sh and stop.sh: which value applies, what is refused, and what runs without a start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli import arguments
from cli.arguments import BAD_USAGE, FLAGS_ARE_VALID, run_arguments
from core import settings
from core.settings import SETTINGS, SettingError, flag


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty directory instead of the repository's root, and no settings in the environment."""
    monkeypatch.setattr(settings, "ROOT", tmp_path)
    monkeypatch.setattr(arguments, "ROOT", tmp_path)
    for name in [name for name in os.environ if name.startswith("LB_")]:
        monkeypatch.delenv(name)
    return tmp_path


def test_flag_overrides_the_variable_and_that_overrides_the_running_project(root: Path) -> None:
    place = root / "run" / "p"
    place.mkdir(parents=True)
    (place / "settings.json").write_text(json.dumps({"LB_MAX": "30", "LB_MIN": "3", "LB_TARGET": "7"}))
    given = {"LB_PROJECT": "p", "LB_MAX": "20", "LB_MIN": "4"}
    result = run_arguments(["--max", "15"], given)
    assert [result.variables[f"LB_{name}"] for name in ("MAX", "MIN", "TARGET", "PORT")] == ["15", "4", "7", "8000"]
    assert (result.settings.max, result.settings.min) == (15, 4)
    assert run_arguments(["--project", "q"], given).variables["LB_TARGET"] == "100", "of another project"


def test_flag_that_is_given_several_times_is_a_list_quoted_as_in_a_shell() -> None:
    result = run_arguments(["--env", "A=one two", "--env", "B=`c`"], {"LB_ENV": "C=3"})
    assert result.variables["LB_ENV"] == "'A=one two' 'B=`c`'"
    assert result.settings.env == ("A=one two", "B=`c`")
    assert run_arguments(["--env", ""], {"LB_ENV": "C=3"}).settings.env == ()


def test_switches_and_the_number_of_backends() -> None:
    result = run_arguments(["3", "--follow", "--no-install", "--no-wait", "--swarm-init"], {})
    assert (result.backends, result.follow, result.no_install, result.no_wait, result.swarm_init) == ("3", *[True] * 4)
    default = run_arguments([], {})
    assert (default.backends, default.follow, default.no_install, default.no_wait, default.swarm_init) == (
        "",
        *[False] * 4,
    )


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["1"], "the number of backends is '1'; allowed: 2 (--min) to 10 (--max)"),
        (["11"], "the number of backends is '11'; allowed: 2 (--min) to 10 (--max)"),
        (["two"], "the number of backends is 'two'; allowed: 2 (--min) to 10 (--max)"),
        (["--ma", "3"], "unrecognized arguments: --ma; ./run.sh --help lists the flags"),
        (["--max"], "argument --max: expected one argument; ./run.sh --help lists the flags"),
        (["3", "4"], "unrecognized arguments: 4; ./run.sh --help lists the flags"),
        (["--watch", "--json"], "--watch prints no JSON; use --status --json"),
        (["--min=0"], "--min (LB_MIN) is '0'; allowed: 1 to 1000"),
    ],
)
def test_bad_command_line_is_one_line(words: list[str], line: str) -> None:
    with pytest.raises(SettingError) as caught:
        run_arguments(words, {})
    assert str(caught.value) == line


def test_help_lists_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        arguments.main("run.sh", ["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, setting in SETTINGS.items():
        default = f" (default: {setting.default})" if setting.default else ""
        assert f"{flag(name)} {name.upper()} {setting.meaning}; {setting.allowed}{default}" in text


@pytest.mark.parametrize("program", ["run.sh", "stop.sh"])
def test_valid_flags_continue_and_bad_ones_do_not(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert arguments.main(program, ["--project", "p"]) == FLAGS_ARE_VALID
    assert capsys.readouterr() == ("", "")
    assert arguments.main(program, ["--project", "P"]) == BAD_USAGE
    line = f"{program}: --project (LB_PROJECT) is 'P'; allowed: a-z 0-9 _ -, 40 at most\n"
    assert capsys.readouterr() == ("", line)


def test_file_of_the_backends_is_needed_for_a_start_alone(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LB_ENV_FILE", f"{root}/a.env")
    assert arguments.main("run.sh", []) == BAD_USAGE
    assert capsys.readouterr() == ("", f"run.sh: cannot read {root}/a.env: No such file or directory\n")
    assert arguments.main("run.sh", ["--status"]) == 1, "it does not run"
    (root / "a.env").write_text("A=1")
    assert arguments.main("run.sh", []) == FLAGS_ARE_VALID


def test_stop_takes_the_project_from_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LB_PROJECT", "q")
    assert arguments.stop_arguments(["--now"]).project == "q"


def test_status_without_an_environment_is_a_project_that_does_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    line = "project p does not run here; ./run.sh starts it"
    assert arguments.main("run.sh", ["--project", "p", "--status"]) == 1
    assert capsys.readouterr() == ("", f"run.sh: {line}\n")
    assert arguments.main("run.sh", ["--project", "p", "--status", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"project": "p", "state": "down", "problem": line}


def test_first_stage_needs_the_standard_library_alone() -> None:
    manager = Path(arguments.__file__).parents[1]
    program = f"import runpy, sys; sys.path.insert(0, {str(manager)!r}); "
    program += "sys.argv[1:] = ['run.sh', '--max', '0']; runpy.run_module('cli.arguments', run_name='__main__')"
    command = [sys.executable, "-S", "-I", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={})
    assert (done.returncode, done.stdout) == (BAD_USAGE, "")
    assert done.stderr == "run.sh: --max (LB_MAX) is '0'; allowed: 1 to 1000\n"


def test_start_on_an_older_python_is_refused_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 13))
    assert arguments.main("run.sh", []) == 1
    assert capsys.readouterr().err == "run.sh: python3 is Python 3.10.13; install 3.11 or later as python3\n"
