"""How a running project is, in the terminal: `./run.sh --status`, `./run.sh --status --json`, `./run.sh --watch`.

    watch.py [--watch | --json] [--project NAME]

Exit codes: 0 (WELL) it serves as desired; 1 (ABSENT) it does not run: no manager of the project answers; 2 (USAGE) bad
usage; 3 (DEGRADED) it runs, but no backend serves or fewer than desired for the moment, launches fail, no balancer
reports, or the engine is out of reach. --watch ends with 0 when it is told to (q or Ctrl-C), with 1 when there was
nothing to watch; it outlasts the manager's restarts.

Pure but for `Manager` and the loops at the end: what /status and /history say in, text out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import sys
import termios
import textwrap
import time
import tty
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import requests
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from scaler import Policy
from settings import ROOT, SETTINGS, variable

WELL, ABSENT, USAGE, DEGRADED = 0, 1, 2, 3
LATE = 3  # intervals without a report until a balancer counts as silent
SPAN = 300.0  # seconds of the past in the sparkline
LAST = 10  # decisions shown
EIGHTHS = " ▏▎▍▌▋▊▉█"
LEVELS = "▁▂▃▄▅▆▇█"
RATES = ("connections_rate", "packets_rate", "active")
HEALTH = {True: "[green]yes[/]", False: "[red]no[/]", None: "?"}
COLOURS = {"active": "green", "draining": "yellow", "starting": "cyan", "failed": "red", "stopped": "dim"}

Status = Mapping[str, Any]  # the body of GET /status


class NoAnswer(Exception):
    """No manager of this project answers; the message says what was tried."""


# -- what is said ----------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """On one line and without control characters: a container's last words may hold any."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def troubles(status: Status) -> list[str]:
    """Why it is degraded, a sentence each; none when it serves as desired."""
    launches, wanted = status["launches"], status["desired"]
    serving = sum(backend["state"] == "active" and backend["healthy"] is not False for backend in status["backends"])
    heard = any(one["last_seen"] <= LATE * status["settings"]["interval"] for one in status["balancers"])
    found = {
        f"engine out of reach: {status['engine']}": status["engine"] != "ok",
        f"launches in vain so far: {launches['failed']}: {launches['why']}": launches["failed"],
        "no balancer reports": not heard,
        f"backends that serve: {serving} of {wanted}": serving < wanted,
    }
    return [plain(sentence) for sentence, applies in found.items() if applies]


def exit_code(status: Status) -> int:
    return DEGRADED if troubles(status) else WELL


def rate(status: Status) -> str:
    unit = Policy(0, 0, 0, status["metric"]).unit
    return "no rate yet" if status["rate"] is None else f"{status['rate']:.5g} {unit}"


def summary(status: Status) -> str:
    """One line: is it well, how many, under which load, and whatever keeps it from being as it should."""
    launches, found = status["launches"], troubles(status)
    notes = {
        "paused": status["paused"],
        "updating": launches["updating"],
        f"update given up: {launches['update_given_up']}": launches["update_given_up"],
    }
    words = [
        f"desired {status['desired']}, current {status['current']} ({status['min']} to {status['max']})",
        f"{rate(status)}, target {status['target']:g} each",
        *(plain(note) for note, applies in notes.items() if applies),
        *found,
    ]
    return f"{status['project']} {'degraded' if found else 'well'}: {'; '.join(words)}"


def reason(status: Status) -> str:
    decision = status["last_decision"]
    if decision is None:
        return "no decision yet"
    return plain(f"{decision['verdict']} {decision['current']}→{decision['desired']}  {decision['reason']}")


def line(status: Status) -> str:
    """What --watch prints where no terminal is, when it differs from the line before."""
    counts = f"desired {status['desired']}  current {status['current']}"
    return "  ".join([counts, rate(status), reason(status), *troubles(status)])


def clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))


# -- what is shown ---------------------------------------------------------------------------------------------------


