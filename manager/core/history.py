"""The past that charts show: each decision for half an hour, one point a minute for a day, and the last changes.

Pure: time is an argument, in seconds since 1970, and never goes back. Memory is bounded, for decisions are at least
3/8 s apart. Points are forgotten by whole minutes and a minute is told by its own point or by those of its decisions,
never by both, so that no peak is lost where the coarse past meets the fine.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

from core.scaler import OK, Decision

MINUTE, FINE, COARSE = 60, 30, 24 * 60  # seconds; minutes with every decision; minutes with one point
CHANGES = 500


@dataclass(frozen=True)
class Point:
    """`capacity` is target × the backends that the decision counted; `backends` are those in rotation."""

    time: float
    rate: float
    capacity: float
    backends: int
    desired: int

    @property
    def minute(self) -> int:
        return int(self.time // MINUTE)


@dataclass
class History:
    fine: deque[Point] = field(default_factory=deque)
    coarse: deque[Point] = field(default_factory=deque)
    changes: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=CHANGES))

    def add(self, point: Point) -> None:
        point = replace(point, time=round(point.time, 3), rate=round(point.rate, 3))
        self.fine.append(point)
        start = float(point.minute * MINUTE)
        if self.coarse and self.coarse[-1].time == start:
            self.coarse.append(_together(self.coarse.pop(), point))
        else:
            self.coarse.append(replace(point, time=start))
        while self.coarse[0].minute < point.minute - COARSE:
            self.coarse.popleft()
        while self.fine[0].minute < point.minute - FINE:
            self.fine.popleft()

    def note(self, decision: Decision, time: float) -> None:
        """Keeps a decision that changed something."""
        if decision.verdict != OK:
            told = {name: getattr(decision, name) for name in ("verdict", "current", "desired", "reason")}
            self.changes.append({"time": round(time, 3), **told})

    def since(self, time: float) -> dict[str, list[dict[str, Any]]]:
        """The body of GET /history: what is newer than `time`, oldest first."""
        points = [*(p for p in self.coarse if p.minute < self.fine[0].minute), *self.fine]
        return {
            "points": [vars(point) for point in points if point.time > time],
            "decisions": [change for change in self.changes if change["time"] > time],
        }


def _together(minute: Point, point: Point) -> Point:
    """The minute's point after one more: the peaks, for a mean would hide what a chart is looked at for."""
    peaks = {"rate": max(minute.rate, point.rate), "capacity": max(minute.capacity, point.capacity)}
    return replace(minute, **peaks, backends=point.backends, desired=point.desired)
