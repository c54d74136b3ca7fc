"""Runs a recorded or made load through three scaling rules and tells what each would have cost and missed.

    python tests/bench/replay.py TRACE.csv … [--target N] [--plot FILE.html]

A trace is lines of `second,load`: load in units of the metric, for the whole fleet. The rules are

- the course project's: over the target per backend, one more; under half of it, one fewer; every 10 s;
- the Kubernetes HorizontalPodAutoscaler's with its defaults: every 15 s, tolerance 0.1, five minutes' stabilization,
  at most double or + 4;
- ours: the manager's own code.

All start two backends, may go up to fifty, and wait START seconds for a new one.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "manager"))
from core import scaler

START = 1  # seconds from decision to first request served; 0.6 was seen
LEAST, MOST = 2, 50
Rule = Callable[[int, Sequence[float], int], int]  # (second, loads of every second so far, backends) → backends wanted


def read_trace(path: Path) -> list[float]:
    """The load of every second, straight lines between the trace's points. Raises ValueError for what is no trace."""
    points = [(float(second), float(load)) for second, load in csv.reader(path.read_text().splitlines())]
    if len(points) < 2 or any(b[0] <= a[0] for a, b in itertools.pairwise(points)):
        raise ValueError("a trace needs two lines or more, with growing seconds")
    if not all(0 <= load < math.inf for _, load in points):
        raise ValueError("a load is a number from 0 on")
    loads, i = [], 0
    for second in range(math.ceil(points[0][0]), int(points[-1][0])):
        while points[i + 1][0] <= second:
            i += 1
        (a, low), (b, high) = points[i], points[i + 1]
        loads.append(low + (high - low) * (second - a) / (b - a))
    return loads


def mean(loads: Sequence[float], seconds: int) -> float:
    last = loads[-seconds:]
    return sum(last) / len(last)


def course(target: float) -> Rule:
    def rule(second: int, loads: Sequence[float], backends: int) -> int:
        if second % 10:
            return backends
        each = mean(loads, 10) / backends
        return backends + (each > target) - (each < target / 2)

    return rule


def hpa(target: float) -> Rule:
    recommended: list[tuple[int, int]] = []

    def rule(second: int, loads: Sequence[float], backends: int) -> int:
        if second % 15:
            return backends
        ratio = mean(loads, 15) / (backends * target)
        wanted = backends if abs(1 - ratio) <= 0.1 else math.ceil(backends * ratio)
        recommended[:] = [(at, n) for at, n in recommended if at > second - 300] + [(second, wanted)]
        if wanted < backends:
            return min(backends, max(n for _, n in recommended))
        return min(wanted, max(2 * backends, backends + 4))

    return rule


def ours(target: float) -> Rule:
    policy = scaler.Policy(LEAST, MOST, target, "connections")
    memory = scaler.Memory(started=-policy.stable_window)

    def rule(second: int, loads: Sequence[float], backends: int) -> int:
        nonlocal memory
        if second % 2:
            return backends
        decision, memory = scaler.decide(policy, memory, scaler.Load(mean(loads, 2)), backends, float(second))
        return decision.desired

    return rule


class Outcome:
    """What a rule made of a trace: backend-hours paid, seconds with more load than target × ready, changes of size."""

    def __init__(self, rule: Rule, loads: Sequence[float], target: float) -> None:
        backends, ready_at = LEAST, [0] * LEAST
        self.sizes: list[int] = []
        self.over = self.changes = 0
        for second in range(len(loads)):
            ready = sum(at <= second for at in ready_at)
            self.over += loads[second] > ready * target
            self.sizes.append(backends)
            wanted = max(LEAST, min(MOST, rule(second, loads[: second + 1], backends)))
            self.changes += wanted != backends
            ready_at = sorted(ready_at)[:wanted] + [second + 1 + START] * (wanted - backends)
            backends = wanted
        self.hours = sum(self.sizes) / 3600


def compare(loads: Sequence[float], target: float) -> dict[str, Outcome]:
    rules = {"course, ±1": course(target), "HPA": hpa(target), "ours": ours(target)}
    return {name: Outcome(rule, loads, target) for name, rule in rules.items()}


def table(name: str, outcomes: dict[str, Outcome]) -> str:
    lines = [f"{name}", f"  {'rule':12} backend-hours  seconds over  changes"]
    for rule, outcome in outcomes.items():
        lines.append(f"  {rule:12} {outcome.hours:13.2f} {outcome.over:13d} {outcome.changes:8d}")
    return "\n".join(lines)


def plot(path: Path, loads: Sequence[float], outcomes: dict[str, Outcome], target: float) -> None:
    """One page that needs nothing else. Raises ImportError without plotly; the rest is the standard library's."""
    import plotly.graph_objects as go  # noqa: PLC0415 - only who wants a picture needs it

    sizes = {"needed": [load / target for load in loads], **{rule: made.sizes for rule, made in outcomes.items()}}
    chart = go.Figure([go.Scatter(y=size, name=name, mode="lines") for name, size in sizes.items()])
    chart.update_traces(line_color="#bbb", selector={"name": "needed"})
    chart.update_layout(template="plotly_white", xaxis_title="seconds", yaxis_title="backends", hovermode="x unified")
    chart.write_html(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("traces", nargs="+", type=Path, metavar="TRACE.csv")
    parser.add_argument("--target", type=float, default=10, help="load per backend (default: 10, the course project's)")
    parser.add_argument("--plot", type=Path, metavar="FILE.html", help="draw the first trace and the three fleets")
    options = parser.parse_args()
    for trace in options.traces:
        try:
            loads = read_trace(trace)
        except (OSError, ValueError) as error:
            print(f"{trace}: {error}", file=sys.stderr)
            return 2
        outcomes = compare(loads, options.target)
        print(table(trace.stem, outcomes))
        if options.plot and trace == options.traces[0]:
            try:
                plot(options.plot, loads, outcomes, options.target)
            except ImportError:
                print("--plot needs plotly: .venv/bin/python has it", file=sys.stderr)
                return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
