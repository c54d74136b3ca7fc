"""Finds frozen backends by their connections: their kernel still accepts connections, so probes may succeed.

Pure: time is an argument. A backend is frozen when several of its connections wait for a first reply, none has got one
for a while, and most other backends do answer. So slow applications and a failed network mark no backend.

A healthy backend whose clients wait in long polls gives no first reply either, until it gets a connection of another
kind. So the other backends must have given enough first replies meanwhile. If a healthy backend has the share s of the
connections, each first reply is one of another backend with the probability 1-s, and all of N are with (1-s)^N. This
has to be below MAX_CHANCE. With equal shares, that takes 14 first replies of one other backend, 23 of two, 88 of nine.
So a frozen backend is found after STALL_SECONDS from about one connection per second and backend on, and later with
fewer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from health import Cause, Health

STALL_SECONDS = 10.0  # without a first reply from the backend
MAX_CHANCE = 1e-4  # that a healthy backend gets none of the first replies in that time
MIN_STALLED = 3  # stalled connections: one or two may be long polls
ANSWERS_WITHIN = 5.0  # seconds since a backend's latest first reply in which it counts as answering
RETRY_SECONDS = 60.0  # then a frozen backend gets connections again, without which it could not send a reply


@dataclass(frozen=True)
class Replies:
    """One backend in one sample: its stalled connections, and the counter of connections that got a first reply.
    `weight` is that of its share in new connections; 0 if it is not in rotation."""

    stalled: int
    first_replies: int
    weight: float


@dataclass
class _Watched:
    """What the samples so far showed about one backend. Times are in seconds on the clock of `now`."""

    first_replies: int
    since: float  # of the first sample, or of the last retry
    replied_at: float = -math.inf
    chance: float = 1.0  # that a healthy backend gave none of the first replies since then
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
        self._watched = {
            id_: self._watched.get(id_) or _Watched(seen.first_replies, now) for id_, seen in backends.items()
        }
        replies = self._new_replies(backends)
        weights = sum(seen.weight for seen in backends.values())
        for id_, seen in backends.items():
            record = self._watched[id_]
            # A changed counter means a reply. It is smaller if it was restarted. A reply ends the frozen state.
            if seen.first_replies != record.first_replies:
                record.first_replies, record.replied_at, record.frozen_at = seen.first_replies, now, None
                record.chance = 1.0
            elif weights:
                record.chance *= (1 - seen.weight / weights) ** replies
            # A retry gives the backend STALL_SECONDS to answer.
            if record.frozen_at is not None and now - record.frozen_at >= RETRY_SECONDS:
                record.frozen_at, record.since, record.chance = None, now, 1.0

    def _new_replies(self, backends: Mapping[str, Replies]) -> int:
        """The first replies since the last sample of all backends in rotation."""
        replies = 0
        for id_, seen in backends.items():
            if seen.weight:
                replies += max(0, seen.first_replies - self._watched[id_].first_replies)
        return replies

    def _is_frozen(self, id_: str, backends: Mapping[str, Replies], now: float) -> bool:
        seen, record = backends[id_], self._watched[id_]
        suspicious = seen.weight and seen.stalled >= MIN_STALLED and record.frozen_at is None
        silent_for = now - max(record.since, record.replied_at)
        if not suspicious or silent_for < STALL_SECONDS or record.chance > MAX_CHANCE:
            return False
        # Most of the others in rotation have to answer: if they do not, the network or a shared dependency is at fault.
        others = [other for other in backends if other != id_ and backends[other].weight]
        answering = 0
        for other in others:
            replied = now - self._watched[other].replied_at < STALL_SECONDS
            answering += replied and backends[other].stalled < MIN_STALLED
        return 2 * answering > len(others)


def health(stalled: int) -> Health:
    """The health of a frozen backend."""
    why = f"{stalled} connections wait for a first reply, none got one for {STALL_SECONDS:.0f} s"
    return Health(False, 0, why, Cause.NO_FIRST_REPLY)
