"""A ramp, a plateau and a drop against the running system, and a picture of what it made of them.

tests/load/run.sh calls it, in the manager's environment. Requests go to 127.0.0.1 alone, at most PEAK_MAX a second for
at most SECONDS_MAX seconds. Exit codes: 0 no request failed, 1 some did, 2 bad use, 3 no system runs, 127 hey is not
there, 130 interrupted (what there is is drawn all the same).
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import requests
from load.picture import NO_ANSWER, Sample, Tally, answers, figure, milliseconds, summary
from load.plan import DROP, PEAK_MAX, SECONDS_MAX, SECONDS_MIN, Lane, Stage, command, enough_seconds, lanes, stages
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from core.settings import ROOT, SETTINGS

PEAK = 80  # by default: some 700 packets a second, for which the default target wants 7 or 8 backends
GRACE = 10.0  # seconds past its stage after which a lane that lags begins no more requests
LAST = 2.0  # seconds an interrupted hey has to say what it saw
TICK = 0.05  # seconds
COLUMNS = "{task.fields[rate]:5.0f}/s  fleet {task.fields[fleet]}  p95 {task.fields[p95]}  failed {task.fields[failed]}"


class NotThere(Exception):
    """No system runs, or it does not answer; the message says what to do."""


class HeyError(Exception):
    """hey itself did not work; the message has its words."""


@dataclass(frozen=True)
class System:
    """The running project, as its settings.json and its manager tell."""

    project: str
    service: str
    manager: str
    windows: float  # seconds a lower load has to last before the fleet shrinks


def find(project: str, root: Path) -> System:
    """Raises NotThere."""
    start = "./run.sh" if project == SETTINGS["project"].default else f"./run.sh --project {project}"
    try:
        stored = json.loads((root / "run" / project / "settings.json").read_text())
        service, manager = (f"http://127.0.0.1:{int(stored[name])}/" for name in ("LB_PORT", "LB_MANAGER_PORT"))
        windows = float(stored["LB_STABLE_WINDOW"]) + float(stored["LB_PANIC_WINDOW"])
        system = System(project, service, manager, windows)
        ask(system.manager, "status")
    except (OSError, ValueError, KeyError) as error:  # requests' own errors are OSErrors
        raise NotThere(f"project {project} does not run here; {start} starts it") from error
    try:
        session().get(system.service, timeout=10, allow_redirects=False)
    except OSError as error:
        raise NotThere(f"project {project} runs, but nothing answers at {system.service}: {error}") from error
    return system


def session() -> requests.Session:
    """Without the environment's proxies, for all is on this host."""
    made = requests.Session()
    made.trust_env = False
    return made


def ask(manager: str, path: str) -> Any:
    answer = session().get(f"{manager}{path}", timeout=5)
    answer.raise_for_status()
    return answer.json()


def sample(status: dict[str, Any], at: float) -> Sample:
    active = sum(backend["state"] == "active" for backend in status["backends"])
    return Sample(at, active, status["desired"], status["rate"] or 0.0)


class Watch:
    """Looks at the manager's /status each second, in a thread, so that a slow answer delays no request."""

    def __init__(self, manager: str, began: float) -> None:
        self.samples: list[Sample] = []
        self._manager, self._began = manager, began
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> list[Sample]:
        self._over.set()
        self._thread.join()
        return self.samples

    def _run(self) -> None:
        while True:
            with suppress(OSError, ValueError, KeyError, TypeError):  # a manager that is started again is back soon
                self.samples.append(sample(ask(self._manager, "status"), time.time() - self._began))
            if self._over.wait(1):
                return


class Run:
    """One hey, at work on its lane. In a session of its own, so that Ctrl-C comes to it from us alone."""

    def __init__(self, lane: Lane, url: str, at: float) -> None:
        self.lane, self.at = lane, at
        self._told = False
        self._output: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed when it is read
        self._process = subprocess.Popen(
            command(lane, url), stdout=self._output, stderr=subprocess.STDOUT, start_new_session=True
        )

    def over(self, now: float) -> bool:
        if now > self.lane.stage.end + GRACE and not self._told:
            self.stop()
        return self._process.poll() is not None

    def stop(self) -> None:
        """hey begins no more requests and says what became of the others."""
        self._told = True
        self._process.send_signal(signal.SIGINT)

    def cut(self, seconds: float) -> None:
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def read(self, tally: Tally, whole: bool) -> None:
        """Raises HeyError where hey itself failed. What a `whole` run has no line for got no answer; when it was is
        not known, so it is told at the stage's end."""
        with self._output:
            self._output.seek(0)
            text = self._output.read()
        if self._process.returncode > 0:
            raise HeyError(f"hey failed with status {self._process.returncode}: {text.strip()[:300]}")
        found = answers(text, self.at)
        tally.add(found)
        if whole:
            tally.fail(self.lane.stage.end - TICK, NO_ANSWER, self.lane.requests - len(found))


