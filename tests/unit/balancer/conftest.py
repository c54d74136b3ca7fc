"""The fixture of the tests of the balancer's threads."""

from __future__ import annotations

import pytest

import reconciler
import reporter
import sampler
import state
import synchronization_client as client
from fakes_balancer import Clock, FakeProber, World


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    clock = Clock()
    for module in (client, reconciler, reporter, sampler, state):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(state, "Prober", FakeProber)
    return World(clock)
