"""The loop over a fake engine and a fake clock: which calls it makes, when, on which thread, and what it logs."""

from __future__ import annotations

import inspect
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.replay import read_trace
from core import controller as module
from core import workers
from core.controller import Controller, UnknownBackend
from core.engine import BalancerState, EngineError, Event, NameTaken
from core.fleet import Container
from core.launch_backoff import FORGET_AFTER, MAX_UPDATE_FAILURES, STABLE
from core.load import Finding, Sample
from core.plan import DRAIN_GRACE
from core.publisher import Closing
from core.scaler import CREATE, OK, Decision
from fakes import Chance, Clock, FakeEngine, controller, eventually, report, sample


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """What is waited for in real time is short or, where it would hide a missing wake-up, infinite."""
    monkeypatch.setattr(module, "PAUSE", 0.01)
    monkeypatch.setattr(workers, "PAUSE", 0.01)
    monkeypatch.setattr(module, "RELIST", 60.0)
    caplog.set_level(logging.INFO)


class Rig:
    """A controller that has adopted the first `running` backends; p-backend-1 is at 198.18.0.2, and so on. They are
    made from image-1, what it launches from `image`."""

    def __init__(self, place: Path, running: int = 0, image: str = "image-1", **changes: object) -> None:
        self.engine = FakeEngine(*(f"p-backend-{n}" for n in range(1, running + 1)))
        self.engine.image = image
        self.clock = Clock()
        self.ip_file = place / "ip.txt"
        self.controller = controller(self.engine, place, self.clock, **changes)
        self.controller.adopt(None)

    def fail_to_launch(self, times: int) -> None:
        """Has the engine refuse so often, with time enough after each refusal for another try."""
        self.engine.refusals = [EngineError("no space left")] * times
        while self.engine.refusals:
            left = len(self.engine.refusals)
            self.step_until(lambda left=left: len(self.engine.refusals) < left and not self.states())
            self.clock.pass_by(30)

    def step_until(self, condition: Callable[[], object]) -> None:
        """Steps, with the clock standing still, until the workers' results make `condition` true."""
        assert eventually(lambda: (self.controller.step(), condition())[1]), self.states()

    def states(self) -> dict[int, str]:
        rows = self.controller.status()["backends"]
        return {int(row["name"].removeprefix("p-backend-")): row["state"] for row in rows}

    def reason(self, number: int) -> str:
        return next(b["reason"] for b in self.controller.status()["backends"] if b["name"].endswith(f"-{number}"))

    def snapshot(self) -> dict[str, str]:
        snapshot = self.controller.wait_for_snapshot("", 0)
        assert snapshot is not None
        return {backend["ip"]: backend["state"] for backend in snapshot["backends"]}

    def revision(self) -> str:
        return str(self.controller.status()["revision"])

    def report_rows(self, **backends: Sample) -> Decision | None:
        """A report of a balancer that has the newest snapshot: with the ids of the current backends."""
        snapshot = self.controller.wait_for_snapshot("", 0)
        assert snapshot is not None
        ids = {f"_{b['ip'].rpartition('.')[2]}": b["id"] for b in snapshot["backends"]}
        return self.controller.report(
            report(**{name: replace(one, id=ids.get(name, "gone")) for name, one in backends.items()})
        )

    def report_all_healthy(self, but: str = "") -> None:
        """A report that finds all healthy but what is made from the image `but`."""
        specs = {container.ip: container.spec for container in self.engine.containers.values()}
        snapshot = self.snapshot()
        self.report_rows(**{f"_{ip.rpartition('.')[2]}": sample(healthy=specs.get(ip) != but) for ip in snapshot})

    def launches(self) -> dict[str, Any]:
        return dict(self.controller.status()["launches"])

    def specs(self) -> list[str]:
        return [container.spec for container in self.engine.containers.values()]

    def calls(self, kind: str) -> list[int]:
        return [int(name.removeprefix("p-backend-")) for call, name in self.engine.calls if call == kind]

    def id(self, number: int) -> str:
        return self.engine.containers[f"p-backend-{number}"].id


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def make(running: int = 0, **changes: object) -> Rig:
        made.append(Rig(tmp_path, running, **changes))
        return made[-1]

    yield make
    for one in made:
        one.engine.gate.set()


@pytest.fixture
def looping(rig: Callable[..., Rig]) -> Iterator[Callable[..., Rig]]:
    """A rig whose loop runs in a thread of its own."""
    begun: list[tuple[Rig, threading.Thread]] = []

    def begin(running: int, **changes: object) -> Rig:
        made = rig(running, **changes)
        begun.append((made, threading.Thread(target=made.controller.run)))
        begun[-1][1].start()
        return made

    yield begin
    for made, thread in begun:
        made.controller.close()
        made.engine.tell(None)
        thread.join(5)
        assert not thread.is_alive()


# -- launching --------------------------------------------------------------------------------------------------------


def test_launches_run_on_other_threads_while_the_controller_goes_on(rig: Callable[..., Rig]) -> None:
    r = rig()
    r.engine.gate.clear()
    r.controller.step()
    r.controller.step()
    assert r.states() == {1: "starting", 2: "starting"}
    assert r.snapshot() == {}, "not listed without an address"
    assert eventually(lambda: len(r.engine.calls) == 2)
    assert r.engine.containers == {}
    r.engine.gate.set()
    r.step_until(lambda: len(r.snapshot()) == 2)
    assert r.states() == {1: "starting", 2: "starting"}, "not ready before a balancer reports it"
    assert sorted(r.calls("launch")) == [1, 2], "each once"
    assert all(name.startswith("launch") for name in r.engine.threads)


def test_a_launched_backend_is_active_when_a_balancer_finds_it_healthy(rig: Callable[..., Rig]) -> None:
    r = rig(min=1)
    r.step_until(r.snapshot)
    assert r.ip_file.read_text() == ""
    r.report_rows(_2=sample(healthy=False))
    assert r.states() == {1: "starting"}
    r.report_rows(_2=sample(healthy=True))
    assert r.states() == {1: "active"}
    assert r.ip_file.read_text() == "198.18.0.2\n"


def test_failed_launch_is_logged_and_retried_with_growing_waits(
    rig: Callable[..., Rig], caplog: pytest.LogCaptureFixture
) -> None:
    r = rig(min=1)
    r.engine.refusals = [EngineError("no space left")] * 3
    for attempt, pause in enumerate((0.5, 1.0, 2.0), 1):
        r.step_until(lambda: not r.states())
        assert [r.launches()[key] for key in ("failed", "retry_in", "why")] == [attempt, pause, "no space left"]
        r.controller.step()
        r.clock.pass_by(pause / 2)
        r.controller.step()
        assert (r.states(), r.calls("launch")) == ({}, [1] * attempt), "before its time"
        r.clock.pass_by(pause / 2)
    r.step_until(r.snapshot)
    assert r.calls("launch") == [1] * 4
    assert "3 failures in a row, next launch in 2.0 s: no space left" in caplog.text


