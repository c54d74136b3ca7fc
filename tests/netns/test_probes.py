"""Probes of backends that refuse, that do not exist, and that do not answer."""

from __future__ import annotations

import asyncio
import time

import pytest

from health import Cause
from netns.conftest import VIP
from netns.lab import Lab, Namespace, Server
from netns.test_failures import eventually
from prober import probe


@pytest.mark.parametrize("method", ["tcp", "http:/"])
@pytest.mark.parametrize(
    ("address", "cause"),
    [("198.18.1.2", Cause.PROBE_FAILED), ("198.18.1.9", Cause.UNREACHABLE)],
    ids=["refuses", "missing"],
)
def test_missing_backend_is_unreachable_and_one_that_refuses_is_not(
    lab: Lab, client: Namespace, method: str, address: str, cause: Cause
) -> None:
    lab.add(VIP[0], "198.18.1.2")

    def assert_cause() -> None:
        with client:
            assert asyncio.run(probe(address, 8000, method)).cause is cause

    eventually(assert_cause)  # the first packet to a new namespace may be lost


def test_backend_that_accepts_and_does_not_answer_is_reachable(lab: Lab, client: Namespace) -> None:
    server = Server(lab.add("198.18.1.2"), talk=lambda _: time.sleep(3), greet=False)

    def assert_reachable() -> None:
        with client:
            answer = asyncio.run(probe("198.18.1.2", 8000, "http:/"))
        assert (answer.cause, answer.timed_out) == (Cause.PROBE_FAILED, True)
        assert answer.why == "GET / on port 8000: no answer within 1 s"

    eventually(assert_reachable)  # as above
    server.close()