def bar(part: float, width: int) -> str:
    """A bar of `part` (0…1) of the width, to an eighth of a character."""
    eighths = round(max(0.0, min(1.0, part)) * width * 8)
    return EIGHTHS[-1] * (eighths // 8) + EIGHTHS[eighths % 8].strip()


def columns(points: Sequence[Status], name: str, now: float, width: int) -> list[float | None]:
    """The highest value in each of `width` equal parts of the SPAN that ends now; None where nothing was measured."""
    found: list[float | None] = [None] * width
    for point in points:
        column = width - 1 - int((now - point["time"]) / SPAN * width)
        if 0 <= column < width:
            found[column] = max(point[name], found[column] or 0.0)
    return found


def sparkline(values: Sequence[float | None], top: float) -> str:
    return "".join(" " if v is None else LEVELS[min(7, int(v / top * 8)) if top else 0] for v in values)


def load(points: Sequence[Status], now: float, width: int, interval: float) -> RenderableType:
    """The rate over the capacity, on one scale; the rate is red where it is above."""
    width = max(1, min(width, int(SPAN / interval)))
    rates, capacities = (columns(points, name, now, width) for name in ("rate", "capacity"))
    top = max((value for value in (*rates, *capacities) if value is not None), default=0.0)
    drawn = Text("load      ")
    for value, capacity in zip(rates, capacities, strict=True):
        above = value is not None and capacity is not None and value > capacity
        drawn.append(sparkline([value], top), style="red" if above else "green")
    drawn.append("\ncapacity  ").append(sparkline(capacities, top), style="dim")
    return drawn.append(f"\n          the last {SPAN / 60:g} minutes; full height is {top:.5g}", style="dim")


def fleet(status: Status, most: int | None = None, bars: bool = False) -> RenderableType:
    """The backends, a row each, of which `most` are shown; with bars, no row takes more than a line."""
    rows = status["backends"][:most]
    table = Table(box=None, pad_edge=False, collapse_padding=bars, header_style="bold")
    for title in ("backend", "address", "state"):
        table.add_column(title, no_wrap=bars, overflow="ellipsis" if bars else "fold")
    for title in ("share", "conn/s", "packets/s", "active"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("healthy", no_wrap=True)
    if bars:
        table.add_column("", no_wrap=True)
    table.add_column("why", overflow="ellipsis" if bars else "fold")
    largest = max((row["share"] for row in rows), default=0.0)
    for row in rows:
        name = row["name"].removeprefix(f"{status['project']}-" if bars else "")
        told = [plain(name), row["ip"] or "-", Text(row["state"], style=COLOURS.get(row["state"], ""))]
        figures = [f"{row['share']:.1%}", *(f"{row[name]:g}" for name in RATES)]
        drawn = [Text(bar(row["share"] / largest if largest else 0.0, 10), style="blue")] if bars else []
        # A cell that may be cut in a column that may shrink: where there is little room, this one gives way first.
        why = Text(plain("; ".join(text for text in (row["why"], row["reason"]) if text)), no_wrap=bars)
        table.add_row(*told, *figures, HEALTH[row["healthy"]], *drawn, why)
    more = len(status["backends"]) - len(rows)
    return Group(table, Text(f"… and {more} more", style="dim")) if more else table


def balancers(status: Status) -> str:
    def told(one: Status) -> str:
        late = "" if one["revision"] == status["revision"] else ", has not taken in the last change"
        return plain(f"balancer {one['id']}: last report {one['last_seen']:.1f} s ago{late}")

    return "\n".join(told(one) for one in status["balancers"]) or "no balancer reports"


def once(status: Status) -> RenderableType:
    """What --status prints."""
    said = [Text(summary(status), style="red" if troubles(status) else "green"), fleet(status)]
    return Group(*said, Text(balancers(status)), Text(f"last decision: {reason(status)}"))


def decisions(past: Past, most: int) -> RenderableType:
    changes = past.decisions[-most:] if most > 0 else ()
    rows = [
        f"{clock(c['time'])}  {c['verdict']} {c['current']}→{c['desired']}  {plain(c['reason'])}" for c in changes[::-1]
    ]
    return Text("\n".join(rows) or "no decision has changed anything yet", no_wrap=True, overflow="ellipsis")


@dataclass(frozen=True)
class Past:
    """Of /history what is shown: the points of the last SPAN seconds, the last decisions."""

    points: tuple[Status, ...] = ()
    decisions: tuple[Status, ...] = ()

    @property
    def newest(self) -> float:
        return float(self.points[-1]["time"]) if self.points else 0.0

    def and_then(self, news: Mapping[str, Sequence[Status]], now: float) -> Past:
        points = (point for point in (*self.points, *news["points"]) if point["time"] > now - SPAN)
        return Past(tuple(points), (*self.decisions, *news["decisions"])[-LAST:])


def screen(status: Status, past: Past, away: str, now: float, size: tuple[int, int]) -> RenderableType:
    """One frame of --watch for a terminal of `size` (columns, lines); `away` says that the manager is, or was, away."""
    width, height = size
    head = Text(summary(status), style="red" if troubles(status) or away.endswith("…") else "green")
    interval = status["settings"]["interval"]
    news = f"{clock(now)}  {away or 'q ends'}"
    fixed = 9 + sum(len(textwrap.wrap(text, width)) for text in (head.plain, news)) + max(1, len(status["balancers"]))
    changes = max(3, min(len(past.decisions), height - fixed - len(status["backends"])))
    return Group(
        head,
        Text(news, style="yellow" if away else "dim"),
        Text(),
        load(past.points, now, width - 10, interval),
        Text(),
        fleet(status, most=max(1, height - fixed - changes), bars=True),
        Text(),
        Text(balancers(status)),
        Text(f"last: {reason(status)}", no_wrap=True, overflow="ellipsis"),
        decisions(past, changes),
    )


# -- asking the manager, and the loops -------------------------------------------------------------------------------


def manager_port(project: str, environ: Mapping[str, str]) -> int:
    """As run.sh says it in the environment, else as the project was started with. Raises NoAnswer."""
    if (given := environ.get(variable("manager_port"))) and environ.get(variable("project")) == project:
        return int(given)
    try:
        return int(json.loads((ROOT / "run" / project / "settings.json").read_text())[variable("manager_port")])
    except (OSError, ValueError, KeyError, TypeError):
        raise NoAnswer(f"project {project} does not run here; ./run.sh starts it") from None


class Manager:
    """A project's manager, asked over HTTP on loopback; every call raises NoAnswer."""

    def __init__(self, project: str, port: int) -> None:
        self._project, self._address = project, f"127.0.0.1:{port}"
        self._session = requests.Session()
        self._session.trust_env = False  # loopback is reached through no proxy

    def status(self) -> dict[str, Any]:
        status = self._get("/status")
        if status.get("project") != self._project:
            raise NoAnswer(f"{self._address} does not answer for project {self._project}")
        return status

    def history(self, since: float) -> dict[str, Any]:
        return self._get(f"/history?since={since}")

    def _get(self, path: str) -> dict[str, Any]:
        try:
            answer = self._session.get(f"http://{self._address}{path}", timeout=3, allow_redirects=False)
            answer.raise_for_status()
            body = answer.json()
        except (requests.RequestException, ValueError) as error:
            raise NoAnswer(f"no manager of project {self._project} answers at {self._address}") from error
        if not isinstance(body, dict):
            raise NoAnswer(f"{self._address} is not a manager")
        return body


def watch_lines(manager: Manager, status: Status) -> None:
    """A line a second at most, and only when it says something new, until interrupted."""
    before, said = "", line(status)
    while True:
        if said != before:
            print(f"{clock(time.time())}  {said}", flush=True)
        before = said
        time.sleep(1)
        try:
            said = line(manager.status())
        except NoAnswer as error:
            said = f"{error}; waiting"


def watch_screen(manager: Manager, status: Status, console: Console) -> None:
    """A frame a second, until q or an interrupt; the last frame stays while the manager is away."""
    past, away, since = Past(), "", 0.0
    with _keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            now = time.time()
            try:
                status = manager.status()
                past = past.and_then(manager.history(past.newest), now)
                if since:
                    away, since = f"the manager was away from {clock(since)} to {clock(now)}", 0.0
            except NoAnswer as error:
                since = since or now
                away = f"{error} since {clock(since)}; waiting …"
            live.update(screen(status, past, away, now, console.size), refresh=True)
            if pressed(1.0) in ("q", "Q"):
                return


@contextlib.contextmanager
def _keys() -> Iterator[Any]:
    """A function that waits so many seconds for a key and returns it, or nothing; keys are not shown meanwhile."""
    if not sys.stdin.isatty():
        yield time.sleep
        return
    door = sys.stdin.fileno()
    before = termios.tcgetattr(door)

    def pressed(seconds: float) -> str:
        ready, _, _ = select.select([door], [], [], seconds)
        return (os.read(door, 1) or b"q").decode(errors="replace") if ready else ""

    try:
        tty.setcbreak(door)
        yield pressed
    finally:
        termios.tcsetattr(door, termios.TCSADRAIN, before)


def _project(text: str) -> str:
    try:
        return str(SETTINGS["project"].parse(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: {SETTINGS['project'].allowed}") from None


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    parser = argparse.ArgumentParser(
        prog="watch.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--watch", action="store_true", help="show it live")
    how.add_argument("--json", action="store_true", help="the manager's /status as it is")
    parser.add_argument("--status", action="store_true", help="say it once; what is done without --watch")
    parser.add_argument("--project", type=_project, default=environ.get(variable("project"), "lbscaler"))
    chosen = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 200)
    try:
        manager = Manager(chosen.project, manager_port(chosen.project, environ))
        status = manager.status()
    except NoAnswer as error:
        print(f"watch.py: {error}", file=sys.stderr)
        return ABSENT
    if chosen.json:
        print(json.dumps(status))
    elif not chosen.watch:
        console.print(once(status))
    elif sys.stdout.isatty():
        watch_screen(manager, status, console)
    else:
        watch_lines(manager, status)
    return WELL if chosen.watch else exit_code(status)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr] # a terminal that has no blocks shows ?
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the terminal is put back as it was
    try:
        sys.exit(main(sys.argv[1:], os.environ))
    except KeyboardInterrupt:
        sys.exit(WELL)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
