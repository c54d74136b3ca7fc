"""When the balancer's threads do their work. Pure: time is an argument, in seconds on a monotonic clock."""

from __future__ import annotations

import math

EARLY_GAP = 0.25  # seconds between an early report and the one before it


class ReportSchedule:
    """Regular reports have fixed deadlines, which early ones (a backend's health changed) neither move nor replace."""

    def __init__(self, now: float, interval: float) -> None:
        self._due = now + interval
        self._sent = -math.inf

    def until_regular(self, now: float) -> float:
        return max(0.0, self._due - now)

    def early_pause(self, now: float) -> float:
        """How long an early report still has to wait; the regular one is not delayed by it."""
        return min(max(0.0, self._sent + EARLY_GAP - now), self.until_regular(now))

    def send(self, now: float, interval: float) -> bool:
        """Notes that a report is sent now, and says whether it is a regular one. Deadlines missed are skipped."""
        self._sent = now
        if now < self._due:
            return False
        self._due = max(self._due + interval, now)
        return True


class Pace:
    """Limits how often something costly is done: at most every `period` seconds, for at most a share of the time."""

    def __init__(self, period: float) -> None:
        self._period = period
        self._due = -math.inf

    def is_due(self, now: float) -> bool:
        return now >= self._due

    def done(self, began: float, now: float, share: float) -> None:
        self._due = now + max(self._period, (now - began) / share)
