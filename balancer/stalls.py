"""Finds frozen backends by their connections: their kernel still accepts connections, so probes may succeed.

Pure: time is an argument. A backend is frozen when several of its connections wait for a first reply, none has got one
for a while, and most other backends do answer. So long polls, slow applications and a failed network mark no backend.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from health import Cause, Health

STALL_SECONDS = 10.0  # without a first reply from the backend
MIN_STALLED = 3  # stalled connections: one or two may be long polls
ANSWERS_WITHIN = 5.0  # seconds since a backend's latest first reply in which it counts as answering
RETRY_SECONDS = 60.0  # then a frozen backend gets connections again, without which it could not send a reply


@dataclass(frozen=True)
class Replies:
    """One backend in one sample: its stalled connections, and the counter of connections that got a first reply."""

    stalled: int
    first_replies: int
    in_rotation: bool


@dataclass
class _Watched:
    """What the samples so far showed about one backend. Times are in seconds on the clock of `now`."""

    first_replies: int
    since: float  # of the first sample, or of the last retry
    replied_at: float = -math.inf
    frozen_at: float | None = None
    stalled: int = 0  # connections, when it was found frozen


class StallDetector:
    def __init__(self) -> None:
        self._watched: dict[str, _Watched] = {}  # by id

    def frozen(self, backends: Mapping[str, Replies], now: float, table_full: bool = False) -> dict[str, int]:
        """Takes one sample. Returns the ids of the frozen backends, with how many connections stalled when each was
        found. With a full connection table none is added: packets are then dropped before a backend gets them."""
        self._update(backends, now)
        if not table_full:
            found = [id_ for id_ in backends if self._is_frozen(id_, backends, now)]
            for id_ in found:
                self._watched[id_].frozen_at, self._watched[id_].stalled = now, backends[id_].stalled
        return {id_: record.stalled for id_, record in self._watched.items() if record.frozen_at is not None}

    def answering(self, now: float) -> frozenset[str]:
        """The ids of the backends that gave a client a first reply within ANSWERS_WITHIN."""
        return frozenset(id_ for id_, record in self._watched.items() if now - record.replied_at < ANSWERS_WITHIN)

    def _update(self, backends: Mapping[str, Replies], now: float) -> None:
        watched = {}
        for id_, seen in backends.items():
            record = watched[id_] = self._watched.get(id_) or _Watched(seen.first_replies, now)
            # A changed counter means a reply. It is smaller if it was restarted. A reply ends the frozen state.
            if seen.first_replies != record.first_replies:
                record.first_replies, record.replied_at, record.frozen_at = seen.first_replies, now, None
            # A retry gives the backend STALL_SECONDS to answer.
            if record.frozen_at is not None and now - record.frozen_at >= RETRY_SECONDS:
                record.frozen_at, record.since = None, now
        self._watched = watched

    def _is_frozen(self, id_: str, backends: Mapping[str, Replies], now: float) -> bool:
        seen, record = backends[id_], self._watched[id_]
        suspicious = seen.in_rotation and seen.stalled >= MIN_STALLED and record.frozen_at is None
        if not suspicious or now - max(record.since, record.replied_at) < STALL_SECONDS:
            return False
        # Most of the others in rotation have to answer: if they do not, the network or a shared dependency is at fault.
        others = [other for other in backends if other != id_ and backends[other].in_rotation]
        answering = 0
        for other in others:
            replied = now - self._watched[other].replied_at < STALL_SECONDS
            answering += replied and backends[other].stalled < MIN_STALLED
        return 2 * answering > len(others)


def health(stalled: int) -> Health:
    """The health of a frozen backend."""
    why = f"{stalled} connections wait for a first reply, none got one for {STALL_SECONDS:.0f} s"
    return Health(False, 0, why, Cause.NO_FIRST_REPLY)
