"""The state of a running project, in the terminal: `./run.sh --status`, `./run.sh --status --json`, `./run.sh --watch`.

`cli.arguments` starts it with the flags of run.sh, which it has checked.
Exit codes: 0 healthy; 1 down, no manager of the project answers; 3 degraded, and the problems say why. --watch ends
with 0.
"""

from __future__ import annotations

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

from cli.arguments import Arguments, print_down, run_arguments
from core.scaler import Policy
from core.settings import Settings
from core.snapshot import State, Status

HEALTHY, DEGRADED = 0, 3
SPAN, COLUMNS = 300.0, 60  # seconds that the sparkline covers, and its width in characters
POINTS = 1000  # points of the history that are kept; a SPAN has fewer
LAST = 10  # changes of the fleet that are displayed
LEVELS = "▁▂▃▄▅▆▇█"
COLOURS = {"active": "green", "draining": "yellow", "starting": "cyan", "failed": "red", "yes": "green", "no": "red"}
RIGHT, WRAP = ("share", "conn/s", "pkt/s", "active"), ("backend", "why")  # columns: flush right; those that may wrap


class NoAnswer(Exception):
    """No manager of this project answers; the message says what was tried."""


class Manager:
    """The HTTP interface of a project's manager, on loopback. Every call raises NoAnswer."""

    def __init__(self, settings: Settings) -> None:
        self._project = settings.project
        self._address = f"127.0.0.1:{settings.manager_port}"
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy for loopback

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


def plain(text: str, style: str = "") -> Text:
    """The text on one line, without control characters and without markup: a container's log may contain both."""
    return Text("".join(letter if letter.isprintable() else " " for letter in text), style=style)


def clock(at: float | None = None) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))


# -- parts of the output -----------------------------------------------------------------------------------------------


def progress(status: Status) -> str:
    """How many backends an update has replaced so far."""
    launches = status["launches"]
    return f"{launches['replaced']} of {launches['replaced'] + launches['to_replace']} backends replaced"


def summary(status: Status) -> Text:
    """One line: the state, the number of backends, the load, and the problems."""
    unit = Policy(0, 0, 0, status["metric"]).unit
    rate = "no rate yet" if status["rate"] is None else f"{status['rate']:.5g} {unit}"
    parts = [
        f"desired {status['desired']}, current {status['current']} ({status['min']} to {status['max']})",
        f"{rate}, target {status['target']:g} each",
    ]
    if status["paused"]:
        parts.append("paused")
    if status["launches"]["updating"]:
        parts.append(f"updating: {progress(status)}")
    parts += [problem["text"] for problem in status["problems"]]
    colour = "green" if status["state"] == State.HEALTHY else "red"
    return plain(f"{status['project']} {status['state']}: {'; '.join(parts)}", colour)


def decision(made: Status | None) -> Text:
    if made is None:
        return plain("none yet")
    return plain(f"{made['verdict']} {made['current']}→{made['desired']}  {made['reason']}")


def balancers(status: Status) -> Text:
    """When each balancer reported last, and whether its rules follow the current snapshot."""
    reports = []
    for balancer in status["balancers"]:
        late = "" if balancer["revision"] == status["revision"] else ", not yet at the current revision"
        reports.append(f"{balancer['id']} {balancer['last_seen']:.1f} s ago{late}")
    return plain(f"last reports of the balancers: {'; '.join(reports) or 'none'}")


def cells(row: Status) -> dict[str, str]:
    """The texts for a backend, by column."""
    reasons = ["" if row["healthy"] else row["why"], row["reason"]]
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
        "why": "; ".join(filter(None, reasons)),
    }


def _has_text(rows: Sequence[Mapping[str, str]], title: str) -> bool:
    return any(row[title] for row in rows)


def fleet(status: Status) -> Table:
    """A row for each backend. Columns that are empty in all rows are left out."""
    rows = [cells(backend) for backend in status["backends"]]
    titles = [title for title in (rows[0] if rows else ()) if _has_text(rows, title)]
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for title in titles:
        justify: Any = "right" if title in RIGHT else "left"
        table.add_column(title, justify=justify, no_wrap=title not in WRAP, overflow="fold")
    for row in rows:
        table.add_row(*(plain(row[title], COLOURS.get(row[title], "")) for title in titles))
    return table


