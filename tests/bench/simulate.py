"""How many balancers and backends one manager bears: its own code, an engine in memory, a simulated clock.

    python tests/bench/simulate.py [NODESxBACKENDS[xROWS] …]

Every balancer reports ROUNDS times, two simulated seconds apart. Each report is a JSON text that goes the route's way:
parsed, then taken in by a real Controller, whose engine, like Swarm, keeps a number of backends by itself. ROWS is how
many backends one balancer knows, and so the rows of its report; without it all. Every shape runs in its own process, so
that the peak of memory is its own. Times are the processor's, of one thread: the manager's lock lets one report in at a
time.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "manager"))
from core.controller import Controller
from core.engine import Engine, Event
from core.fleet import Container
from core.load import Report
from fakes import Clock, settings
from web import schemas
from web.http_server import BODY_MAX
from web.metrics import Tally

SHAPES = ("3x30", "10x100", "100x2000", "1000x20000x200")
ROUNDS, INTERVAL = 3, 2.0
PACKETS = 190  # of each backend an interval: just under the target, so that nobody is to come or go
COLUMNS = (
    *("nodes", "backends", "rows", "parse ms", "report ms", "decision ms", "step ms", "change ms", "status ms"),
    *("report kB", "view kB", "status kB", "peak MB", "of an interval"),
)


class Still(Engine):
    """Keeps its backends for ever, on a node each; `move` has one of them end, and another there in its place."""

    def __init__(self, backends: int) -> None:
        self.replicas = backends
        self.tasks = [self._task(slot) for slot in range(backends)]

    def _task(self, slot: int, of: str = "t") -> Container:
        id_, ip = f"{of}{slot:024}"[::-1], f"198.{18 + (slot >> 16)}.{slot >> 8 & 255}.{slot & 255}"
        return Container(id_, f"p-backend-{slot}.{of}", ip, "running", spec="image", node=f"{slot % 1000:025}")

    def move(self) -> None:
        self.tasks[0] = self._task(len(self.tasks), "n")

    def list(self) -> list[Container]:
        return list(self.tasks)

    def spec(self) -> str:
        return "image"

    def last_log_line(self, container_id: str) -> str:
        return ""

    def events(self) -> Iterator[Event]:
        return iter(())


class Site:
    """A manager with its engine, and the balancers that report to it. Past 1000 backends it is past its settings."""

    def __init__(self, nodes: int, backends: int, rows: int, place: Path) -> None:
        self.nodes, self.rows = nodes, rows
        self.clock, self.engine = Clock(), Still(backends)
        asked = replace(settings(orchestrator="swarm"), min=1, max=backends, interval=INTERVAL)
        self.controller = Controller(self.engine, asked, place / "ip.txt", Tally(), self.clock)
        self.controller.adopt(None)

    def message(self, node: int, round_: int) -> dict[str, Any]:
        """What balancer `node` has to say: its rows begin elsewhere than its neighbour's; together they cover all."""
        tasks, first = self.engine.tasks, node * len(self.engine.tasks) // self.nodes
        reporters = self.nodes * self.rows / len(tasks)  # of each backend
        packets = round(round_ * PACKETS / reporters)
        rows = [
            {
                **{"id": task.id[:12], "ip": task.ip, "healthy": True, "share": 1 / self.rows},
                **{"connections": packets // 8, "packets": packets, "bytes": 70 * packets, "active": round_ % 3},
            }
            for task in (tasks[(first + i) % len(tasks)] for i in range(self.rows))
        ]
        name = f"{node:012x}"
        return {"balancer": name, "revision": "0123456789ab", "interval": INTERVAL, "backends": rows, "warnings": []}

    def report(self, node: int, round_: int) -> Report:
        return take_in(json.dumps(self.message(node, round_)))


def take_in(text: str) -> Report:
    """As the route does. Raises for what the route would refuse."""
    if len(text) > BODY_MAX:
        raise RequestEntityTooLarge(f"a report of {len(text)} bytes; BODY_MAX is {BODY_MAX}")
    return schemas.decode(text.encode(), schemas.ReportRequest).report()


def answer(body: Any) -> str:
    """As Flask writes it: without a space."""
    return json.dumps(body, separators=(",", ":"), sort_keys=True)


@dataclass
class Times:
    """Milliseconds of every call, by what was called."""

    of: dict[str, list[float]] = field(default_factory=dict)

    def __call__(self, what: str, call: Callable[[], Any]) -> Any:
        began = time.thread_time()
        result = call()
        self.of.setdefault(what, []).append(1000 * (time.thread_time() - began))
        return result

    def mean(self, what: str) -> float:
        return statistics.fmean(self.of.get(what, [float("nan")]))


def hear_all(site: Site, times: Times, round_: int) -> int:
    """One interval's reports, spread over it; a report that brings a decision is told apart. The bytes of the last."""
    controller, text = site.controller, ""
    for node in range(site.nodes):
        site.clock.pass_by(INTERVAL / site.nodes)
        text = json.dumps(site.message(node, round_))
        report = times("parse", lambda: take_in(text))  # noqa: B023 - called at once
        decided, began = len(controller.decisions), time.thread_time()
        controller.report(report)
        took = 1000 * (time.thread_time() - began)
        times.of.setdefault("decision" if len(controller.decisions) > decided else "report", []).append(took)
    return len(text)


def measure(nodes: int, backends: int, rows: int) -> dict[str, float]:
    """A row of the table. The first two rounds, in which all is new, are left out of the means."""
    with tempfile.TemporaryDirectory() as place:
        site = Site(nodes, backends, rows, Path(place))
        for round_ in range(2):
            hear_all(site, Times(), round_)
            site.controller.step()
        times, size = Times(), 0
        for round_ in range(2, 2 + ROUNDS):
            size = hear_all(site, times, round_)
            times("step", site.controller.step)
            status = times("status", lambda: answer(site.controller.status()))
        site.engine.move()
        times("change", site.controller.step)
        view = answer(site.controller.wait_for_snapshot("", 0))
    busy = sum(sum(times.of.get(what, ())) for what in ("parse", "report", "decision")) / ROUNDS
    return {
        **{"nodes": nodes, "backends": backends, "rows": rows},
        **{f"{what} ms": times.mean(what) for what in ("parse", "report", "decision", "step", "change", "status")},
        **{"report kB": size / 1000, "view kB": len(view) / 1000, "status kB": len(status) / 1000},
        "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
        "of an interval": busy / 1000 / INTERVAL,
    }


def shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2g}"


