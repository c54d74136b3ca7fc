"""What run.sh waits for after it has started the manager. It asks GET /status and prints each change of what it finds.

`startup.py serve`: until the balancer runs, a backend is in rotation and, for the sample server, a request through the
service's port is answered. `startup.py update`: until the backends of a running project have been replaced.
Exit codes: 0 reached; 1 not, and what is printed last says why. The settings come in LB_ variables, as run.sh exports
them. The two classes are pure: a status and a time in, a verdict out.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import requests
from rich.console import Console

from cli.watch import Manager, NoAnswer, Status, plain, progress, view
from core.settings import Settings, read

POLL = 0.2  # seconds between two questions
BALANCER_FAILED = 10.0  # seconds for which the balancer has to be failed; the manager tries again meanwhile
FAILED_LAUNCHES = 4  # one after the other, with no backend in rotation: waiting longer does not help
OTHERS = 15.0  # seconds that are spent waiting for all backends to be ready, once one is
MARGIN = 15.0  # seconds past the ready timeout, for the manager to find that it has passed and to report it
TIMEOUT = 5.0  # seconds for one request through the service's port
UNANSWERED = 30.0  # seconds without an answer there, though a backend is in rotation, that are a failure
SILENT = 30.0  # seconds without an answer of the manager that are a failure; its supervisor may have to start it again
EXPLAINED = 1.0  # seconds after a failure until its reason is complete
LINE = 1000  # characters: no line is wrapped
HELP = "see --backend-port, --health, --ready-timeout and --allow in ./run.sh --help"


class Outcome(Enum):
    WAIT = "wait"
    REACHED = "reached"
    FAILED = "failed"


@dataclass(frozen=True)
class Verdict:
    """`text` is for people: what is waited for, or why it failed."""

    outcome: Outcome
    text: str = ""


class Goal(Protocol):
    def judge(self, status: Status, now: float) -> Verdict: ...


class Serve:
    """A started project serves. Times in seconds of one clock; `now` is when the wait begins."""

    def __init__(self, ready_timeout: float, now: float) -> None:
        self._began, self._deadline = now, now + ready_timeout + MARGIN
        self._balancer_failed: float | None = None  # since when

    def judge(self, status: Status, now: float) -> Verdict:
        balancer = status["balancer"]
        states = [backend["state"] for backend in status["backends"]]
        if balancer["state"] != "failed":
            self._balancer_failed = None
        elif self._balancer_failed is None:
            self._balancer_failed = now
        elif now - self._balancer_failed >= BALANCER_FAILED:
            return Verdict(Outcome.FAILED, f"the balancer does not run: {balancer['problem']}")
        if "active" not in states and status["launches"]["failed"] >= FAILED_LAUNCHES:
            return Verdict(Outcome.FAILED, f"no backend got ready: {status['launches']['why']}; {HELP}")
        all_ready = "starting" not in states or now - self._began > OTHERS
        if balancer["state"] == "running" and "active" in states and all_ready:
            return Verdict(Outcome.REACHED)
        if now > self._deadline:
            return Verdict(Outcome.FAILED, self._too_late(status))
        return Verdict(Outcome.WAIT, f"{states.count('active')} of {status['desired']} backends are ready")

    @staticmethod
    def _too_late(status: Status) -> str:
        if status["balancer"]["state"] != "running":
            return f"the balancer does not run ({status['balancer']['state']}): {status['balancer']['problem']}"
        return f"no backend got ready in time; {HELP}"


class Update:
    """The backends of a running project have been replaced, where they had to be.

    An update takes as long as it takes: it fails when the manager gives it up, or when nothing moves for longer than
    launches that fail (two of them, one after the other) and a drain take.
    """

    def __init__(self, ready_timeout: float, drain_timeout: float, now: float) -> None:
        self._longest_pause = 3 * ready_timeout + drain_timeout + 60.0
        self._moved_at, self._last_seen = now, ""
        self._updating = False

    def judge(self, status: Status, now: float) -> Verdict:
        launches = status["launches"]
        if launches["update_given_up"]:
            why = f"the update was given up, and what ran before is used again: {launches['update_given_up']}"
            return Verdict(Outcome.FAILED, why)
        self._updating = self._updating or launches["updating"]
        active = sum(backend["state"] == "active" for backend in status["backends"])
        replaced = not launches["updating"] and active >= status["desired"]
        if replaced or not self._updating:
            return Verdict(Outcome.REACHED, progress(status) if self._updating else "")
        seen = f"{progress(status)}, {active} in rotation"
        if seen != self._last_seen:
            self._last_seen, self._moved_at = seen, now
        if now - self._moved_at > self._longest_pause:
            return Verdict(Outcome.FAILED, f"the update has not moved for {self._longest_pause:g} s: {seen}")
        return Verdict(Outcome.WAIT, seen)


class Checked:
    """A goal that also needs the manager to answer and, once it is reached, a request to be answered."""

    def __init__(self, goal: Goal, answers: Callable[[], bool], now: float) -> None:
        self._goal, self._answers = goal, answers
        self._manager_answered = now
        self._unanswered: float | None = None  # since when

    def judge(self, status: Status | None, problem: str, now: float) -> Verdict:
        """`status` is None where the manager does not answer, and `problem` says so."""
        if status is None:
            silent = now - self._manager_answered > SILENT
            return Verdict(Outcome.FAILED if silent else Outcome.WAIT, problem)
        self._manager_answered = now
        verdict = self._goal.judge(status, now)
        if verdict.outcome is not Outcome.REACHED or self._answers():
            return verdict
        if self._unanswered is None:
            self._unanswered = now
        outcome = Outcome.FAILED if now - self._unanswered > UNANSWERED else Outcome.WAIT
        return Verdict(outcome, "backends are in rotation, but a request to the service's port is not answered")


def wait(goal: Checked, manager: Manager) -> int:
    """Asks until the goal is reached (0) or has failed (1)."""
    printed = ""
    while True:
        status, problem = None, ""
        try:
            status = manager.status()
        except NoAnswer as error:
            problem = str(error)
        verdict = goal.judge(status, problem, time.monotonic())
        if verdict.outcome is Outcome.FAILED:
            explain(*_a_moment_later(goal, manager, status, verdict))
            return 1
        if verdict.text not in ("", printed):
            print(verdict.text, flush=True)
            printed = verdict.text
        if verdict.outcome is Outcome.REACHED:
            return 0
        time.sleep(POLL)


def _a_moment_later(
    goal: Checked, manager: Manager, status: Status | None, verdict: Verdict
) -> tuple[Status | None, str]:
    """The status and the reason once more: by then the manager has read the failed backend's last log line."""
    time.sleep(EXPLAINED)
    try:
        later = manager.status()
    except NoAnswer:
        return status, verdict.text
    again = goal.judge(later, "", time.monotonic())
    return later, again.text if again.outcome is Outcome.FAILED else verdict.text


