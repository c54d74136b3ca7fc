"""The demonstration: the profile, hey's CSV, the picture; and the whole, with hey itself against a small server."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from load.demo import System, main, perform, sample
from load.picture import NO_ANSWER, Sample, Tally, answers, figure, quantile, summary
from load.plan import PEAK_MAX, Lane, Stage, command, enough_seconds, lanes, stages

needs_hey = pytest.mark.skipif(not shutil.which("hey"), reason="needs hey")

CSV = """response-time,DNS+dialup,DNS,Request-write,Response-delay,Response-read,status-code,offset
0.0100,0.0004,0.0000,0.0001,0.0017,0.0001,200,0.5010
0.0300,0.0001,0.0000,0.0001,0.0019,0.0001,200,0.5014
0.0200,0.0002,0.0000,0.0001,0.0007,0.0001,302,1.0008
0.5000,0.0011,0.0000,0.0001,0.0007,0.0001,503,1.4003

"""
PLAN = [Stage("ramp", 0, 2, 1.0), Stage("plateau", 2, 2, 5.0), Stage("drop", 4, 4, 1.0)]
SHORT = [Stage("ramp", 0, 1, 8.0), Stage("plateau", 1, 1, 8.0)]
GROWING = {
    "time": 1.5,
    "verdict": "CREATE_SERVER",
    "current": 2,
    "desired": 6,
    "reason": "577.4 packets/s over 2 backends = 288.7 each, target 100 (2.89×); <max> 6",
}
SHRINKING = {"time": 7.0, "verdict": "STOP_SERVER", "current": 6, "desired": 2, "reason": "0 packets/s"}


def tally() -> Tally:
    made = Tally()
    made.add(answers(CSV, began=1.0))
    made.fail(3.9, NO_ANSWER, 2)
    return made


# -- the profile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("peak", "seconds"), [(1, 20), (80, 130), (PEAK_MAX, 900)])
def test_the_stages_follow_each_other_without_a_gap_and_never_pass_the_peak(peak: int, seconds: int) -> None:
    made = stages(peak, seconds)
    assert made[0].start == 0
    assert made[-1].end == pytest.approx(seconds)
    assert [b.start for b in made[1:]] == pytest.approx([a.end for a in made[:-1]])
    assert max(stage.rate for stage in made) == peak
    assert all(2 < stage.seconds < 8 for stage in made)


def test_the_ramp_rises_to_the_plateau_and_the_drop_is_a_twentieth() -> None:
    made = stages(100, 100)
    ramp, plateau, drop = ([s.rate for s in made if s.name == name] for name in ("ramp", "plateau", "drop"))
    assert ramp == pytest.approx([14.5, 33.5, 52.5, 71.5, 90.5])
    assert set(plateau) == {100}
    assert set(drop) == {5}
    assert sum(s.seconds for s in made if s.name == "drop") == pytest.approx(60)


@pytest.mark.parametrize("rate", [1.0, 4.0, 14.5, 80.0, 333.0, 2000.0])
def test_the_lanes_of_a_stage_ask_as_often_as_it_says_and_begin_apart(rate: float) -> None:
    stage = Stage("plateau", 10, 4, rate)
    made = lanes(stage)
    assert sum(lane.requests for lane in made) == pytest.approx(4 * rate, rel=0.05)
    assert all(lane.requests == pytest.approx(lane.workers * lane.pace * stage.seconds) for lane in made)
    assert len({lane.at for lane in made}) == len(made) == min(16, max(1, round(rate / 5)))
    assert all(10 <= lane.at < 10 + 1 / lane.pace for lane in made)
    assert all(1 <= lane.pace <= 5 for lane in made)


def test_hey_is_bounded_and_goes_nowhere_else() -> None:
    lane = Lane(PLAN[1], at=2.0, workers=2, requests=8, pace=2.0)
    assert " ".join(command(lane, "http://127.0.0.1:8000/")) == (
        "hey -n 8 -c 2 -q 2.0000 -t 10 -disable-keepalive -disable-redirects -o csv http://127.0.0.1:8000/"
    )


def test_the_drop_outlasts_the_windows_within_the_bounds() -> None:
    assert enough_seconds(60 + 6) == 130
    assert enough_seconds(0) == 20
    assert enough_seconds(3600) == 900


# -- what was met ---------------------------------------------------------------------------------------------------


def test_heys_lines_become_answers_at_the_seconds_in_which_they_were_asked_for() -> None:
    found = answers(CSV, began=1.0)
    assert [(round(a.at, 4), a.took, a.status) for a in found] == [
        (1.501, 0.01, 200),
        (1.5014, 0.03, 200),
        (2.0008, 0.02, 302),
        (2.4003, 0.5, 503),
    ]


def test_a_second_tells_what_was_offered_answered_and_failed() -> None:
    seconds = tally().seconds(PLAN)
    assert [second.offered for second in seconds] == [1, 1, 5, 5]
    assert [second.answered for second in seconds] == [0, 2, 1, 0]
    assert [second.took for second in seconds] == [[], [0.01, 0.03], [0.02], []]
    assert [second.failed for second in seconds] == [{}, {}, {"status 503": 1}, {NO_ANSWER: 2}]
    assert tally().failures() == Counter({NO_ANSWER: 2, "status 503": 1})


def test_a_lane_that_lost_nothing_tells_of_no_failure() -> None:
    made = Tally()
    made.fail(3.0, NO_ANSWER, 0)
    assert (made.seconds(PLAN), made.failures()) == ([], Counter())


def test_a_quantile_is_the_nearest_rank() -> None:
    ordered = [float(n) for n in range(1, 101)]
    assert [quantile(ordered, part) for part in (0.5, 0.95, 0.99, 1)] == [50, 95, 99, 100]
    assert (quantile([7.0], 0.5), quantile([], 0.5)) == (7, None)


def test_a_status_becomes_a_sample() -> None:
    states = [{"state": state} for state in ("active", "starting", "active", "draining")]
    assert sample({"backends": states, "desired": 4, "rate": None}, 3.0) == Sample(3.0, 2, 4, 0.0)


# -- the sentence and the picture -----------------------------------------------------------------------------------

SAMPLES = [Sample(0, 2, 2, 0), Sample(1, 2, 2, 50), Sample(2, 2, 6, 577), Sample(3, 6, 6, 600), Sample(7, 2, 2, 0)]


def test_the_summary_is_one_line_with_every_number() -> None:
    assert summary(tally(), SAMPLES, PLAN) == (
        f"6 requests, 3 failed: 2 {NO_ANSWER}, 1 status 503; p50/p95/p99 20 ms/30 ms/30 ms; "
        "fleet 2→2, 6 at its peak; enough backends (6) 3 s after the ramp of 2 s began"
    )


def test_too_few_backends_during_the_whole_load_are_reported() -> None:
    assert summary(Tally(), SAMPLES[:3], PLAN) == (
        "0 requests, 0 failed; p50/p95/p99 -/-/-; fleet 2→2, 2 at its peak; the 6 that were wanted never were active"
    )


def test_enough_backends_from_the_start_are_reported() -> None:
    assert summary(Tally(), SAMPLES[:2], PLAN).endswith("; fleet 2→2, 2 at its peak; no more were wanted")


def drawn() -> dict[str, Any]:
    """The figure's lines by name."""
    made = figure("p", tally().seconds(PLAN), SAMPLES, [GROWING, SHRINKING], PLAN)
    return {line.name: line for line in made.data}


