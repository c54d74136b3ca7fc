"""Faults of the manager, the balancer and the engine; updates and restarts by the operator."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

from chaos.allowances import new_until_repaired, nothing, outage
from chaos.fault import Fault, Injected, Stage
from chaos.product import BACKENDS, BALANCER, MANAGER_PORT, PROJECT
from chaos.site import SiteError

ENGINE_DOWN = 3.0  # seconds
LIVE_RESTORE = "--live-restore"


def signal_manager(stage: Stage, how: signal.Signals, undo: signal.Signals | None = None) -> Injected:
    pids = stage.product.manager_pids()
    send(pids, how)
    return Injected([], lambda: send(pids, undo) if undo else None)


def send(pids: list[int], how: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, how)


def lose_link(*match: str) -> Callable[[Stage], Injected]:
    """Drops what the balancer sends to the manager, or the part of it that `match` selects."""

    def inject(stage: Stage) -> Injected:
        gateway = stage.site.docker("network", "inspect", "-f", "{{(index .IPAM.Config 0).Gateway}}", PROJECT)
        words = ["INPUT", "-d", gateway, "-p", "tcp", "--dport", str(MANAGER_PORT), *match, "-j", "DROP"]
        stage.site.run("iptables", "-w", "5", "-I", *words)
        return Injected([], lambda: stage.site.run("iptables", "-w", "5", "-D", *words))

    return inject


def fill_disk(stage: Stage) -> Injected:
    """Fills run/, which is a file system of its own."""
    file = stage.site.tree / "run" / "full"
    with suppress(OSError), file.open("wb") as full:
        while True:
            full.write(b"x" * 65536)
            full.flush()
    return Injected([], lambda: file.unlink(missing_ok=True))


def kill_balancer(stage: Stage) -> Injected:
    stage.site.docker("kill", BALANCER)
    return Injected()


def kill_client(stage: Stage) -> Injected:
    send(stage.product.client_pids(), signal.SIGKILL)
    return Injected()


def restart_engine(how: signal.Signals, *flags: str) -> Callable[[Stage], Injected]:
    def inject(stage: Stage) -> Injected:
        stage.site.end_engine(how)
        time.sleep(ENGINE_DOWN)
        stage.site.start_engine(*flags)
        return Injected()

    return inject


def update(stage: Stage) -> Injected:
    """A rolling update of all backends."""
    stage.product.up("--env", f"CHAOS={stage.random.random()}")
    return Injected()


def run_again(stage: Stage) -> Injected:
    stage.product.up()
    return Injected()


def scale(stage: Stage) -> Injected:
    stage.product.order("/scale", {"min": BACKENDS + 2, "max": BACKENDS + 2})
    return Injected([], lambda: stage.product.order("/scale", {"min": BACKENDS, "max": BACKENDS}))


def stop_and_start(stage: Stage) -> Injected:
    stage.product.down()
    stage.product.up()
    return Injected()


def interrupted_start(stage: Stage) -> Injected:
    """A run.sh with other settings that is interrupted: it undoes what it began."""
    process = stage.product.begin_up("--env", f"CHAOS={stage.random.random()}")
    time.sleep(stage.random.uniform(0.5, 4.0))
    process.send_signal(signal.SIGINT)
    if process.wait(120) not in (0, 130):
        raise SiteError(f"run.sh ended with status {process.returncode}")
    return Injected()


FAULTS = [
    Fault(
        "kill the manager", "manager", lambda stage: signal_manager(stage, signal.SIGKILL), nothing,
        "the rules stay",
    ),
    Fault(
        "stop and continue the manager", "manager",
        lambda stage: signal_manager(stage, signal.SIGSTOP, signal.SIGCONT), nothing, "the rules stay", hold=6,
        budget=14,
    ),
    Fault("link to the manager lost", "manager", lose_link(), nothing, "the last rules stay", hold=6, budget=14),
    Fault(
        "link to the manager slow", "manager", lose_link("-m", "statistic", "--mode", "random", "--probability", "0.5"),
        nothing, "half of the packets are lost and sent again; the last rules stay", hold=8, bound=30, budget=16,
    ),
    Fault("disk of the manager full", "manager", fill_disk, nothing, "state is in labels, not in files", hold=4),
    Fault(
        "kill the balancer", "balancer", kill_balancer, outage,
        "the connection table ends with its network namespace", bound=30, datapaths=("bridge",),
    ),
    Fault(
        "kill the balancer (host path)", "balancer", kill_balancer, nothing, "rules and connections are the host's",
        bound=30, datapaths=("host",),
    ),
    Fault("kill the balancer's client", "balancer", kill_client, nothing, "the rules stay"),
    Fault(
        "kill the engine, live-restore", "engine", restart_engine(signal.SIGKILL, LIVE_RESTORE), new_until_repaired,
        "at its start the engine writes its rules for published ports again; until then a new connection is refused",
        alone=True, bound=45, budget=16, datapaths=("bridge",),
    ),
    Fault(
        "kill the engine, live-restore (host path)", "engine", restart_engine(signal.SIGKILL, LIVE_RESTORE), nothing,
        "containers and rules stay", alone=True, bound=45, budget=16, datapaths=("host",),
    ),
    Fault(
        "kill the engine", "engine", restart_engine(signal.SIGKILL), outage,
        "without live-restore the engine ends all containers at its start", alone=True, bound=60, budget=30,
    ),
    Fault(
        "restart the engine", "engine", restart_engine(signal.SIGTERM), outage,
        "without live-restore the engine ends all containers", alone=True, bound=60, budget=24,
    ),
    Fault(
        "rolling update by run.sh", "update", update, nothing, "each new backend is ready before an old one drains",
        alone=True, bound=30, budget=30,
    ),
    Fault("run.sh again", "update", run_again, nothing, "nothing has changed", bound=20),
    Fault("run.sh interrupted", "update", interrupted_start, nothing, "it is undone", alone=True, bound=60, budget=24),
    Fault("scale out and in", "update", scale, nothing, "grow first, drain last", hold=6, bound=40, budget=24),
    Fault(
        "stop.sh, then run.sh", "update", stop_and_start, outage, "the service is down in between", alone=True,
        bound=30, budget=24,
    ),
]  # fmt: skip
