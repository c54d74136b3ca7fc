"""The manager's messages as snapshots."""

from __future__ import annotations

from typing import Any

import pytest

from snapshot import Backend, Snapshot

A = "198.18.0.2"


SERVICE = {
    **{"port": 8000, "health": "tcp", "interval": 2, "drain_timeout": 30},
    "weights": "adaptive",
}


ONE = {"id": "a", "ip": A, "state": "active"}


MESSAGE: dict[str, Any] = {"revision": "r7", "service": SERVICE, "backends": [ONE]}


def test_message_is_parsed_into_a_snapshot() -> None:
    backends = (Backend("a", A, "active"),)
    assert Snapshot.parse(MESSAGE) == Snapshot("r7", backends, 8000, "tcp", 2.0, 30.0, "adaptive")
    assert Snapshot.parse({**MESSAGE, "backends": [], "more": 1}).backends == ()


@pytest.mark.parametrize(("given", "source"), [({}, ""), ({"check_source": ""}, ""), ({"check_source": A}, A)])
def test_source_of_self_checks_is_optional(given: dict[str, str], source: str) -> None:
    assert Snapshot.parse({**MESSAGE, "service": {**SERVICE, **given}}).check_source == source


@pytest.mark.parametrize(
    "message",
    [
        {},
        [],
        "busy",
        {**MESSAGE, "backends": None},
        {**MESSAGE, "backends": [A]},
        {**MESSAGE, "backends": [{"ip": A}]},
        {**MESSAGE, "backends": [{**ONE, "ip": "-j ACCEPT"}]},
        {**MESSAGE, "service": None},
        {**MESSAGE, "service": {**SERVICE, "port": "http"}},
        {**MESSAGE, "service": {**SERVICE, "check_source": "-j ACCEPT"}},
        {**MESSAGE, "service": {key: SERVICE[key] for key in ("port", "health", "interval")}},
        {key: MESSAGE[key] for key in ("service", "backends")},
    ],
)
def test_malformed_message_raises_an_error_that_the_loop_handles(message: Any) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Snapshot.parse(message)