def test_the_picture_has_each_line_in_its_chart() -> None:
    charts: dict[str, set[str]] = {}
    for name, line in drawn().items():
        charts.setdefault(line.yaxis, set()).add(name)
    assert charts == {
        "y": {"offered", "answered"},
        "y2": {"desired", "active", "decisions"},
        "y3": {"median", "95 %", "99 %"},
        "y4": {NO_ANSWER, "status 503"},
    }


def test_the_picture_shows_the_numbers() -> None:
    lines = drawn()
    assert list(lines["answered"].y) == [0, 2, 1, 0]
    assert list(lines["active"].x) == [0, 1, 2, 3, 7]
    assert list(lines["active"].y) == [2, 2, 2, 6, 2]
    assert list(lines["desired"].y) == [2, 2, 6, 6, 2]
    assert list(lines["99 %"].y) == [None, 30, 20, None]
    assert list(lines["status 503"].y) == [0, 0, 1, 0]


def test_each_decision_is_marked_where_it_was_made_and_says_its_sentence() -> None:
    marks = drawn()["decisions"]
    assert (list(marks.x), list(marks.y)) == ([1.5, 7.0], [6, 2])
    assert list(marks.marker.symbol) == ["triangle-up", "triangle-down"]
    assert list(marks.hovertext) == [
        "CREATE_SERVER 2→6: 577.4 packets/s over 2 backends = 288.7 each, target 100 (2.89×);<br>&lt;max&gt; 6",
        "STOP_SERVER 6→2: 0 packets/s",
    ]


def test_all_charts_share_their_time_and_the_phases_are_named() -> None:
    made = figure("p", tally().seconds(PLAN), SAMPLES, [], PLAN)
    assert [axis.matches for axis in made.select_xaxes()] == ["x4", "x4", "x4", None]
    assert [(note.text, note.x) for note in made.layout.annotations] == [("ramp", 1), ("plateau", 3), ("drop", 6)]