def explain(status: Status | None, why: str) -> None:
    """Prints what is known of a failure; the reason comes last, for run.sh prints the end of what it logged."""
    console = Console(width=LINE, color_system=None)
    if status is not None:
        console.print(view(status))
    console.print(plain(why))


def request_through(settings: Settings) -> Callable[[], bool]:
    """A request through the service's port, by this host's own address. Another image may speak anything but HTTP, and
    in a Swarm this node may have no balancer: there what the manager reports is enough."""
    if settings.image or settings.orchestrator == "swarm":
        return lambda: True
    address = "127.0.0.1" if settings.bind == "0.0.0.0" else settings.bind
    session = requests.Session()
    session.trust_env = False  # this host is reached through no proxy

    def answers() -> bool:
        try:
            return session.get(f"http://{address}:{settings.port}/", timeout=TIMEOUT).status_code == 200
        except requests.RequestException:
            return False

    return answers


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    settings, now = read(environ), time.monotonic()
    manager = Manager({"LB_PROJECT": settings.project, "LB_MANAGER_PORT": str(settings.manager_port)})
    match list(arguments):
        case ["serve"]:
            return wait(Checked(Serve(settings.ready_timeout, now), request_through(settings), now), manager)
        case ["update"]:
            update = Update(settings.ready_timeout, settings.drain_timeout, now)
            return wait(Checked(update, lambda: True, now), manager)
        case _:
            print(__doc__, file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
