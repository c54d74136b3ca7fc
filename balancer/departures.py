"""When a draining backend can be stopped, and why. Pure: time is an argument.

The balancer requests the stop of draining backends and of no others. The manager itself replaces unhealthy ones.
"""

from __future__ import annotations

from flows import SILENT_SECONDS


def stop_reason(seconds: float, live: int, silent: int, unhealthy: bool, drain_timeout: float) -> str:
    """Why it can be stopped now, in words; empty while the drain continues. It left rotation `seconds` ago, and has
    `live` open connections; `silent` of them had no packet for SILENT_SECONDS. `drain_timeout` in seconds."""
    if not live:
        return f"drained in {seconds:.1f} s"
    # A failed backend answers none of its connections, so waiting for their end would only cost time.
    if unhealthy and silent >= live:
        return f"{live} open connections, none answered for {SILENT_SECONDS} s"
    if seconds > drain_timeout:
        return f"{live} open connections at the drain deadline"
    return ""
