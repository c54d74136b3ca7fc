"""When a draining backend can be stopped: each condition, and its sentence."""

from __future__ import annotations

import pytest

from departures import stop_reason

SILENT, DEADLINE = "2 open connections, none answered for 10 s", "2 open connections at the drain deadline"


@pytest.mark.parametrize(
    ("seconds", "live", "silent", "unhealthy", "reason"),
    [
        (0.0, 0, 0, False, "drained in 0.0 s"),
        (12.34, 0, 0, True, "drained in 12.3 s"),
        (29.0, 2, 2, False, ""),  # healthy and idle: clients may still use kept-alive connections
        (29.0, 2, 1, True, ""),  # one of them is still served
        (0.0, 2, 2, True, SILENT),
        (30.0, 2, 0, False, ""),
        (30.1, 2, 0, False, DEADLINE),
        (30.1, 2, 0, True, DEADLINE),
        (40.0, 0, 0, False, "drained in 40.0 s"),
    ],
)
def test_draining_backend_can_be_stopped_for_a_reason(
    seconds: float, live: int, silent: int, unhealthy: bool, reason: str
) -> None:
    assert stop_reason(seconds, live, silent, unhealthy, 30.0) == reason
