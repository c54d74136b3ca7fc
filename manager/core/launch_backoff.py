"""How long to wait before the next launch after failed ones, and when an update is given up. Pure: time and chance are
arguments.

As with Kubernetes' CrashLoopBackOff the wait doubles with every failure, up to MOST. A backend that is killed after it
has served counts too, or one that runs out of memory again and again would never be noticed; only its first failure
costs no wait. Failures are forgotten once the fleet has been at its desired size for SETTLED seconds. An update whose
backends fail GIVE_UP times in a row, before one of them has served for STABLE seconds, is given up.
"""

from __future__ import annotations

from dataclasses import dataclass

FIRST, MOST = 0.5, 30.0  # seconds: the wait after the first failure, and the longest one
STABLE = 10.0  # seconds in rotation after which an update counts as proven
SETTLED = 60.0  # seconds at the desired size after which failures are forgotten
TOGETHER = 1.0  # seconds within which several backends that stop serving count as one failure
GIVE_UP = 2


@dataclass
class LaunchBackoff:
    """`spec` is what to launch. While an update is unproven, `previous` is what to go back to. `refused` is the spec of
    the last update that was given up, and `given_up` says why."""

    spec: str = ""
    previous: str = ""
    failures: int = 0
    update_failures: int = 0  # of the unproven update alone
    retry_at: float = 0.0
    why: str = ""
    failed_at: float = float("-inf")
    given_up: str = ""
    refused: str = ""
    update_failed_at: float = 0.0
    settled_since: float | None = None

    def failed(self, spec: str, why: str, now: float, chance: float, served: bool = False) -> None:
        """A launch of `spec` failed, or a backend made from it did; `served` if that one had been in rotation for a
        while. `chance`, 0 to 1, is the jitter of the wait."""
        together = served and now - self.failed_at < TOGETHER
        self.why = why
        self.failed_at = now
        self.settled_since = None
        if self._gives_up(spec, why, now):
            self.failures, self.retry_at = 0, now
            return
        if now < self.retry_at or together:
            return  # the same event as a failure that was counted already
        self.failures += 1
        wait = min(MOST, FIRST * 2 ** min(self.failures - 1, 10)) * (0.5 + chance)
        self.retry_at = now if served and self.failures == 1 else now + wait

    def _gives_up(self, spec: str, why: str, now: float) -> bool:
        """Counts a failure of the unproven update; whether the update is given up with it. Failures of what is made
        from the old spec do not count: they may be why there is an update."""
        if not self.previous or spec != self.spec:
            return False
        if self.update_failures and now - self.update_failed_at < FIRST:
            return False  # launched together with one that failed just now
        self.update_failures += 1
        self.update_failed_at = now
        if self.update_failures < GIVE_UP:
            return False
        self.refused, self.given_up = spec, why
        self.spec, self.previous = self.previous, ""
        return True

    def explain(self, detail: str) -> None:
        """More about the newest failure."""
        if self.given_up == self.why:
            self.given_up = f"{self.given_up}; {detail}"
        self.why = f"{self.why}; {detail}"

    def mark_stable(self, spec: str, since: float, now: float) -> None:
        """A backend made from `spec` has been in rotation, and ready, since then."""
        if spec == self.spec and now - since > STABLE:
            self.previous = ""

    def settle(self, at_desired_size: bool, now: float) -> None:
        """To be called at every pass: whether as many backends serve as are desired."""
        if not at_desired_size:
            self.settled_since = None
        elif self.settled_since is None:
            self.settled_since = now
        elif now - self.settled_since >= SETTLED:
            self.failures, self.why, self.retry_at = 0, "", 0.0

    def wait(self, now: float) -> float:
        """Seconds until the next launch may be tried."""
        return max(0.0, self.retry_at - now) if self.failures else 0.0
