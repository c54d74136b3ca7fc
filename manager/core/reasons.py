"""Why a backend is in its state, or why a launch failed: a cause and its values. Pure.

Code compares causes. The sentence for people is made from the fields in one place, and nothing reads it back.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Cause(StrEnum):
    NONE = ""
    # The manager has just started.
    ADOPTED = "adopted"
    LEFT_OVER = "left_over"
    # A drain begins.
    SCALE_IN = "scale_in"  # value: the desired number
    UPDATE = "update"
    UNHEALTHY = "unhealthy"  # value: seconds; detail: the last probe's result
    SURPLUS_SPARE = "surplus_spare"
    OPERATOR = "drained_by_operator"
    EXTERNAL_STOP = "external_stop"
    ENGINE_STOP = "engine_stop"
    # A drain ends, or a balancer drains a backend. detail: the balancer's text
    BALANCER_REPORT = "balancer_report"
    DRAIN_TIMEOUT = "drain_timeout"
    ENDED_IN_DRAIN = "ended_in_drain"
    # A backend or its launch fails.
    ENDED = "ended"  # value: the exit code, if known
    PAUSED = "paused"
    NO_ADDRESS = "no_address"
    NETWORK_LOST = "network_lost"
    NOT_READY = "not_ready"  # value: the ready timeout in seconds; detail: the last probe's result
    LAUNCH_ERROR = "launch_error"  # detail: the engine's error
    # An update or the balancer fails.
    ENGINE_GAVE_UP = "engine_gave_up"
    BALANCER_ENDED = "balancer_ended"


_SENTENCES = {
    Cause.ADOPTED: "adopted",
    Cause.LEFT_OVER: "had ended before this manager started",
    Cause.SCALE_IN: "scale-in to {value:g}",
    Cause.UPDATE: "replaced by the update",
    Cause.UNHEALTHY: "unhealthy for {value:.0f} s",
    Cause.SURPLUS_SPARE: "surplus spare",
    Cause.OPERATOR: "drained by the operator",
    Cause.EXTERNAL_STOP: "another program is stopping its container",
    Cause.ENGINE_STOP: "the engine is stopping its container",
    Cause.DRAIN_TIMEOUT: "drain timeout: no report that the backend's last connection has ended",
    Cause.ENDED_IN_DRAIN: "its container has ended",
    Cause.ENDED: "its container ended with exit code {value:g}",
    Cause.PAUSED: "its container was paused",
    Cause.NO_ADDRESS: "its container has no address",
    Cause.NETWORK_LOST: "its container has lost its network",
    Cause.NOT_READY: "not ready within {value:g} s",
    Cause.ENGINE_GAVE_UP: "the engine paused the update: its backends did not stay up",
    Cause.BALANCER_ENDED: "it ended soon after its start",
}


@dataclass(frozen=True)
class Reason:
    """A cause with its values. A reason without a cause is false."""

    cause: Cause = Cause.NONE
    value: float | None = None
    detail: str = ""
    last_log_line: str = ""  # of a failed backend

    def __bool__(self) -> bool:
        return self.cause is not Cause.NONE

    @property
    def sentence(self) -> str:
        """For people, in /status and in the log."""
        # A balancer's report and the engine's error have no sentence of their own: the detail is the sentence.
        known = _SENTENCES.get(self.cause, "").format(value=self.value or 0)
        if self.cause is Cause.ENDED and self.value is None:
            known = "its container ended"
        text = ": ".join(part for part in (known, self.detail) if part)
        return f"{text}; last log line: {self.last_log_line}" if self.last_log_line else text


NO_REASON = Reason()
