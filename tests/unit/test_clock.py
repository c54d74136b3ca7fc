"""A change of the host's date moves no timeout and no window: the product measures time with the monotonic clock."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WALL_CLOCK = {"time", "time_ns", "now", "utcnow", "today", "localtime", "gmtime"}
# Why a date is needed there.
USES = {
    "manager/cli/swarm.py": "a claim of stop.sh is newer than all others",
    "manager/cli/watch.py": "the end of the charts",
    "manager/core/controller.py": "dates in /decisions and /history, from one reading at the start",
    "manager/engines/swarm_claim.py": "the newest of the managers' claims",
}


def reads_the_date(file: Path) -> bool:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            is_clock = node.value.id in ("time", "datetime", "date")
            if is_clock and node.attr in WALL_CLOCK:
                return True
    return False


def test_the_date_is_read_in_four_places_only() -> None:
    files = [file for folder in ("manager", "balancer", "server") for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 50
    assert {str(file.relative_to(ROOT)) for file in files if reads_the_date(file)} == USES.keys()
