"""Finds a project's manager and supervisor by their command lines, and ends them. Uses the standard library only."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from core.settings import ROOT

SUPERVISOR, MANAGER = "manager/supervise.sh", "manager/script.py"
END_TIMEOUT = 10.0  # seconds from SIGTERM to SIGKILL
POLL = 0.05  # seconds


def find(project: str, program: str) -> Iterator[int]:
    """The processes whose command line is INTERPRETER PROGRAM --project NAME, with this checkout's PROGRAM.

    This needs no pid file, and never finds another project's process or one that has a reused process number.
    """
    for directory in Path("/proc").glob("[0-9]*"):
        words = command_line(int(directory.name))
        if len(words) < 4 or words[2:4] != ["--project", project]:
            continue
        by_path = words[1] == str(ROOT / program)
        # The process may have been started through another path of this checkout, such as a link. Then its working
        # directory is this checkout.
        by_directory = f"/{words[1]}".endswith(f"/{program}") and _works_in_root(directory)
        if by_path or by_directory:
            yield int(directory.name)


def command_line(pid: int) -> list[str]:
    """Empty for a process that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def _works_in_root(process: Path) -> bool:
    try:
        return (process / "cwd").samefile(ROOT)
    except OSError:
        return False


def end(pid: int) -> None:
    """SIGTERM, and SIGKILL after END_TIMEOUT. Raises PermissionError for another user's process."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + END_TIMEOUT
        while time.monotonic() < deadline:
            if not command_line(pid):  # empty for a zombie, too
                return
            time.sleep(POLL)
