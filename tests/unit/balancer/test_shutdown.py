"""The removal of a project's rules, sets and flows from the host's namespace."""

from __future__ import annotations

import pytest

import shutdown
from fakes_balancer import World
from fakes_netfilter import flow
from netfilter import NetfilterError

A, B = "198.18.0.2", "198.18.0.3"


@pytest.mark.parametrize("break_at", [0, 1, 2, 3])
def test_removal_that_failed_is_completed_by_the_next(
    world: World, monkeypatch: pytest.MonkeyPatch, break_at: int
) -> None:
    kernel = world.kernel
    world.set_backends(f"a {A}", f"b {B}")
    world.reconcile()
    kernel.flows = [flow(A), flow(B)]
    monkeypatch.setattr(shutdown, "_destroy", kernel.all_sets.pop)
    if break_at:
        kernel.break_at = len(kernel.calls) + break_at
        with pytest.raises(NetfilterError):
            shutdown.remove(kernel)
    shutdown.remove(kernel)
    assert (kernel.flows, kernel.all_sets, world.chains()) == ([], {}, set())
    shutdown.remove(kernel)  # there is nothing to remove
