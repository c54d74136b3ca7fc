"""What run.sh and stop.sh print, and how they end: named steps with their durations, signals, and undo.

Guarantees: a closed standard output does not stop a run; the first signal ends the program with exit code 128 + its
number, and later ones do not interrupt the clean-up; the changes of a failed run are undone, latest first, and an undo
action that fails does not stop the others.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

LOG_LINES = 15  # printed of the log after a failure
END_TIMEOUT = 5.0  # seconds for interrupted programs to end after SIGTERM
POLL = 0.05  # seconds


class Failed(Exception):
    """A step failed, or something is missing on the host. The message is for people; the exit code is 1. `log` is the
    end of the log if it helps to explain the failure."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


class Output:
    """Standard output and the log file of one run. The output of commands goes to the log."""

    def __init__(self, log: Path) -> None:
        self.path = log
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")
        # In append mode, because a supervisor from an earlier run writes to the same file.
        self.log = log.open("a", buffering=1, errors="replace")
        self.terminal = sys.stdout.isatty()

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        self.log.close()

    def say(self, text: str, end: str = "\n") -> None:
        """Prints a line to the standard output, or to the log once the standard output is closed."""
        try:
            print(text, end=end, flush=True)
        except OSError:
            # The log takes the place of the closed output, so that later lines do not fail.
            os.dup2(self.log.fileno(), sys.stdout.fileno())
            print(text, end=end, flush=True)

    def step(self, text: str) -> Step:
        return Step(self, text)

    def run(self, *command: str, grace: float = 0.0) -> None:
        """Runs a program with its output in the log. After an interrupt, it has `grace` seconds to end by itself;
        then it is ended with all programs that it has started. Raises Failed."""
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": self.log, "stderr": self.log}
        # In a session of its own, Ctrl-C does not reach it, and its process group has its number.
        with subprocess.Popen(command, start_new_session=True, **streams) as process:
            try:
                status = process.wait()
            except BaseException:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(grace)
                _end_group(process)
                raise
        if status:
            raise Failed(f"{command[0]} ended with status {status}; its output is in {self.path}")

    def need(self, program: str, purpose: str, package: str) -> None:
        """Installs a Debian package unless its program exists. Raises Failed if that fails or is not allowed."""
        if shutil.which(program):
            return
        install = '. manager/host.sh; LOG=$1; shift; need "$@"'
        if subprocess.run(["bash", "-c", install, "run.sh", self.path, purpose, package], check=False).returncode:
            raise Failed(f"{program} is missing for {purpose}")

    def end_of_log(self) -> str:
        lines = self.path.read_text(errors="replace").splitlines()[-LOG_LINES:]
        return "\n".join([f"--- the end of {self.path}:", *lines, "---", ""])


def _end_group(leader: subprocess.Popen[bytes]) -> None:
    """SIGTERM to a process group, and SIGKILL after END_TIMEOUT. Waits until the whole group has ended."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + END_TIMEOUT
        with suppress(ProcessLookupError):
            os.killpg(leader.pid, number)
            while time.monotonic() < deadline:
                leader.poll()  # one that has ended is a member until its status is read
                os.killpg(leader.pid, 0)
                time.sleep(POLL)


class Step:
    """A context that prints its name when it begins, its progress while it runs, and its duration when it ends.

    An exception in the context becomes Failed, with the step's name and the end of the log.
    """

    def __init__(self, output: Output, text: str) -> None:
        self._output, self._text = output, text
        self._progress = ""
        self._ended = threading.Event()

    def log(self, line: str) -> None:
        """Adds a line to the log; the last one is printed while the step runs."""
        self._output.log.write(f"{line.rstrip()}\n")
        self._progress = "".join(letter for letter in line if letter.isprintable())

    def __enter__(self) -> Step:
        raise_pending_signal()
        # The name is printed first, so that it is known which step hangs.
        self._output.say(f"{self._text} … ", end="")
        self._began = time.monotonic()
        self._ticker = threading.Thread(target=self._tick, daemon=True)
        self._ticker.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._ended.set()
        self._ticker.join()
        # On a terminal, the line is written again without the progress.
        if self._output.terminal:
            self._output.say(f"\r\033[K{self._text} … ", end="")
        if error is None:
            self._output.say(f"{time.monotonic() - self._began:.1f} s")
            raise_pending_signal()
            return
        self._output.say("failed" if isinstance(error, Exception) else "interrupted")
        if isinstance(error, Exception):
            self._output.log.write(f"{error}\n")
            raise Failed(f"{self._text}: failed: {reason(error)}", self._output.end_of_log()) from error

    def _tick(self) -> None:
        pause = 1 if self._output.terminal else 5
        while not self._ended.wait(pause):
            seconds = time.monotonic() - self._began
            if self._output.terminal:
                self._output.say(f"\r\033[K{self._text} … {seconds:.0f} s  {self._progress:.60}", end="")
            else:
                progress = f": {self._progress}" if self._progress else ""
                self._output.say(f"{seconds:.0f} s{progress} … ", end="")


def reason(error: BaseException) -> str:
    """The text of an error. For an error of the engine, this is the engine's own text."""
    return str(getattr(error, "explanation", None) or error) or type(error).__name__


# -- signals ----------------------------------------------------------------------------------------------------------

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_pending: list[int] = []  # the exit code for the first signal


def handle_signals() -> None:
    """From now on the first signal raises SystemExit in the main thread."""
    for number in SIGNALS:
        signal.signal(number, _end)


def shield() -> None:
    """From now on this process ignores the signals. Installs an empty handler instead of SIG_IGN, which the programs
    started by this process would inherit."""
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)


def _end(number: int, _: object) -> None:
    shield()
    _pending.append(128 + number)
    raise_pending_signal()


def raise_pending_signal() -> None:
    """Raises SystemExit if a signal has come. Each step calls it, because Python drops an exception that the signal's
    handler raises within a finalizer."""
    if _pending:
        raise SystemExit(_pending[0])


# -- undo -------------------------------------------------------------------------------------------------------------


class Undo:
    """The actions that undo a run's changes. If the context ends with an exception, they run, latest first."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._actions: list[tuple[str, Callable[[], object]]] = []

    def add(self, name: str, action: Callable[[], object]) -> None:
        self._actions.append((name, action))

    def __enter__(self) -> Undo:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not self._actions:
            return
        # A signal must not interrupt the undo, which would leave an incomplete project.
        shield()
        _pending.clear()
        self._output.say("Undoing what this run began")
        for name, action in reversed(self._actions):
            try:
                action()
            except Exception as error:
                self._output.say(f"  could not {name}: {reason(error)} (see {self._output.path})")


# -- one run ----------------------------------------------------------------------------------------------------------


def main(program: str, run_dir: Path, log: str, run: Callable[[Output], None]) -> int:
    """Calls `run` while this process holds the project's lock. Returns the exit code."""
    handle_signals()
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr] # for letters that the locale does not have
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with (run_dir / "lock").open("w") as lock:
            _acquire(lock, run_dir.name)
            with Output(run_dir / log) as output:
                run(output)
    except (Failed, OSError) as error:
        text = f"{getattr(error, 'log', '')}{program}: {error}"
        with suppress(OSError):  # it was closed
            print(text, file=sys.stderr, flush=True)
        return 1
    return 0


def _acquire(lock: TextIO, project: str) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise Failed(f"another run.sh or stop.sh of project {project} is at work") from None
