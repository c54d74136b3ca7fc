"""The terminal's view: a status in, text out; and once against a manager that answers on a port."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType
from rich.text import Text
from werkzeug.serving import BaseWSGIServer, make_server

import watch
from fakes import TOKEN, Clock, FakeEngine, controller, report, sample
from script import create_app
from watch import NoAnswer, Past

PYTHON = [sys.executable, "-W", "error", watch.__file__]
NOW = 1_800_000_000.0


def shown(thing: RenderableType, width: int = 100) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(thing)
    return "\n".join(row.rstrip() for row in capture.get().splitlines())


def backend(number: int, **changes: object) -> dict[str, Any]:
    return {
        **{"name": f"p-backend-{number}", "ip": f"198.18.0.{number + 1}", "state": "active", "reason": "", "why": ""},
        **{"share": 0.25, "connections_rate": 3.5, "packets_rate": 35.25, "active": 2.0, "healthy": True, **changes},
    }


def status(**changes: object) -> dict[str, Any]:
    """Two backends that serve as desired."""
    return {
        **{"project": "p", "desired": 2, "current": 2, "min": 2, "max": 10, "metric": "packets", "rate": 150.5},
        **{"target": 100.0, "paused": False, "engine": "ok", "revision": "abc", "settings": {"interval": 2.0}},
        "launches": {"failed": 0, "why": "", "updating": False, "update_given_up": ""},
        "backends": [backend(1), backend(2, share=0.75)],
        "balancers": [{"id": "b1", "last_seen": 0.8, "revision": "abc"}],
        "last_decision": {"verdict": "OK", "current": 2, "desired": 2, "reason": "150.5 packets/s over 2 backends"},
        **changes,
    }


def launches(**changes: object) -> dict[str, Any]:
    return {"launches": {**status()["launches"], **changes}}


def point(ago: float, rate: float, capacity: float = 200.0) -> dict[str, Any]:
    return {"time": NOW - ago, "rate": rate, "capacity": capacity, "backends": 2, "desired": 2}


def change(number: int) -> dict[str, Any]:
    told = {"verdict": "CREATE_SERVER", "current": number, "desired": number + 1, "reason": f"reason {number}"}
    return {"time": NOW - 60 + number, **told}


# -- what is said ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "trouble"),
    [
        ({"engine": "timed out"}, "engine out of reach: timed out"),
        (launches(failed=3, why="no such image"), "launches in vain so far: 3: no such image"),
        ({"balancers": []}, "no balancer reports"),
        ({"balancers": [{"id": "b1", "last_seen": 6.1, "revision": "abc"}]}, "no balancer reports"),
        ({"backends": [backend(1)]}, "backends that serve: 1 of 2"),
        ({"backends": [backend(1), backend(2, state="starting")]}, "backends that serve: 1 of 2"),
        ({"backends": [backend(1, healthy=False), backend(2, healthy=False)]}, "backends that serve: 0 of 2"),
    ],
)
def test_each_trouble_makes_it_degraded_and_is_said_in_the_summary(changes: dict[str, Any], trouble: str) -> None:
    ill = status(**changes)
    assert watch.troubles(ill) == [trouble]
    assert watch.exit_code(ill) == watch.DEGRADED
    assert watch.summary(ill).startswith("p degraded: ")
    assert trouble in watch.summary(ill)
    assert trouble in watch.line(ill)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"paused": True},
        {"backends": [backend(n) for n in (1, 2, 3)]},
        {"backends": [backend(1, healthy=None), backend(2), backend(3, state="draining")]},
        launches(updating=True),
        {"balancers": [{"id": "b1", "last_seen": 5.9, "revision": "abc"}]},
    ],
)
def test_what_serves_as_desired_is_well(changes: dict[str, Any]) -> None:
    assert watch.exit_code(status(**changes)) == watch.WELL


def test_the_summary_is_one_line_with_counts_load_and_notes() -> None:
    assert watch.summary(status()) == "p well: desired 2, current 2 (2 to 10); 150.5 packets/s, target 100 each"
    noted = status(paused=True, metric="concurrency", rate=None, **launches(updating=True, update_given_up="x\ny"))
    wanted = "no rate yet, target 100 each; paused; updating; update given up: x y"
    assert watch.summary(noted).endswith(wanted)


def test_control_characters_from_a_container_never_reach_the_terminal() -> None:
    evil = "\x1b]0;title\x07\x1b[2J\r\n[red]"
    ill = status(
        engine=evil,
        backends=[backend(1, why=evil), backend(2, reason=evil)],
        last_decision={**status()["last_decision"], "reason": evil},
        **launches(failed=1, why=evil),
    )
    past = Past((), ({**change(1), "reason": evil},))
    for thing in (watch.once(ill), watch.line(ill), watch.screen(ill, past, "", NOW, (200, 40))):
        text = shown(thing, 200) if not isinstance(thing, str) else thing
        assert not {"\x1b", "\x07", "\r"} & set(text)
        assert "[red]" in text, "and brackets are no markup"


def test_a_line_says_counts_load_and_the_last_reason() -> None:
    wanted = "desired 2  current 2  150.5 packets/s  OK 2→2  150.5 packets/s over 2 backends"
    assert watch.line(status()) == wanted
    assert watch.line(status(last_decision=None)).endswith("no decision yet")


# -- what is shown ---------------------------------------------------------------------------------------------------


def test_the_status_shows_every_backend_the_balancers_and_the_last_decision() -> None:
    ill = backend(2, state="failed", share=0.0, healthy=False, ip="", why="refused", reason="exit 1")
    behind = {"id": "b2", "last_seen": 2.5, "revision": "old"}
    text = shown(watch.once(status(backends=[backend(1), ill], balancers=[*status()["balancers"], behind])), 200)
    first, header, *rows, b1, b2, last = text.splitlines()
    assert first.startswith("p degraded")
    assert header.split() == ["backend", "address", "state", "share", "conn/s", "packets/s", "active", "healthy", "why"]
    assert rows[0].split() == ["p-backend-1", "198.18.0.2", "active", "25.0%", "3.5", "35.25", "2", "yes"]
    assert rows[1].split() == ["p-backend-2", "-", "failed", "0.0%", "3.5", "35.25", "2", "no", "refused;", "exit", "1"]
    assert b1 == "balancer b1: last report 0.8 s ago"
    assert b2 == "balancer b2: last report 2.5 s ago, has not taken in the last change"
    assert last == "last decision: OK 2→2  150.5 packets/s over 2 backends"


@pytest.mark.parametrize(
    ("part", "drawn"), [(0.0, ""), (1.0, "████"), (0.5, "██"), (0.53125, "██▏"), (2.0, "████"), (-1.0, "")]
)
def test_a_bar_is_drawn_to_an_eighth_of_a_character(part: float, drawn: str) -> None:
    assert watch.bar(part, 4) == drawn


def test_a_column_is_its_highest_point_and_one_without_points_is_unknown() -> None:
    points = [point(299, 5), point(119, 9), point(110, 7), point(0, 3), point(301, 99), point(-400, 99)]
    assert watch.columns(points, "rate", NOW, 5) == [5, None, None, 9, 3]
    assert watch.sparkline([0, None, 50, 99.9, 100], 100) == "▁ ▅██"
    assert watch.sparkline([0.0], 0) == "▁"


def test_the_load_is_drawn_on_one_scale_with_the_capacity() -> None:
    drawn = shown(watch.load([point(100, 100), point(10, 400)], NOW, 3, 2.0)).splitlines()
    assert drawn[0] == "load       ▃█"
    assert drawn[1] == "capacity   ▅▅"
    assert "full height is 400" in drawn[2]
    assert shown(watch.load([], NOW, 3, 2.0)).startswith("load")


def test_only_a_load_above_the_capacity_is_red() -> None:
    def colours(rate: float) -> set[str]:
        drawn = watch.load([point(10, rate)], NOW, 3, 2.0)
        assert isinstance(drawn, Text)
        return {str(span.style) for span in drawn.spans}

    assert "red" in colours(201)
    assert "red" not in colours(200)


def test_columns_are_never_narrower_than_an_interval() -> None:
    points = [point(ago, 1.0) for ago in range(1, 300, 60)]
    assert shown(watch.load(points, NOW, 90, 60.0)).splitlines()[0] == "load      ▁▁▁▁▁"


@pytest.mark.parametrize("size", [(80, 24), (100, 30), (200, 60)])
@pytest.mark.parametrize("count", [2, 40])
def test_a_frame_fits_the_terminal_and_says_how_many_backends_it_leaves_out(size: tuple[int, int], count: int) -> None:
    many = status(backends=[backend(n, why="a long story " * 20) for n in range(1, count + 1)])
    past = Past((point(4, 90), point(2, 150)), tuple(change(n) for n in range(10)))
    rows = shown(watch.screen(many, past, "", NOW, size), size[0]).splitlines()
    assert len(rows) <= size[1]
    bars = sum("█" * 10 in row and "backend-" in row for row in rows)
    assert bars == count or f"… and {count - bars} more" in rows
    assert not any("p-backend" in row for row in rows), "the project is in the first line"
    assert any("reason 9" in row for row in rows)
    assert any(set(row) & set(watch.LEVELS) for row in rows if row.startswith("load"))


def test_the_past_keeps_what_is_recent_and_the_last_ten_decisions() -> None:
    past = Past().and_then({"points": [point(400, 1), point(200, 2)], "decisions": [change(1)]}, NOW)
    assert (past.newest, [p["rate"] for p in past.points]) == (NOW - 200, [2])
    past = past.and_then({"points": [point(0, 3)], "decisions": [change(n) for n in range(2, 14)]}, NOW + 150)
    assert [p["rate"] for p in past.points] == [3]
    assert [c["current"] for c in past.decisions] == list(range(4, 14))
    assert past.and_then({"points": [], "decisions": []}, NOW + 150) == past


# -- asking a manager ------------------------------------------------------------------------------------------------


class Served:
    """A manager over fakes on a port of 127.0.0.1, two backends and a balancer behind it; its project is p."""

    def __init__(self, place: Path, port: int = 0) -> None:
        self.clock = Clock()
        self.controller = controller(FakeEngine("p-backend-1", "p-backend-2"), place, self.clock)
        self.controller.adopt(None)
        for packets in (0, 150):
            self.clock.pass_by(2)
            self.controller.report(report(_0_2=sample(packets), _0_3=sample(packets)))
        self.server: BaseWSGIServer = make_server(
            "127.0.0.1", port, create_app(self.controller, TOKEN, []), threaded=True
        )
        self.port = self.server.server_port
        self._thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self._thread.join()
        self.server.server_close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path)
    yield made
    made.close()


def environ(port: int) -> dict[str, str]:
    return {"LB_PROJECT": "p", "LB_MANAGER_PORT": str(port)}


def test_the_status_of_a_manager_that_answers_is_printed_once(
    served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    assert watch.main(["--status"], environ(served.port)) == watch.WELL
    assert capsys.readouterr().out.startswith("p well: desired 2, current 2")
    assert watch.main(["--status", "--json"], environ(served.port)) == watch.WELL
    assert json.loads(capsys.readouterr().out).keys() == served.controller.status().keys()


def test_a_manager_whose_balancers_fell_silent_is_degraded(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    served.clock.pass_by(7)
    for how in ("--status", "--json"):
        assert watch.main([how], environ(served.port)) == watch.DEGRADED
    assert "no balancer reports" in capsys.readouterr().out


def test_loopback_is_reached_through_no_proxy(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert watch.Manager("p", served.port).status()["project"] == "p"


def test_a_manager_of_another_project_or_none_is_absent(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    assert watch.main([], {**environ(served.port), "LB_PROJECT": "other"}) == watch.ABSENT
    assert capsys.readouterr().err == f"watch.py: 127.0.0.1:{served.port} does not answer for project other\n"
    assert watch.main(["--watch"], environ(1)) == watch.ABSENT
    assert capsys.readouterr().err == "watch.py: no manager of project p answers at 127.0.0.1:1\n"


def test_the_port_is_the_one_the_project_was_started_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watch, "ROOT", tmp_path)
    assert watch.main(["--project", "q"], environ(7)) == watch.ABSENT
    assert capsys.readouterr().err == "watch.py: project q does not run here; ./run.sh starts it\n"
    (tmp_path / "run" / "q").mkdir(parents=True)
    (tmp_path / "run" / "q" / "settings.json").write_text('{"LB_MANAGER_PORT": "5123"}')
    assert watch.manager_port("q", environ(7)) == 5123, "what the environment says of p is not for q"
    assert watch.manager_port("q", {"LB_PROJECT": "q", "LB_MANAGER_PORT": "7"}) == 7


@pytest.mark.parametrize("arguments", [["--dance"], ["--watch", "--json"], ["--project", "../etc"]])
def test_bad_usage_is_told_by_its_exit_code(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        watch.main(arguments, {})
    assert ended.value.code == watch.USAGE
    said = {"--project": "'../etc'; allowed: a-z 0-9 _ -"}.get(arguments[0], arguments[-1])
    assert said in capsys.readouterr().err


class Script(watch.Manager):
    """Answers what it is given, one a second; then the user interrupts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: dict[str, Any] | None) -> None:
        self._answers = list(answers)
        monkeypatch.setattr(time, "sleep", self._second)

    def _second(self, _: float) -> None:
        if not self._answers:
            raise KeyboardInterrupt

    def status(self) -> dict[str, Any]:
        answer = self._answers.pop(0)
        if answer is None:
            raise NoAnswer("nobody answers")
        return answer

    def history(self, since: float) -> dict[str, Any]:
        return {"points": [point(0, 1)], "decisions": [change(1)]} if since < NOW else {"points": [], "decisions": []}


