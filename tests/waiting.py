"""Waiting for a condition, for tests and for programs that have no pytest."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
    """The first true value of `condition`; a generous bound, for a busy machine. A condition that takes long, such as
    one with a program, is checked less often: it may use a third of the time."""
    deadline = time.monotonic() + seconds
    while (began := time.monotonic()) < deadline:
        if value := condition():
            return value
        time.sleep(max(0.1, 2 * (time.monotonic() - began)))
    raise AssertionError(f"not within {seconds:g} s: {what}")
