"""How long to wait before the next launch after failures, and when to give up an update. Pure: time and chance are
arguments.

As with Kubernetes' CrashLoopBackOff, the wait doubles with every failure. A backend that fails after it has served
counts, too; otherwise one that runs out of memory again and again would never be noticed. If it is the first failure,
there is no wait. Failures are forgotten once the fleet has been at its desired size for FORGET_AFTER seconds.

An update is given up after MAX_UPDATE_FAILURES failures of its backends, unless one of them has been healthy and in
rotation for more than STABLE seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from core.reasons import NO_REASON, Reason

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds
STABLE = 10.0  # seconds in rotation after which an update counts as proven
FORGET_AFTER = 60.0  # seconds at the desired size after which failures are forgotten
TOGETHER = 1.0  # seconds within which several backends that stop serving count as one failure
MAX_UPDATE_FAILURES = 2


@dataclass
class LaunchBackoff:
    """`spec` is what to launch. While an update is unproven, `previous` is the spec to go back to. `refused` is the
    spec of the last update that was given up, and `refusal` the reason."""

    spec: str = ""
    previous: str = ""
    failures: int = 0
    update_failures: int = 0  # of the unproven update alone
    update_failed_at: float = 0.0
    retry_at: float = 0.0
    reason: Reason = NO_REASON  # of the newest failure
    failed_at: float = float("-inf")
    refused: str = ""
    refusal: Reason = NO_REASON
    at_desired_size_since: float | None = None
    delays_launches: bool = True  # not if the engine launches backends on its own

    @property
    def why(self) -> str:
        """The newest failure, for people."""
        return self.reason.sentence

    @property
    def given_up(self) -> str:
        """Why the last update was given up, for people."""
        return self.refusal.sentence

    def failed(self, spec: str, reason: Reason, now: float, chance: float, served: bool = False) -> None:
        """A launch of `spec` failed, or a backend made from it did. `served`: it had been in rotation for STABLE
        seconds. `chance`, 0 to 1, sets the jitter: 0.5 to 1.5 times the wait."""
        together = served and now - self.failed_at < TOGETHER
        self.reason, self.failed_at, self.at_desired_size_since = reason, now, None
        if self._gives_up(spec, now):
            self.failures, self.retry_at = 0, now
            return
        if now < self.retry_at or together:
            return  # the same event as a failure that was counted already
        self.failures += 1
        doubled = FIRST_WAIT * 2 ** min(self.failures - 1, 10)  # the exponent is limited: a float would overflow
        # With jitter, several managers on one engine do not retry at the same moments.
        wait = min(LONGEST_WAIT, doubled) * (0.5 + chance)
        self.retry_at = now if served and self.failures == 1 else now + wait

    def _gives_up(self, spec: str, now: float) -> bool:
        """Counts a failure of the unproven update. Returns whether the update is now given up."""
        # Failures of the old spec do not count: they may be the reason for the update.
        if not self.previous or spec != self.spec:
            return False
        # Backends that are launched together often fail together. That counts as one failure.
        launched_together = bool(self.update_failures) and now - self.update_failed_at < FIRST_WAIT
        if launched_together:
            return False
        self.update_failures += 1
        self.update_failed_at = now
        if self.update_failures < MAX_UPDATE_FAILURES:
            return False
        self.refused, self.refusal = spec, self.reason
        self.spec, self.previous = self.previous, ""
        return True

    def explain(self, last_log_line: str) -> None:
        """Adds the failed backend's last log line to the newest failure, unless that has been forgotten."""
        if self.reason == NO_REASON:
            return
        explained = replace(self.reason, last_log_line=last_log_line)
        if self.refusal == self.reason:
            self.refusal = explained
        self.reason = explained

    def mark_stable(self, spec: str, since: float, now: float) -> None:
        """Takes note that a backend made from `spec` has been healthy and in rotation since `since`: after STABLE
        seconds the update is proven."""
        if spec == self.spec and now - since > STABLE:
            self.previous = ""

    def settle(self, at_desired_size: bool, now: float) -> None:
        """Called at every pass. `at_desired_size`: whether the desired number of backends serves."""
        if not at_desired_size:
            self.at_desired_size_since = None
        elif self.at_desired_size_since is None:
            self.at_desired_size_since = now
        elif now - self.at_desired_size_since >= FORGET_AFTER:
            self.failures, self.reason, self.retry_at = 0, NO_REASON, 0.0

    def wait(self, now: float) -> float:
        """Seconds until the next launch may be tried."""
        return max(0.0, self.retry_at - now) if self.failures and self.delays_launches else 0.0
