"""The whole system on the real engine: up, traffic, scaling, replacement, down."""

from __future__ import annotations

import grp
import os
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, ip_interface
from pathlib import Path

import pytest

from e2e.conftest import Load, System, docker, wait_until


def test_every_active_backend_answers(system: System) -> None:
    names = {backend["name"] for backend in system.active()}
    assert Counter(system.answering_backend() for _ in range(40)).keys() == names


def test_load_scales_out_and_its_end_scales_in_and_no_request_fails(system: System) -> None:
    heavy = Load(system.port, seconds=60, per_second=150)
    wait_until(lambda: len(system.active()) >= 4, "growth to four", 50)
    answered, others, _ = heavy.stop()
    assert (answered > 100, others) == (True, 0)
    light = Load(system.port, seconds=150, per_second=20)  # while it shrinks
    system.wait_for_active(2, 120)
    answered, others, _ = light.stop()
    assert (answered > 100, others) == (True, 0)
    log = system.log()
    assert "CREATE_SERVER 2→" in log
    assert "STOP_SERVER" in log
    assert "draining→stopped" in log
    assert "Traceback" not in log


def test_killed_backend_is_replaced(system: System) -> None:
    victim = system.active()[0]["name"]
    docker("kill", victim)
    wait_until(lambda: "active→failed" in system.log(), "the failure is logged")
    system.wait_for_active(2)
    assert {system.answering_backend() for _ in range(20)} == {backend["name"] for backend in system.active()}


def test_foreign_container_is_kept_and_its_address_and_name_do_not_block_a_scale_out(system: System) -> None:
    names = {backend["name"] for backend in system.active()}
    image = docker("inspect", "-f", "{{.Config.Image}}", min(names))
    next_name = next(name for n in range(1, 9) if (name := f"{system.project}-backend-{n}") not in names)
    listed = docker("network", "inspect", "-f", "{{range .Containers}}{{.IPv4Address}} {{end}}", system.project)
    used = [int(ip_interface(address).ip) for address in listed.split()]
    their_address = str(IPv4Address(max(used) + 2))  # one that the scale-out may get
    idle = ("--entrypoint", "sleep", image, "600")
    on_the_network = docker("run", "-d", "--network", system.project, "--ip", their_address, *idle)
    with_our_next_name = docker("run", "-d", "--name", next_name, *idle)
    try:
        system.operate("/scale", {"min": 5})
        system.wait_for_active(5)
        system.operate("/scale", {"min": 2})
        system.wait_for_active(2, 60)
        for container in (on_the_network, with_our_next_name):
            assert docker("inspect", "-f", "{{.State.Running}}", container) == "true"
    finally:
        docker("rm", "-f", on_the_network, with_our_next_name)


def test_second_run_applies_only_the_changed_settings(system: System) -> None:
    before = sorted(system.containers())
    assert "unchanged" in system.up()
    assert sorted(system.containers()) == before
    pid = (system.run_dir / "manager.pid").read_text()
    system.up("--max", "7")
    assert sorted(system.containers()) == before
    assert (system.run_dir / "manager.pid").read_text() != pid
    assert system.status()["max"] == 7
    output = system.up("--bind", "198.18.99.99", "--max", "6", status=1)
    assert "give an address of this host with --bind" in output
    assert system.answering_backend(), "it serves where it served before"
    assert system.status()["max"] == 7
    assert system.status()["target"] == 100


def test_traffic_flows_without_manager_and_balancer_client(system: System) -> None:
    os.kill(system.manager_pid(), signal.SIGKILL)
    balancer = f"{system.project}-balancer"
    docker("exec", balancer, "/bin/bash", "-c", "kill -STOP $(cat /run/client.pid)")
    try:
        assert len({system.answering_backend() for _ in range(30)}) == 2
    finally:
        docker("exec", balancer, "/bin/bash", "-c", "kill -KILL $(cat /run/client.pid)")
    assert len({system.answering_backend() for _ in range(30)}) == 2
    system.up()
    system.wait_for_active(2)


def test_host_files_list_the_rotation_and_the_manager_address(system: System) -> None:
    shown = (system.tree / "balancer" / "ip.txt").read_text().split()
    assert sorted(shown) == sorted(backend["ip"] for backend in system.active())
    assert (system.tree / "balancer" / "hostip.txt").read_text().strip().endswith(f":{system.manager_port}")


