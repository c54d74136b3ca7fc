"""Which draining backends are done: each condition, and the sentence that says so."""

from __future__ import annotations

import pytest

from departures import Departure, Draining, Reason, departures


@pytest.mark.parametrize(
    ("live", "silent", "unhealthy", "seconds", "reason"),
    [
        (0, 0, False, 0.0, Reason.DRAINED),
        (0, 0, True, 0.0, Reason.DRAINED),
        (2, 2, False, 29.0, None),  # healthy and idle: kept-alive connections may still be used
        (2, 1, True, 29.0, None),  # one of them is still served
        (2, 2, True, 0.0, Reason.SILENT),
        (2, 0, False, 30.0, None),
        (2, 0, False, 30.1, Reason.DEADLINE),
        (2, 0, True, 30.1, Reason.DEADLINE),
        (0, 0, False, 40.0, Reason.DRAINED),
    ],
)
def test_a_draining_backend_is_done(
    live: int, silent: int, unhealthy: bool, seconds: float, reason: Reason | None
) -> None:
    draining = {"198.18.0.2": Draining(100.0, live, silent, unhealthy)}
    done = departures(draining, 100.0 + seconds, 30.0)
    assert [(departure.ip, departure.reason) for departure in done] == ([("198.18.0.2", reason)] if reason else [])


def test_each_backend_is_judged_by_itself() -> None:
    draining = {"a": Draining(0.0, 0, 0, False), "b": Draining(0.0, 1, 0, False), "c": Draining(-9.0, 3, 0, False)}
    assert departures(draining, 25.0, 30.0) == [
        Departure("a", Reason.DRAINED, 25.0, 0),
        Departure("c", Reason.DEADLINE, 34.0, 3),
    ]


@pytest.mark.parametrize(
    ("reason", "sentence"),
    [
        (Reason.DRAINED, "drained in 12.3 s"),
        (Reason.SILENT, "4 open connections, none answered for 10 s"),
        (Reason.DEADLINE, "4 flows left at the drain deadline"),
    ],
)
def test_every_reason_has_a_sentence(reason: Reason, sentence: str) -> None:
    assert Departure("198.18.0.2", reason, 12.34, 4).sentence() == sentence
