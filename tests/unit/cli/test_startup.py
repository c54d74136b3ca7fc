"""What run.sh waits for: a status and a time in, a result out; and once with a manager that answers on a port."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from werkzeug.serving import BaseWSGIServer, make_server

from cli import startup
from cli.output import Failed
from cli.startup import Serve, Update, wait_for_update, wait_until_it_serves
from cli.watch import NoAnswer
from fakes import Clock, settings

WAIT, REACHED, FAILED = "waits", "is reached", "failed"


def backend(number: int, state: str = "active", why: str = "") -> dict[str, Any]:
    return {
        **{"name": f"p-backend-{number}", "ip": f"198.18.0.{number + 1}", "state": state, "reason": "", "why": why},
        **{"node": "", "share": 0.5, "connections_rate": 0.0, "packets_rate": 0.0, "active": 0.0},
        "healthy": state == "active",
    }


def status(*states: str, balancer: str = "running", problem: str = "", **launches: Any) -> dict[str, Any]:
    fixed = {"failed": 0, "why": "", "updating": False, "update_given_up": "", "replaced": 0, "to_replace": 0}
    return {
        **{"project": "p", "desired": 2, "current": 2, "min": 2, "max": 10, "metric": "packets", "rate": None},
        **{"target": 100.0, "paused": False, "engine": "ok", "revision": "abc", "settings": {"interval": 2.0}},
        **{"state": "healthy", "problems": []},
        "launches": {**fixed, **launches},
        "backends": [backend(number, state) for number, state in enumerate(states, 1)],
        "balancer": {"state": balancer, "problem": problem},
        "balancers": [{"id": "b1", "last_seen": 0.8, "revision": "abc"}],
        "last_decision": None,
    }


def served() -> bool:
    """The service answers."""
    return True


def judge(goal: Serve | Update, found: dict[str, Any], now: float) -> tuple[str, str]:
    """The outcome, and what is waited for or why it failed."""
    try:
        waits_for = goal.judge(found, now)  # type: ignore[arg-type]
    except Failed as error:
        return FAILED, str(error)
    return (REACHED, "") if waits_for is None else (WAIT, waits_for)


def outcome(goal: Serve | Update, found: dict[str, Any], now: float) -> str:
    return judge(goal, found, now)[0]


# -- a start ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "now", "expected"),
    [
        (status("active", "active"), 0.0, REACHED),
        (status("active", "draining"), 0.0, REACHED),
        (status("active", "starting"), 14.0, WAIT),
        (status("active", "starting"), 16.0, REACHED),
        (status("starting", "starting"), 74.0, WAIT),
        (status("starting", "starting"), 76.0, FAILED),
        (status(), 1.0, WAIT),
        (status("active", "active", balancer="starting"), 1.0, WAIT),
        (status("active", "active", balancer="missing"), 76.0, FAILED),
        (status("starting", failed=3), 1.0, WAIT),
        (status("starting", failed=4), 1.0, FAILED),
        (status("active", "active", failed=4), 1.0, REACHED),
    ],
)
def test_a_project_serves_once_its_balancer_runs_and_a_backend_is_in_rotation(
    found: dict[str, Any], now: float, expected: str
) -> None:
    assert outcome(Serve(60, served, 0.0), found, now) == expected


def test_slow_image_has_its_ready_timeout() -> None:
    goal = Serve(300, served, 0.0)
    assert [outcome(goal, status("starting"), now) for now in (76, 314, 316)] == [WAIT, WAIT, FAILED]


def test_a_balancer_that_stays_failed_ends_the_wait_with_its_problem() -> None:
    goal, failed = Serve(60, served, 0.0), status("active", balancer="failed", problem="port 8000 is already allocated")
    assert [outcome(goal, failed, now) for now in (0, 9)] == [WAIT, WAIT]
    assert outcome(goal, status("active", balancer="starting"), 9.5) == WAIT
    assert [outcome(goal, failed, now) for now in (10, 19)] == [WAIT, WAIT], "the time began again"
    assert judge(goal, failed, 20) == (FAILED, "the balancer does not run: port 8000 is already allocated")


@pytest.mark.parametrize(("problem", "end"), [("", ""), ("no such image", ": no such image")])
def test_balancer_that_is_missing_for_too_long_is_named_with_its_problem_if_there_is_one(
    problem: str, end: str
) -> None:
    found = status("active", "active", balancer="missing", problem=problem)
    assert judge(Serve(60, served, 0.0), found, 76) == (FAILED, f"the balancer does not run (missing){end}")


def test_failed_launches_are_explained_by_the_managers_reason() -> None:
    _, text = judge(Serve(60, served, 0.0), status("starting", failed=4, why="GET / on port 80: status 500"), 1)
    assert text.startswith("no backend got ready: GET / on port 80: status 500; see --backend-port")


def test_service_port_that_does_not_answer_is_a_failure_after_thirty_seconds() -> None:
    answers, serving = [False, False, True], status("active", "active")
    goal = Serve(60, lambda: answers.pop(0), 0.0)
    assert [outcome(goal, serving, now) for now in (0, 29, 30)] == [WAIT, WAIT, REACHED]
    never = Serve(60, lambda: False, 0.0)
    assert [outcome(never, serving, now) for now in (0, 29, 31)] == [WAIT, WAIT, FAILED]


# -- an update -------------------------------------------------------------------------------------------------------


def updating(replaced: int, to_replace: int, *states: str) -> dict[str, Any]:
    return status(*(states or ("active", "active")), updating=to_replace > 0, replaced=replaced, to_replace=to_replace)


def test_wait_ends_where_there_is_no_update() -> None:
    assert outcome(Update(60, 30, False, 0.0), status("active", "starting"), 0) == REACHED


def test_an_update_is_reached_when_all_are_replaced_and_in_rotation() -> None:
    goal = Update(60, 30, False, 0.0)
    assert judge(goal, updating(1, 1), 0) == (WAIT, "1 of 2 backends replaced, 2 in rotation")
    assert outcome(goal, updating(2, 0, "active", "starting"), 1) == WAIT
    assert outcome(goal, updating(2, 0, "active", "active", "draining"), 2) == REACHED


def test_an_update_that_was_given_up_has_failed_with_its_reason() -> None:
    given_up = status("active", "active", update_given_up="exit code 3")
    goal = Update(60, 30, True, 0.0)
    assert outcome(goal, updating(0, 2), 0) == WAIT
    for failed in (goal, Update(60, 30, False, 0.0)):
        result, text = judge(failed, given_up, 5)
        assert (result, text.endswith("what ran before is used again: exit code 3")) == (FAILED, True)


def test_update_that_an_earlier_run_tried_is_no_failure_of_this_one() -> None:
    given_up = status("active", "active", update_given_up="exit code 3")
    assert outcome(Update(60, 30, True, 0.0), given_up, 0) == REACHED


def test_long_update_has_no_time_limit_while_it_progresses() -> None:
    goal = Update(60, 30, False, 0.0)  # 3 x 60 + 30 + 60 = 270 s without a change
    assert outcome(goal, updating(0, 5), 0) == WAIT
    assert outcome(goal, updating(1, 4), 269) == WAIT
    assert outcome(goal, updating(1, 4), 538) == WAIT
    reason = "the update has not moved for 270 s: 1 of 5 backends replaced, 2 in rotation"
    assert judge(goal, updating(1, 4), 540) == (FAILED, reason)


# -- the program -----------------------------------------------------------------------------------------------------


class Answers:
    """A manager and a service on one port of 127.0.0.1: /status has each of `statuses` once, and then the last one."""

    def __init__(self, *statuses: dict[str, Any]) -> None:
        self.statuses = list(statuses)
        self.server: BaseWSGIServer = make_server("127.0.0.1", 0, self._answer)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def _answer(self, environ: dict[str, Any], start: Any) -> list[bytes]:
        start("200 OK", [])
        if environ["PATH_INFO"] != "/status":
            return [b"hello"]
        return [json.dumps(self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]).encode()]

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def wait() -> Iterator[Callable[..., list[str]]]:
    """Waits for a goal with a manager that answers with those statuses; the lines that were logged."""
    made: list[Answers] = []
    logged: list[str] = []

    def run(goal: Callable[..., None], *statuses: dict[str, Any]) -> list[str]:
        manager, service = Answers(*statuses), Answers(status())
        made.extend([manager, service])
        goal(settings(manager_port=manager.server.server_port, port=service.server.server_port), logged.append)
        return logged

    run.logged = logged  # type: ignore[attr-defined]
    yield run
    for one in made:
        one.close()


def test_each_change_is_logged_once_until_it_serves(wait: Callable[..., list[str]]) -> None:
    starting = status("starting", "starting")
    changes = (starting, starting, status("active", "starting"), status("active", "active"))
    assert wait(wait_until_it_serves, *changes) == ["0 of 2 backends are ready", "1 of 2 backends are ready"]


def test_progress_of_an_update_is_logged(wait: Callable[..., list[str]]) -> None:
    def goal(found: Any, log: Callable[[str], None]) -> None:
        wait_for_update(found, False, log)

    assert wait(goal, updating(0, 2), updating(1, 1), updating(1, 1), updating(2, 0)) == [
        "0 of 2 backends replaced, 2 in rotation",
        "1 of 2 backends replaced, 2 in rotation",
    ]


def test_failure_logs_each_backend_and_raises_the_reason(wait: Callable[..., list[str]]) -> None:
    hint = "its container ended with exit code 1; last log line: open() failed [--allow root]"
    failed = status("starting", failed=4, why=hint)
    failed["backends"] = [backend(3, "starting", "GET / on port 80: connection refused")]
    with pytest.raises(Failed) as caught:
        wait(wait_until_it_serves, failed)
    assert str(caught.value).startswith(f"no backend got ready: {hint}; see --backend-port")
    (lines,) = wait.logged  # type: ignore[attr-defined]
    assert any("p-backend-3" in line and "connection refused" in line for line in lines.splitlines())


def test_silent_manager_is_a_failure_unless_it_answers_again_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "SILENT", 20.0)
    clock, answers = Clock(), [False, True, False, False]

    def ask(_: object) -> dict[str, Any]:
        clock.pass_by(15)
        if answers and answers.pop(0):
            return updating(1, 1)
        raise NoAnswer("no manager answers")

    monkeypatch.setattr(startup.Manager, "status", ask)
    monkeypatch.setattr(startup.time, "monotonic", clock)
    monkeypatch.setattr(startup.time, "sleep", lambda _: None)
    logged: list[str] = []
    with pytest.raises(Failed, match="no manager answers"):
        wait_for_update(settings(), False, logged.append)
    assert logged == ["no manager answers", "1 of 2 backends replaced, 2 in rotation", "no manager answers"]
    assert answers == []
