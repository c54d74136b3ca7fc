"""Crashes of the manager, the balancer and the engine, and spares, on a real engine."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable

import pytest

from e2e.conftest import ROOT, Load, System, docker, machine_lock, rotations, wait_until

Figure = Callable[[str], None]


@pytest.fixture
def system(three: System) -> System:
    three.operate("/scale", {"min": 3, "max": 3, "target": 100000})
    three.wait_for_active(3, 60)
    return three


def test_killed_manager_is_restarted_and_keeps_the_same_containers(system: System) -> None:
    before = sorted(system.containers())
    system.kill_manager()
    system.wait_for_active(3)
    assert sorted(system.containers()) == before
    assert "manager ended with status 137; starting it again" in system.log()


def test_manager_killed_during_scale_out_and_scale_in_completes_them_and_fails_no_request(system: System) -> None:
    load = Load(system.port, seconds=300, per_second=40)
    for i in range(6):
        size = 5 if i % 2 == 0 else 3
        system.operate("/scale", {"min": size, "max": size})
        time.sleep(0.12 * (i // 2))  # before the first call to the engine, amid it, after it, on the way back
        system.kill_manager()
        system.wait_for_active(size, 60)
        backends = docker("ps", "-a", "--filter", f"label=lbscaler.project={system.project}", "--format", "{{.Names}}")
        assert sum("backend" in name for name in backends.split()) == size
    answered, others, _ = load.stop()
    assert (answered > 300, others) == (True, 0)


def test_killed_balancer_client_fails_no_request_and_killed_balancer_restarts_with_its_rules(system: System) -> None:
    balancer = f"{system.project}-balancer"
    load = Load(system.port, seconds=4, per_second=60)
    for _ in range(3):
        time.sleep(1)
        docker("exec", balancer, "/bin/bash", "-c", "kill -KILL $(cat /run/client.pid)")
    _, others, _ = load.result()
    assert others == 0
    first = docker("inspect", "-f", "{{.State.Pid}}", balancer)
    os.kill(int(first), signal.SIGKILL)
    wait_until(lambda: docker("inspect", "-f", "{{.State.Pid}}", balancer) not in (first, "0"), "the balancer is back")

    def all_serve() -> bool:
        try:
            return len({system.answering_backend() for _ in range(30)}) == 3
        except OSError:  # for a moment there was no balancer, and connections end
            return False

    wait_until(all_serve, "all three serve again", 30)


def ready_spare(system: System) -> str | None:
    return next((b["name"] for b in system.status()["backends"] if b["state"] == "spare" and b["healthy"]), None)


def test_scale_out_puts_the_ready_spare_into_rotation(system: System, figure: Figure) -> None:
    system.up("--spares", "1")
    try:
        spare = wait_until(lambda: ready_spare(system), "a ready spare", 30)
        assert all(system.answering_backend() != spare for _ in range(30))
        system.operate("/scale", {"min": 3, "max": 4})
        address = next(b["ip"] for b in system.status()["backends"] if b["name"] == spare)
        began = time.time()
        system.operate("/scale", {"min": 4})
        wait_until(lambda: system.answering_backend() == spare, "the spare serves", 10)
        answered = time.time()
        rules = next(at for at, serving in rotations(system) if at > began and address in serving)
        figure(
            f"a spare was in the rules {1000 * (rules - began):.0f} ms after the decision; its first answer came after "
            f"{1000 * (answered - began):.0f} ms, asked one at a time with a chance of one in four"
        )
        wait_until(lambda: ready_spare(system) not in (None, spare), "a new spare", 30)
    finally:
        system.up("--spares", "0")


OWN_ENGINE = os.environ.get("LBTEST_OWN_ENGINE")


@pytest.mark.paired  # all systems of this engine fail with it
@pytest.mark.skipif(not OWN_ENGINE, reason="would kill an engine that tests/run.sh did not start")
@pytest.mark.parametrize("live_restore", [True, False])
def test_service_recovers_from_a_killed_engine(
    system: System, live_restore: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """With live restore the containers go on and traffic with them; without, a new engine ends them all, and the
    restart policy and the manager bring everything back."""
    with machine_lock("images", tmp_path_factory):  # a test of a Swarm may be using this engine to make its images
        kill_and_restart_the_engine(system, live_restore)
    backends = docker("ps", "-a", "--filter", f"label=lbscaler.project={system.project}", "--format", "{{.Names}}")
    assert len(backends.split()) == 4


def kill_and_restart_the_engine(system: System, live_restore: bool) -> None:
    start = f"cd '{ROOT}' && . manager/host.sh && start_engine {'--live-restore' if live_restore else ''}"
    for round_ in range(2 if live_restore else 1):  # the first new engine only brings live restore with it
        address = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
        balancer = docker("inspect", "-f", address, f"{system.project}-balancer")
        neighbour = docker("inspect", "-f", "{{.State.Pid}}", system.active()[0]["name"])
        os.kill(int((ROOT / "run/engine/dockerd.pid").read_text()), signal.SIGKILL)
        wait_until(lambda: system.status()["engine"] != "ok", "the manager reports it", 20)
        if round_:  # connections over loopback need the engine's proxy process; the rules do not
            ask = f"import urllib.request as u; print(u.urlopen('http://{balancer}:8000/', timeout=10).read().decode())"
            command = ["nsenter", f"--net=/proc/{neighbour}/ns/net", "python3", "-c", ask]
            answers = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(20)]
            assert len({answer.split(" ")[0] for answer in answers}) == 3
        subprocess.run(["bash", "-c", start], check=True, capture_output=True, timeout=60)
        wait_until(lambda: system.status()["engine"] == "ok", "the manager uses the new engine", 30)
        system.wait_for_active(3, 90)
        wait_until(lambda: len({system.answering_backend() for _ in range(20)}) == 3, "all serve", 30)
