"""Keeps the balancer running: repairs it when, according to the engine's list, it does not run, and when the test of
the data path shows a problem that a new balancer fixes.

Docker's restart policy covers a crash of the balancer, but not `docker kill`, `stop` or `rm`. If a repair fails, or the
balancer ends again soon after it, the next repair waits longer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from core import event_log
from core.engine import BalancerState
from core.launch_backoff import STABLE, LaunchBackoff
from core.load import Finding
from core.path_check import PathCheck
from core.reasons import Cause, Reason
from core.workers import BALANCER, Workers

NEVER = float("-inf")

log = logging.getLogger("manager")


class BalancerKeeper:
    """All calls are made with the controller's lock held. `chance` returns a number from 0 to 1."""

    def __init__(self, workers: Workers, chance: Callable[[], float], *, on_host: bool = False) -> None:
        self.state = BalancerState.RUNNING
        self.path = PathCheck(on_host)
        self._workers, self._chance = workers, chance
        self._backoff = LaunchBackoff()
        self._repaired_at = NEVER

    @property
    def running(self) -> bool:
        return self.state is BalancerState.RUNNING

    def keep(self, listed: BalancerState, now: float) -> None:
        """Repairs the balancer unless it is running according to the engine's list."""
        runs = listed is BalancerState.RUNNING
        being_repaired = BALANCER in self._workers.busy
        # During a repair, the list shows intermediate states.
        if listed != self.state and (runs or not being_repaired):
            event_log.balancer(listed)
            self.state = listed
        self._backoff.settle(runs, now)
        if not runs:
            self._repair(now)

    def _repair(self, now: float) -> None:
        if BALANCER in self._workers.busy or self._backoff.wait(now):
            return
        if now - self._repaired_at < STABLE:
            # The balancer ended soon after the last repair. That is one failure.
            self._failed(Reason(Cause.BALANCER_ENDED), now)
            if self._backoff.wait(now):
                return
        self._repaired_at = now
        self._workers.repair_balancer()

    def repaired(self, problem: str, now: float) -> None:
        """A repair has ended, with the engine's error if it failed."""
        if problem:
            log.error("the balancer cannot be started: %s", problem)
            self._failed(Reason(Cause.LAUNCH_ERROR, detail=problem), now)

    def _failed(self, reason: Reason, now: float) -> None:
        self._repaired_at = NEVER
        self._backoff.failed("", reason, now, self._chance())

    def path_tested(self, errors: Mapping[str, str], findings: Sequence[Finding], now: float) -> None:
        """Takes the result of a test of the data path. `errors`: the error of each target, empty if it worked."""
        was_broken = bool(self.path.problem)
        self.path.take_result(errors, findings)
        if bool(self.path.problem) != was_broken:
            event_log.path(self.path)
        # A repair interrupts the service, so it is tried only if a new balancer fixes the problem.
        if self.path.repairable(findings):
            self._repair(now)

    def status(self) -> dict[str, str]:
        """For /status: `running`; `starting` during the first repair; `failed` with the problem after a failure."""
        if self.running:
            return {"state": "running", "problem": ""}
        return {"state": "failed" if self._backoff.reason else "starting", "problem": self._backoff.why}
