"""The files that remain after the manager has ended, all in one folder: ip.txt for a balancer that starts, the state
for the next manager, and the recorded load.

Files are replaced atomically: a reader gets the old text or the new one. The recorded load is only appended to. A
failed write never stops the manager.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from core.fleet import STATES
from core.reasons import NO_REASON, Cause, Reason
from core.scaler import Policy

# The errors of a file that cannot be used: it is missing, unreadable, not JSON, or JSON with other fields.
UNUSABLE = (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError)

log = logging.getLogger("manager")


@dataclass(frozen=True)
class SavedFleet:
    """What the engine's list does not show: the desired number (0: unknown) and each backend's state, by the id of its
    container. An id is never used again, so the states of containers that are gone do no harm."""

    desired: int = 0
    states: Mapping[str, str] = field(default_factory=dict)


class StateFiles:
    def __init__(self, ip_file: Path) -> None:
        self._ip_file = ip_file
        self._unwritable: set[Path] = set()
        self._fleet_file = ip_file.with_name("fleet.json")
        self._operator_file = ip_file.with_name("operator_settings.json")
        self._refused_file = ip_file.with_name("refused_update.json")
        self._trace_file = ip_file.with_name("trace.csv")

    def write_addresses(self, addresses: Iterable[str]) -> None:
        """The addresses in rotation."""
        self._save(self._ip_file, "".join(f"{address}\n" for address in addresses))

    def read_fleet(self) -> SavedFleet:
        """The fleet of the manager before this one."""
        with suppress(*UNUSABLE):
            saved = json.loads(self._fleet_file.read_text())
            states, desired = dict(saved["states"]), int(saved["desired"])
            if desired >= 0 and set(states.values()) <= set(STATES):
                return SavedFleet(desired, states)
        return SavedFleet()

    def write_fleet(self, fleet: SavedFleet) -> bool:
        """Returns whether it was written."""
        return self._save(self._fleet_file, json.dumps(asdict(fleet)))

    def read_operator_settings(self, policy: Policy) -> tuple[Policy, bool]:
        """`policy` with the operator's limits, and whether the operator has paused the manager."""
        with suppress(*UNUSABLE):
            saved = json.loads(self._operator_file.read_text())
            least, most, target = int(saved["min"]), int(saved["max"]), float(saved["target"])
            if 1 <= least <= most and 0 < target < math.inf:
                return replace(policy, min=least, max=most, target=target), bool(saved["paused"])
        return policy, False

    def write_operator_settings(self, policy: Policy, paused: bool) -> None:
        saved = {"min": policy.min, "max": policy.max, "target": policy.target, "paused": paused}
        self._save(self._operator_file, json.dumps(saved))

    def read_refusal(self, spec: str) -> Reason:
        """Why an earlier manager gave up the update to `spec`; NO_REASON if none did."""
        with suppress(*UNUSABLE):
            # A refusal holds for this spec only: any other update may be tried.
            saved = json.loads(self._refused_file.read_text())
            if saved["spec"] == digest(spec):
                reason = saved["reason"]
                value = None if reason["value"] is None else float(reason["value"])
                return Reason(Cause(reason["cause"]), value, str(reason["detail"]), str(reason["last_log_line"]))
        return NO_REASON

    def write_refusal(self, spec_digest: str, reason: Reason) -> None:
        self._save(self._refused_file, json.dumps({"spec": spec_digest, "reason": asdict(reason)}))

    def _save(self, path: Path, text: str) -> bool:
        """Replaces the file atomically. Returns whether it did; the first error of each file is logged."""
        new = path.with_suffix(".new")
        try:
            new.write_text(text)
            os.replace(new, path)
        except OSError as error:
            if path not in self._unwritable:
                log.error("cannot write %s: %s", path.name, error)
            self._unwritable.add(path)
            return False
        self._unwritable.discard(path)
        return True

    def append_to_trace(self, time: float, rate: float) -> None:
        """Adds a line for tests/bench/replay.py: seconds since 1970, load."""
        with suppress(OSError), self._trace_file.open("a") as trace:
            trace.write(f"{time:.1f},{rate:.3f}\n")


def digest(spec: str) -> str:
    """A hash of a spec. The files contain it in place of the spec, which may contain passwords."""
    return hashlib.sha256(spec.encode()).hexdigest()