# -- the whole, with hey --------------------------------------------------------------------------------------------


class Place:
    """A service and its manager at one port of 127.0.0.1; every `bad`-th request meets a 503, or is hung up on."""

    def __init__(self, bad: int, hang_up: bool) -> None:
        place, self.asked, self.began = self, 0, time.time()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/status":
                    self.tell({"backends": [{"state": "active"}] * 2, "desired": 2, "rate": 1.0})
                elif self.path.startswith("/history?since="):
                    self.tell({"points": [], "decisions": [{**GROWING, "time": place.began + 1}]})
                else:
                    place.asked += 1
                    fails = bad and not place.asked % bad
                    if not (fails and hang_up):
                        self.tell({}, 503 if fails else 200)

            def tell(self, body: dict[str, Any], status: int = 200) -> None:
                text = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def system(self) -> System:
        return System("p", f"http://127.0.0.1:{self.port}/", f"http://127.0.0.1:{self.port}/", 66.0)

    def installed(self, root: Path) -> Path:
        """A tree in which the project p runs here."""
        stored = {"LB_PORT": self.port, "LB_MANAGER_PORT": self.port, "LB_STABLE_WINDOW": 60, "LB_PANIC_WINDOW": 6}
        (root / "run" / "p").mkdir(parents=True)
        (root / "run" / "p" / "settings.json").write_text(json.dumps({k: str(v) for k, v in stored.items()}))
        return root


@pytest.fixture
def place() -> Iterator[Callable[..., Place]]:
    made: list[Place] = []

    def begin(bad: int = 0, hang_up: bool = False) -> Place:
        made.append(Place(bad, hang_up))
        return made[-1]

    yield begin
    for one in made:
        one.server.shutdown()
        one.server.server_close()


@pytest.mark.slow
@needs_hey
def test_every_request_is_sent_and_counted_once(
    place: Callable[..., Place], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, out = place(), tmp_path / "demo.html"
    assert perform(there.system, SHORT, out) == 0
    assert there.asked == 16
    assert "16 requests, 0 failed; p50/p95/p99 " in capsys.readouterr().out
    assert "577.4 packets" in out.read_text()


@pytest.mark.slow
@needs_hey
@pytest.mark.parametrize(("hang_up", "kind"), [(True, NO_ANSWER), (False, "status 503")])
def test_failed_requests_are_reported_by_number_and_kind(
    place: Callable[..., Place], tmp_path: Path, capsys: pytest.CaptureFixture[str], hang_up: bool, kind: str
) -> None:
    assert perform(place(4, hang_up).system, SHORT, tmp_path / "demo.html") == 1
    assert f"16 requests, 4 failed: 4 {kind};" in capsys.readouterr().out


@pytest.mark.slow
@needs_hey
def test_an_interrupted_demo_ends_hey_and_draws_what_there_is(place: Callable[..., Place], tmp_path: Path) -> None:
    there = place()
    root = there.installed(tmp_path)
    script = f"from pathlib import Path; from load.demo import main; raise SystemExit(main(root=Path({str(root)!r})))"
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, "--project", "p", "--peak", "40", "--seconds", "20"]
    demo = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **path}
    )
    deadline = time.monotonic() + 30
    while there.asked < 10 and time.monotonic() < deadline:
        time.sleep(0.05)
    demo.send_signal(signal.SIGINT)
    output, errors = demo.communicate(timeout=30)
    assert (demo.returncode, errors) == (130, "interrupted\n")
    assert "too short to see the fleet shrink" in output
    assert f"{there.asked - 1} requests, 0 failed; " in output, "all but the one that looked whether it answers"
    assert "answered" in (root / "run" / "p" / "demo.html").read_text()
    before = there.asked
    time.sleep(1)
    assert there.asked == before


def test_where_no_system_runs_the_command_that_starts_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--project", "other"], tmp_path) == 3
    assert capsys.readouterr() == ("", "project other does not run here; ./run.sh --project other starts it\n")


def test_a_picture_that_cannot_be_written_is_known_before_the_load(
    place: Callable[..., Place], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = place()
    assert main(["--project", "p", "--out", str(tmp_path / "none" / "x.html")], there.installed(tmp_path)) == 2
    assert capsys.readouterr().err == f"--out {tmp_path}/none/x.html: No such file or directory\n"
    assert there.asked == 1


@pytest.mark.parametrize("words", [["--peak", "2001"], ["--seconds", "901"], ["--peak", "1.5"], ["--project", "../x"]])
def test_bad_use_is_refused(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words, tmp_path)
    assert ended.value.code == 2
    assert "allowed" in capsys.readouterr().err
