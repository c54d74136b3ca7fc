"""What a fault is: how it is injected and undone, what it may cost, and for how long."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from chaos.allowances import Allowance
from chaos.product import PROJECT, Product
from chaos.site import Site, call

PATHS = ("bridge", "host")
SWARM = "swarm"


@dataclass
class Stage:
    """What a fault can use. The random numbers are of the campaign's seed."""

    site: Site
    product: Product
    random: random.Random

    def backends(self, count: int = 1) -> list[str]:
        """The names of some backends, from the engine: the manager may be away."""
        labels = ["--filter", f"label=lbscaler.project={PROJECT}", "--filter", "label=lbscaler.role=backend"]
        names = sorted(self.site.docker("ps", *labels, "--format", "{{.Names}}").split())
        return self.random.sample(names, min(count, len(names)))

    def in_rules(self, *command: str) -> str:
        """Runs a program where the product's rules are."""
        return call(*self.product.rules_namespace(), *command)


@dataclass
class Injected:
    """`victims` are names of containers. `undo` ends the fault.

    Of a Swarm: the fault affects the clients of `nodes`, which are addresses. If `settles`, all other nodes have to be
    complete before the undo, within the same bound.
    """

    victims: list[str] = field(default_factory=list)
    undo: Callable[[], object] = lambda: None
    nodes: list[str] = field(default_factory=list)
    settles: bool = False


@dataclass(frozen=True)
class Fault:
    name: str
    group: str  # two faults of a pair are of different groups
    inject: Callable[[Any], Injected]  # of a Stage, or of a Swarm's
    allowance: Allowance
    why: str  # of the allowance
    bound: float = 20.0  # seconds from the undo until all invariants hold again
    hold: float = 0.0  # seconds until the undo
    replaced: bool = False  # its victims have to be replaced
    alone: bool = False  # never in a pair
    datapaths: tuple[str, ...] = PATHS
    resets: bool = False  # counters start again
    budget: float = 9.0  # seconds that a round takes, about: the plan's length follows from it
