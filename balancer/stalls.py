"""Finds frozen backends by their connections: the kernel of a frozen process still accepts, so probes may miss it.

Pure: time is an argument. A backend is judged when several of its connections wait for a first reply, none has got one
for a while, and most other backends do answer. So long polls, slow applications and a dead network judge nobody.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

STALL_SECONDS = 10.0  # without a packet, after which a connection that waits counts as stalled; and without a reply
MIN_STALLED = 3  # stalled connections: one or two may be long polls
ANSWERS_WITHIN = 5.0  # seconds since a backend's newest first reply in which it counts as answering
RETRY_SECONDS = 60.0  # after which a backend is tried anew, for without connections it cannot show that it answers


@dataclass(frozen=True)
class Replies:
    """One backend as a sample saw it: stalled connections, and the counter of connections that got a first reply."""

    stalled: int
    first_replies: int
    in_rotation: bool


@dataclass(frozen=True)
class _Verdict:
    since: float
    stalled: int


class StallDetector:
    """Keeps, by id, when each backend last gave a first reply, since when it may be judged, and who is judged."""

    def __init__(self) -> None:
        self._counted: dict[str, int] = {}
        self._replied_at: dict[str, float] = {}
        self._watched_since: dict[str, float] = {}
        self._verdicts: dict[str, _Verdict] = {}

    def judge(self, backends: Mapping[str, Replies], now: float, table_full: bool = False) -> dict[str, int]:
        """The ids that are unhealthy now, with how many of their connections stalled when that was found.

        With a full connection table no new verdict is made: packets are then dropped before any backend sees them."""
        self._note_replies(backends, now)
        self._end_verdicts(backends, now)
        if not table_full:
            newly = {id_: seen for id_, seen in backends.items() if self._is_frozen(id_, backends, now)}
            for id_, seen in newly.items():
                self._verdicts[id_] = _Verdict(now, seen.stalled)
        return {id_: verdict.stalled for id_, verdict in self._verdicts.items()}

    def answering(self, now: float) -> frozenset[str]:
        """The ids of the backends that gave a client a first reply lately."""
        return frozenset(id_ for id_, at in self._replied_at.items() if now - at < ANSWERS_WITHIN)

    def _note_replies(self, backends: Mapping[str, Replies], now: float) -> None:
        """A counter that fell began anew: what it shows since then are replies, too."""
        replied = [
            id_ for id_, seen in backends.items() if self._counted.get(id_, seen.first_replies) != seen.first_replies
        ]
        before = {id_: at for id_, at in self._replied_at.items() if id_ in backends}
        self._replied_at = before | dict.fromkeys(replied, now)
        self._watched_since = {id_: self._watched_since.get(id_, now) for id_ in backends}
        self._counted = {id_: seen.first_replies for id_, seen in backends.items()}

    def _end_verdicts(self, backends: Mapping[str, Replies], now: float) -> None:
        for id_, verdict in list(self._verdicts.items()):
            replied = self._replied_at.get(id_, verdict.since) > verdict.since
            retried = now - verdict.since >= RETRY_SECONDS
            if id_ not in backends or replied or retried:
                del self._verdicts[id_]
            if id_ in backends and retried:
                self._watched_since[id_] = now  # it gets STALL_SECONDS to answer before it is judged again

    def _is_frozen(self, id_: str, backends: Mapping[str, Replies], now: float) -> bool:
        seen = backends[id_]
        if id_ in self._verdicts or not seen.in_rotation or seen.stalled < MIN_STALLED:
            return False
        just_watched = now - self._watched_since[id_] < STALL_SECONDS
        if just_watched or self._replied_lately(id_, now):
            return False
        others = [other for other in backends if other != id_ and backends[other].in_rotation]
        answering = [
            other for other in others if self._replied_lately(other, now) and backends[other].stalled < MIN_STALLED
        ]
        return 2 * len(answering) > len(others)

    def _replied_lately(self, id_: str, now: float) -> bool:
        return id_ in self._replied_at and now - self._replied_at[id_] < STALL_SECONDS


def why(stalled: int) -> str:
    return f"{stalled} connections wait for a first reply, none got one for {STALL_SECONDS:.0f} s"
