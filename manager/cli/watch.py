"""The state of a running project, in the terminal: `./run.sh --status`, `./run.sh --status --json`, `./run.sh --watch`.

The settings come in LB_ variables, as run.sh exports them; what they leave out is as the project was started with.
Exit codes: 0 healthy, it serves as desired; 1 down, no manager of the project answers; 2 bad usage; 3 degraded: fewer
backends serve than desired for the moment, launches fail, an update was given up, the balancer does not run or report,
clients cannot reach it, or the engine is unreachable. --watch ends with 0.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NoReturn

import requests
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from core.scaler import Policy
from core.settings import SettingError, read, with_stored

HEALTHY, ABSENT, USAGE, DEGRADED = 0, 1, 2, 3
LATE = 3  # intervals without a report until a balancer counts as silent
SPAN, COLUMNS = 300.0, 60  # seconds of the past in the sparkline, and its width
POINTS, LAST = 1000, 10  # points kept, which are more than a SPAN has; changes shown
LEVELS = "▁▂▃▄▅▆▇█"
COLOURS = {"active": "green", "draining": "yellow", "starting": "cyan", "failed": "red", "yes": "green", "no": "red"}
RIGHT, WRAP = ("share", "conn/s", "pkt/s", "active"), ("backend", "why")  # columns: flush right; those that may wrap

Status = Mapping[str, Any]  # the body of GET /status


class NoAnswer(Exception):
    """No manager of this project answers; the message says what was tried."""


def plain(text: str, style: str = "") -> Text:
    """Never markup, on one line and without control characters: a container's last log line may hold any."""
    return Text("".join(letter if letter.isprintable() else " " for letter in text), style=style)


def troubles(status: Status) -> list[str]:
    """Why it is degraded, a sentence each; none when it serves as desired."""
    launches, wanted = status["launches"], status["desired"]
    serving = sum(backend["state"] == "active" and backend["healthy"] is not False for backend in status["backends"])
    reports = any(one["last_seen"] <= LATE * status["settings"]["interval"] for one in status["balancers"])
    # A manager that was started before an upgrade does not have these two fields.
    balancer = status.get("balancer", {"state": "running", "problem": ""})
    data_path = status.get("data_path", {"working": True, "problem": ""})
    no_balancer = f"the balancer does not run ({balancer['state']})"
    found = {
        f"engine unreachable: {status['engine']}": status["engine"] != "ok",
        f"launches that failed so far: {launches['failed']}: {launches['why']}": launches["failed"],
        f"update given up: {launches['update_given_up']}": launches["update_given_up"],
        ": ".join(filter(None, (no_balancer, balancer["problem"]))): balancer["state"] != "running",
        "no balancer reports": not reports,
        f"clients cannot reach the service: {data_path['problem']}": data_path["working"] is False,
        f"backends that serve: {serving} of {wanted}": serving < wanted,
    }
    return [sentence for sentence, applies in found.items() if applies]


def state(problems: Sequence[str]) -> str:
    return "degraded" if problems else "healthy"


def for_programs(status: Status) -> str:
    """What --status --json prints: the manager's /status with its `state` and `problems` beside."""
    problems = troubles(status)
    return json.dumps({**status, "state": state(problems), "problems": problems})


def progress(status: Status) -> str:
    """How far an update of the backends is; empty where a manager from before an upgrade does not report it."""
    launches = status["launches"]
    if "replaced" not in launches:
        return ""
    return f"{launches['replaced']} of {launches['replaced'] + launches['to_replace']} backends replaced"


def summary(status: Status) -> Text:
    """One line: its state, how many backends, under which load, and what keeps it from being healthy."""
    launches, found, unit = status["launches"], troubles(status), Policy(0, 0, 0, status["metric"]).unit
    rate = "no rate yet" if status["rate"] is None else f"{status['rate']:.5g} {unit}"
    notes = {
        f"desired {status['desired']}, current {status['current']} ({status['min']} to {status['max']})": True,
        f"{rate}, target {status['target']:g} each": True,
        "paused": status["paused"],
        ": ".join(filter(None, ("updating", progress(status)))): launches["updating"],
    }
    sentences = [*(note for note, applies in notes.items() if applies), *found]
    line = f"{status['project']} {state(found)}: {'; '.join(sentences)}"
    return plain(line, "red" if found else "green")


def decision(told: Status | None) -> Text:
    return plain(f"{told['verdict']} {told['current']}→{told['desired']}  {told['reason']}" if told else "none yet")


def balancers(status: Status) -> Text:
    def told(one: Status) -> str:
        late = "" if one["revision"] == status["revision"] else ", has not taken in the last change"
        return f"{one['id']} {one['last_seen']:.1f} s ago{late}"

    return plain(f"balancers' last reports: {'; '.join(map(told, status['balancers'])) or 'none'}")


def clock(at: float | None = None) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))


def sparkline(points: Sequence[Status], name: str, now: float, top: float) -> str:
    """The highest value in each of COLUMNS parts of the SPAN that ends now; blank where nothing was measured."""
    highest: dict[int, float] = {}
    for point in points:
        column = int((now - point["time"]) / SPAN * COLUMNS)
        highest[column] = max(point[name], highest.get(column, 0.0))
    ago = reversed(range(COLUMNS))
    return "".join(LEVELS[min(7, int(highest[column] / top * 8))] if column in highest else " " for column in ago)