def sparkline(points: Sequence[Status], name: str, now: float, top: float) -> str:
    """The last SPAN seconds in COLUMNS characters: the highest value for each, or a blank if there is no value."""
    highest: dict[int, float] = {}  # by column, counted from now
    for point in points:
        column = int((now - point["time"]) / SPAN * COLUMNS)
        highest[column] = max(point[name], highest.get(column, 0.0))
    # The oldest column is the first character.
    line = ""
    for column in reversed(range(COLUMNS)):
        line += LEVELS[min(7, int(highest[column] / top * 8))] if column in highest else " "
    return line


def load(points: Sequence[Status], now: float) -> Text:
    """The sparklines of rate and capacity, on one scale."""
    recent = [point for point in points if now - point["time"] < SPAN]
    top = 0.0
    for point in recent:
        top = max(top, point["rate"], point["capacity"])
    top = top or 1.0  # without any load, every value is at the bottom
    rate, capacity = sparkline(recent, "rate", now, top), sparkline(recent, "capacity", now, top)
    scale = f"the last {SPAN / 60:g} minutes; full height is {top:.5g}"
    return Text(f"rate      {rate}\ncapacity  {capacity}\n          {scale}")


def past(changes: Sequence[Status]) -> Text:
    """The changes of the fleet, one a line, the newest first."""
    rows = [Text(f"{clock(change['time'])}  ").append(decision(change)) for change in reversed(changes)]
    return Text("\n", no_wrap=True, overflow="ellipsis").join(rows)


def render_status(status: Status, *charts: RenderableType) -> RenderableType:
    """The output of --status, and of --watch with its charts. The table is last, because a terminal cuts the end."""
    last = Text("last decision: ").append(decision(status["last_decision"]))
    return Group(summary(status), balancers(status), last, *charts, fleet(status))


# -- the commands ------------------------------------------------------------------------------------------------------


def watch(manager: Manager, status: Status, console: Console) -> NoReturn:
    """Draws the status each second; without a terminal, prints a line at each change. Reports when the manager does not
    answer, and continues."""
    points, changes = deque[Status](maxlen=POINTS), deque[Status](maxlen=LAST)
    note, silent_since, printed = "Ctrl-C ends", "", ""  # `silent_since`: when the manager stopped answering, if so
    live = Live(console=console, auto_refresh=False)
    with live if console.is_terminal else nullcontext():
        while True:
            # Fetch the status and what is new in the history; note when the manager does not answer.
            try:
                status = manager.status()
                fresh = manager.get(f"/history?since={points[-1]['time'] if points else 0}")
                points.extend(fresh["points"])
                changes.extend(fresh["decisions"])
                if silent_since:
                    note, silent_since = f"the manager did not answer from {silent_since} to {clock()}", ""
            except NoAnswer as error:
                silent_since = silent_since or clock()
                note = f"{error} since {silent_since}; waiting"
            # Draw, or print a line that differs from the last one.
            line = note
            if not silent_since:
                line = f"{summary(status)}; last decision: {decision(status['last_decision'])}"
            if console.is_terminal:
                heading = Text(f"{clock()}  {note}", style="yellow" if silent_since else "dim")
                charts = load(points, time.time()), past(changes)
                live.update(Group(heading, render_status(status, *charts)), refresh=True)
            elif line != printed:
                print(f"{clock()}  {line}", flush=True)
            printed = line
            time.sleep(1)


def main(arguments: Arguments) -> int:
    # Without a terminal, rich would assume 80 columns and wrap the table.
    console = Console(force_terminal=sys.stdout.isatty(), width=None if sys.stdout.isatty() else 200)
    try:
        manager = Manager(arguments.settings)
        status = manager.status()
    except NoAnswer as error:
        return print_down(arguments, str(error))
    if arguments.watch:
        watch(manager, status, console)
    if arguments.json:
        print(json.dumps(status))
    else:
        console.print(render_status(status))
    return HEALTHY if status["state"] == State.HEALTHY else DEGRADED


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr] # a terminal without these characters prints ?
    for end in (signal.SIGINT, signal.SIGTERM):  # raises SystemExit, so that rich restores the terminal
        signal.signal(end, lambda *_: sys.exit(HEALTHY))
    try:
        sys.exit(main(run_arguments(sys.argv[1:], os.environ)))
    except BrokenPipeError:  # the reader, such as `| head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