def test_an_unexpected_error_of_a_launch_or_a_stop_is_logged_and_the_call_is_made_again(
    rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    r = rig(min=1)
    r.engine.refusals = [RuntimeError("no such thing")]
    r.step_until(lambda: r.launches()["failed"])
    assert "launch of p-backend-1 failed: no such thing" in caplog.text
    r.clock.pass_by(30)
    r.step_until(r.snapshot)

    stops = []

    def stop(container_id: str) -> None:
        stops.append(container_id)
        if len(stops) == 1:
            raise RuntimeError("no such thing")
        FakeEngine.stop(r.engine, container_id)

    monkeypatch.setattr(r.engine, "stop", stop)
    r.engine.die("p-backend-1", 1)
    r.step_until(lambda: len(stops) == 2)
    assert "a call of the engine failed; trying again" in caplog.text


@pytest.mark.parametrize("beside", [0, 2])
def test_backends_that_end_at_their_start_back_off_also_beside_healthy_ones(
    rig: Callable[..., Rig], beside: int
) -> None:
    r = rig(beside, min=beside + 1)
    r.clock.pass_by(100)
    r.engine.crashing = {"image-1": 3}
    for attempt, pause in enumerate((0.5, 1.0, 2.0, 4.0), 1):
        r.step_until(lambda: len(r.states()) == beside and r.launches()["failed"])
        launches = [r.launches()[key] for key in ("failed", "retry_in")]
        assert launches == [attempt, pause]
        assert r.launches()["why"] == "its container ended with exit code 3; last log line: goodbye"
        r.clock.pass_by(pause - 0.1)
        r.controller.step()
        assert len(r.calls("launch")) == attempt, "before its time"
        r.clock.pass_by(0.2)
    r.engine.crashing = {}
    r.step_until(lambda: len(r.snapshot()) == beside + 1)


def test_failures_are_forgotten_once_the_fleet_is_at_its_size_for_a_minute(rig: Callable[..., Rig]) -> None:
    r = rig(min=1, max=2)
    r.fail_to_launch(3)
    r.step_until(r.snapshot)
    r.report_all_healthy()
    r.controller.step()
    r.clock.pass_by(FORGET_AFTER - 0.1)
    r.controller.step()
    assert r.launches()["failed"] == 3, "not for long enough"
    r.clock.pass_by(0.2)
    r.controller.step()
    assert [r.launches()[key] for key in ("failed", "retry_in", "why")] == [0, 0, ""]
    r.engine.refusals = [EngineError("no space left")]
    r.controller.scale(2, None, None)
    r.step_until(lambda: len(r.states()) == 1 and r.launches()["retry_in"] == 0.5)


def test_wait_after_a_failed_launch_has_jitter(rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Chance, "value", 0.9)
    r = rig(min=1)
    r.engine.refusals = [EngineError("no space left")]
    r.step_until(lambda: not r.states())
    assert r.launches()["retry_in"] == 0.7


def test_serving_backend_that_fails_first_is_replaced_without_a_wait(rig: Callable[..., Rig]) -> None:
    r = rig(2)
    r.clock.pass_by(STABLE)
    r.engine.die("p-backend-2", 1)
    r.step_until(lambda: sorted(r.engine.containers) == ["p-backend-1", "p-backend-3"])
    assert (r.launches()["failed"], r.launches()["retry_in"]) == (1, 0)
    r.step_until(lambda: r.launches()["why"] == "its container ended with exit code 1; last log line: goodbye")


def test_backends_that_serve_and_are_killed_again_and_again_back_off(rig: Callable[..., Rig]) -> None:
    """As with a memory limit that is too low: each serves for 25 s."""
    r = rig(1, min=1)
    for failures, expected in enumerate((0, 1, 2, 4, 8), 1):
        r.step_until(r.snapshot)
        r.report_all_healthy()
        for _ in range(25):
            r.clock.pass_by(1)
            r.controller.step()
        r.engine.die(next(iter(r.engine.containers)), 137)
        r.step_until(lambda failures=failures: r.launches()["failed"] == failures)
        assert r.launches()["retry_in"] == expected
        r.clock.pass_by(expected)


def test_backends_that_fail_at_once_are_counted_and_logged_as_one_failure(
    rig: Callable[..., Rig], caplog: pytest.LogCaptureFixture
) -> None:
    r = rig(3, min=3)
    for _ in range(2):
        r.clock.pass_by(STABLE)
        for name in list(r.engine.containers):
            r.engine.die(name, 137)
        r.controller.step()
        r.clock.pass_by(2)
        r.step_until(lambda: len(r.snapshot()) == 3)
        r.report_all_healthy()
    assert r.launches()["failed"] == 2
    assert [m.split(",")[0] for m in caplog.messages if "in a row" in m] == ["2 failures in a row"]


@pytest.mark.parametrize("signal", [9, 3, 0])  # by docker kill; by docker stop, as the image says: number or name
def test_backend_killed_from_outside_counts_as_no_failure(looping: Callable[..., Rig], signal: int) -> None:
    r = looping(2)
    r.clock.pass_by(STABLE)
    r.engine.tell(Event("kill", r.id(2), signal))
    assert eventually(lambda: r.controller._fleet["p-backend-2"].signalled is not None)
    r.engine.die("p-backend-2", 137)
    assert eventually(lambda: sorted(r.engine.containers) == ["p-backend-1", "p-backend-3"])
    assert r.launches()["failed"] == 0


def test_log_line_of_a_killed_backend_does_not_explain_the_failure_of_an_earlier_one_with_its_name(
    looping: Callable[..., Rig], caplog: pytest.LogCaptureFixture
) -> None:
    r = looping(2)

    def killed(name: str, by_whom: str, left: list[str]) -> None:
        if by_whom == "docker kill":
            r.engine.tell(Event("kill", r.engine.containers[name].id, 9))
            assert eventually(lambda: r.controller._fleet[name].signalled is not None)
        r.engine.die(name, 137)
        assert eventually(lambda: sorted(r.engine.containers) == left)
        assert eventually(lambda: f"last log line of {name}: goodbye" in caplog.text)
        caplog.clear()
        assert eventually(lambda: len(r.snapshot()) == 2)
        r.report_all_healthy()

    r.clock.pass_by(60)
    killed("p-backend-2", "itself", ["p-backend-1", "p-backend-3"])
    killed("p-backend-3", "docker kill", ["p-backend-1", "p-backend-2"])
    for _ in range(2):
        r.controller.step()
        r.clock.pass_by(FORGET_AFTER)
    r.controller.step()
    assert r.launches()["why"] == ""
    killed("p-backend-2", "docker kill", ["p-backend-1", "p-backend-3"])
    assert (r.launches()["why"], r.launches()["update_given_up"]) == ("", "")


def test_end_soon_after_a_slow_launch_is_a_launch_failure(rig: Callable[..., Rig]) -> None:
    r = rig(min=1)
    r.engine.gate.clear()
    r.controller.step()
    r.clock.pass_by(STABLE + 1)
    r.engine.gate.set()
    r.step_until(r.snapshot)
    r.report_all_healthy()
    assert r.states() == {1: "active"}
    r.engine.die("p-backend-1", 1)
    r.controller.step()
    assert r.launches()["failed"] == 1


def test_a_launch_that_failed_a_thousand_times_is_still_retried(rig: Callable[..., Rig]) -> None:
    r = rig(min=30, max=30)
    r.fail_to_launch(1110)
    r.step_until(lambda: len(r.snapshot()) == 30)


READY_TIMEOUT = 60.0


def test_name_of_a_foreign_container_is_skipped_from_then_on(rig: Callable[..., Rig]) -> None:
    r = rig()
    r.engine.foreign = {"p-backend-1"}
    r.step_until(lambda: len(r.snapshot()) == 2)
    assert sorted(r.states()) == [2, 3]
    assert r.calls("launch").count(1) == 1
    assert r.launches()["failed"] == 0


def test_names_of_foreign_containers_do_not_end_an_update(rig: Callable[..., Rig]) -> None:
    r = rig(2, image="image-2")
    for name in ("p-backend-3", "p-backend-4"):
        r.engine.foreign.add(name)
        r.step_until(lambda name=name: name in r.controller._namer.taken)
        r.clock.pass_by(30)
    r.step_until(lambda: "image-2" in r.specs())
    assert r.launches()["update_given_up"] == ""


# -- dying ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", [("die", 137), ("pause", 0)])
def test_an_event_moves_the_revision_before_the_engine_lists_what_happened(
    looping: Callable[..., Rig], event: tuple[str, int]
) -> None:
    r = looping(2)
    r.engine.gate.clear()  # no replacement is launched yet
    before = r.revision()
    r.engine.tell(Event(event[0], r.id(2), event[1]))  # while the list goes on to say that it runs
    after = r.controller.wait_for_snapshot(before, 3)
    assert after is not None
    assert [b["ip"] for b in after["backends"]] == ["198.18.0.2"]
    assert after["revision"] != before
    assert r.ip_file.read_text() == "198.18.0.2\n"


def test_failed_backend_is_logged_replaced_and_removed(
    looping: Callable[..., Rig], caplog: pytest.LogCaptureFixture
) -> None:
    r = looping(2)
    r.clock.pass_by(60)
    r.engine.die("p-backend-2", 3)
    assert eventually(lambda: sorted(r.engine.containers) == ["p-backend-1", "p-backend-3"])
    assert (
        "backend p-backend-2 198.18.0.3 active→failed after 60.0 s: its container ended with exit code 3" in caplog.text
    )
    assert "last log line of p-backend-2: goodbye" in caplog.text


def test_backend_stopped_from_outside_drains_immediately(looping: Callable[..., Rig]) -> None:
    r = looping(2)
    r.engine.gate.clear()
    r.engine.tell(Event("kill", r.id(2), 1))  # a HUP is nothing
    r.engine.tell(Event("kill", "somebody else's", 15))
    r.engine.tell(Event("kill", r.id(1), 15))
    assert eventually(lambda: r.snapshot().get("198.18.0.2") == "draining")
    assert r.snapshot()["198.18.0.3"] == "active"
    assert r.reason(1) == "another program is stopping its container"


def test_any_other_event_causes_a_list(looping: Callable[..., Rig]) -> None:
    r = looping(2)
    before = r.revision()
    r.clock.pass_by(60)
    assert eventually(lambda: r.engine.lists == 2)  # adopted, and the first pass; the next would come in a minute
    r.engine.containers["p-backend-2"] = replace(r.engine.containers["p-backend-2"], ip="")
    r.engine.tell(Event("disconnect", "a network", 0))
    assert r.controller.wait_for_snapshot(before, 3) is not None
    assert eventually(lambda: sorted(r.engine.containers) == ["p-backend-1", "p-backend-3"])


def test_events_of_our_own_stops_change_nothing(looping: Callable[..., Rig]) -> None:
    r = looping(3)
    r.engine.gate.clear()
    r.controller.scale(None, 2, None)
    assert eventually(lambda: r.states()[3] == "draining")
    r.controller.stop("198.18.0.4", "drained")
    r.engine.tell(Event("kill", r.id(3), 15))
    r.engine.tell(Event("die", r.id(3), 0))
    assert eventually(lambda: "198.18.0.4" not in r.snapshot())
    assert (r.states()[3], r.reason(3)) == ("stopped", "drained")


def test_events_are_listened_for_again_after_the_stream_broke(looping: Callable[..., Rig]) -> None:
    r = looping(2)
    for end in (EngineError("connection reset"), None):
        r.engine.tell(end)
    before = r.revision()
    r.engine.tell(Event("die", r.id(2), 1))
    assert r.controller.wait_for_snapshot(before, 3) is not None


def make_unhealthy(r: Rig, *numbers: int, seconds: float, why: str = "refused") -> None:
    """Reports every second, over `seconds`, that those backends are unhealthy and all others healthy."""
    rows = r.controller.status()["backends"]
    addresses = {row["ip"] for row in rows if int(row["name"].rpartition("-")[2]) in numbers}
    for _ in range(int(seconds)):
        r.clock.pass_by(1)
        snapshot = r.snapshot()
        r.report_rows(**{f"_{ip.rpartition('.')[2]}": sample(healthy=ip not in addresses, why=why) for ip in snapshot})
        r.controller.step()


def test_unhealthy_backend_drains_once_its_substitute_is_ready(
    rig: Callable[..., Rig], caplog: pytest.LogCaptureFixture
) -> None:
    r = rig(2)
    make_unhealthy(r, 1, seconds=10)
    assert (r.states(), r.calls("launch")) == ({1: "active", 2: "active"}, []), "not for long enough"
    r.engine.gate.clear()
    make_unhealthy(r, 1, seconds=2)
    assert eventually(lambda: r.calls("launch") == [3])
    assert r.states() == {1: "active", 2: "active", 3: "starting"}, "kept until there is a substitute"
    r.engine.gate.set()
    r.step_until(lambda: len(r.snapshot()) == 3)
    make_unhealthy(r, 1, seconds=1)
    assert r.states() == {1: "draining", 2: "active", 3: "active"}
    assert r.reason(1).endswith("s: refused")
    assert r.launches()["failed"] == 1, "a failure of what it was made from"
    r.controller.stop("198.18.0.2", "drained in 1.0 s")
    r.step_until(lambda: sorted(r.engine.containers) == ["p-backend-2", "p-backend-3"])


def test_four_unhealthy_of_five_are_replaced_one_at_a_time(rig: Callable[..., Rig]) -> None:
    r = rig(5, min=5)
    unhealthy = (1, 2, 3, 4)
    make_unhealthy(r, *unhealthy, seconds=11)
    for step in range(400):
        make_unhealthy(r, *unhealthy, seconds=1)
        states = r.states()
        active = [n for n, state in states.items() if state == "active"]
        assert len(active) >= 5, f"{states} in step {step}: the unhealthy ones left before their substitutes were ready"
        assert sum(state == "starting" for state in states.values()) <= 1, f"{states}: more than one at a time"
        if not set(active) & set(unhealthy):
            break
        time.sleep(0.002)
    assert len(active) == 5


def test_unhealthy_backends_stay_while_no_substitute_gets_ready(rig: Callable[..., Rig]) -> None:
    r = rig(3, min=3)
    for _ in range(200):
        r.clock.pass_by(1)
        r.report_rows(**{f"_{ip.rpartition('.')[2]}": sample(healthy=False) for ip in r.snapshot()})
        r.controller.step()
        assert [r.states()[n] for n in (1, 2, 3)] == ["active"] * 3
        time.sleep(0.001)
    assert r.launches()["failed"] >= 1
    assert r.launches()["why"].startswith("not ready within 60 s")


def test_report_that_an_active_backend_is_done_drains_it(rig: Callable[..., Rig]) -> None:
    r = rig(2)
    r.controller.stop("198.18.0.2", "drained")
    assert r.states()[1] == "draining"
    r.controller.stop("198.18.0.2", "drained")
    assert r.states()[1] == "stopped"
    with pytest.raises(UnknownBackend):
        r.controller.stop("198.18.0.99", "drained")


def test_failed_backend_without_logs_is_removed_all_the_same(rig: Callable[..., Rig]) -> None:
    r = rig(2)
    r.engine.no_logs = "configured logging driver does not support reading"
    r.engine.die("p-backend-1", 3)
    assert eventually(lambda: (r.controller.step(), "p-backend-1" not in r.engine.containers)[1], within=0.5)


def test_new_backend_does_not_inherit_the_health_of_its_address(rig: Callable[..., Rig]) -> None:
    r = rig(2)
    r.clock.pass_by(60)
    r.report_rows(_2=sample(), _3=sample(healthy=True))
    r.engine.die("p-backend-2", 1)
    r.step_until(lambda: "198.18.0.3" in r.snapshot() and 2 not in r.states())
    assert r.states() == {1: "active", 3: "starting"}
    r.report_rows(_3=sample(healthy=True))
    assert r.states() == {1: "active", 3: "active"}


def test_no_backend_fails_its_ready_timeout_without_a_balancer(rig: Callable[..., Rig]) -> None:
    r = rig(2)
    r.report_rows(_2=sample(), _3=sample())
    r.controller.drain("198.18.0.3")
    r.step_until(lambda: "198.18.0.4" in r.snapshot())
    r.engine.balancers = frozenset()
    r.clock.pass_by(READY_TIMEOUT + 1)
    r.controller.step()
    assert r.states()[3] == "starting"


# -- leaving ----------------------------------------------------------------------------------------------------------


def test_backend_drains_until_the_balancer_reports_and_is_listed_until_its_container_ends(
    rig: Callable[..., Rig],
) -> None:
    r = rig(3)
    r.controller.scale(None, 2, None)
    r.controller.step()
    assert r.snapshot() == {"198.18.0.2": "active", "198.18.0.3": "active", "198.18.0.4": "draining"}
    assert r.ip_file.read_text() == "198.18.0.2\n198.18.0.3\n"
    r.controller.step()
    assert (r.states()[3], r.engine.calls) == ("draining", []), "not stopped before the balancer's word"

    r.engine.gate.clear()
    draining = r.revision()
    r.controller.stop("198.18.0.4", "drained in 1.0 s")
    r.controller.step()
    assert eventually(lambda: r.calls("stop") == [3])
    r.controller.stop("198.18.0.4", "drained in 1.5 s")
    r.controller.step()
    assert r.states()[3] == "stopped"
    assert r.snapshot()["198.18.0.4"] == "draining", "its last packets have to reach its clients"
    assert r.revision() == draining

    r.engine.gate.set()
    r.step_until(lambda: 3 not in r.states())
    assert r.calls("stop") == [3], "once"
    assert "198.18.0.4" not in r.snapshot()
    assert r.calls("launch") == []


def test_drain_without_a_balancers_report_ends_after_timeout_and_grace(rig: Callable[..., Rig]) -> None:
    r = rig(3, drain_timeout=5)
    r.controller.scale(None, 2, None)
    r.controller.step()
    r.clock.pass_by(5 + DRAIN_GRACE)
    r.controller.step()
    assert r.states()[3] == "draining"
    r.engine.gate.clear()
    r.clock.pass_by(0.5)
    r.controller.step()
    assert (r.states()[3], r.reason(3)) == (
        "stopped",
        "drain timeout: no report that the backend's last connection has ended",
    )
    r.engine.gate.set()
    r.step_until(lambda: sorted(r.engine.containers) == ["p-backend-1", "p-backend-2"])


def test_a_stop_that_failed_is_tried_again(rig: Callable[..., Rig], caplog: pytest.LogCaptureFixture) -> None:
    r = rig(3)
    r.controller.drain("198.18.0.4")
    r.controller.stop("198.18.0.4", "drained")
    r.engine.gate.clear()
    r.controller.step()
    assert eventually(lambda: r.calls("stop") == [3])
    r.engine.down = "timeout"
    r.engine.gate.set()
    assert eventually(lambda: "stop of p-backend-3 failed, will try again: timeout" in caplog.text)
    r.engine.down = ""
    r.step_until(lambda: "p-backend-3" not in r.engine.containers)
    assert r.calls("stop") == [3, 3]


def test_a_backend_drained_by_hand_is_replaced(rig: Callable[..., Rig]) -> None:
    r = rig(2)
    r.controller.drain("198.18.0.2")
    r.step_until(lambda: "198.18.0.4" in r.snapshot())
    assert r.states() == {1: "draining", 2: "active", 3: "starting"}
    with pytest.raises(ValueError, match=r"198\.18\.0\.2 is draining; only starting and active backends"):
        r.controller.drain("198.18.0.2")
    with pytest.raises(UnknownBackend):
        r.controller.drain("198.18.0.99")


def test_a_spare_cannot_be_drained(rig: Callable[..., Rig]) -> None:
    r = rig(2, spares=1)
    r.step_until(lambda: r.snapshot().get("198.18.0.4") == "spare")
    with pytest.raises(ValueError, match="is spare; only starting and active backends"):
        r.controller.drain("198.18.0.4")
    assert r.states()[3] == "spare"


# -- spares -----------------------------------------------------------------------------------------------------------


def test_decision_admits_a_ready_spare_before_the_next_list(
    rig: Callable[..., Rig],
) -> None:
    r = rig(2, spares=1)
    r.step_until(lambda: len(r.snapshot()) == 3)
    r.report_rows(_2=sample(), _4=sample(healthy=True))
    assert r.snapshot()["198.18.0.4"] == "spare"
    assert r.ip_file.read_text() == "198.18.0.2\n198.18.0.3\n"
    status = r.controller.status()
    assert (status["current"], status["desired"]) == (2, 2), "a spare is no capacity"

    looks = r.engine.lists
    r.clock.pass_by(2)
    r.report_rows(_2=sample(2 * 290))
    assert r.controller.desired == 3
    assert r.snapshot()["198.18.0.4"] == "active"
    assert r.ip_file.read_text() == "198.18.0.2\n198.18.0.3\n198.18.0.4\n"
    assert r.engine.lists == looks
    r.step_until(lambda: r.snapshot().get("198.18.0.5") == "spare")
    assert r.calls("launch") == [3, 4]


def test_a_spare_admitted_before_it_is_ready_is_starting(rig: Callable[..., Rig]) -> None:
    r = rig(2, spares=1)
    r.engine.gate.clear()
    r.controller.step()
    r.controller.scale(3, None, None)
    assert r.states() == {1: "active", 2: "active", 3: "starting", 4: "spare"}
    r.engine.gate.set()
    r.step_until(lambda: len(r.snapshot()) == 4)
    assert r.states()[3] == "starting"
    r.report_all_healthy()
    assert r.states() == {1: "active", 2: "active", 3: "active", 4: "spare"}


def test_restarted_manager_keeps_the_ready_spares(rig: Callable[..., Rig], tmp_path: Path) -> None:
    r = rig(2, spares=2)
    r.step_until(lambda: len(r.snapshot()) == 4)
    r.report_all_healthy()
    calls = list(r.engine.calls)
    again = controller(r.engine, tmp_path, r.clock, spares=2)
    again.adopt(None)
    again.step()
    assert [backend["state"] for backend in again.status()["backends"]] == ["active"] * 2 + ["spare"] * 2
    assert (again.desired, r.engine.calls) == (2, calls)


def test_manager_without_a_saved_fleet_does_not_count_the_wanted_spares_as_backends(rig: Callable[..., Rig]) -> None:
    r = rig(5, spares=2)
    assert r.controller.desired == 3
    r.controller.step()
    assert list(r.states().values())[:5] == ["active"] * 3 + ["draining"] * 2


def test_late_report_of_an_earlier_backend_does_not_stop_the_one_that_has_its_address(rig: Callable[..., Rig]) -> None:
    r = rig(2)
    with pytest.raises(UnknownBackend):
        r.controller.stop("198.18.0.2", "drained", "another-id")
    assert r.states() == {1: "active", 2: "active"}
    r.controller.stop("198.18.0.2", "drained", r.id(1)[:12])
    assert r.states()[1] == "draining"


def test_launch_that_fails_after_a_list_showed_its_container_counts_as_a_failure(
    rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    r = rig(1, min=2)
    listed, launched = threading.Event(), list[str]()

    def launch(name: str, spec: str) -> Container:
        launched.append(name)
        r.engine.run(name, spec)
        listed.wait(5)
        del r.engine.containers[name]
        raise EngineError("timed out")

    monkeypatch.setattr(r.engine, "launch", launch)
    r.step_until(lambda: r.states().get(2) == "starting" and "198.18.0.3" in r.snapshot())
    listed.set()
    r.step_until(lambda: not r.controller._workers.busy)
    assert (r.launches()["failed"], r.launches()["why"]) == (1, "timed out")
    assert launched == ["p-backend-2"], "the next launch waits"


def test_failed_launch_does_not_remove_a_backend_that_was_renamed_to_its_name(rig: Callable[..., Rig]) -> None:
    r = rig(2)
    r.engine.gate.clear()
    r.controller.scale(3, None, None)
    renamed = replace(r.engine.containers.pop("p-backend-1"), name="p-backend-3")
    r.engine.containers["p-backend-3"] = renamed
    r.controller.step()
    assert r.states()[3] == "active"
    r.engine.refusals = [NameTaken("in use"), NameTaken("in use")]
    seen: list[bool] = []
    r.controller.subscribe(lambda: seen.append(renamed.ip in r.snapshot()))
    r.engine.gate.set()
    r.step_until(lambda: not r.controller._workers.busy)
    r.controller.step()
    assert r.states() == {2: "active", 3: "active", 4: "starting"}
    assert all(seen), "without it in the snapshot, its connections would be cut"


# -- a manager's restart ----------------------------------------------------------------------------------------------


def test_restarted_manager_takes_no_drain_back_and_counts_its_end_as_no_failure(
    rig: Callable[..., Rig], tmp_path: Path
) -> None:
    r = rig(3)
    r.controller.scale(None, 2, None)
    assert r.states() == {1: "active", 2: "active", 3: "draining"}
    again = controller(r.engine, tmp_path, r.clock, max=2)
    again.adopt(None)
    again.step()
    assert (again.status()["revision"], again.desired) == (r.revision(), 2)
    r.engine.die("p-backend-3", 0)
    again.step()
    assert [backend["state"] for backend in again.status()["backends"]] == ["active", "active", "stopped"]
    assert (again.status()["launches"]["failed"], r.calls("launch")) == (0, [])


def test_restarted_manager_keeps_the_desired_number_during_an_update(rig: Callable[..., Rig], tmp_path: Path) -> None:
    r = rig(3, image="image-2", min=1)
    r.step_until(lambda: len(r.snapshot()) == 4)
    r.report_all_healthy()
    again = controller(r.engine, tmp_path, r.clock, image="image-2", min=1)
    again.adopt(None)
    assert again.desired == 3


def test_restarted_manager_keeps_the_desired_number_although_backends_have_ended(
    rig: Callable[..., Rig], tmp_path: Path
) -> None:
    r = rig(3, min=1)
    r.engine.containers.clear()
    again = controller(r.engine, tmp_path, r.clock, min=1)
    again.adopt(None)
    assert again.desired == 3


# -- updates ----------------------------------------------------------------------------------------------------------


def test_an_update_replaces_one_by_one_and_never_has_fewer_active_than_desired(rig: Callable[..., Rig]) -> None:
    r = rig(3, image="image-2", min=3)
    assert r.launches()["updating"]
    for _ in range(200):
        r.controller.step()
        r.report_all_healthy()
        for ip, state in r.snapshot().items():
            if state == "draining":
                r.controller.stop(ip, "drained")
        states = list(r.states().values())
        assert states.count("active") >= 3
        assert states.count("active") + states.count("starting") <= 4
        if r.specs() == ["image-2"] * 3:
            break
        time.sleep(0.005)
    assert r.specs() == ["image-2"] * 3
    assert (len(r.calls("launch")), len(r.calls("stop"))) == (3, 3)
    assert not r.launches()["updating"]


@pytest.mark.parametrize("age", [0, 100])
@pytest.mark.parametrize("crash", [True, False])
def test_update_whose_backends_never_get_ready_is_given_up(
    rig: Callable[..., Rig], caplog: pytest.LogCaptureFixture, age: float, crash: bool
) -> None:
    r = rig(2, image="image-2")
    r.clock.pass_by(age)
    r.engine.crashing = {"image-2": 3} if crash else {}
    for _ in range(400):
        r.controller.step()
        r.report_all_healthy(but="image-2")
        r.clock.pass_by(0.1 if crash else 1)
        if r.launches()["update_given_up"] and r.specs() == ["image-1"] * 2:
            break
        time.sleep(0.001)
    given_up = r.launches()["update_given_up"]
    assert given_up.startswith("its container ended with exit code 3" if crash else "not ready within 60 s")
    r.step_until(lambda: r.launches()["update_given_up"].endswith("; last log line: goodbye"))
    r.step_until(lambda: r.states() == {1: "active", 2: "active"})
    assert r.specs() == ["image-1"] * 2, "the old ones never left"
    assert len(r.calls("launch")) == MAX_UPDATE_FAILURES
    assert not r.launches()["updating"]
    r.engine.refusals = [EngineError("no space left")]
    r.controller.drain("198.18.0.2")
    r.step_until(lambda: r.launches()["failed"])  # of the old, for which nothing is given up
    assert caplog.text.count("update given up, going back: its backends failed: ") == 1


def test_update_whose_backends_turn_unhealthy_after_their_start_is_given_up(rig: Callable[..., Rig]) -> None:
    r = rig(2, image="image-2")
    for _ in range(400):
        r.controller.step()
        rows = {}
        for one in r.controller._fleet.values():
            turned = one.spec == "image-2" and one.state == "active" and r.clock.now - one.since >= 5
            rows[f"_{one.ip.rpartition('.')[2]}"] = sample(healthy=not turned)
            if one.state == "draining":
                r.controller.stop(one.ip, "drained")
        r.report_rows(**rows)
        r.clock.pass_by(1)
        if r.launches()["update_given_up"] and r.specs() == ["image-1"] * 2:
            break
        time.sleep(0.002)
    assert r.launches()["update_given_up"].startswith("unhealthy for ")
    assert r.specs() == ["image-1"] * 2


def test_a_manager_that_takes_over_amid_an_update_keeps_the_old_until_a_new_one_is_found_healthy(
    rig: Callable[..., Rig],
) -> None:
    r = rig(2, image="image-2")
    new = r.engine.run("p-backend-3", "image-2")  # launched by the manager before, and not ready yet
    r.controller.adopt(2)
    r.controller.step()
    r.report_all_healthy(but="image-2")
    r.controller.step()
    assert [r.states()[n] for n in (1, 2)] == ["active", "active"]
    assert r.launches()["updating"]
    r.report_all_healthy()
    r.controller.step()
    assert (r.snapshot()[new.ip], sorted(r.states().values())[:3]) == ("active", ["active", "active", "draining"])


def running(engine: FakeEngine) -> list[Container]:
    return [container for container in engine.containers.values() if container.status == "running"]


def refuse_update(r: Rig) -> None:
    """Steps until the update to what crashes is given up, and all of the old serve."""
    r.engine.crashing = {"image-2": 3}
    for _ in range(400):
        r.controller.step()
        r.report_all_healthy(but="image-2")
        r.clock.pass_by(0.1)
        if r.launches()["update_given_up"] and r.specs() == ["image-1"] * 2:
            return
        time.sleep(0.001)
    raise AssertionError(r.launches())


def test_restarted_manager_does_not_try_a_refused_update_again(rig: Callable[..., Rig], tmp_path: Path) -> None:
    r = rig(2, image="image-2")
    refuse_update(r)
    launched = len(r.calls("launch"))
    again = controller(r.engine, tmp_path, r.clock)
    again.adopt(None)
    for _ in range(3):
        again.step()
    assert len(r.calls("launch")) == launched
    launches = again.status()["launches"]
    assert (launches["update_given_up"], launches["updating"]) == (r.launches()["update_given_up"], False)


def test_manager_that_starts_after_a_reboot_does_not_try_a_refused_update_again(
    rig: Callable[..., Rig], tmp_path: Path
) -> None:
    r = rig(2, image="image-2")
    refuse_update(r)
    for name, one in r.engine.containers.items():
        r.engine.containers[name] = replace(one, status="exited", ip="")
    again = controller(r.engine, tmp_path, r.clock)
    again.adopt(None)
    assert eventually(lambda: (again.step(), [c.spec for c in running(r.engine)] == ["image-1"] * 2)[1])
    assert again.status()["launches"]["update_given_up"] == r.launches()["update_given_up"]


def test_failed_update_goes_back_to_the_image_that_most_backends_in_rotation_have(
    rig: Callable[..., Rig], tmp_path: Path
) -> None:
    """An update to image-2 had just begun when run.sh was run with image-3."""
    r = rig(2, image="image-2")
    r.step_until(lambda: len(r.snapshot()) == 3)
    newest_first = reversed(r.engine.containers.items())  # as Docker lists them
    r.engine.containers = dict(newest_first)
    r.engine.image = "image-3"
    again = controller(r.engine, tmp_path, r.clock)
    again.adopt(None)
    assert again._backoff.previous == "image-1"


def test_another_update_is_tried_after_one_was_refused(rig: Callable[..., Rig], tmp_path: Path) -> None:
    r = rig(2, image="image-2")
    refuse_update(r)
    r.engine.image = "image-3"
    again = controller(r.engine, tmp_path, r.clock)
    again.adopt(None)
    assert again.status()["launches"]["update_given_up"] == ""
    assert eventually(lambda: (again.step(), "image-3" in r.specs())[1])


def test_status_counts_what_an_update_has_replaced(rig: Callable[..., Rig]) -> None:
    r = rig(3, image="image-2", min=3)
    assert [r.launches()[key] for key in ("updating", "replaced", "to_replace")] == [True, 0, 3]
    r.step_until(lambda: len(r.snapshot()) == 4)
    assert [r.launches()[key] for key in ("updating", "replaced", "to_replace")] == [True, 1, 3]


# -- the balancer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [BalancerState.MISSING, BalancerState.STOPPED, BalancerState.OUTDATED])
def test_balancer_that_does_not_run_as_it_should_is_repaired(rig: Callable[..., Rig], state: BalancerState) -> None:
    r = rig(2)
    r.engine.balancer = state
    r.controller.step()
    assert r.controller.status()["balancer"] == {"state": "starting", "problem": ""}
    r.step_until(lambda: r.engine.calls == [("repair", "balancer")])
    r.step_until(lambda: r.controller.status()["balancer"] == {"state": "running", "problem": ""})
    r.controller.step()
    assert r.engine.calls == [("repair", "balancer")], "once"


def test_balancer_that_cannot_be_started_is_tried_again_with_growing_waits(
    rig: Callable[..., Rig], caplog: pytest.LogCaptureFixture
) -> None:
    r = rig(2)
    r.engine.balancer, r.engine.balancer_error = BalancerState.MISSING, "port is already allocated"
    for attempt in range(1, 4):
        r.step_until(lambda attempt=attempt: len(r.engine.calls) == attempt)
        r.step_until(lambda: r.controller.status()["balancer"]["state"] == "failed")
        assert r.controller.status()["balancer"]["problem"] == "port is already allocated"
        r.controller.step()
        assert len(r.engine.calls) == attempt, "before its time"
        assert r.controller._balancer._backoff.failures == attempt, "each counts once"
        r.clock.pass_by(30)
    assert "the balancer cannot be started: port is already allocated" in caplog.text
    r.engine.balancer_error = ""
    r.step_until(lambda: r.controller.status()["balancer"]["state"] == "running")


def test_balancer_that_is_ended_soon_after_its_repair_is_back_within_a_second(rig: Callable[..., Rig]) -> None:
    r = rig(2)
    for repairs in (1, 2):
        r.engine.balancer = BalancerState.MISSING
        began = r.clock.now
        while len(r.engine.calls) < repairs:
            r.controller.step()
            r.clock.pass_by(0.05)
            assert r.clock.now - began < 1
            time.sleep(0.002)
        r.step_until(lambda: r.controller.status()["balancer"]["state"] == "running")
        r.clock.pass_by(2)


def test_balancer_that_ends_at_once_again_and_again_backs_off(rig: Callable[..., Rig]) -> None:
    r = rig(2)
    for _ in range(100):
        r.engine.balancer = BalancerState.STOPPED
        r.controller.step()
        time.sleep(0.002)
        r.clock.pass_by(0.1)
    assert len(r.engine.calls) <= 5


# -- the test of the data path ----------------------------------------------------------------------------------------


TARGET = "198.18.0.100:8000"


def checked_rig(rig: Callable[..., Rig]) -> Rig:
    r = rig(2)
    r.engine.path = {TARGET: ""}
    r.report_all_healthy()
    return r


def test_two_failed_connections_in_a_row_are_reported_once_with_what_was_found(
    rig: Callable[..., Rig], caplog: pytest.LogCaptureFixture
) -> None:
    r = checked_rig(rig)
    found = (Finding("foreign_rule", "filter FORWARD -j DROP"),)
    r.controller.report(replace(report(_2=sample(), _3=sample()), findings=found))
    r.controller.check_path()
    assert r.controller.status()["data_path"]["working"] is True
    r.engine.path = {TARGET: "timed out"}
    r.controller.check_path()
    assert r.controller.status()["data_path"]["problem"] == "", "one may be chance"
    for _ in range(3):
        r.controller.check_path()
    problem = (
        "connections through the balancer at 198.18.0.100:8000 fail: timed out; "
        "found: a foreign rule blocks or redirects connections: filter FORWARD -j DROP"
    )
    data_path = r.controller.status()["data_path"]
    assert (data_path["working"], data_path["problem"]) == (False, problem)
    assert data_path["findings"] == [{"kind": "foreign_rule", "detail": "filter FORWARD -j DROP"}]
    assert caplog.messages.count(problem) == 1
    r.engine.path = {TARGET: ""}
    r.controller.check_path()
    assert r.controller.status()["data_path"]["working"] is True
    assert "connections through the balancer work again" in caplog.messages


def test_path_is_not_checked_without_a_healthy_backend_or_a_running_balancer(
    rig: Callable[..., Rig],
) -> None:
    r = checked_rig(rig)
    r.report_rows(_2=sample(healthy=False), _3=sample(healthy=False))
    r.controller.check_path()
    assert r.engine.path_checks == 0
    r.report_all_healthy()
    r.engine.gate.clear()
    r.engine.balancer = BalancerState.MISSING
    r.controller.step()
    r.controller.check_path()
    assert r.engine.path_checks == 0


def test_balancer_is_replaced_where_its_ip_forwarding_is_off(
    rig: Callable[..., Rig],
) -> None:
    r = checked_rig(rig)
    r.engine.path = {TARGET: "timed out"}
    r.controller.report(replace(report(_2=sample(), _3=sample()), findings=(Finding("ip_forward_off"),)))
    assert r.engine.calls == []
    r.controller.check_path()
    assert eventually(lambda: r.engine.calls == [("repair", "balancer")])


# -- a process that was stopped ---------------------------------------------------------------------------------------


def test_time_in_which_the_process_was_stopped_fails_no_backend(rig: Callable[..., Rig]) -> None:
    r = rig(2, min=3)
    r.step_until(lambda: len(r.snapshot()) == 3)
    r.report_rows(_2=sample(healthy=False), _3=sample(), _4=sample(healthy=False))
    r.clock.pass_by(100)
    r.controller.extend_deadlines(100)
    r.report_rows(_2=sample(healthy=False), _3=sample(), _4=sample(healthy=False))
    r.controller.step()
    assert r.states() == {1: "active", 2: "active", 3: "starting"}, "neither replaced nor given up"
    assert r.calls("launch") == [3]


def test_loop_notices_that_the_process_was_stopped(
    looping: Callable[..., Rig], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RELIST", 0.05)
    r = looping(2)
    assert eventually(lambda: r.engine.lists > 2)
    r.clock.pass_by(8)
    assert eventually(lambda: "this process was stopped for 8 s" in caplog.text)


def test_event_during_a_list_causes_two_lists_soon_after_it(
    looping: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Docker's first list after an event may still show the old state."""
    monkeypatch.setattr(module, "RELIST", 60)
    r = looping(2)
    time.sleep(2 * module.RELIST_AFTER_EVENT)
    lists, list_containers = r.engine.lists, r.engine.list

    def list_with_event() -> Sequence[Container]:
        if r.engine.lists == lists:
            r.controller._take_event(Event("start", "", 0))
        return list_containers()

    monkeypatch.setattr(r.engine, "list", list_with_event)
    r.controller._wake.set()
    assert eventually(lambda: r.engine.lists == lists + 3)


def test_many_events_of_foreign_containers_cause_few_lists(looping: Callable[..., Rig]) -> None:
    r = looping(2)
    assert eventually(lambda: r.engine.lists == 2)  # adopted, and the first pass
    began = time.monotonic()
    for _ in range(50):
        r.engine.tell(Event("die", "another container", 0))
        time.sleep(0.01)
    assert r.engine.lists - 2 <= 2 + (time.monotonic() - began) / module.RELIST_AFTER_EVENT


# -- panic ------------------------------------------------------------------------------------------------------------


def test_panic_of_a_balancer_is_logged_once_and_in_the_status(
    rig: Callable[..., Rig], caplog: pytest.LogCaptureFixture
) -> None:
    r = rig(2)
    for _ in range(2):
        r.controller.report(replace(report("b1"), panic=True))
    assert r.controller.status()["rotation_panic"] == ["b1"]
    r.controller.report(report("b1"))
    assert r.controller.status()["rotation_panic"] == []
    assert [m.split(":")[0] for m in caplog.messages if "half" in m] == [
        "fewer than half of the backends are healthy",
        "at least half of the backends are healthy again",
    ]


# -- the unreachable engine ------------------------------------------------------------------------------------------


def test_unreachable_engine_changes_nothing_and_is_logged_once(
    rig: Callable[..., Rig], caplog: pytest.LogCaptureFixture
) -> None:
    r = rig(3)
    before = (r.states(), r.snapshot(), r.revision(), r.ip_file.read_text(), r.controller.desired)
    r.engine.down = "connection refused"
    r.controller.step()
    r.controller.scale(4, None, None)
    for _ in range(3):
        r.controller.step()
        assert r.controller.status()["engine"] == "connection refused"
    assert r.launches()["failed"] == 0, "what the engine cannot do is no backend's fault"
    assert (r.states(), r.snapshot(), r.revision(), r.ip_file.read_text(), r.controller.desired - 1) == before
    assert r.engine.calls == []
    line = "engine unreachable, the fleet stays as it is: connection refused"
    assert [record.getMessage() for record in caplog.records].count(line) == 1
    r.engine.down = ""
    r.step_until(lambda: len(r.snapshot()) == 4)
    assert r.controller.status()["engine"] == "ok"
    assert "engine reachable again" in caplog.text


def test_nothing_is_adopted_from_an_unreachable_engine(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.down = "connection refused"
    with pytest.raises(EngineError, match="connection refused"):
        controller(engine, tmp_path, Clock()).adopt(None)


# -- deciding ---------------------------------------------------------------------------------------------------------


def load(r: Rig, rate: float, reports: int) -> list[Decision | None]:
    """Reports two seconds apart, of `rate` packets/s in all, from one balancer; what each was answered."""
    answers = []
    for _ in range(reports):
        answers.append(r.report_rows(_2=sample(int(r.clock.now * rate))))
        r.clock.pass_by(2)
    return answers


def test_a_report_after_the_first_decides_and_the_fleet_follows(rig: Callable[..., Rig]) -> None:
    r = rig(2)
    first, second = load(r, 290, 2)
    assert first is None
    assert second is not None
    assert (second.verdict, second.current, second.desired) == (CREATE, 2, 3)
    assert r.controller.desired == 3
    r.step_until(lambda: len(r.snapshot()) == 3)
    third = load(r, 290, 1)[-1]
    assert third is not None
    assert (third.verdict, third.current) == (OK, 3), "what is starting counts as capacity"


def test_a_report_that_comes_too_soon_is_answered_with_the_decision_before(rig: Callable[..., Rig]) -> None:
    r = rig(2)
    decision = load(r, 200, 2)[-1]
    r.clock.pass_by(-1.9)
    assert r.report_rows(_2=sample()) is decision
    assert len(r.controller.decisions) == 1


@pytest.mark.parametrize("record", ["", "1"])
def test_a_trace_of_the_load_is_kept_for_replay_when_asked_for(
    rig: Callable[..., Rig], tmp_path: Path, record: str
) -> None:
    load(rig(2, record=record), 290, 4)
    trace = tmp_path / "trace.csv"
    assert trace.exists() == bool(record)
    if record:
        loads = read_trace(trace)  # of the whole seconds between the first and the last
        assert loads in ([290.0] * 3, [290.0] * 4)


def test_there_is_one_decision_an_interval_however_many_balancers_report(rig: Callable[..., Rig]) -> None:
    r = rig(2)
    for beat in range(4):
        for n in range(4):
            r.controller.report(report(f"b{n}", _2=sample(beat * 200)))
            r.clock.pass_by(0.5)
    times = [decision.at for decision in r.controller.decisions]
    assert len(times) > 2
    assert all(later - earlier >= 1.5 for earlier, later in itertools.pairwise(times)), "about two seconds"


def test_paused_controller_logs_decisions_but_does_not_carry_them_out(
    rig: Callable[..., Rig], caplog: pytest.LogCaptureFixture
) -> None:
    r = rig(2)
    r.controller.pause(True)
    decision = load(r, 290, 2)[-1]
    assert decision is not None
    assert (decision.verdict, decision.desired) == (CREATE, 3)
    assert "CREATE_SERVER 2→3  290 packets/s over 2 backends = 145 each, target 100 (1.45×); paused: not" in caplog.text
    r.controller.step()
    assert (r.controller.desired, len(r.states()), r.controller.status()["paused"]) == (2, 2, True)
    r.controller.pause(False)
    load(r, 290, 1)
    assert r.controller.desired == 3


def test_charts_have_the_load_and_the_changes_but_no_paused_decisions(rig: Callable[..., Rig]) -> None:
    r = rig(2)
    load(r, 200, 2)
    r.report_rows(_2=sample(1002 * 200 + 2 * 400))
    r.controller.pause(True)
    r.clock.pass_by(2)
    r.report_rows(_2=sample(1002 * 200 + 2 * 400 + 2 * 1200))
    points, decisions = r.controller.history(0).values()
    assert [(p["capacity"], p["backends"], p["desired"]) for p in points] == [(200, 2, 2), (200, 2, 3), (300, 2, 3)]
    assert [(d["verdict"], d["current"], d["desired"]) for d in decisions] == [(CREATE, 2, 3)]


def test_decisions_that_change_nothing_are_logged_once(
    rig: Callable[..., Rig], caplog: pytest.LogCaptureFixture
) -> None:
    r = rig(2)
    answers = load(r, 200, 5)
    assert {a.verdict for a in answers if a} == {OK}
    assert sum(record.getMessage().startswith("OK 2→2") for record in caplog.records) == 1
    assert len(r.controller.decisions) == 4


def test_balancers_warning_is_logged_each_time_it_begins(
    rig: Callable[..., Rig], caplog: pytest.LogCaptureFixture
) -> None:
    r = rig(2)
    for warnings in (("table full",), ("table full",), (), ("table full",)):
        r.controller.report(report("b1", warnings))
    assert [m for m in caplog.messages if "full" in m] == ["balancer b1: table full"] * 2


@pytest.mark.parametrize(
    ("change", "desired", "limits"),
    [
        ((5, None, None), 5, (5, 10, 100)),
        ((None, 2, None), 2, (2, 2, 100)),
        ((4, 4, 7.5), 4, (4, 4, 7.5)),
        ((None, None, 1.0), 3, (2, 10, 1)),
    ],
)
def test_the_operators_limits_hold_at_once(
    rig: Callable[..., Rig], change: tuple[Any, Any, Any], desired: int, limits: tuple[float, ...]
) -> None:
    r = rig(3)
    policy = r.controller.scale(*change)
    assert (policy.min, policy.max, policy.target) == limits
    status = r.controller.status()
    assert (status["min"], status["max"], status["target"]) == limits
    assert r.controller.desired == desired


def test_limits_that_cross_are_refused_and_change_nothing(rig: Callable[..., Rig]) -> None:
    r = rig(3)
    with pytest.raises(ValueError, match="min 11 would be above max 10"):
        r.controller.scale(11, None, 1.0)
    assert (r.controller.policy.min, r.controller.policy.target, r.controller.desired) == (2, 100, 3)


def test_operators_limits_are_carried_out_before_the_next_list(rig: Callable[..., Rig]) -> None:
    r = rig(3)
    looks = r.engine.lists
    r.controller.scale(None, 2, None)
    assert r.states() == {1: "active", 2: "active", 3: "draining"}
    r.controller.scale(None, 4, None)
    r.controller.scale(4, None, None)
    assert r.states() == {1: "active", 2: "active", 3: "draining", 4: "starting", 5: "starting"}
    assert r.engine.lists == looks


def test_the_operators_settings_outlive_the_manager(rig: Callable[..., Rig], tmp_path: Path) -> None:
    r = rig(3)
    r.controller.scale(4, 6, 7.5)
    r.controller.pause(True)
    again = controller(r.engine, tmp_path, r.clock)
    assert (again.policy.min, again.policy.max, again.policy.target, again.paused) == (4, 6, 7.5, True)
    again.adopt(None)
    assert again.desired == 4
    again.pause(False)
    assert controller(r.engine, tmp_path, r.clock).paused is False


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"min": 4, "max": 6}'])
def test_operator_settings_that_cannot_be_read_leave_the_flags_in_force(tmp_path: Path, text: str) -> None:
    (tmp_path / "operator_settings.json").write_text(text)
    made = controller(FakeEngine(), tmp_path, Clock())
    assert (made.policy.min, made.policy.max, made.policy.target, made.paused) == (2, 10, 100, False)


def test_restarted_manager_takes_no_starting_backend_for_active(rig: Callable[..., Rig], tmp_path: Path) -> None:
    r = rig(1, min=2, ready_timeout=120)
    r.step_until(lambda: len(r.snapshot()) == 2)
    r.report_rows(_2=sample(), _3=sample(healthy=False))
    again = controller(r.engine, tmp_path, r.clock, min=2, ready_timeout=120)
    again.adopt(None)
    states = {b["name"][-1]: b["state"] for b in again.status()["backends"]}
    assert states == {"1": "active", "2": "starting"}


@pytest.mark.parametrize(("waited", "state"), [(90, "starting"), (121, "failed")])
def test_backend_may_take_as_long_as_the_ready_timeout(rig: Callable[..., Rig], waited: float, state: str) -> None:
    r = rig(min=1, ready_timeout=120)
    r.step_until(r.snapshot)
    r.report_rows(_2=sample(healthy=False))
    r.clock.pass_by(waited)
    r.report_rows(_2=sample(healthy=False))
    r.controller.step()
    assert r.states() == {1: state}


def test_silent_balancer_keeps_the_fleet_from_shrinking_until_the_engine_does_not_list_it(
    rig: Callable[..., Rig],
) -> None:
    r = rig(3, min=1, stable_window=6, interval=2)
    r.engine.balancers = frozenset({"b1", "b2"})

    def beat(*names: str, times: int = 1) -> None:
        for _ in range(times):
            r.clock.pass_by(2)
            r.controller.step()
            for name in names:
                r.controller.report(report(name, _2=sample(int(r.clock.now * rates[name]))))

    rates = {"b1": 200, "b2": 90}
    beat("b1", "b2", times=10)
    assert r.controller.desired == 3
    beat("b2", times=60)
    assert r.controller.desired == 3, "b1 is silent: its load is not zero"
    r.engine.balancers = frozenset({"b2"})
    beat("b2", times=10)
    assert r.controller.desired == 1


# -- adopting, and the snapshot ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("running", "wanted", "desired"), [(3, None, 3), (0, None, 2), (1, None, 2), (12, None, 10), (3, 5, 5), (3, 99, 10)]
)
def test_new_manager_aims_at_the_given_or_the_running_number(
    tmp_path: Path, running: int, wanted: int | None, desired: int
) -> None:
    made = controller(FakeEngine(*(f"p-backend-{n}" for n in range(running))), tmp_path, Clock())
    made.adopt(wanted)
    assert made.desired == desired


def test_number_of_backends_outside_the_operators_limits_is_logged(
    rig: Callable[..., Rig], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    r = rig(2)
    r.controller.scale(None, 4, None)
    again = controller(r.engine, tmp_path, r.clock)
    again.adopt(4)
    assert "asked for" not in caplog.text
    again.adopt(8)
    assert again.desired == 4
    assert "run.sh asked for 8 backends; the limits are min 2 and max 4" in caplog.messages


def test_restarted_manager_has_the_same_revision_and_starts_and_stops_nothing(
    rig: Callable[..., Rig], tmp_path: Path
) -> None:
    r = rig(min=3)
    r.step_until(lambda: len(r.snapshot()) == 3)
    r.report_rows(_2=sample(), _3=sample(), _4=sample())
    r.clock.pass_by(60)
    r.engine.die("p-backend-2", 1)
    r.step_until(lambda: sorted(r.states()) == [1, 3, 4] and len(r.snapshot()) == 3)
    r.report_rows(_2=sample(), _3=sample(), _4=sample())
    assert r.states() == {1: "active", 3: "active", 4: "active"}
    text, calls = r.ip_file.read_text(), list(r.engine.calls)

    r.clock.pass_by(100)
    again = controller(r.engine, tmp_path, r.clock, min=3)
    again.adopt(None)
    again.step()
    assert again.status()["revision"] == r.revision()
    assert [b["state"] for b in again.status()["backends"]] == ["active"] * 3
    assert (r.ip_file.read_text(), r.engine.calls, again.desired) == (text, calls, 3)


def test_snapshot_has_the_service_and_its_backends(rig: Callable[..., Rig]) -> None:
    r = rig(1, min=1, health="http:/ok", backend_port=80, interval=3, drain_timeout=4, weights="equal")
    assert r.controller.wait_for_snapshot("", 0) == {
        "revision": r.revision(),
        "service": {
            **{"port": 80, "health": "http:/ok", "interval": 3, "drain_timeout": 4},
            **{"weights": "equal", "locality": "", "check_source": ""},
        },
        "backends": [{"id": r.id(1)[:12], "ip": "198.18.0.2", "state": "active"}],
    }


def test_ip_txt_holds_the_addresses_in_rotation_one_a_line_and_is_replaced_in_one_step(
    rig: Callable[..., Rig],
) -> None:
    r = rig(3)
    with r.ip_file.open() as held:  # by a reader
        r.controller.drain("198.18.0.3")
        assert held.read() == "198.18.0.2\n198.18.0.3\n198.18.0.4\n"
    assert r.ip_file.read_text() == "198.18.0.2\n198.18.0.4\n"
    assert sorted(path.name for path in r.ip_file.parent.iterdir()) == ["fleet.json", "ip.txt"]


def test_fleet_that_could_not_be_saved_is_saved_later_and_the_error_is_logged_once(
    rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    r = rig(3, min=2)
    with monkeypatch.context() as full:
        full.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        r.controller.scale(None, 2, None)
        r.controller.step()
    assert caplog.messages.count("cannot write fleet.json: disk full") == 1
    r.controller.step()
    assert '"draining"' in r.ip_file.with_name("fleet.json").read_text()


def test_snapshot_is_published_although_ip_txt_cannot_be_written(
    rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    r = rig(2)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    before = r.revision()
    r.controller.drain("198.18.0.3")
    assert r.controller.wait_for_snapshot(before, 0) is not None
    assert r.ip_file.read_text() == "198.18.0.2\n198.18.0.3\n"
    assert "cannot write ip.txt: disk full" in caplog.text


def test_revision_changes_only_with_the_snapshot(rig: Callable[..., Rig]) -> None:
    r = rig(2)
    before = r.revision()
    load(r, 200, 3)
    r.controller.step()
    r.engine.run("p-backend-7")
    r.engine.die("p-backend-7", 0)  # left over: nothing that a balancer knows of
    r.step_until(lambda: r.calls("stop") == [7])
    assert r.revision() == before
    assert r.controller.wait_for_snapshot(before, 0.01) is None
    r.controller.drain("198.18.0.2")
    assert r.revision() != before


def test_long_poll_ends_with_a_change_or_with_the_controller(rig: Callable[..., Rig]) -> None:
    r = rig(2)
    answers: list[dict[str, Any] | None] = []

    def poll() -> threading.Thread:
        waiting = threading.Event()
        have = r.revision()

        def wait() -> None:
            waiting.set()
            try:
                answers.append(r.controller.wait_for_snapshot(have, 5))
            except Closing:
                answers.append(None)

        thread = threading.Thread(target=wait)
        thread.start()
        waiting.wait(1)
        return thread

    for act in (lambda: r.controller.drain("198.18.0.2"), r.controller.close):
        thread, begun = poll(), time.monotonic()
        act()
        thread.join(5)
        assert time.monotonic() - begun < 1
    assert answers[0] is not None
    assert answers[0]["revision"] == r.revision()
    assert answers[1] is None


def test_setting_the_hosts_clock_ends_no_drain_and_stops_no_decision() -> None:
    assert inspect.signature(Controller).parameters["clock"].default is time.monotonic
