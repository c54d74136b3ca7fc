"""The terminal's output: a status in, text out; and against a manager on a port."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, Group, RenderableType
from werkzeug.serving import BaseWSGIServer, make_server

from cli import arguments, watch
from cli.watch import NoAnswer
from core import settings
from fakes import TOKEN, Clock, FakeEngine, controller, report, sample
from fakes import settings as some_settings
from web.app import create_app

PYTHON = [sys.executable, "-W", "error", "-m", "cli.watch"]
MODULES = {"PYTHONPATH": str(Path(watch.__file__).parents[1])}
NOW = 1_800_000_000.0


def rendered(thing: RenderableType, width: int = 100) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(thing)
    return "\n".join(row.rstrip() for row in capture.get().splitlines())


def backend(number: int, **changes: object) -> dict[str, Any]:
    return {
        **{
            "name": f"p-backend-{number}",
            "ip": f"198.18.0.{number + 1}",
            "state": "active",
            "reason": "",
            "why": "",
            "node": "",
        },
        **{"share": 0.25, "connections_rate": 3.5, "packets_rate": 35.25, "active": 2.0, "healthy": True, **changes},
    }


def status(**changes: object) -> dict[str, Any]:
    """A healthy project with two backends."""
    return {
        **{"project": "p", "desired": 2, "current": 2, "min": 2, "max": 10, "metric": "packets", "rate": 150.5},
        **{"target": 100.0, "paused": False, "engine": "ok", "revision": "abc", "settings": {"interval": 2.0}},
        **{"state": "healthy", "problems": []},
        "launches": {"updating": False, "replaced": 2, "to_replace": 0},
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
    fields = {"verdict": "CREATE_SERVER", "current": number, "desired": number + 1, "reason": f"reason {number}"}
    return {"time": NOW - 60 + number, **fields}


# -- the parts of the output -----------------------------------------------------------------------------------------


def test_the_summary_has_the_state_and_each_problem() -> None:
    problems = [{"kind": "a", "text": "no balancer reports"}, {"kind": "b", "text": "1 of 2 backends serve"}]
    summary = watch.summary(status(state="degraded", problems=problems))
    assert summary.plain.startswith("p degraded: ")
    assert summary.plain.endswith("; no balancer reports; 1 of 2 backends serve")
    assert summary.style == "red"
    assert watch.summary(status()).style == "green"


def test_the_summary_is_one_line_with_counts_load_and_notes() -> None:
    assert (
        watch.summary(status()).plain == "p healthy: desired 2, current 2 (2 to 10); 150.5 packets/s, target 100 each"
    )
    updating = launches(updating=True, replaced=3, to_replace=2)
    noted = status(paused=True, metric="concurrency", rate=None, **updating)
    expected = "no rate yet, target 100 each; paused; updating: 3 of 5 backends replaced"
    assert watch.summary(noted).plain.endswith(expected)


def test_control_characters_from_a_container_never_reach_the_terminal() -> None:
    evil = "\x1b]0;title\x07\x1b[2J\r\n[red]"
    calm = status()
    for changes in (
        {"problems": [{"kind": "engine_unreachable", "text": evil}]},
        {"backends": [backend(1), backend(2, healthy=False, why=evil)]},
        {"backends": [backend(1), backend(2, reason=evil)]},
        {"balancers": [{**calm["balancers"][0], "id": evil}]},
        {"last_decision": {**calm["last_decision"], "reason": evil}},
    ):
        text = rendered(watch.render_status(status(**changes), watch.past([change(1)])), 200)
        assert not {"\x1b", "\x07", "\r"} & set(text)
        assert "[red]" in text, "brackets are not markup"
    assert rendered(watch.past([{**change(1), "reason": evil}])).endswith("CREATE_SERVER 1→2   ]0;title  [2J  [red]")


def test_the_output_has_every_backend_the_balancers_and_the_last_decision() -> None:
    failed = backend(2, state="failed", share=0.0, healthy=False, ip="", why="refused", reason="exit 1")
    behind = {"id": "b2", "last_seen": 2.5, "revision": "old"}
    text = rendered(
        watch.render_status(status(backends=[backend(1), failed], balancers=[*status()["balancers"], behind])), 200
    )
    first, reports, last, header, *rows = text.splitlines()
    assert first.startswith("p healthy")
    assert reports == "last reports of the balancers: b1 0.8 s ago; b2 2.5 s ago, not yet at the current revision"
    assert last == "last decision: OK 2→2  150.5 packets/s over 2 backends"
    assert header.split() == ["backend", "address", "state", "share", "conn/s", "pkt/s", "active", "healthy", "why"]
    assert rows[0].split() == ["p-backend-1", "198.18.0.2", "active", "25.0%", "3.5", "35.25", "2", "yes"]
    assert rows[1].split() == ["p-backend-2", "-", "failed", "0.0%", "3.5", "35.25", "2", "no", "refused;", "exit", "1"]
    assert header.index("conn/s") + len("conn/s") == rows[0].index(" 3.5 ") + len(" 3.5"), "figures are flush right"
    nothing = rendered(watch.render_status(status(backends=[], balancers=[], last_decision=None)), 200).splitlines()
    assert nothing[1:3] == ["last reports of the balancers: none", "last decision: none yet"]


def test_a_probes_result_is_left_out_for_a_healthy_backend() -> None:
    texts = [watch.cells(backend(1, healthy=healthy, why="timed out"))["why"] for healthy in (True, False, None)]
    assert texts == ["", "timed out", "timed out"]
    assert watch.cells(backend(1, why="x", reason="drained by hand"))["why"] == "drained by hand"


def test_the_node_column_exists_only_where_a_backend_has_a_node() -> None:
    rows = [backend(1, node="abcdefghijklmnop"), backend(2)]
    header, first, second = rendered(watch.fleet(status(backends=rows))).splitlines()
    assert header.split()[:4] == ["backend", "address", "node", "state"]
    assert (first.split()[2:4], second.split()[2]) == (["abcdefgh", "active"], "active")
    assert "node" not in rendered(watch.fleet(status()))


def test_a_narrow_terminal_wraps_and_cuts_nothing() -> None:
    why = f"a long story of {'x' * 70}"
    text = rendered(watch.fleet(status(backends=[backend(1, healthy=False, why=why)])), 80)
    assert (text.count("x"), text.count("story")) == (70, 1)
    assert max(map(len, text.splitlines())) <= 80


def test_a_sparkline_column_is_its_highest_point_and_blank_without_points(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "COLUMNS", 5)
    points = [point(299, 5), point(119, 9), point(110, 7), point(0, 3), point(301, 99), point(-400, 99)]
    assert watch.sparkline(points, "rate", NOW, 10) == "▅  █▃"


def test_load_and_capacity_have_one_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "COLUMNS", 3)
    points = [point(1000, 9999), point(100, 100), point(10, 400)]
    rate, capacity, scale = rendered(watch.load(points, NOW)).splitlines()
    assert (rate, capacity) == ("rate       ▃█", "capacity   ▅▅")
    assert scale.endswith("the last 5 minutes; full height is 400"), "older points do not count"
    assert rendered(watch.load([], NOW)).startswith("rate")
    assert rendered(watch.load([point(1, 0.0, 0.0)], NOW)).startswith("rate        ▁")


def test_changes_are_one_line_each_newest_first() -> None:
    rows = rendered(Group(watch.past([change(1), {**change(2), "reason": "a long story " * 20}])), 60).splitlines()
    assert [row[10:27] for row in rows] == ["CREATE_SERVER 2→3", "CREATE_SERVER 1→2"]
    assert rows[0].endswith("…")


# -- against a manager -----------------------------------------------------------------------------------------------


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


def environ(port: int, project: str = "p") -> dict[str, str]:
    return {"LB_PROJECT": project, "LB_MANAGER_PORT": str(port)}


def command(words: list[str], environment: dict[str, str]) -> int:
    """Runs the command with these flags and variables; its exit code."""
    return watch.main(arguments.run_arguments(words, environment))


def buffered(port: int) -> dict[str, str]:
    """A process's environment, in which its output waits until it is flushed."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | environ(port) | MODULES


