"""How run.sh waits after it has started the manager: until the project serves, and until an update has ended.

A goal's `judge` takes a status and a time. It returns None if the goal is reached, else what the wait is for, as a text
for people, and raises Failed if waiting does not help.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from contextlib import suppress

import requests
from rich.console import Console

from cli.output import Failed
from cli.watch import Manager, NoAnswer, progress, render_status
from core.settings import Settings
from core.snapshot import Status

POLL = 0.2  # seconds between two requests
BALANCER_FAILED = 10.0  # seconds for which the balancer may be failed; the manager tries again in this time
FAILED_LAUNCHES = 4  # in a row, without a backend in rotation: after that, waiting does not help
WAIT_FOR_ALL = 15.0  # seconds from the beginning for all backends to be ready; after that, one is enough
MARGIN = 15.0  # seconds after the ready timeout, for the manager to detect and report it
TIMEOUT = 5.0  # seconds for one request through the service's port
UNANSWERED = 30.0  # seconds for which the service may not answer although a backend is in rotation
SILENT = 30.0  # seconds for which the manager may not answer: its supervisor may be restarting it
REASON_DELAY = 1.0  # seconds from a failure until its reason is complete
TABLE_WIDTH = 1000  # characters, so that no line is wrapped
HELP = "see --backend-port, --health, --ready-timeout and --allow in ./run.sh --help"


class Serve:
    """The goal of a start: the project serves, and a request to it is answered (`answers` sends one). Times in seconds
    of one clock; `now` is when the wait begins."""

    def __init__(self, ready_timeout: float, answers: Callable[[], bool], now: float) -> None:
        self._began, self._deadline = now, now + ready_timeout + MARGIN
        self._answers = answers
        self._balancer_failed: float | None = None  # since when
        self._unanswered: float | None = None  # since when

    def judge(self, status: Status, now: float) -> str | None:
        # The manager starts a failed balancer again, so only one that stays failed counts.
        balancer = status["balancer"]
        states = [backend["state"] for backend in status["backends"]]
        if balancer["state"] != "failed":
            self._balancer_failed = None
        elif self._balancer_failed is None:
            self._balancer_failed = now
        elif now - self._balancer_failed >= BALANCER_FAILED:
            raise Failed(f"the balancer does not run: {balancer['problem']}")
        # One failed launch may be an accident; several in a row are not.
        if "active" not in states and status["launches"]["failed"] >= FAILED_LAUNCHES:
            raise Failed(f"no backend got ready: {status['launches']['why']}; {HELP}")
        # One backend is enough to serve. The others get some more time, so that a start usually ends with all of them.
        all_ready = "starting" not in states or now - self._began > WAIT_FOR_ALL
        if balancer["state"] == "running" and "active" in states and all_ready:
            return self._request(now)
        if now > self._deadline and balancer["state"] != "running":
            problem = f": {balancer['problem']}" if balancer["problem"] else ""
            raise Failed(f"the balancer does not run ({balancer['state']}){problem}")
        if now > self._deadline:
            raise Failed(f"no backend got ready in time; {HELP}")
        return f"{states.count('active')} of {status['desired']} backends are ready"

    def _request(self, now: float) -> str | None:
        if self._answers():
            return None
        if self._unanswered is None:
            self._unanswered = now
        unanswered = "backends are in rotation, but a request to the service's port is not answered"
        if now - self._unanswered > UNANSWERED:
            raise Failed(unanswered)
        return unanswered


class Update:
    """The goal of an update: all backends that have to be replaced have been replaced.

    There is no time limit as long as the update progresses. It has failed when the manager gives it up, or when nothing
    changes for longer than two failing launches and a drain take. `given_up_before`: an earlier run's update was given
    up and is not tried again, so this is no failure of this run.
    """

    def __init__(self, ready_timeout: float, drain_timeout: float, given_up_before: bool, now: float) -> None:
        self._longest_pause = 3 * ready_timeout + drain_timeout + 60.0
        self._changed_at, self._last_seen = now, ""
        self._updating = False
        self._given_up_before = given_up_before

    def judge(self, status: Status, now: float) -> str | None:
        launches = status["launches"]
        self._updating = self._updating or launches["updating"]
        if launches["update_given_up"] and (self._updating or not self._given_up_before):
            raise Failed(f"the update was given up, and what ran before is used again: {launches['update_given_up']}")
        active = sum(backend["state"] == "active" for backend in status["backends"])
        replaced = not launches["updating"] and active >= status["desired"]
        if replaced or not self._updating:
            return None
        # Any change of these numbers is progress, also a backend that leaves rotation.
        seen = f"{progress(status)}, {active} in rotation"
        if seen != self._last_seen:
            self._last_seen, self._changed_at = seen, now
        if now - self._changed_at > self._longest_pause:
            raise Failed(f"the update has not moved for {self._longest_pause:g} s: {seen}")
        return seen


def wait_until_it_serves(settings: Settings, log: Callable[[str], None]) -> None:
    """Waits until the project serves. Raises Failed; `log` gets each change."""
    now = time.monotonic()
    _wait(Serve(settings.ready_timeout, request_through(settings), now), settings, log)


def wait_for_update(settings: Settings, given_up_before: bool, log: Callable[[str], None]) -> None:
    """Waits until all backends that have to be replaced have been replaced. Raises Failed; `log` gets each change."""
    now = time.monotonic()
    _wait(Update(settings.ready_timeout, settings.drain_timeout, given_up_before, now), settings, log)


def _wait(goal: Serve | Update, settings: Settings, log: Callable[[str], None]) -> None:
    manager, logged = Manager(settings), ""
    answered = time.monotonic()  # when the manager answered last
    while True:
        try:
            status = manager.status()
            answered = time.monotonic()
            waits_for = goal.judge(status, answered)
        except NoAnswer as error:
            if time.monotonic() - answered > SILENT:
                raise Failed(str(error)) from error
            waits_for = str(error)
        except Failed:
            _explain(goal, manager, status, log)
            raise
        if waits_for is None:
            return
        if waits_for != logged:
            log(waits_for)
            logged = waits_for
        time.sleep(POLL)


def _explain(goal: Serve | Update, manager: Manager, status: Status, log: Callable[[str], None]) -> None:
    """Logs the state of each backend. Raises Failed if the goal still fails, now with the complete reason.

    The status is read again after a moment, when the manager has read the failed backend's last log line.
    """
    time.sleep(REASON_DELAY)
    with suppress(NoAnswer):
        status = manager.status()
    text = io.StringIO()
    Console(width=TABLE_WIDTH, color_system=None, file=text).print(render_status(status))
    log(text.getvalue())
    goal.judge(status, time.monotonic())


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
