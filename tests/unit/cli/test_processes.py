"""A project's manager and supervisor are found by their command lines, and ended."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cli import processes
from cli.processes import MANAGER, SUPERVISOR, end, find

SLEEPER = "import time\nprint(flush=True)\ntime.sleep(60)\n"
STUBBORN = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint(flush=True)\ntime.sleep(60)\n"

Begin = Callable[..., int]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "a checkout"
    (place / "manager").mkdir(parents=True)
    for program in (MANAGER, SUPERVISOR):
        (place / program).write_text(SLEEPER)
    monkeypatch.setattr(processes, "ROOT", place)
    return place


@pytest.fixture
def begin(checkout: Path) -> Iterator[Begin]:
    """Starts a program with these arguments; its process id."""
    started = []

    def start(*arguments: str, cwd: Path = checkout) -> int:
        process = subprocess.Popen([sys.executable, *arguments], cwd=cwd, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None
        process.stdout.readline()
        return process.pid

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_manager_is_found_by_its_path_and_its_project(checkout: Path, begin: Begin) -> None:
    ours = begin(str(checkout / MANAGER), "--project", "p", "--backends", "3")
    begin(str(checkout / MANAGER), "--project", "q")
    begin(str(checkout / MANAGER), "--verbose", "--project", "p")
    begin(str(checkout / SUPERVISOR), "--project", "p")
    assert list(find("p", MANAGER)) == [ours]


def test_relative_path_counts_only_in_this_checkout(checkout: Path, begin: Begin, tmp_path: Path) -> None:
    ours = begin(MANAGER, "--project", "p")
    other = tmp_path / "other"
    (other / "manager").mkdir(parents=True)
    (other / MANAGER).write_text(SLEEPER)
    begin(MANAGER, "--project", "p", cwd=other)
    assert list(find("p", MANAGER)) == [ours]


def test_process_that_ignores_sigterm_is_killed(checkout: Path, begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "END_TIMEOUT", 0.3)
    (checkout / MANAGER).write_text(STUBBORN)
    pid = begin(str(checkout / MANAGER), "--project", "p")
    end(pid)
    assert processes.command_line(pid) == []
    end(pid)  # twice is fine


def test_process_that_has_ended_has_no_command_line() -> None:
    assert processes.command_line(999999999) == []
