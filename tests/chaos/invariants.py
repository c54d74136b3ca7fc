"""What has to be true of the system from outside. Pure: each function takes what was seen and returns what is wrong.

A violation is one sentence. `unsettled` may be violated for a bounded time after a fault; everything else never.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise

from chaos.observe import Observation, Process

LEAST_SHARE = 0.25  # of 1/n: the product keeps each share within a quarter and four times that
DEVIATIONS = 4.0  # standard deviations of a random choice that count as chance
LASTING_PROBLEMS = {"launches_fail"}  # reported until the fleet has been complete for a minute
ENOUGH = 8  # expected answers: below, none at all may be chance
FILES_MORE, MEMORY_MORE = 24, 16 * 2**20  # file descriptors, bytes: what a process may grow by
YOUNG = 60.0  # seconds after which a process has everything that it needs


def unsettled(seen: Observation, desired: int) -> list[str]:
    """Fleet = desired, without orphans and doubles; rules = fleet; one manager and one supervisor; no problem."""
    return [*_processes(seen), *_fleet(seen, desired), *_rules(seen), *_status(seen, desired)]


def _processes(seen: Observation) -> list[str]:
    found = []
    if seen.managers != 1:
        found.append(f"{seen.managers} managers run")
    if seen.supervisors != 1:
        found.append(f"{seen.supervisors} supervisors run")
    return found


def _fleet(seen: Observation, desired: int) -> list[str]:
    found = []
    running = [one for one in seen.backends if one.running]
    if len(running) != desired:
        found.append(f"{len(running)} backends run, {desired} are wanted")
    ended = [one.name for one in seen.backends if not one.running]
    if ended:
        found.append(f"containers of backends that do not run: {', '.join(ended)}")
    balancers = [one for one in seen.containers if one.role == "balancer"]
    if len(balancers) != 1 or not balancers[0].running:
        found.append(f"{len(balancers)} containers of the balancer, or it does not run")
    addresses = [one.ip for one in seen.backends]
    if len(set(addresses)) != len(addresses) or "" in addresses:
        found.append(f"addresses of backends: {addresses}")
    return found


def _rules(seen: Observation) -> list[str]:
    fleet = {one.ip for one in seen.backends}
    found = []
    for what, addresses in (
        ("DNAT rules", set(seen.connections)),
        ("dispatch", seen.dispatched),
        ("the set of backends", seen.members),
    ):
        if addresses != fleet:
            found.append(f"{what}: {sorted(addresses)}, the fleet: {sorted(fleet)}")
    return found


def _status(seen: Observation, desired: int) -> list[str]:
    if not seen.status:
        return ["the manager does not answer"]
    rows = seen.status["backends"]
    found = []
    if seen.status["desired"] != desired:
        found.append(f"the manager wants {seen.status['desired']} backends instead of {desired}")
    if {row["name"] for row in rows} != {one.name for one in seen.backends}:
        found.append("the manager's backends are not those of the engine")
    not_serving = [row["name"] for row in rows if row["state"] != "active" or row["healthy"] is not True]
    if not_serving:
        found.append(f"not active and healthy: {', '.join(not_serving)}")
    problems = [problem for problem in seen.status["problems"] if problem["kind"] not in LASTING_PROBLEMS]
    return found + [f"the manager reports: {problem['text']}" for problem in problems]


def changed_foreign(before: Sequence[str], after: Sequence[str]) -> list[str]:
    """What others have, compared with the start."""
    lost = [f"lost of others: {line}" for line in before if line not in after]
    return lost + [f"new among others: {line}" for line in after if line not in before]


def fallen_counters(before: Observation, after: Observation, reset: bool) -> list[str]:
    """Counters of the same container and the same balancer, unless `reset`: a fault had deleted its rule."""
    if reset or before.balancer != after.balancer:
        return []
    found = []
    for name, read in (("rules", _rule_counters), ("/status", _status_counters)):
        earlier, later = read(before), read(after)
        for container, value in earlier.items():
            if later.get(container, value) < value:
                found.append(f"{name}: connections of {container[:12]} fell from {value:g} to {later[container]:g}")
    return found


def _rule_counters(seen: Observation) -> dict[str, float]:
    return {one.id: float(seen.connections[one.ip]) for one in seen.backends if one.ip in seen.connections}


def _status_counters(seen: Observation) -> dict[str, float]:
    ids = {one.name: one.id for one in seen.backends}
    rows = seen.status.get("backends", [])
    return {ids[row["name"]]: float(row["connections"]) for row in rows if row["name"] in ids}


def unfair_shares(answers: Mapping[str, int], healthy: Collection[str]) -> list[str]:
    """`answers`: new connections that each backend answered while all in `healthy` were in rotation."""
    total = sum(answers.values())
    least = LEAST_SHARE / max(1, len(healthy))
    expected = total * least
    bound = expected - DEVIATIONS * math.sqrt(expected * (1 - least))
    found = []
    for name in sorted(healthy):
        if answers.get(name, 0) < max(1.0, bound) and expected >= ENOUGH:
            found.append(f"{name} answered {answers.get(name, 0)} of {total}, at least {bound:.0f} were expected")
    return found


def growth(samples: Sequence[tuple[float, Process]]) -> list[str]:
    """`samples`: (time, process) in order. The first minute of a process does not count: it still fills its caches."""
    found = []
    by_process: dict[str, list[tuple[float, Process]]] = {}
    for at, process in samples:
        by_process.setdefault(f"{process.role} {process.identity}", []).append((at, process))
    for name, seen in by_process.items():
        old = [process for at, process in seen if at >= seen[0][0] + YOUNG]
        if len(old) < 2:
            continue
        files, memory = old[-1].files - old[0].files, old[-1].memory - old[0].memory
        if files > FILES_MORE:
            found.append(f"{name}: {files} more file descriptors")
        if memory > MEMORY_MORE:
            found.append(f"{name}: {memory / 2**20:.0f} MB more")
    return found


def changes_of_direction(desired: Sequence[int]) -> int:
    """How often the number of backends turned from growing to shrinking, or back."""
    steps = [later - earlier for earlier, later in pairwise(desired) if later != earlier]
    return sum(one * other < 0 for one, other in pairwise(steps))
