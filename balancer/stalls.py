"""Finds frozen backends by their connections: the kernel of a frozen process still accepts, so probes may succeed.

Pure: time is an argument. A backend is frozen when several of its connections wait for a first reply, none has got one
for a while, and most other backends do answer. So long polls, slow applications and a failed network mark no backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from health import Cause, Health

STALL_SECONDS = 10.0  # without a first reply from the backend
MIN_STALLED = 3  # stalled connections: one or two may be long polls
ANSWERS_WITHIN = 5.0  # seconds since a backend's latest first reply in which it counts as answering
RETRY_SECONDS = 60.0  # after which a frozen backend is tried again: without connections it cannot prove that it answers


@dataclass(frozen=True)
class Replies:
    """One backend in one sample: its stalled connections, and the counter of connections that got a first reply."""

    stalled: int
    first_replies: int
    in_rotation: bool


@dataclass(frozen=True)
class _Frozen:
    since: float
    stalled: int


class StallDetector:
    """Keeps, by id, when each backend last gave a first reply, since when it is watched, and which ones are frozen."""

    def __init__(self) -> None:
        self._counted: dict[str, int] = {}
        self._replied_at: dict[str, float] = {}
        self._watched_since: dict[str, float] = {}
        self._frozen: dict[str, _Frozen] = {}

    def frozen(self, backends: Mapping[str, Replies], now: float, table_full: bool = False) -> dict[str, int]:
        """Takes one sample. Returns the ids of the frozen backends, with how many connections stalled when each was
        found. With a full connection table none is added: packets are then dropped before a backend gets them."""
        self._note_replies(backends, now)
        self._release(backends, now)
        if not table_full:
            found = [id_ for id_ in backends if self._is_frozen(id_, backends, now)]
            for id_ in found:
                self._frozen[id_] = _Frozen(now, backends[id_].stalled)
        return {id_: frozen.stalled for id_, frozen in self._frozen.items()}

    def answering(self, now: float) -> frozenset[str]:
        """The ids of the backends that gave a client a first reply within ANSWERS_WITHIN."""
        return frozenset(id_ for id_, at in self._replied_at.items() if now - at < ANSWERS_WITHIN)

    def _note_replies(self, backends: Mapping[str, Replies], now: float) -> None:
        """Any other counter than before is a reply; one that fell was restarted."""
        for id_ in self._watched_since.keys() - backends.keys():
            del self._watched_since[id_], self._counted[id_]
            self._replied_at.pop(id_, None)
        for id_, seen in backends.items():
            if self._counted.get(id_, seen.first_replies) != seen.first_replies:
                self._replied_at[id_] = now
            self._counted[id_] = seen.first_replies
            self._watched_since.setdefault(id_, now)

    def _release(self, backends: Mapping[str, Replies], now: float) -> None:
        """Releases frozen backends that replied, that were removed, and that are to be tried again."""
        for id_, frozen in list(self._frozen.items()):
            replied = self._replied_at.get(id_, frozen.since) > frozen.since
            retried = now - frozen.since >= RETRY_SECONDS
            if id_ not in backends or replied or retried:
                del self._frozen[id_]
            if id_ in backends and retried:
                self._watched_since[id_] = now  # gives it STALL_SECONDS to answer

    def _is_frozen(self, id_: str, backends: Mapping[str, Replies], now: float) -> bool:
        seen = backends[id_]
        just_watched = now - self._watched_since[id_] < STALL_SECONDS
        if id_ in self._frozen or not seen.in_rotation or seen.stalled < MIN_STALLED:
            return False
        if just_watched or self._replied_lately(id_, now):
            return False
        # Most of the others in rotation have to answer.
        others = [other for other in backends if other != id_ and backends[other].in_rotation]
        answering = 0
        for other in others:
            answering += self._replied_lately(other, now) and backends[other].stalled < MIN_STALLED
        return 2 * answering > len(others)

    def _replied_lately(self, id_: str, now: float) -> bool:
        return id_ in self._replied_at and now - self._replied_at[id_] < STALL_SECONDS


def health(stalled: int) -> Health:
    """The health of a frozen backend."""
    why = f"{stalled} connections wait for a first reply, none got one for {STALL_SECONDS:.0f} s"
    return Health(False, 0, why, Cause.NO_FIRST_REPLY)
