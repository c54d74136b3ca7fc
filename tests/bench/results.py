"""The measured values by quantity, way and number of backends, one for each round; and their JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Key = tuple[str, str, int]  # quantity, way, backends


@dataclass(frozen=True)
class Value:
    """A median and its spread."""

    median: float
    low: float
    high: float


@dataclass
class Results:
    machine: dict[str, Any] = field(default_factory=dict)
    values: dict[Key, list[float]] = field(default_factory=dict)

    def add(self, quantity: str, way: str, backends: int, value: float) -> None:
        self.values.setdefault((quantity, way, backends), []).append(value)

    def value(self, quantity: str, way: str, backends: int) -> Value | None:
        return _value(self.values.get((quantity, way, backends)))

    def ratio(self, quantity: str, numerator: tuple[str, int], denominator: tuple[str, int]) -> Value | None:
        """The ratio in each round, of (way, backends); None if one of them was not measured."""
        above, below = self.values.get((quantity, *numerator)), self.values.get((quantity, *denominator))
        if not above or not below:
            return None
        return _value([a / b for a, b in zip(above, below, strict=False) if b])

    def ways(self, quantity: str, backends: int) -> list[str]:
        """In the order in which they were measured."""
        return [way for kind, way, count in self.values if kind == quantity and count == backends]

    def counts(self, quantity: str) -> list[int]:
        """The numbers of backends for which it was measured."""
        return sorted({count for kind, _, count in self.values if kind == quantity})

    def write(self, path: Path) -> None:
        rows = []
        for (quantity, way, backends), values in self.values.items():
            rows.append({"quantity": quantity, "way": way, "backends": backends, "values": values})
        path.write_text(json.dumps({"machine": self.machine, "results": rows}, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Results:
        stored = json.loads(path.read_text())
        results = cls(stored["machine"])
        for row in stored["results"]:
            results.values[row["quantity"], row["way"], row["backends"]] = row["values"]
        return results


def _value(values: Iterable[float] | None) -> Value | None:
    ordered = sorted(values or ())
    return Value(statistics.median(ordered), ordered[0], ordered[-1]) if ordered else None
