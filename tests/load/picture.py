"""What a load met, second by second, and the picture and the sentence made of it. No input, no output, no clock.

A request counts in the second in which it was sent, so that answered and failed make up what was offered.
"""

from __future__ import annotations

import csv
import html
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import plotly.graph_objects as go
from load.plan import PATIENCE, Stage, offered
from plotly.subplots import make_subplots

NO_ANSWER = f"no answer (refused, reset, or not within {PATIENCE} s)"
ROWS = ("requests a second", "backends", "latency, ms", "failed a second")
QUANTILES = {"median": 0.5, "95 %": 0.95, "99 %": 0.99}


class Answer(NamedTuple):
    at: float  # seconds since the load began
    took: float  # seconds
    status: int


class Sample(NamedTuple):
    """The manager's /status at one time."""

    at: float
    active: int
    desired: int
    rate: float  # of the manager's metric


class Second(NamedTuple):
    at: int
    offered: float
    answered: int
    took: list[float]  # seconds, sorted
    failed: Counter[str]


def answers(text: str, began: float) -> list[Answer]:
    """hey's CSV; `began` is when that hey did. Requests that met an error are not in it."""
    rows = csv.DictReader(text.splitlines())
    return [Answer(began + float(row["offset"]), float(row["response-time"]), int(row["status-code"])) for row in rows]


@dataclass
class Tally:
    took: dict[int, list[float]] = field(default_factory=dict)  # by second
    failed: dict[int, Counter[str]] = field(default_factory=dict)
    ordered: list[float] = field(default_factory=list)  # of all that were answered well

    def add(self, found: Iterable[Answer]) -> None:
        for answer in found:
            if answer.status < 400:
                self.took.setdefault(int(answer.at), []).append(answer.took)
                self.ordered.append(answer.took)
            else:
                self.fail(answer.at, f"status {answer.status}", 1)
        self.ordered.sort()  # cheap: most of it is in order already

    def fail(self, at: float, kind: str, number: int) -> None:
        if number:
            self.failed.setdefault(int(at), Counter())[kind] += number

    def failures(self) -> Counter[str]:
        return sum(self.failed.values(), Counter())

    def seconds(self, stages: Sequence[Stage]) -> list[Second]:
        """From the first to the last second in which there was anything."""
        last = max([-1, *self.took, *self.failed])
        return [
            Second(
                at,
                next((offered(stage) for stage in stages if stage.start <= at + 0.5 < stage.end), 0.0),
                len(self.took.get(at, [])),
                sorted(self.took.get(at, [])),
                self.failed.get(at, Counter()),
            )
            for at in range(last + 1)
        ]


def quantile(ordered: Sequence[float], part: float) -> float | None:
    """The nearest rank; None of nothing."""
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)] if ordered else None


def milliseconds(ordered: Sequence[float], part: float) -> str:
    value = quantile(ordered, part)
    return "-" if value is None else f"{1000 * value:.0f} ms"


def summary(tally: Tally, samples: Sequence[Sample], stages: Sequence[Stage]) -> str:
    """One line."""
    failures = tally.failures()
    kinds = ", ".join(f"{number} {kind}" for kind, number in failures.most_common())
    parts = [
        f"{len(tally.ordered) + failures.total()} requests, {failures.total()} failed"
        + (f": {kinds}" if kinds else ""),
        "p50/p95/p99 " + "/".join(milliseconds(tally.ordered, part) for part in QUANTILES.values()),
    ]
    if samples:
        peak = max(sample.active for sample in samples)
        parts.append(f"fleet {samples[0].active}→{samples[-1].active}, {peak} at its peak")
        parts.append(_growth(samples, stages))
    return "; ".join(parts)


def _growth(samples: Sequence[Sample], stages: Sequence[Stage]) -> str:
    """How long it took until there were as many as ramp and plateau came to want."""
    ramp, loaded = (max(s.end for s in stages if s.name == name) for name in ("ramp", "plateau"))
    wanted = max((sample.desired for sample in samples if sample.at <= loaded), default=0)
    if wanted <= samples[0].active:
        return "no more were wanted"
    enough = next((sample.at for sample in samples if sample.active >= wanted), None)
    if enough is None:
        return f"the {wanted} that were wanted never were active"
    return f"enough backends ({wanted}) {enough:.0f} s after the ramp of {ramp:.0f} s began"


