"""When a draining backend can be stopped, and why. Pure: time is an argument.

The balancer asks the manager to stop draining backends only. The manager itself replaces unhealthy ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from flows import SILENT_SECONDS


@dataclass(frozen=True)
class Draining:
    """One draining backend in the last sample."""

    seconds: float  # since it left rotation
    live: int  # open connections
    silent: int  # those of them without a packet for SILENT_SECONDS
    unhealthy: bool

    def stop_reason(self, drain_timeout: float) -> str:
        """Why it can be stopped now, in words; empty while the drain continues. `drain_timeout` in seconds."""
        if not self.live:
            return f"drained in {self.seconds:.1f} s"
        # A failed backend answers none of its connections, so waiting for their end would only cost time.
        if self.unhealthy and self.silent >= self.live:
            return f"{self.live} open connections, none answered for {SILENT_SECONDS} s"
        if self.seconds > drain_timeout:
            return f"{self.live} open connections at the drain deadline"
        return ""
