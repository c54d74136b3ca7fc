"""Faults of single backends and of most of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from chaos.allowances import answered_by_victims, in_flight, nothing, until_out
from chaos.fault import Fault, Injected, Stage
from chaos.product import PROJECT


def by_docker(*command: str) -> Callable[[Stage], Injected]:
    """Runs a command of docker on the victims."""

    def inject(stage: Stage) -> Injected:
        victims = stage.backends()
        stage.site.docker(*command, *victims)
        return Injected(victims)

    return inject


def freeze(stage: Stage) -> Injected:
    victims = stage.backends()
    os.kill(stage.site.pid_of(victims[0]), signal.SIGSTOP)
    return Injected(victims)


def rename(stage: Stage) -> Injected:
    [victim] = stage.backends()
    stage.site.docker("rename", victim, "renamed")
    return Injected([], lambda: stage.site.try_docker("rename", "renamed", victim))


def switch(stage: Stage, file: str, count: int = 1) -> Injected:
    """Creates the file that makes the campaign's backend fail in that way; the undo removes it."""
    victims = stage.backends(count)
    ids = [stage.site.docker("inspect", "-f", "{{.Id}}", name) for name in victims]
    for id_ in ids:
        stage.site.docker("exec", id_, "touch", f"/tmp/{file}")

    def undo() -> None:
        for id_ in ids:  # by the id: a replacement may have taken the name
            stage.site.try_docker("exec", id_, "rm", "-f", f"/tmp/{file}")

    return Injected(victims, undo)


def out_of_memory(stage: Stage) -> Injected:
    """At the victim's next request. No undo: it might remove the file before that request."""
    return Injected(switch(stage, "oom").victims)


FAULTS = [
    Fault("kill a backend", "backend", by_docker("kill"), in_flight, "what was open on it ends with it", replaced=True),
    Fault(
        "stop a backend", "backend", by_docker("stop", "-t", "20"), nothing,
        "it finishes what it has, and gets nothing new", bound=30, replaced=True,
    ),
    Fault(
        "pause a backend", "backend", by_docker("pause"), until_out, "what was open on it is never answered",
        replaced=True,
    ),
    Fault(
        "freeze a backend (SIGSTOP)", "backend", freeze, until_out,
        "its kernel accepts connections until three probes have failed", bound=45, budget=40, replaced=True,
    ),
    Fault(
        "disconnect a backend", "backend", by_docker("network", "disconnect", PROJECT), in_flight,
        "its open connections have lost their network", replaced=True,
    ),
    Fault(
        "a backend out of memory", "backend", out_of_memory, until_out,
        "while it takes its memory it answers nobody, then it is killed", bound=30, replaced=True,
    ),
    Fault(
        "slow backend", "backend", lambda stage: switch(stage, "slow"), nothing, "slow answers are answers", hold=4,
        budget=12,
    ),
    Fault(
        "a backend answers every request with 500", "backend", lambda stage: switch(stage, "broken"),
        answered_by_victims, "its health path is good: only its own share may fail", hold=4, budget=12,
    ),
    Fault(
        "health that flaps", "backend", lambda stage: switch(stage, "flap"), nothing,
        "it leaves rotation and returns, and answers meanwhile", hold=6, bound=30, budget=14,
    ),
    Fault(
        "most backends unhealthy", "backend", lambda stage: switch(stage, "sick", 3), nothing,
        "below half, all stay in rotation", hold=6, bound=60, budget=30,
    ),
    Fault("rename a backend", "backend", rename, nothing, "labels are the state, not names", hold=4, budget=12),
]  # fmt: skip
