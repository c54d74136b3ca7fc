"""When reports are sent and samples are taken. Pure: time is an argument, in seconds on a monotonic clock."""

from __future__ import annotations

import math

SAMPLE_PERIOD = 0.5  # seconds between samples of one kind, while they are cheap
EARLY_GAP = 0.25  # seconds between an early report and the one before it


class ReportSchedule:
    """Regular reports have fixed deadlines. Early reports, after a change of a backend's health, do not move them."""

    def __init__(self, now: float, interval: float) -> None:
        self._due = now + interval
        self._sent = -math.inf

    def until_regular(self, now: float) -> float:
        return max(0.0, self._due - now)

    def early_pause(self, now: float) -> float:
        """Seconds that an early report still has to wait; it does not delay the regular one."""
        return min(max(0.0, self._sent + EARLY_GAP - now), self.until_regular(now))

    def send(self, now: float, interval: float) -> bool:
        """Notes that a report is sent now, and returns whether it is a regular one. The next regular one is due at the
        next deadline in the future."""
        self._sent = now
        if now < self._due:
            return False
        missed = (now - self._due) // interval
        self._due += interval * (1 + missed)
        return True


class Pace:
    """Limits costly samples: at most one in SAMPLE_PERIOD, and at most a given share of one processor's time."""

    def __init__(self) -> None:
        self._due = -math.inf

    def is_due(self, now: float) -> bool:
        return now >= self._due

    def done(self, now: float, cost: float, share: float) -> None:
        """`cost` is in seconds of processor time."""
        # After a sample of 0.4 s with a share of 0.01, the next one is due 40 s later.
        self._due = now + max(SAMPLE_PERIOD, cost / share)