@pytest.mark.parametrize(
    "moment",
    [
        "Checking that this kernel",
        "Creating the network",
        "Starting the manager",  # the next test interrupts a later moment
    ],
)
def test_interrupted_start_removes_everything_it_created(fresh: System, moment: str) -> None:
    process = fresh.start()
    assert process.stdout is not None
    seen = ""
    while moment not in seen:
        piece = process.stdout.read(1)
        assert piece, seen
        seen += piece
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, seen + output
    wait_until(fresh.nothing_left, "nothing is left", 40)


def test_second_interrupt_does_not_stop_the_rollback(fresh: System) -> None:
    process = fresh.start()
    assert process.stdout is not None
    seen = ""
    for moment in ("Waiting for", "Undoing"):
        while moment not in seen:
            piece = process.stdout.read(1)
            assert piece, seen
            seen += piece
        os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, seen + output
    assert fresh.nothing_left()


def test_run_sh_and_stop_sh_find_a_manager_whose_files_were_deleted(fresh: System) -> None:
    fresh.up()
    shutil.rmtree(fresh.run_dir)
    fresh.up()
    fresh.wait_for_active(2)
    assert fresh.answering_backend()
    shutil.rmtree(fresh.run_dir)
    fresh.down("--now")
    assert fresh.nothing_left()


@pytest.mark.paired  # six starts need both cores
def test_projects_started_together_get_separate_networks(tree: Path) -> None:
    several = [System(tree, f"lbtogether{number}") for number in range(6)]
    begun = [system.start("--min", "1", "1") for system in several]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in begun]
        assert [process.returncode for process in begun] == [0] * len(several), outputs
        assert all("primes" in system.get() for system in several)
    finally:
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda system: system.down("--now"), several))
    assert all(system.nothing_left() for system in several)


def test_stop_removes_only_its_own_project_and_can_be_repeated(fresh: System, system: System) -> None:
    fresh.up("3", *("--min", "1"))
    assert len(fresh.active()) == 3
    docker("rm", "-f", f"{fresh.project}-backend-2")
    os.kill(fresh.manager_pid(), signal.SIGKILL)
    fresh.down()
    assert fresh.nothing_left()
    assert "is down" in fresh.down()
    assert system.answering_backend()
    system.wait_for_active(2)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--max", "1"), "--min 2 is above --max 1"),
        (("--port", "http"), "--port (LB_PORT) is 'http'; allowed: 1 to 65535"),
        (("--colour", "red"), "unrecognized arguments: --colour"),
        (("99",), "the number of backends is '99'; allowed: 2 (--min) to 10 (--max)"),
    ],
)
def test_invalid_setting_is_one_line_with_exit_code_2_and_changes_nothing(
    fresh: System, flags: tuple[str, ...], line: str
) -> None:
    output = fresh.up(*flags, status=2)
    assert line in output
    assert output.count("\n") == 1
    assert fresh.nothing_left()


def test_taken_port_is_reported_with_its_owner_and_the_flag_to_change_it(fresh: System, system: System) -> None:
    output = fresh.up("--port", str(system.port), status=1)
    assert f"port {system.port} is taken by docker-proxy" in output
    assert "--port PORT" in output
    assert fresh.nothing_left()


def test_stop_lets_an_open_request_finish(fresh: System, tmp_path: Path) -> None:
    fresh.up()
    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(fresh.get("/?seconds=3")))
    thread.start()
    time.sleep(1)
    fresh.down()
    thread.join(10)
    assert "primes" in answers[0]


def test_member_of_the_docker_group_runs_it_without_root(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    group = grp.getgrnam("docker").gr_gid
    home = tmp_path_factory.mktemp("member")
    shutil.copytree(tree, home / "a checkout", ignore=shutil.ignore_patterns("run", ".venv"))
    for place in (home, *home.rglob("*")):
        os.chown(place, 54321, 54321, follow_symlinks=False)
    for above in home.parents:
        above.chmod(above.stat().st_mode | 0o011)
    member = System(home / "a checkout", "lbmember")
    person = ["setpriv", "--reuid", "54321", "--regid", "54321", "--groups", str(group)]

    def run(*command: str) -> str:
        environment = {**os.environ, "PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(home)}
        done = subprocess.run(
            [*person, *command], capture_output=True, text=True, timeout=120, env=environment, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    try:
        run(str(member.tree / "run.sh"), *member.flags)
        assert "primes" in member.get()
        assert (member.run_dir / "manager.sock").stat().st_uid == 54321
        assert (member.run_dir / "manager.sock").stat().st_mode & 0o777 == 0o600
        assert (member.run_dir / "token").stat().st_mode & 0o777 == 0o600
    finally:
        run(str(member.tree / "stop.sh"), "--project", member.project, "--now")
    assert member.nothing_left()
