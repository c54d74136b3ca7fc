"""A long load without faults, steady or in waves: nothing grows, the number of backends does not flap, shares stay.

The functions that judge are pure.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from chaos.allowances import Request
from chaos.invariants import changed_foreign, changes_of_direction, unsettled
from chaos.rounds import Scene

STEADY, WAVE = "steady", "wave"
LOADS = (STEADY, WAVE)
WAVES = 3  # in the whole time
# About four backends at the mean of the load, two and six at its ends. The windows are the product's defaults.
FOLLOWING = ("--metric", "connections", "--target", "12", "--min", "2", "--stable-window", "60", "--panic-window", "6")
EVERY = 10.0  # seconds between observations
LONGEST_CHANGE = 60.0  # seconds in a row without all invariants: a drain, and a launch
DEVIATIONS = 5.0  # standard deviations of a share that count as chance
PART = 60.0  # seconds over which shares are compared


@dataclass(frozen=True)
class Watched:
    """One observation of a soak."""

    at: float
    desired: int
    violated: tuple[str, ...]


def watch(scene: Scene, seconds: float) -> list[Watched]:
    deadline = time.monotonic() + seconds
    watched = []
    while time.monotonic() < deadline:
        seen = scene.complete()
        desired = seen.status.get("desired", 0)
        violated = [*unsettled(seen, desired), *changed_foreign(scene.foreign, seen.foreign)]
        watched.append(Watched(seen.at, desired, tuple(violated)))
        time.sleep(EVERY)
    return watched


def unsettled_for_long(watched: Sequence[Watched]) -> list[str]:
    """What was violated for longer than a change of the number takes."""
    found = []
    since = watched[0].at if watched else 0.0
    for one in watched:
        if not one.violated:
            since = one.at
        elif one.at - since > LONGEST_CHANGE:
            found += [f"for {one.at - since:.0f} s: {sentence}" for sentence in one.violated]
            since = one.at
    return found


def flapping(watched: Sequence[Watched], kind: str) -> list[str]:
    """A steady load turns the number at most once, at its beginning; a wave twice."""
    turns = changes_of_direction([one.desired for one in watched])
    most = 2 * WAVES + 1 if kind == WAVE else 1
    return [f"the number of backends turned {turns} times, at most {most} were expected"] if turns > most else []


def drifting(requests: Sequence[Request], began: float, ended: float) -> list[str]:
    """Of a steady load: backends whose share of a minute's new connections is not 1/n, within chance."""
    found = []
    for number in range(1, int((ended - began) // PART)):  # not the first minute, in which the number settles
        start = began + number * PART
        answers = Counter(
            r.backend for r in requests if r.kind == "new" and r.backend and start <= r.start < start + PART
        )
        found += [f"minute {number + 1}: {sentence}" for sentence in uneven(answers)]
    return found


def uneven(answers: Mapping[str, int]) -> list[str]:
    total, count = sum(answers.values()), max(1, len(answers))
    bound = DEVIATIONS * math.sqrt(total / count * (1 - 1 / count))
    found = []
    for name, number in sorted(answers.items()):
        if abs(number - total / count) > bound:
            found.append(f"{name} answered {number} of {total}; {total / count:.0f} ± {bound:.0f} were expected")
    return found


def judge(watched: Sequence[Watched], requests: Sequence[Request], kind: str) -> list[str]:
    found = [*unsettled_for_long(watched), *flapping(watched, kind)]
    if kind == STEADY and watched:
        found += drifting(requests, watched[0].at, watched[-1].at)
    return found


def most_and_least(watched: Sequence[Watched]) -> tuple[int, int]:
    numbers = [one.desired for one in watched]
    return min(numbers, default=0), max(numbers, default=0)
