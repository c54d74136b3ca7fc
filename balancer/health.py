"""Decides from the results of its probes whether a backend is healthy. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

FALL, RISE = 3, 2  # failed probes in a row that make a backend unhealthy, successful ones that make it healthy again
PERIOD = 1.0  # seconds between probes
RETRY = 0.1  # the same while health is unknown or in doubt, and at first while a backend is unhealthy
RETRIES = 100  # probes of an unhealthy backend with RETRY: it may be starting, or recover soon


class Cause(Enum):
    """Why a backend is unhealthy, as reports name it."""

    PROBE_FAILED = "probe_failed"
    UNREACHABLE = "unreachable"  # not even its kernel answers
    REFUSED = "refused"  # it reported that it accepts no new connections
    NO_FIRST_REPLY = "no_first_reply"  # found by its connections, not by its probes


@dataclass(frozen=True)
class Answer:
    """The result of one probe: `cause` is None for a success, `why` is a text with the request and its result."""

    cause: Cause | None = None
    why: str = ""
    timed_out: bool = False

    @property
    def may_be_lost(self) -> bool:
        """Whether lost packets, which a full connection table causes, can explain this answer."""
        return self.timed_out or self.cause is Cause.UNREACHABLE


@dataclass(frozen=True)
class Health:
    """`healthy` is None until it is decided. `streak` counts the latest probes in a row that contradict it, `confirmed`
    those that agreed with it."""

    healthy: bool | None = None
    streak: int = 0
    why: str = "not probed yet"
    cause: Cause | None = None  # where healthy is False
    confirmed: int = 0

    def after(self, answer: Answer, table_full: bool = False) -> Health:
        """The health after one more probe. With a full connection table a lost packet is not the backend's fault."""
        if table_full and answer.may_be_lost:
            return self
        good = answer.cause is None
        if good == self.healthy:
            return Health(good, 0, answer.why, answer.cause, self.confirmed + 1)
        # One contradicting probe may be an accident, so several are needed. There are two exceptions: the first success
        # of a new backend, and a refusal, with which the backend itself reports its state.
        streak = self.streak + 1
        is_first_success = good and self.healthy is None
        enough = streak >= (RISE if good else FALL)
        if is_first_success or enough or answer.cause is Cause.REFUSED:
            return Health(good, 0, answer.why, answer.cause)
        return Health(self.healthy, streak, answer.why, self.cause)

    def pause(self) -> float:
        """Seconds until the next probe."""
        in_doubt = self.healthy is None or self.streak > 0
        became_unhealthy = self.healthy is False and self.confirmed < RETRIES
        return RETRY if in_doubt or became_unhealthy else PERIOD