def test_a_line_is_printed_only_when_it_says_something_new(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = status(), status(desired=3)
    manager = Script(monkeypatch, one, one, other, None, None, other)
    with pytest.raises(KeyboardInterrupt):
        watch.watch_lines(manager, one)
    said = [row[10:] for row in capsys.readouterr().out.splitlines()]
    assert said == [watch.line(one), watch.line(other), "nobody answers; waiting", watch.line(other)]


def test_the_screen_says_that_the_manager_is_away_and_that_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(*answers: dict[str, Any] | None) -> str:
        console = Console(file=io.StringIO(), force_terminal=True, width=100, height=30)
        manager = Script(monkeypatch, *answers)
        with pytest.raises(KeyboardInterrupt):
            watch.watch_screen(manager, status(), console)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    well = drawn(status(), status())
    assert ("away" in well, well.count("reason 1")) == (False, 2), "the past is asked for once and kept"
    gone = drawn(status(), None)
    assert ("nobody answers since" in gone, "was away" in gone) == (True, False)
    assert "the manager was away from" in drawn(status(), None, status())


def test_without_a_terminal_watching_prints_plain_lines_of_news_over_a_restart(served: Served, tmp_path: Path) -> None:
    command = subprocess.Popen(
        [*PYTHON, "--watch"], stdout=subprocess.PIPE, text=True, env={**os.environ, **environ(served.port)}
    )
    assert command.stdout is not None
    try:
        first = command.stdout.readline()
        served.close()
        away = command.stdout.readline()
        again = Served(tmp_path, served.port)
        try:
            back = command.stdout.readline()
        finally:
            again.close()
        command.terminate()
        assert command.wait(10) == watch.WELL
    finally:
        command.kill()
        rest = command.communicate()[0]
    assert first[10:] == back[10:]
    assert first[10:].startswith("desired 2  current 2  ")
    assert away[10:] == f"no manager of project p answers at 127.0.0.1:{served.port}; waiting\n"
    assert "\x1b" not in first + away + back + rest


def test_lines_that_nobody_reads_any_more_end_quietly(served: Served) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [*PYTHON, "--watch"]
    done = subprocess.run(
        command,
        stdout=writing,
        stderr=subprocess.PIPE,
        env={**os.environ, **environ(served.port)},
        timeout=20,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("key", ["q", "\x03"])
def test_in_a_terminal_it_is_drawn_until_q_or_ctrl_c_and_the_terminal_is_put_back(served: Served, key: str) -> None:
    pid, door = pty.fork()
    if pid == 0:
        os.execve(PYTHON[0], [*PYTHON, "--watch"], {**os.environ, **environ(served.port), "TERM": "xterm"})
    before = termios.tcgetattr(door)
    try:
        seen = read_until(door, "backend-2")
        assert termios.tcgetattr(door) != before, "keys are read one by one"
        os.write(door, key.encode())
        seen += read_until(door, "\x1b[?1049l")
        assert "\x1b[?1049h" in seen
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == watch.WELL
        assert termios.tcgetattr(door) == before
    finally:
        os.close(door)


def read_until(door: int, word: str, within: float = 20.0) -> str:
    """What a terminal was sent, up to a word."""
    seen, deadline = "", time.monotonic() + within
    while word not in seen:
        assert select.select([door], [], [], max(0.0, deadline - time.monotonic()))[0], seen
        seen += os.read(door, 65536).decode(errors="replace")
    return seen
