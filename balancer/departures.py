"""When a draining backend can be stopped, and why. Pure: time is an argument.

The balancer requests a stop of draining backends only: an unhealthy backend that is not draining is for the manager to
replace.
"""

from __future__ import annotations

from dataclasses import dataclass

from flows import SILENT_SECONDS


@dataclass(frozen=True)
class Draining:
    """One draining backend, as the last sample found it."""

    seconds: float  # since it left rotation
    live: int  # open connections
    silent: int  # those of them without a packet for SILENT_SECONDS
    unhealthy: bool

    def stop_reason(self, drain_timeout: float) -> str:
        """Why it can be stopped, for people; empty while the drain goes on. `drain_timeout` in seconds."""
        if not self.live:
            return f"drained in {self.seconds:.1f} s"
        if self.unhealthy and self.silent >= self.live:
            return f"{self.live} open connections, none answered for {SILENT_SECONDS} s"
        if self.seconds > drain_timeout:
            return f"{self.live} flows left at the drain deadline"
        return ""
