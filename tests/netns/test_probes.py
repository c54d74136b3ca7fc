"""What a probe finds of a backend that is there, that refuses, and that is not there at all."""

from __future__ import annotations

import asyncio
import time

import pytest

from netns.conftest import VIP
from netns.lab import Lab, Namespace, Server
from prober import Answer, ask


@pytest.mark.parametrize("method", ["tcp", "http:/"])
@pytest.mark.parametrize(
    ("address", "answer"),
    [("198.18.1.2", Answer.FAILED), ("198.18.1.9", Answer.UNREACHABLE)],
    ids=["refuses", "not there"],
)
def test_backend_that_is_not_there_is_told_from_one_that_refuses(
    lab: Lab, client: Namespace, method: str, address: str, answer: Answer
) -> None:
    lab.add(VIP[0], "198.18.1.2")
    with client:
        found, _ = asyncio.run(ask(address, 8000, method))
    assert found is answer


def test_backend_that_accepts_and_says_nothing_is_reachable(lab: Lab, client: Namespace) -> None:
    server = Server(lab.add("198.18.1.2"), talk=lambda _: time.sleep(3), greet=False)
    with client:
        found, why = asyncio.run(ask("198.18.1.2", 8000, "http:/"))
    server.close()
    assert (found, why) == (Answer.TIMED_OUT, "GET / on port 8000: no answer within 1 s")