def load(points: Sequence[Status], now: float) -> Text:
    """The rate over the capacity, on one scale."""
    recent = [point for point in points if now - point["time"] < SPAN]
    top = max((point[name] for point in recent for name in ("rate", "capacity")), default=0.0) or 1.0
    drawn = (f"{name:<10}{sparkline(recent, name, now, top)}" for name in ("rate", "capacity"))
    return Text("\n".join([*drawn, f"{'':10}the last {SPAN / 60:g} minutes; full height is {top:.5g}"]))


def cells(row: Status) -> dict[str, str]:
    """A backend in words, by column."""
    return {
        "backend": row["name"],
        "address": row["ip"] or "-",
        "node": row["node"][:8],
        "state": row["state"],
        "share": f"{row['share']:.1%}",
        "conn/s": f"{row['connections_rate']:g}",
        "pkt/s": f"{row['packets_rate']:g}",
        "active": f"{row['active']:g}",
        "healthy": {True: "yes", False: "no"}.get(row["healthy"], "?"),
        "why": "; ".join(word for word in ("" if row["healthy"] else row["why"], row["reason"]) if word),
    }


def fleet(status: Status) -> Table:
    """The backends, a row each, without the columns that none fills."""
    rows = [cells(backend) for backend in status["backends"]]
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    titles = [title for title in (rows[0] if rows else ()) if any(row[title] for row in rows)]
    for name in titles:
        table.add_column(name, justify="right" if name in RIGHT else "left", no_wrap=name not in WRAP, overflow="fold")
    for row in rows:
        table.add_row(*(plain(row[title], COLOURS.get(row[title], "")) for title in titles))
    return table


def past(changes: Sequence[Status]) -> Text:
    """What was changed, the newest first, a line each."""
    rows = (Text(f"{clock(change['time'])}  ").append(decision(change)) for change in reversed(changes))
    return Text("\n", no_wrap=True, overflow="ellipsis").join(rows)


def view(status: Status, *charts: RenderableType) -> RenderableType:
    """What --status prints, and --watch with its charts; the fleet comes last, for it is cut where there is no room."""
    last = Text("last decision: ").append(decision(status["last_decision"]))
    return Group(summary(status), balancers(status), last, *charts, fleet(status))


class Manager:
    """A project's manager, asked over HTTP on loopback; every call raises NoAnswer."""

    def __init__(self, settings: Mapping[str, str]) -> None:
        self._project, self._address = settings["LB_PROJECT"], f"127.0.0.1:{settings['LB_MANAGER_PORT']}"
        self._session = requests.Session()
        self._session.trust_env = False  # loopback is reached through no proxy

    def status(self) -> Status:
        status = self.get("/status")
        if status.get("project") != self._project:
            raise NoAnswer(f"{self._address} does not answer for project {self._project}")
        return status

    def get(self, path: str) -> Mapping[str, Any]:
        try:
            return dict(self._session.get(f"http://{self._address}{path}", timeout=3).json())
        except (requests.RequestException, ValueError, TypeError) as error:
            raise NoAnswer(f"no manager of project {self._project} answers at {self._address}") from error


def watch(manager: Manager, status: Status, console: Console) -> NoReturn:
    """A frame a second, or a line when there is news where no terminal is; while the manager is away it says so."""
    points, changes = deque[Status](maxlen=POINTS), deque[Status](maxlen=LAST)
    note, gone, before = "Ctrl-C ends", "", ""
    live = Live(console=console, auto_refresh=False)
    with live if console.is_terminal else nullcontext():
        while True:
            try:
                status, news = manager.status(), manager.get(f"/history?since={points[-1]['time'] if points else 0}")
                points.extend(news["points"])
                changes.extend(news["decisions"])
                note, gone = f"the manager was away from {gone} to {clock()}" if gone else note, ""
            except NoAnswer as error:
                gone = gone or clock()
                note = f"{error} since {gone}; waiting"
            said = note if gone else f"{summary(status)}; last decision: {decision(status['last_decision'])}"
            if console.is_terminal:
                now = Text(f"{clock()}  {note}", style="yellow" if gone else "dim")
                live.update(Group(now, view(status, load(points, time.time()), past(changes))), refresh=True)
            elif said != before:
                print(f"{clock()}  {said}", flush=True)
            before = said
            time.sleep(1)


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    parser = argparse.ArgumentParser("watch.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--watch", action="store_true", help="show it live")
    how.add_argument("--json", action="store_true", help="print the manager's /status with state and problems, as JSON")
    parser.add_argument("--status", action="store_true", help="print it once; the default")
    chosen = parser.parse_args(arguments)
    console = Console(force_terminal=sys.stdout.isatty(), width=None if sys.stdout.isatty() else 200)
    try:
        settings = with_stored(environ)
        read(settings)
    except SettingError as error:
        print(f"watch.py: {error}", file=sys.stderr)
        return USAGE
    try:
        manager = Manager(settings)
        status = manager.status()
    except NoAnswer as error:
        if chosen.json:
            print(json.dumps({"project": settings["LB_PROJECT"], "state": "down", "problem": str(error)}))
        else:
            print(f"watch.py: {error}", file=sys.stderr)
        return ABSENT
    if chosen.watch:
        watch(manager, status, console)
    if chosen.json:
        print(for_programs(status))
    else:
        console.print(view(status))
    return DEGRADED if troubles(status) else HEALTHY


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr] # a terminal that has no blocks shows ?
    for end in (signal.SIGINT, signal.SIGTERM):  # by an exception, so that the terminal is put back as it was
        signal.signal(end, lambda *_: sys.exit(HEALTHY))
    try:
        sys.exit(main(sys.argv[1:], os.environ))
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
