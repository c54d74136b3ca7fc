"""The engine's calls on threads: what is logged and returned when they fail, and how long the next try waits."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from core import workers
from core.engine import EngineError, TakenOver
from core.fleet import FAILED, Backend
from core.workers import BALANCER, LONGEST_PAUSE, RESIZE, Result, Workers
from fakes import FakeEngine

FAILED_BACKEND = Backend("p-backend-1", FAILED, 0.0, "id")


class Rig:
    """Workers over a fake engine. `pauses`: the seconds for which they have waited."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine, self.pauses = FakeEngine(), list[float]()
        self._done = threading.Event()
        self.workers = Workers(self.engine, self._done.set)
        monkeypatch.setattr(workers, "time", SimpleNamespace(sleep=self.pauses.append))

    def result(self) -> Result:
        assert self._done.wait(5)
        self._done.clear()
        [result] = self.workers.results()
        return result


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(monkeypatch)


def test_last_log_line_is_read_at_a_later_stop_if_the_engine_did_not_answer(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as down:
        down.setattr(rig.engine, "stop", Mock(side_effect=EngineError("connection refused")))
        down.setattr(rig.engine, "last_log_line", Mock(side_effect=EngineError("connection refused")))
        rig.workers.stop(FAILED_BACKEND)
        assert rig.result().last_log_line == ""
    rig.workers.stop(FAILED_BACKEND)
    assert rig.result() == Result("p-backend-1", last_log_line="goodbye")


def test_stop_that_fails_again_and_again_waits_longer_and_logs_the_last_line_once(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as busy:
        busy.setattr(rig.engine, "stop", Mock(side_effect=EngineError("device or resource busy")))
        lines = []
        for _ in range(8):
            rig.workers.stop(FAILED_BACKEND)
            result = rig.result()
            assert result.still_there
            lines.append(result.last_log_line)
    assert rig.pauses == [0.5, 1, 2, 4, 8, LONGEST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE]
    assert lines == ["goodbye", *[""] * 7]
    assert caplog.text.count("last log line of p-backend-1: goodbye") == 1
    rig.workers.stop(FAILED_BACKEND)
    assert not rig.result().still_there


def test_call_that_found_another_manager_in_control_logs_no_failure(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The loop's next list raises the same error; that is logged, and the manager ends."""

    def taken_over(*_: object) -> None:
        raise TakenOver("the manager at n2 has taken over; this one ends")

    monkeypatch.setattr(rig.engine, "resize", taken_over)
    monkeypatch.setattr(rig.engine, "repair_balancer", taken_over)
    rig.workers.resize(3, "image-1")
    assert rig.result().name == RESIZE
    rig.workers.repair_balancer()
    result = rig.result()
    assert (result.name, result.why) == (BALANCER, "")
    assert caplog.messages == []
