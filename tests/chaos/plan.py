"""What is injected, in which order: a list that follows from the seed and the minutes alone. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from chaos.fault import Fault

PAIRS = 0.4  # of the rounds that can have two faults
LARGEST = 0.3  # of the whole time: a fault that takes more is left out
GAP = 0.2, 1.5  # seconds between the two faults of a pair


@dataclass(frozen=True)
class Round:
    faults: tuple[str, ...]
    gap: float  # seconds
    seed: int  # of the choices within the round: the victims, and others


def plan(seed: int, minutes: float, faults: Sequence[Fault]) -> list[Round]:
    """Every fault once in random order before any comes again, for as long as their budgets fit into the minutes."""
    chance = random.Random(seed)
    left, rounds = minutes * 60, []
    usable = [fault for fault in faults if fault.budget <= LARGEST * minutes * 60]
    waiting: list[Fault] = []
    while usable:
        if not waiting:
            waiting = chance.sample(usable, len(usable))
        first = waiting.pop(0)
        chosen = [first, *_second(first, waiting, chance)]
        left -= max(fault.budget for fault in chosen) + (4 if len(chosen) > 1 else 0)
        if left < 0:
            break
        rounds.append(Round(tuple(f.name for f in chosen), chance.uniform(*GAP), chance.randrange(2**32)))
    return rounds


def _second(first: Fault, waiting: list[Fault], chance: random.Random) -> list[Fault]:
    """Sometimes another fault, of another group, that is taken from `waiting`."""
    if first.alone or chance.random() >= PAIRS:
        return []
    others = [fault for fault in waiting if not fault.alone and fault.group != first.group]
    if not others:
        return []
    second = chance.choice(others)
    waiting.remove(second)
    return [second]