def table(rows: list[dict[str, float]]) -> str:
    def line(cells: Iterable[str]) -> str:
        padded = (cell.rjust(len(column)) for cell, column in zip(cells, COLUMNS, strict=True))
        return f"| {' | '.join(padded)} |"

    return "\n".join([line(COLUMNS), *(line(shown(row[column]) for column in COLUMNS) for row in rows)])


def read_shape(text: str) -> tuple[int, int, int]:
    """Nodes, backends and rows of `text`; raises ValueError for what is no shape, or one that no report can have."""
    nodes, backends, *rows = map(int, text.split("x"))
    shape = nodes, backends, *(rows or [backends])
    if len(shape) != 3 or min(shape) < 1 or not backends <= nodes * shape[2] <= nodes * backends:
        raise ValueError(f"{text}: NODESxBACKENDS[xROWS], and every backend in somebody's rows")
    return shape


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shapes", nargs="*", default=SHAPES, metavar="NODESxBACKENDS[xROWS]", help=" ".join(SHAPES))
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.disable()
    try:
        shapes = [read_shape(text) for text in options.shapes]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.one:
        try:
            print(json.dumps(measure(*shapes[0])))
        except HTTPException as refusal:
            sys.exit(f"{options.shapes[0]}: {refusal.description or refusal.get_response().get_data(as_text=True)}")
        return 0
    rows = []
    for text in options.shapes:
        done = subprocess.run([sys.executable, __file__, "--one", text], stdout=subprocess.PIPE, text=True, check=False)
        rows += [json.loads(done.stdout)] if done.returncode == 0 else []
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
