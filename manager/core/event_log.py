"""The log lines about backends, decisions, the balancer, the engine and the data path: one line for each change."""

from __future__ import annotations

import logging

from core.engine import BalancerState
from core.fleet import FAILED, Backend
from core.launch_backoff import LaunchBackoff
from core.path_check import PathCheck
from core.scaler import OK, Decision, Policy

log = logging.getLogger("manager")


def backend_changed(before: Backend | None, after: Backend | None, now: float) -> None:
    """Logs a change of state; other changes of a backend are not logged."""
    if after is None:
        if before is not None:
            log.info("backend %s %s removed", before.name, before.ip or "-")
        return
    if before is not None and before.state == after.state:
        return
    change = f"{before.state}→{after.state} after {now - before.since:.1f} s" if before else after.state
    reason = f": {after.reason.sentence}" if after.reason else ""
    level = logging.WARNING if after.state == FAILED else logging.INFO
    log.log(level, "backend %s %s %s%s", after.name, after.ip or "-", change, reason)


def decided(decision: Decision, before: Decision | None, paused: bool) -> None:
    """Logs a decision: at INFO if it changes the number of backends or has another reason than `before`, else at
    DEBUG."""
    changes = decision.verdict != OK
    other_reason = before is None or _kinds(before) != _kinds(decision)
    level = logging.INFO if changes or other_reason else logging.DEBUG
    note = "; paused: not carried out" if paused and changes else ""
    change = f"{decision.current}→{decision.desired}"
    log.log(level, "%s %s  %s%s", decision.verdict, change, decision.reason, note)


def _kinds(decision: Decision) -> tuple[str, ...]:
    """The verdict and the limits that applied, without the numbers."""
    return (decision.verdict, *(clamp.kind for clamp in decision.clamps))


def failed(backoff: LaunchBackoff, failures_before: int, given_up: bool, now: float) -> None:
    """Logs what a failure leads to: an update is given up, or a launch waits. The backend has a line of its own."""
    if given_up:
        log.error("update given up, going back: its backends failed: %s", backoff.given_up)
        return
    # Several failures at once may count as one.
    if backoff.failures <= max(1, failures_before):
        return
    if not backoff.delays_launches:
        log.warning("%d failures in a row, the engine starts others: %s", backoff.failures, backoff.why)
    else:
        wait = backoff.wait(now)
        log.warning("%d failures in a row, next launch in %.1f s: %s", backoff.failures, wait, backoff.why)


def number_limited(wanted: int, policy: Policy) -> None:
    log.warning("run.sh asked for %d backends; the limits are min %d and max %d", wanted, policy.min, policy.max)


def rotation_panic(began: bool) -> None:
    if began:
        log.warning("fewer than half of the backends are healthy: all stay in rotation (panic)")
    else:
        log.info("at least half of the backends are healthy again: unhealthy ones leave rotation")


def engine(trouble: str) -> None:
    if trouble:
        log.error("engine unreachable, the fleet stays as it is: %s", trouble)
    else:
        log.info("engine reachable again")


def balancer(state: BalancerState) -> None:
    level = logging.INFO if state is BalancerState.RUNNING else logging.WARNING
    log.log(level, "balancer: %s", state.value)


def path(check: PathCheck) -> None:
    if check.problem:
        log.error("connections through the balancer at %s fail: %s; found: %s", check.target, check.error, check.found)
    else:
        log.info("connections through the balancer work again")
