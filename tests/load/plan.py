"""A load's profile, cut into stages of a few seconds and these into runs of hey. Pure.

Ramp, plateau, drop. hey's workers fire in step, so each stage is dealt to several lanes that start a little apart: a
load, not a drumbeat. Every lane has a number of requests rather than a time, for hey's CSV leaves out the requests that
met an error: what was asked for and has no line in it is what got no answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

PEAK_MAX = 2000  # new connections a second
SECONDS_MIN, SECONDS_MAX = 20, 900
RAMP, PLATEAU, DROP = 0.2, 0.2, 0.6  # parts of the whole time
REST = 0.05  # of the peak: where the ramp begins, and the load of the drop
STAGE = 4.0  # seconds, about
MARGIN = 12.0  # seconds in which a shrink can be seen once it is allowed
PACE = 2.0  # requests of one worker a second: one that waits for less than 1/PACE delays nobody
LANE, LANES = 5.0, 16  # requests of one lane a second, about; most lanes of a stage
PATIENCE = 10  # seconds until an answer is given up


@dataclass(frozen=True)
class Stage:
    name: str
    start: float  # seconds since the load began
    seconds: float
    rate: float  # new connections a second

    @property
    def end(self) -> float:
        return self.start + self.seconds


@dataclass(frozen=True)
class Lane:
    """One run of hey: it starts at `at`, and each worker asks `pace` times a second, first after 1/pace seconds."""

    stage: Stage
    at: float
    workers: int
    requests: int
    pace: float


def stages(peak: float, seconds: float) -> list[Stage]:
    rest = max(1.0, peak * REST)
    ramp, plateau, drop = (part * seconds for part in (RAMP, PLATEAU, DROP))
    return [
        *_phase("ramp", 0.0, ramp, rest, peak),
        *_phase("plateau", ramp, plateau, peak, peak),
        *_phase("drop", ramp + plateau, drop, rest, rest),
    ]


def _phase(name: str, start: float, seconds: float, low: float, high: float) -> Iterator[Stage]:
    """Equal stages, each with the rate that the line from low to high has in its middle."""
    count = max(1, round(seconds / STAGE))
    for i in range(count):
        yield Stage(name, start + i * seconds / count, seconds / count, low + (high - low) * (i + 0.5) / count)


def lanes(stage: Stage) -> list[Lane]:
    count = min(LANES, max(1, round(stage.rate / LANE)))
    workers = max(1, round(stage.rate / count / PACE))
    each = max(1, round(stage.rate * stage.seconds / count / workers))
    pace = each / stage.seconds
    return [Lane(stage, stage.start + i / count / pace, workers, workers * each, pace) for i in range(count)]


def offered(stage: Stage) -> float:
    """Requests a second as they are sent: whole requests of whole workers, so a little off the stage's rate."""
    return sum(lane.requests for lane in lanes(stage)) / stage.seconds


def command(lane: Lane, url: str) -> list[str]:
    """Redirects are not followed: no request goes anywhere but to `url`."""
    bounds = ["-n", str(lane.requests), "-c", str(lane.workers), "-q", f"{lane.pace:.4f}", "-t", str(PATIENCE)]
    return ["hey", *bounds, "-disable-keepalive", "-disable-redirects", "-o", "csv", url]


def enough_seconds(windows: float) -> int:
    """How long the whole has to last, within its bounds, for the drop to outlast `windows` seconds: then the fleet may
    shrink."""
    return max(SECONDS_MIN, min(SECONDS_MAX, round((windows + MARGIN) / DROP)))
