"""Carries out one round of the plan: injects, undoes, and waits until all invariants hold again."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from chaos.allowances import Event, Request
from chaos.fault import Fault, Injected, Stage
from chaos.invariants import changed_foreign, fallen_counters, unfair_shares, unsettled
from chaos.observe import Observation, observe
from chaos.plan import Round
from chaos.product import BACKENDS, Product
from chaos.site import Site
from chaos.verdict import Done

POLL = 0.5  # seconds between observations


@dataclass
class Running:
    """A fault in progress."""

    fault: Fault
    injected: Injected
    begun: float
    done: float
    addresses: set[str]  # of the victims
    ids: set[str]  # of the victims that have to be replaced
    out: float = 0.0
    undone: float = 0.0


@dataclass
class Scene:
    """The system and what others have on the host: how a round looks at them."""

    site: Site
    product: Product
    foreign: Sequence[str]
    seen: list[Observation] = field(default_factory=list)  # the complete ones
    quiet = 4.0  # seconds after a round, in which every backend has to get its share

    def stage(self, chance: random.Random) -> Stage:
        return Stage(self.site, self.product, chance)

    def look(self, others: bool = False) -> Observation:
        return observe(self.product, others)

    def complete(self) -> Observation:
        self.seen.append(self.look(others=True))
        return self.seen[-1]

    def violated(self, seen: Observation) -> list[str]:
        """What has to hold again after a fault, and does not."""
        unanswered = [] if self._serves() else ["a client outside is not answered at once"]
        return unsettled(seen, BACKENDS) + unanswered

    def _serves(self) -> bool:
        return all(self.product.serves() for _ in range(BACKENDS))

    def fallen(self, before: Observation, after: Observation, resets: bool) -> list[str]:
        return fallen_counters(before, after, resets)

    def unfair(self, before: Observation, after: Observation, requests: Sequence[Request]) -> list[str]:
        return shares(before, after, requests)


def carry_out(scene: Scene, wanted: Round, faults: dict[str, Fault]) -> Done:
    before = scene.complete()
    running = _inject(scene, wanted, faults, before)
    violations = _recover(scene, running)[1] if any(one.injected.settles for one in running) else []
    _hold_and_undo(scene, running)
    settled, late = _recover(scene, running)
    violations += late
    after = scene.complete()
    resets = any(one.fault.resets for one in running)
    violations += scene.fallen(before, after, resets)
    violations += changed_foreign(scene.foreign, after.foreign)
    name = " + ".join(one.fault.name for one in running)
    events = tuple(_event(one, settled) for one in running)
    return Done(events, tuple(f"{name}: {sentence}" for sentence in violations))


def _inject(scene: Scene, wanted: Round, faults: dict[str, Fault], before: Observation) -> list[Running]:
    stage = scene.stage(random.Random(wanted.seed))
    known = {one.name: one for one in before.backends}
    running: list[Running] = []
    for name in wanted.faults:
        if running:
            time.sleep(wanted.gap)
        begun = time.monotonic()
        injected = faults[name].inject(stage)
        victims = [known[victim] for victim in injected.victims if victim in known]
        ids = {one.id for one in victims} if faults[name].replaced else set()
        running.append(Running(faults[name], injected, begun, time.monotonic(), {one.ip for one in victims}, ids))
    return running


def _hold_and_undo(scene: Scene, running: list[Running]) -> None:
    """Undoes each fault after its own time, the last one first."""
    held = list(reversed(running))
    while held:
        _note(running, scene.look())
        for one in [one for one in held if time.monotonic() >= one.done + one.fault.hold]:
            one.injected.undo()
            one.undone = time.monotonic()
            held.remove(one)
        if held:
            next_end = min(one.done + one.fault.hold for one in held)
            time.sleep(min(POLL, max(0.0, next_end - time.monotonic())))


def _note(running: list[Running], seen: Observation) -> None:
    """Notes when the victims are out of the rules. No rules at all: another fault has flushed them."""
    for one in running:
        if not one.out and seen.dispatched and not one.addresses & seen.dispatched:
            one.out = seen.at


def _recover(scene: Scene, running: list[Running]) -> tuple[float, list[str]]:
    """(when all invariants held, what was still violated at the deadline)."""
    bound = sum(one.fault.bound for one in running)
    deadline = time.monotonic() + bound
    while True:
        seen = scene.look()
        _note(running, seen)
        left = {one.id for one in seen.backends} & {id_ for one in running for id_ in one.ids}
        violated = [*scene.violated(seen), *(f"{id_[:12]} is not replaced" for id_ in left)]
        if not violated:
            return seen.at, []
        if time.monotonic() > deadline:
            return seen.at, [f"not within {bound:g} s: {sentence}" for sentence in violated]
        time.sleep(POLL)


def _event(one: Running, settled: float) -> Event:
    out = one.out or settled
    victims, nodes = frozenset(one.injected.victims), frozenset(one.injected.nodes)
    return Event(one.fault.name, one.begun, one.done, out, one.undone, settled, victims, nodes)


def shares(before: Observation, after: Observation, requests: Sequence[Request]) -> list[str]:
    """Of the quiet time between two observations: whether each backend that was there all the time got its share."""
    healthy = {one.name for one in before.backends} & {one.name for one in after.backends}
    answers: Counter[str] = Counter()
    for request in requests:
        if request.kind == "new" and before.at <= request.start < after.at and request.backend:
            answers[request.backend] += 1
    return unfair_shares(answers, healthy)
