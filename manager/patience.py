"""How long to wait with the next launch after launches that came to nothing, and when to give an update up. Pure: time
and chance are arguments.

As Kubernetes' CrashLoopBackOff: the wait doubles with every failure, up to MOST, and a backend that has lived STEADY
seconds in rotation ends it. An update whose backends never get ready GIVE_UP times in a row goes back by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

FIRST, MOST = 0.5, 30.0  # seconds
STEADY = 10.0  # seconds
GIVE_UP = 2


@dataclass
class Patience:
    """`spec` is what to launch; `previous`, while an update is unproven, what to go back to."""

    spec: str = ""
    previous: str = ""
    failures: int = 0
    retry_at: float = 0.0
    why: str = ""
    failed_at: float = 0.0
    given_up: str = ""  # why the last update was undone

    def failed(self, spec: str, why: str, now: float, chance: float) -> None:
        """A launch of `spec` came to nothing, or what it launched ended at once. `chance`, in 0…1, is the jitter."""
        self.why = why
        self.failed_at = now
        if now < self.retry_at:
            return  # launched together with one that failed already: the same piece of bad luck
        self.failures += 1
        self.retry_at = now + min(MOST, FIRST * 2 ** min(self.failures - 1, 10)) * (0.5 + chance)
        if self.previous and spec == self.spec and self.failures >= GIVE_UP:
            self.spec, self.previous, self.given_up = self.previous, "", why
            self.failures, self.retry_at = 0, now

    def lives(self, spec: str, since: float, now: float) -> None:
        """A backend made from `spec` has been in rotation, and ready, since then."""
        if now - since <= STEADY:
            return
        if spec == self.spec:
            self.previous = ""
        if since >= self.failed_at:  # older ones say nothing of what is launched now
            self.failures, self.why, self.retry_at = 0, "", 0.0

    def wait(self, now: float) -> float:
        """Seconds until the next launch may be tried."""
        return max(0.0, self.retry_at - now) if self.failures else 0.0
