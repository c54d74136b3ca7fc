"""How run.sh waits after it has started the manager: until the project serves, and until an update has ended.

A goal's `judge` takes a status and a time, and returns a verdict.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum

import requests
from rich.console import Console

from cli.output import Failed
from cli.watch import Manager, NoAnswer, progress, render_status
from core.settings import Settings
from core.snapshot import Status

POLL = 0.2  # seconds between two requests
BALANCER_FAILED = 10.0  # seconds for which the balancer may be failed; the manager tries again in this time
FAILED_LAUNCHES = 4  # in a row, without a backend in rotation: after that, waiting does not help
OTHERS = 15.0  # seconds from the beginning for all backends to be ready; after that, one is enough
MARGIN = 15.0  # seconds after the ready timeout, for the manager to detect and report it
TIMEOUT = 5.0  # seconds for one request through the service's port
UNANSWERED = 30.0  # seconds for which the service may not answer although a backend is in rotation
SILENT = 30.0  # seconds for which the manager may not answer: its supervisor may be restarting it
EXPLAINED = 1.0  # seconds from a failure until its reason is complete
LINE = 1000  # width in characters, so that no line is wrapped
HELP = "see --backend-port, --health, --ready-timeout and --allow in ./run.sh --help"


class Outcome(Enum):
    WAIT = "wait"
    REACHED = "reached"
    FAILED = "failed"


@dataclass(frozen=True)
class Verdict:
    """`text` is for people: what the wait is for, or why it failed."""

    outcome: Outcome
    text: str = ""


class Serve:
    """The goal of a start: the project serves, and a request to it is answered (`answers` sends one). Times in seconds
    of one clock; `now` is when the wait begins."""

    def __init__(self, ready_timeout: float, answers: Callable[[], bool], now: float) -> None:
        self._began, self._deadline = now, now + ready_timeout + MARGIN
        self._answers = answers
        self._balancer_failed: float | None = None  # since when
        self._unanswered: float | None = None  # since when

    def judge(self, status: Status, now: float) -> Verdict:
        # The manager starts a failed balancer again, so only one that stays failed counts.
        balancer = status["balancer"]
        states = [backend["state"] for backend in status["backends"]]
        if balancer["state"] != "failed":
            self._balancer_failed = None
        elif self._balancer_failed is None:
            self._balancer_failed = now
        elif now - self._balancer_failed >= BALANCER_FAILED:
            return Verdict(Outcome.FAILED, f"the balancer does not run: {balancer['problem']}")
        # One failed launch may be an accident; several in a row are not.
        if "active" not in states and status["launches"]["failed"] >= FAILED_LAUNCHES:
            return Verdict(Outcome.FAILED, f"no backend got ready: {status['launches']['why']}; {HELP}")
        # One backend is enough to serve. The others get some more time, so that a start usually ends with all of them.
        all_ready = "starting" not in states or now - self._began > OTHERS
        if balancer["state"] == "running" and "active" in states and all_ready:
            return self._request(now)
        if now > self._deadline:
            return Verdict(Outcome.FAILED, self._too_late(status))
        return Verdict(Outcome.WAIT, f"{states.count('active')} of {status['desired']} backends are ready")

    def _request(self, now: float) -> Verdict:
        if self._answers():
            return Verdict(Outcome.REACHED)
        if self._unanswered is None:
            self._unanswered = now
        outcome = Outcome.FAILED if now - self._unanswered > UNANSWERED else Outcome.WAIT
        return Verdict(outcome, "backends are in rotation, but a request to the service's port is not answered")

    @staticmethod
    def _too_late(status: Status) -> str:
        if status["balancer"]["state"] != "running":
            return f"the balancer does not run ({status['balancer']['state']}): {status['balancer']['problem']}"
        return f"no backend got ready in time; {HELP}"


class Update:
    """The goal of an update: all backends that have to be replaced have been replaced.

    There is no time limit as long as the update progresses. It has failed when the manager gives it up, or when nothing
    changes for longer than two failing launches and a drain take.
    """

    def __init__(self, ready_timeout: float, drain_timeout: float, now: float) -> None:
        self._longest_pause = 3 * ready_timeout + drain_timeout + 60.0
        self._changed_at, self._last_seen = now, ""
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
        # Any change of these numbers is progress, also a backend that leaves rotation.
        seen = f"{progress(status)}, {active} in rotation"
        if seen != self._last_seen:
            self._last_seen, self._changed_at = seen, now
        if now - self._changed_at > self._longest_pause:
            return Verdict(Outcome.FAILED, f"the update has not moved for {self._longest_pause:g} s: {seen}")
        return Verdict(Outcome.WAIT, seen)


def wait_until_it_serves(settings: Settings, log: Callable[[str], None]) -> None:
    """Waits until the project serves. Raises Failed; `log` gets each change."""
    now = time.monotonic()
    _wait(Serve(settings.ready_timeout, request_through(settings), now), settings, log)


def wait_for_update(settings: Settings, log: Callable[[str], None]) -> None:
    """Waits until all backends that have to be replaced have been replaced. Raises Failed; `log` gets each change."""
    now = time.monotonic()
    _wait(Update(settings.ready_timeout, settings.drain_timeout, now), settings, log)


def _wait(goal: Serve | Update, settings: Settings, log: Callable[[str], None]) -> None:
    manager, status, logged = Manager(settings), None, ""
    answered = time.monotonic()  # when the manager answered last
    while True:
        try:
            status = manager.status()
            answered = time.monotonic()
            verdict = goal.judge(status, answered)
        except NoAnswer as error:
            silent = time.monotonic() - answered > SILENT
            verdict = Verdict(Outcome.FAILED if silent else Outcome.WAIT, str(error))
        if verdict.outcome is Outcome.FAILED:
            raise Failed(_explain(goal, manager, status, verdict, log))
        if verdict.text not in ("", logged):
            log(verdict.text)
            logged = verdict.text
        if verdict.outcome is Outcome.REACHED:
            return
        time.sleep(POLL)


def _explain(
    goal: Serve | Update, manager: Manager, status: Status | None, verdict: Verdict, log: Callable[[str], None]
) -> str:
    """The reason for a failure; `log` gets the state of each backend.

    The status is read again after a moment, when the manager has read the failed backend's last log line.
    """
    time.sleep(EXPLAINED)
    with suppress(NoAnswer):
        status = manager.status()
        later = goal.judge(status, time.monotonic())
        if later.outcome is Outcome.FAILED:
            verdict = later
    if status is not None:
        text = io.StringIO()
        Console(width=LINE, color_system=None, file=text).print(render_status(status))
        log(text.getvalue())
    return verdict.text


def request_through(settings: Settings) -> Callable[[], bool]:
    """Returns a function that sends a request to the service, at an address of this host, and says whether it was
    answered. Another image may not serve HTTP, and a Swarm may have no balancer on this node. Then no request is sent,
    and the manager's status is enough."""
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
