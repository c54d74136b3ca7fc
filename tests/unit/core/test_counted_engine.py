"""An engine that keeps a number of backends on its own, under a real controller: it gets only the number. A Swarm in
memory."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from core import fleet as fleets
from core.controller import Controller
from core.engine import Engine, EngineError, Event, TakenOver
from core.fleet import ACTIVE, DRAINING, FAILED, STARTING, Backend, Container
from core.plan import Goal, Namer, Resize, plan
from core.publisher import Closing
from core.reasons import Cause
from fakes import Clock, controller, eventually, report, sample, save_active


class Swarm(Engine):
    """Keeps `replicas` tasks, the newest of which it lets go first; a task leaves when `finish` says so."""

    def __init__(self, count: int = 0) -> None:
        self.replicas = count
        self.made_from = "image-1"
        self.image = "image-1"
        self.tasks: dict[str, Container] = {}
        self.resizes: list[tuple[int, str]] = []
        self.down = ""
        self._slots = itertools.count(1)
        self._keep()

    def _keep(self) -> None:
        serving = [task for task in self.tasks.values() if not task.stopping and not task.ended]
        for _ in range((self.replicas or 0) - len(serving)):
            slot = next(self._slots)
            name = f"p-backend-{slot}.abcde"
            self.tasks[name] = Container(f"task{slot}", name, f"198.18.0.{slot + 1}", "running", node="n1")
        for task in serving[self.replicas or 0 :]:
            self.tasks[task.name] = replace(task, stopping=True)

    def list(self) -> list[Container]:
        if self.down:
            raise EngineError(self.down)
        return [replace(task, spec=self.made_from) for task in self.tasks.values()]

    def spec(self) -> str:
        return self.image

    def resize(self, count: int, spec: str) -> None:
        self.resizes.append((count, spec))
        self.replicas, self.made_from = count, spec
        self._keep()

    def finish(self) -> None:
        self.tasks = {name: task for name, task in self.tasks.items() if not task.stopping and not task.ended}

    def fail(self, name: str) -> None:
        """It ends by itself, and another is there in its place."""
        self.tasks[name] = replace(self.tasks[name], status="exited", exit_code=7)
        self._keep()

    def last_log_line(self, container_id: str) -> str:
        return "none"

    def repair_balancer(self) -> None:
        raise AssertionError("it runs")

    def check_path(self) -> dict[str, str]:
        return {}

    def events(self) -> Iterator[Event]:
        return iter(())


class Rig:
    def __init__(self, place: Path, count: int = 3, **changes: object) -> None:
        self.clock, self.engine = Clock(), Swarm(count)
        save_active(place, [task.id for task in self.engine.tasks.values()])
        changes = {"min": 1, "max": 9, "orchestrator": "swarm", **changes}
        self.controller: Controller = controller(self.engine, place, self.clock, **changes)  # type: ignore[arg-type]
        self.controller.adopt(None)

    def step(self) -> None:
        self.controller.step()
        eventually(lambda: not self.controller._workers.busy or self.controller._workers._results.qsize())
        self.controller.step()

    def report_all_healthy(self) -> None:
        snapshot = self.controller.wait_for_snapshot("", 0)
        assert snapshot is not None
        self.controller.report(
            report(**{"_" + b["ip"].split(".")[-1]: sample(id=b["id"]) for b in snapshot["backends"]})
        )

    def states(self) -> dict[str, str]:
        return {b["name"].split("-")[-1].split(".")[0]: b["state"] for b in self.controller.status()["backends"]}


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def test_a_manager_adopts_the_number_that_is_kept_and_orders_nothing(rig: Rig) -> None:
    assert rig.controller.desired == 3
    rig.step()
    assert rig.states() == {"1": ACTIVE, "2": ACTIVE, "3": ACTIVE}
    assert rig.engine.resizes == []


def test_engine_is_resized_and_new_backends_are_active_when_healthy(rig: Rig) -> None:
    rig.controller.scale(5, 5, None)
    rig.step()
    assert rig.engine.resizes == [(5, "image-1")]
    assert (rig.states()["4"], rig.states()["5"]) == (STARTING, STARTING)
    rig.report_all_healthy()
    assert set(rig.states().values()) == {ACTIVE}


def test_backend_that_the_engine_stops_is_listed_as_draining_until_it_has_ended(rig: Rig) -> None:
    rig.controller.scale(1, 2, None)
    rig.step()
    assert rig.engine.resizes == [(2, "image-1")]
    draining = next(b for b in rig.controller.status()["backends"] if b["state"] == DRAINING)
    assert draining["cause"] == Cause.ENGINE_STOP
    snapshot = rig.controller.wait_for_snapshot("", 0)
    assert snapshot is not None
    assert draining["ip"] in {b["ip"] for b in snapshot["backends"] if b["state"] == DRAINING}
    rig.controller.stop(draining["ip"], "drained")
    rig.step()
    rig.engine.finish()
    rig.step()
    assert len(rig.states()) == 2


def test_failed_backend_is_logged_and_the_engine_replaces_it(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.step()
    rig.engine.fail("p-backend-2.abcde")
    with caplog.at_level("INFO"):
        rig.step()
    assert "active→failed" in caplog.text
    assert "exit code 7" in caplog.text
    assert (rig.states()["2"], rig.states()["4"]) == (FAILED, STARTING)
    rig.engine.finish()
    rig.step()
    assert "2" not in rig.states()
    assert rig.engine.resizes == []


def test_stop_report_for_an_active_backend_changes_nothing(rig: Rig) -> None:
    rig.step()
    rig.controller.stop("198.18.0.2", "ill for 10 s")
    rig.clock.pass_by(1000)
    rig.step()
    assert rig.states()["1"] == ACTIVE
    assert rig.engine.resizes == []


def test_manager_does_not_give_up_an_update_of_the_engine(rig: Rig, tmp_path: Path) -> None:
    rig.engine.image = "image-2"
    rig.controller = controller(rig.engine, tmp_path, rig.clock)  # type: ignore[arg-type]
    rig.controller.adopt(None)
    rig.engine.fail("p-backend-1.abcde")
    for _ in range(4):  # whatever is launched ends at once
        rig.step()
        rig.engine.fail(max(rig.engine.tasks, key=fleets.by_number))
        rig.clock.pass_by(60)
    rig.step()
    assert {spec for _, spec in rig.engine.resizes} == {"image-2"}


def test_failures_do_not_delay_an_engine_that_launches_on_its_own(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        rig.step()
        rig.engine.fail(max(rig.engine.tasks, key=fleets.by_number))
        rig.clock.pass_by(60)
    rig.step()
    launches = rig.controller.status()["launches"]
    assert (launches["failed"], launches["retry_in"]) == (3, 0)
    assert "3 failures in a row, the engine starts others: its container ended" in caplog.text
    assert "next launch" not in caplog.text


@pytest.mark.parametrize(("image", "given_up"), [("image-2", True), ("image-3", False)])
def test_update_that_the_engine_refused_is_remembered_until_another_is_wanted(
    rig: Rig, tmp_path: Path, image: str, given_up: bool
) -> None:
    rig.engine.refused = hashlib.sha256(b"image-2").hexdigest()
    rig.step()
    assert rig.controller.status()["launches"]["update_given_up"]
    rig.engine.refused, rig.engine.image = "", image
    again = controller(rig.engine, tmp_path, rig.clock, orchestrator="swarm")  # type: ignore[arg-type]
    again.adopt(None)
    assert bool(again.status()["launches"]["update_given_up"]) == bool(rig.engine.refused) == given_up


def test_backend_that_is_slow_to_get_ready_does_not_fail(rig: Rig) -> None:
    rig.step()
    rig.report_all_healthy()
    rig.controller.scale(4, 4, None)
    rig.step()
    rig.controller.report(report(_5=sample(healthy=False)))
    rig.clock.pass_by(10 * rig.controller.settings.ready_timeout)
    rig.controller.report(report(_5=sample(healthy=False)))
    rig.step()
    assert rig.states()["4"] == STARTING


def test_drain_is_refused_where_the_engine_chooses(rig: Rig) -> None:
    with pytest.raises(ValueError, match="chooses the backends to stop"):
        rig.controller.drain("198.18.0.2")
    assert rig.states()["1"] == ACTIVE


def test_a_resize_that_fails_is_tried_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.workers.PAUSE", 0.0)
    refusals = [EngineError("not now")]
    resize = rig.engine.resize

    def refuse_first(count: int, spec: str) -> None:
        if refusals:
            raise refusals.pop()
        resize(count, spec)

    monkeypatch.setattr(rig.engine, "resize", refuse_first)
    rig.controller.scale(4, 4, None)
    rig.step()
    rig.step()
    assert rig.engine.resizes == [(4, "image-1")]


GOAL = Goal(3, 0, "new", 3, "new")


@pytest.mark.parametrize(
    ("goal", "specs", "steps"),
    [
        (GOAL, ["new"], []),
        (GOAL, ["new", "old"], []),
        (replace(GOAL, made_from="old"), ["old"], [Resize(3)]),
        (replace(GOAL, replicas=2), [], [Resize(3)]),
        (replace(GOAL, replicas=0, desired=1), [], [Resize(1)]),
        (GOAL, [], []),
        (replace(GOAL, replicas=0, made_from=""), [], [Resize(3)]),
    ],
)
def test_plan_is_a_resize_or_empty(goal: Goal, specs: list[str], steps: list[Resize]) -> None:
    fleet = {f"p-{i}": Backend(f"p-{i}", FAILED if i else ACTIVE, 0.0, "x", spec=spec) for i, spec in enumerate(specs)}
    assert plan(fleet, goal, Namer("p-"), 30, 1e6) == steps


def test_the_names_of_tasks_sort_by_their_slots() -> None:
    names = ["p-backend-10.x7f2a", "p-backend-9.zzzzz", "p-backend-2"]
    assert sorted(names, key=fleets.by_number) == ["p-backend-2", "p-backend-9.zzzzz", "p-backend-10.x7f2a"]


def test_a_manager_ends_where_another_has_taken_over(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    def gone() -> list[Container]:
        raise TakenOver("the manager at n2 has taken over; this one ends")

    rig.engine.list = gone  # type: ignore[method-assign]
    loop = threading.Thread(target=rig.controller.run)
    loop.start()
    loop.join(5)
    assert not loop.is_alive()
    with pytest.raises(Closing):  # it gives no balancer a snapshot any more
        rig.controller.wait_for_snapshot("x", 0)
    assert "has taken over" in caplog.text
