"""The data of the charts: each decision of the last half hour, one point for each minute of the last day, the last
changes, and the backends' shares of the last half hour.

Pure: time is an argument, in seconds since 1970, and never decreases. Memory is bounded, because decisions are at least
3/8 s apart. Points are removed in whole minutes, and `since` returns either one point for a minute or all its
decisions, never both. So no peak is lost between the coarse points and the fine ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from core.scaler import OK, Decision

MINUTE = 60  # seconds
FINE_MINUTES, COARSE_MINUTES = 30, 24 * 60  # minutes with every decision, and with one point each
MAX_CHANGES = 500
SHARE_PERIOD, MAX_SHARES = 10, 180  # seconds between two shares of a backend; how many are kept


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


@dataclass(frozen=True)
class Shares:
    """A backend's shares of the new connections, oldest first. `times` in seconds since 1970."""

    times: list[float]
    shares: list[float]


@dataclass
class History:
    fine: deque[Point] = field(default_factory=deque)
    coarse: deque[Point] = field(default_factory=deque)
    changes: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=MAX_CHANGES))
    # All backends have their shares at the same times. One that came later has only the last of these times.
    share_times: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_SHARES))
    shares: dict[str, deque[float]] = field(default_factory=dict)

    def add(self, point: Point) -> None:
        """Adds the point of a decision, which must not be older than the last one."""
        point = replace(point, time=round(point.time, 3), rate=round(point.rate, 3))
        self.fine.append(point)
        # A coarse point has the time at which its minute begins.
        start = float(point.minute * MINUTE)
        if self.coarse and self.coarse[-1].time == start:
            self.coarse.append(_merged(self.coarse.pop(), point))
        else:
            self.coarse.append(replace(point, time=start))
        while self.coarse[0].minute < point.minute - COARSE_MINUTES:
            self.coarse.popleft()
        while self.fine[0].minute < point.minute - FINE_MINUTES:
            self.fine.popleft()

    def note(self, decision: Decision, time: float) -> None:
        """Records a decision that changes the number of backends; ignores any other."""
        if decision.verdict != OK:
            change = {"verdict": decision.verdict, "current": decision.current, "desired": decision.desired}
            self.changes.append({"time": round(time, 3), **change, "reason": decision.reason})

    def needs_shares(self, time: float) -> bool:
        """Whether this period of SHARE_PERIOD seconds has no shares yet."""
        return not self.share_times or time // SHARE_PERIOD > self.share_times[-1] // SHARE_PERIOD

    def add_shares(self, shares: Mapping[str, float], time: float) -> None:
        """Adds the share of each backend, by its id; those of backends that are no longer there are removed."""
        self.share_times.append(round(time, 3))
        kept = {}
        for id_, share in shares.items():
            kept[id_] = self.shares.get(id_, deque(maxlen=MAX_SHARES))
            kept[id_].append(round(share, 4))
        self.shares = kept

    def shares_of(self, id_: str) -> Shares:
        """The body of GET /shares: empty for a backend that has no share yet."""
        shares = list(self.shares.get(id_, ()))
        return Shares(list(self.share_times)[len(self.share_times) - len(shares) :], shares)

    def since(self, time: float) -> dict[str, list[dict[str, Any]]]:
        """The body of GET /history: the points and changes after `time`, oldest first."""
        # A minute whose decisions are still kept is returned without its coarse point.
        coarse = [point for point in self.coarse if point.minute < self.fine[0].minute]
        points = [*coarse, *self.fine]
        return {
            "points": [vars(point) for point in points if point.time > time],
            "decisions": [change for change in self.changes if change["time"] > time],
        }


def _merged(minute: Point, point: Point) -> Point:
    """The minute's point with one more added: the highest values, because a mean would hide peaks."""
    rate, capacity = max(minute.rate, point.rate), max(minute.capacity, point.capacity)
    return Point(minute.time, rate, capacity, point.backends, point.desired)