def figure(
    title: str,
    seconds: Sequence[Second],
    samples: Sequence[Sample],
    decisions: Sequence[dict[str, Any]],
    stages: Sequence[Stage],
) -> go.Figure:
    """Four charts over one time. `decisions` are those of /history, their `time` in seconds since the load began."""
    drawn = make_subplots(rows=len(ROWS), shared_xaxes=True, vertical_spacing=0.04, row_heights=[3, 3, 3, 2])
    at = [second.at for second in seconds]
    _line(drawn, 1, "offered", at, [s.offered for s in seconds], "#999", shape="hv", dash="dot")
    _line(drawn, 1, "answered", at, [s.answered for s in seconds], "#2a6fbb")
    when = [sample.at for sample in samples]
    _line(drawn, 2, "desired", when, [s.desired for s in samples], "#e08214", shape="hv", dash="dot")
    _line(drawn, 2, "active", when, [s.active for s in samples], "#1b7837", shape="hv")
    for (name, part), colour in zip(QUANTILES.items(), ("#9ecae1", "#4292c6", "#084594"), strict=True):
        values = [quantile(s.took, part) for s in seconds]
        _line(drawn, 3, name, at, [None if v is None else round(1000 * v, 1) for v in values], colour)
    for kind in sorted({kind for second in seconds for kind in second.failed}):
        drawn.add_bar(x=at, y=[s.failed[kind] for s in seconds], name=kind, marker_color="#c0392b", row=4, col=1)
    _mark_decisions(drawn, decisions)
    _mark_phases(drawn, stages)
    for row, name in enumerate(ROWS, 1):
        drawn.update_yaxes(title_text=name, rangemode="tozero", row=row, col=1)
    drawn.update_xaxes(title_text="seconds", row=len(ROWS), col=1)
    heading = {"text": html.escape(title), "font": {"size": 14}}
    drawn.update_layout(title=heading, height=900, template="plotly_white", barmode="stack", legend_traceorder="normal")
    return drawn


def _line(
    drawn: go.Figure,
    row: int,
    name: str,
    x: Sequence[float],
    y: Sequence[float | None],
    colour: str,
    shape: str = "linear",
    dash: str = "solid",
) -> None:
    line = {"color": colour, "shape": shape, "dash": dash}
    drawn.add_scatter(x=x, y=y, name=name, mode="lines", line=line, row=row, col=1)


def _mark_decisions(drawn: go.Figure, decisions: Sequence[dict[str, Any]]) -> None:
    """A triangle where the fleet's size was decided, its sentence on hover, and a thin line through all charts."""
    if not decisions:
        return
    up = [decision["desired"] > decision["current"] for decision in decisions]
    drawn.add_scatter(
        x=[decision["time"] for decision in decisions],
        y=[decision["desired"] for decision in decisions],
        name="decisions",
        mode="markers",
        marker={
            "symbol": ["triangle-up" if grows else "triangle-down" for grows in up],
            "color": ["#1b7837" if grows else "#762a83" for grows in up],
            "size": 12,
        },
        hovertext=[_sentence(decision) for decision in decisions],
        hoverinfo="text",
        row=2,
        col=1,
    )
    for decision in decisions:
        drawn.add_vline(x=decision["time"], line_width=1, line_dash="dot", line_color="#bbb")


def _sentence(decision: dict[str, Any]) -> str:
    text = f"{decision['verdict']} {decision['current']}→{decision['desired']}: {decision['reason']}"
    return ";<br>".join(html.escape(part) for part in text.split("; "))


def _mark_phases(drawn: go.Figure, stages: Sequence[Stage]) -> None:
    for name, group in groupby(stages, key=lambda stage: stage.name):
        phase = list(group)
        drawn.add_vrect(
            x0=phase[0].start,
            x1=phase[-1].end,
            fillcolor="#2a6fbb" if name == "plateau" else "#fff",
            opacity=0.06,
            line_width=0,
        )
        middle = (phase[0].start + phase[-1].end) / 2
        drawn.add_annotation(x=middle, y=1, xref="x", yref="paper", yanchor="bottom", text=name, showarrow=False)