def drive(plan: Sequence[Stage], url: str, tally: Tally, began: float, show: Callable[[float], None]) -> bool:
    """Starts each lane when it is due and reads it when it has ended; False when it was interrupted."""
    waiting = deque(sorted((lane for stage in plan for lane in lanes(stage)), key=lambda lane: lane.at))
    running: list[Run] = []
    try:
        while waiting or running:
            now = time.time() - began
            while waiting and waiting[0].at <= now:
                running.append(Run(waiting.popleft(), url, now))
            for run in [run for run in running if run.over(now)]:
                running.remove(run)
                run.read(tally, whole=True)
            show(now)
            time.sleep(min(TICK, max(0.0, waiting[0].at - now)) if waiting else TICK)
    except KeyboardInterrupt:
        return False
    finally:
        for run in running:
            run.stop()
        deadline = time.monotonic() + LAST
        for run in running:
            run.cut(max(0.0, deadline - time.monotonic()))
            run.read(tally, whole=False)
    return True


def perform(system: System, plan: Sequence[Stage], out: Path) -> int:
    tally, began = Tally(), time.time()
    watch = Watch(system.manager, began)
    columns = TextColumn("{task.description:8}"), BarColumn(), TimeRemainingColumn(), TextColumn(COLUMNS)
    with Progress(*columns) as progress:
        task = progress.add_task("ramp", total=plan[-1].end, rate=0, fleet="", p95="", failed=0)

        def show(now: float) -> None:
            stage = next((stage for stage in plan if now < stage.end), plan[-1])
            fleet = f"{watch.samples[-1].active} of {watch.samples[-1].desired}" if watch.samples else "?"
            p95, failed = milliseconds(tally.ordered, 0.95), tally.failures().total()
            progress.update(
                task, completed=now, description=stage.name, rate=stage.rate, fleet=fleet, p95=p95, failed=failed
            )

        whole = drive(plan, system.service, tally, began, show)
    samples = watch.end()
    line = summary(tally, samples, plan)
    title = f"{system.project}: {line}"
    figure(title, tally.seconds(plan), samples, changes(system.manager, began), plan).write_html(out)
    print(line)
    print(f"picture: {out}")
    if not whole:
        print("interrupted", file=sys.stderr)
        return 130
    return 1 if tally.failures() else 0


def changes(manager: str, began: float) -> list[dict[str, Any]]:
    """The decisions since `began`, in seconds since then; none, and a word about it, where the manager is away."""
    try:
        told = ask(manager, f"history?since={began:.3f}")["decisions"]
    except (OSError, ValueError, KeyError) as error:
        print(f"the decisions are not in the picture: {error}", file=sys.stderr)
        return []
    return [{**decision, "time": decision["time"] - began} for decision in told]


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{text!r}; allowed: {low} to {high}")
        return int(text)

    return parse


def _project(text: str) -> str:
    try:
        return str(SETTINGS["project"].parse(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: {SETTINGS['project'].allowed}") from None


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests/load/run.sh", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--project", type=_project, default=SETTINGS["project"].default, help="default: %(default)s")
    peak, seconds = _whole(1, PEAK_MAX), _whole(SECONDS_MIN, SECONDS_MAX)
    parser.add_argument(
        "--peak", type=peak, default=PEAK, metavar="CONNECTIONS_PER_SECOND", help="default: %(default)s"
    )
    parser.add_argument("--seconds", type=seconds, metavar="N", help="default: long enough to see the fleet shrink")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the picture; default: run/PROJECT/demo.html")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    options = _options(arguments)
    try:
        system = find(options.project, root)
    except NotThere as error:
        print(error, file=sys.stderr)
        return 3
    out = options.out or root / "run" / options.project / "demo.html"
    try:
        out.touch()  # better known now than in two minutes
    except OSError as error:
        print(f"--out {out}: {error.strerror}", file=sys.stderr)
        return 2
    if not shutil.which("hey"):
        print("hey, which makes the load, is not installed", file=sys.stderr)
        return 127
    seconds = options.seconds or enough_seconds(system.windows)
    if seconds * DROP <= system.windows:
        print(f"too short to see the fleet shrink: the drop has to last more than {system.windows:.0f} s")
    for number in (signal.SIGINT, signal.SIGTERM):  # even where they were ignored, as a shell's background has it
        signal.signal(number, signal.default_int_handler)
    print(f"to {options.peak} new connections a second at {system.service}, {seconds} s in all")
    try:
        return perform(system, stages(options.peak, seconds), out)
    except HeyError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