def test_the_status_is_printed_once(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["--status"], environ(served.port)) == watch.HEALTHY
    assert capsys.readouterr().out.startswith("p healthy: desired 2, current 2")
    assert command(["--status", "--json"], environ(served.port)) == watch.HEALTHY
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(served.controller.status()))
    assert (printed["state"], printed["problems"]) == ("healthy", [])


def test_a_project_whose_balancers_do_not_report_is_degraded(
    served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    served.clock.pass_by(7)
    assert command(["--status"], environ(served.port)) == watch.DEGRADED
    assert "no balancer reports" in capsys.readouterr().out
    assert command(["--json"], environ(served.port)) == watch.DEGRADED
    printed = json.loads(capsys.readouterr().out)
    assert printed["state"] == "degraded"
    assert {"kind": "no_balancer_reports", "text": "no balancer reports"} in printed["problems"]


def test_a_proxy_is_not_used_for_loopback(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert watch.Manager(some_settings(manager_port=served.port)).status()["project"] == "p"


def test_the_manager_of_another_project_counts_as_absent(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    assert command([], environ(served.port, "other")) == arguments.DOWN
    assert capsys.readouterr().err == f"run.sh: 127.0.0.1:{served.port} does not answer for project other\n"
    assert command(["--watch"], environ(1)) == arguments.DOWN
    assert capsys.readouterr().err == "run.sh: no manager of project p answers at 127.0.0.1:1\n"


def test_with_json_a_project_that_is_down_is_reported_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["--status", "--json"], environ(1)) == arguments.DOWN
    printed = capsys.readouterr()
    problem = "no manager of project p answers at 127.0.0.1:1"
    assert (json.loads(printed.out), printed.err) == ({"project": "p", "state": "down", "problem": problem}, "")


def test_the_port_is_the_one_the_project_was_started_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(settings, "ROOT", tmp_path)
    (tmp_path / "run" / "q").mkdir(parents=True)
    (tmp_path / "run" / "q" / "settings.json").write_text('{"LB_MANAGER_PORT": "1"}')
    assert command([], {"LB_PROJECT": "q"}) == arguments.DOWN
    assert command([], environ(2, "q")) == arguments.DOWN
    expected = [f"run.sh: no manager of project q answers at 127.0.0.1:{port}" for port in (1, 2)]
    assert capsys.readouterr().err.splitlines() == expected


def test_another_service_on_the_port_counts_as_absent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(environ: object, start: Any) -> list[bytes]:
        start("200 OK", [])
        return [bodies.pop()]

    bodies = [b"[1, 2]", b"<html>", b'["abc"]', b"{}"]
    server = make_server("127.0.0.1", 0, answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        assert [command([], environ(server.server_port)) for _ in range(4)] == [arguments.DOWN] * 4
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Script(watch.Manager):
    """Returns the given answers, one a second; then the user interrupts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: dict[str, Any] | None) -> None:
        self._answers = list(answers)
        monkeypatch.setattr(time, "sleep", self._second)

    def _second(self, _: float) -> None:
        if not self._answers:
            raise KeyboardInterrupt

    def status(self) -> dict[str, Any]:
        answer = self._answers.pop(0)
        if answer is None:
            raise NoAnswer("no answer")
        return answer

    def get(self, path: str) -> dict[str, Any]:
        old = path == "/history?since=0"
        return {"points": [point(0, 1)] * old, "decisions": [change(1)] * old}


def watched(monkeypatch: pytest.MonkeyPatch, *answers: dict[str, Any] | None, terminal: bool = True) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100, height=30)
    with pytest.raises(KeyboardInterrupt):
        watch.watch(Script(monkeypatch, *answers), status(), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_without_a_terminal_a_line_is_printed_only_at_a_change(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = status(), status(desired=3)
    assert watched(monkeypatch, one, one, other, None, None, other, terminal=False) == ""
    first, second, away, back = (row[10:] for row in capsys.readouterr().out.splitlines())
    assert first == f"{watch.summary(one)}; last decision: OK 2→2  150.5 packets/s over 2 backends"
    assert "desired 3" in second
    assert away.startswith("no answer since ")
    assert back == second


def test_the_screen_reports_that_the_manager_does_not_answer_and_since_when(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = watched(monkeypatch, status(), status())
    assert ("did not answer" in usual, "Ctrl-C ends" in usual) == (False, True)
    assert usual.count("reason 1") == 3, (
        "the past is fetched once and kept: two frames, and the last one that stays on the screen"
    )
    gone = watched(monkeypatch, status(), None)
    assert ("no answer since" in gone, "did not answer" in gone) == (True, False)
    assert "the manager did not answer from" in watched(monkeypatch, status(), None, status())


def test_a_table_longer_than_the_screen_is_cut_below_the_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    many = watched(monkeypatch, status(backends=[backend(n) for n in range(1, 60)]), terminal=True)
    frame = many.split("Ctrl-C ends")[1].split("\x1b[?25h")[0]
    assert ("full height" in frame, "reason 1" in frame, "p-backend-2 " in frame) == (True, True, True)
    assert "..." in frame


def test_only_the_last_ten_changes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    many = {"points": [], "decisions": [change(n) for n in range(20, 40)]}
    monkeypatch.setattr(Script, "get", lambda self, path: many)
    text = watched(monkeypatch, status())
    assert [n for n in range(20, 40) if f"reason {n}" in text] == list(range(30, 40))


def test_without_a_terminal_watching_prints_plain_lines_and_survives_a_restart(served: Served, tmp_path: Path) -> None:
    process = subprocess.Popen([*PYTHON, "--watch"], stdout=subprocess.PIPE, text=True, env=buffered(served.port))
    assert process.stdout is not None
    try:
        first = process.stdout.readline()
        served.close()
        away = process.stdout.readline()
        again = Served(tmp_path, served.port)
        try:
            back = process.stdout.readline()
        finally:
            again.close()
        process.terminate()
        assert process.wait(10) == watch.HEALTHY
    finally:
        process.kill()
        rest = process.communicate()[0]
    assert first[10:] == back[10:]
    assert first[10:].startswith("p healthy: desired 2, current 2 ")
    assert away[10:].startswith(f"no manager of project p answers at 127.0.0.1:{served.port} since ")
    assert "\x1b" not in first + away + back + rest


def test_a_closed_pipe_ends_it_without_an_error(served: Served) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*PYTHON, "--watch"],
        stdout=writing,
        stderr=subprocess.PIPE,
        env=buffered(served.port),
        timeout=20,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


def test_in_a_terminal_ctrl_c_ends_it_and_restores_the_cursor(served: Served) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(PYTHON[0], [*PYTHON, "--watch"], {**buffered(served.port), "TERM": "xterm"})
    try:
        seen = read_until(terminal, "backend-2")
        assert "\x1b[?25l" in seen, "the cursor is hidden"
        os.write(terminal, b"\x03")
        read_until(terminal, "\x1b[?25h")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == watch.HEALTHY
    finally:
        os.close(terminal)


def read_until(terminal: int, expected: str, within: float = 20.0) -> str:
    """The terminal's output up to a text."""
    seen, deadline = "", time.monotonic() + within
    while expected not in seen:
        assert select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))[0], seen
        seen += os.read(terminal, 65536).decode(errors="replace")
    return seen
