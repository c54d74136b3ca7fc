"""run.sh and stop.sh as a whole, with a fake engine and a fake manager: interrupts, failed steps, updates."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fakes_host import ROOT, System, until

FIRST_ANSWER = "Waiting for the first answer"


pytestmark = pytest.mark.slow  # each test runs run.sh


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    made = System(tmp_path)
    yield made
    made.close()


def status(system: System) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{system.manager_port}/status", timeout=5) as answer:
        return dict(json.loads(answer.read()))


def settings(system: System) -> dict[str, str]:
    return dict(json.loads((system.run_dir / "settings.json").read_text()))


def read_until(process: subprocess.Popen[str], text: str) -> str:
    seen = ""
    assert process.stdout is not None
    while text not in seen:
        piece = process.stdout.read(1)
        assert piece, seen
        seen += piece
    return seen


def test_start_gives_the_manager_its_settings_and_stop_removes_everything(system: System) -> None:
    output = system.up("3", "--image", "good")
    assert FIRST_ANSWER in output
    found = status(system)
    assert found["arguments"] == ["--project", "p", "--backends", "3"]
    assert found["environment"]["LB_BALANCER_IMAGE"].startswith("lbscaler-balancer:")
    assert (found["environment"]["LB_IMAGE"], found["environment"]["LB_IMAGE_ID"]) == ("good", "sha256:good")
    assert len(system.processes()) == 2
    assert (system.run_dir / "settings.json").stat().st_mode & 0o777 == 0o600
    assert system.engine.network_options == {"com.docker.network.bridge.gateway_mode_ipv4": "nat"}
    assert "settings are unchanged" in system.up()
    assert status(system)["pid"] == found["pid"]
    assert "Project p is down" in system.down()
    assert system.nothing_left()
    assert "Project p is down" in system.down(), "twice is fine"


# -- interrupts ------------------------------------------------------------------------------------------------------


def test_second_interrupt_does_not_interrupt_the_undo(system: System) -> None:
    system.engine.removal_seconds = 2
    process = system.start("--image", "hung")
    seen = read_until(process, FIRST_ANSWER)
    os.killpg(process.pid, signal.SIGINT)
    seen += read_until(process, "Undoing")
    until(lambda: "DELETE /networks/network-id" in system.engine.calls, "the undo is at work")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, seen + output
    assert system.nothing_left(), seen + output


@pytest.mark.parametrize("moment", ["Starting the manager", FIRST_ANSWER])
def test_closed_terminal_undoes_the_start(system: System, moment: str) -> None:
    command = system.command("run.sh", "--image", "hung")
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe(command[0], command, system.environment)
    seen = b""
    while moment.encode() not in seen:
        seen += os.read(terminal, 1000)
    os.close(terminal)
    _, ended = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(ended) == 129
    assert "Project p is down" in (system.run_dir / "run.log").read_text()
    assert system.nothing_left()


def test_closed_pipe_interrupts_neither_a_start_nor_a_stop(system: System) -> None:
    for command in (system.command("run.sh", "--image", "good"), system.command("stop.sh")):
        process = subprocess.Popen(command, env=system.environment, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.wait(60) == 0
        assert bool(system.processes()) == ("run.sh" in command[2])
    assert system.nothing_left()


def interrupt_kernel_check(system: System, kind: str, begun: str) -> None:
    """Interrupts a start whose check is of this kind, once the file `begun` exists."""
    (system.state / kind).touch()
    process = system.start("--image", "good")
    read_until(process, "Checking that this kernel")
    until((system.state / begun).exists, "the check has begun")
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130


def test_interrupted_kernel_check_leaves_no_container(system: System) -> None:
    interrupt_kernel_check(system, "slow_check", begun="check")
    assert not (system.state / "check").exists()
    command = (system.state / "kernel_checks").read_text()
    assert "--label lbscaler.project=p --label lbscaler.role=check" in command


def test_kernel_check_that_is_interrupted_before_its_container_exists_leaves_none(system: System) -> None:
    interrupt_kernel_check(system, "late_check", begun="kernel_checks")
    time.sleep(1.5)
    assert not (system.state / "check").exists()


# -- a start that fails ----------------------------------------------------------------------------------------------


def test_start_is_undone_where_its_settings_cannot_be_written(system: System) -> None:
    (system.run_dir / "settings.json.new").mkdir(parents=True)
    output = system.up("--image", "good", status=1)
    assert "run.sh: cannot write run/p/settings.json: Is a directory" in output
    assert "Traceback" not in output
    assert system.nothing_left()


@pytest.mark.parametrize("way", ["<&- >&- 2>&-", "</dev/null >/dev/null 2>&1"])
def test_closed_standard_streams_are_like_dev_null(system: System, way: str) -> None:
    for script, *flags in (("run.sh", "--image", "good"), ("run.sh", "--status"), ("stop.sh",)):
        command = " ".join(f"'{argument}'" for argument in system.command(script, *flags))
        done = subprocess.run(["bash", "-c", f"exec {command} {way}"], env=system.environment, timeout=60, check=False)
        assert done.returncode == 0
        assert bool(system.processes()) == (script == "run.sh")
    assert system.nothing_left()


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("never", "no backend got ready: its container ended with exit code 3; last log line: no such luck"),
        ("broken", "the balancer does not run: port is already allocated"),
    ],
)
def test_start_that_cannot_serve_ends_with_the_managers_reason(system: System, image: str, reason: str) -> None:
    output = system.up("--image", image, status=1)
    assert reason in output
    assert system.nothing_left()


@pytest.mark.parametrize(("refusals", "requests"), [(0, 1), (3, 4), (99, 30)])
def test_next_subnet_is_tried_where_another_start_took_the_first(system: System, refusals: int, requests: int) -> None:
    system.engine.refusal, system.engine.refusals = "Pool overlaps with other one on this address", refusals
    system.up("--image", "good", status=0 if requests < 30 else 1)
    subnets = system.engine.subnets_requested
    assert (len(subnets), len(set(subnets))) == (requests, requests)


@pytest.mark.parametrize(
    ("refusal", "flags"),
    [("permission denied", ()), ("Pool overlaps with other one", ("--subnet", "198.18.0.0/20"))],
)
def test_other_refusal_or_a_given_subnet_is_not_tried_again(
    system: System, refusal: str, flags: tuple[str, ...]
) -> None:
    system.engine.refusal, system.engine.refusals = refusal, 99
    assert refusal in system.up("--image", "good", *flags, status=1)
    assert len(system.engine.subnets_requested) == 1


def test_killed_manager_is_started_again_where_its_folder_was_deleted(system: System) -> None:
    system.up("--image", "good")
    pid = status(system)["pid"]
    shutil.rmtree(system.run_dir)
    os.kill(pid, signal.SIGKILL)
    until(lambda: len(system.processes()) == 2 and pid not in system.processes(), "another manager")
    system.down()
    assert system.nothing_left()


def test_running_project_whose_files_were_deleted_gets_another_manager(system: System) -> None:
    system.up("--image", "good")
    pid = status(system)["pid"]
    shutil.rmtree(system.run_dir)
    system.up("--image", "good")
    assert status(system)["pid"] != pid
    assert len(system.processes()) == 2
    system.down()
    assert system.nothing_left()


# -- an update -------------------------------------------------------------------------------------------------------


def test_update_that_is_given_up_fails_and_the_old_settings_apply_again(system: System) -> None:
    system.up("--image", "good")
    (system.run_dir / "balancer" / "operator_settings.json").write_text("the operator's")
    (system.run_dir / "balancer" / "refused_update.json").write_text("an earlier one")
    output = system.up("--image", "bad", status=1)
    assert "what ran before is used again: its container ended with exit code 3" in output
    assert settings(system)["LB_IMAGE"] == "good"
    assert status(system)["environment"]["LB_IMAGE_ID"] == "sha256:good"
    assert (system.run_dir / "balancer" / "operator_settings.json").read_text() == "the operator's"
    assert (system.run_dir / "balancer" / "refused_update.json").read_text() == "an earlier one"
    assert len(system.processes()) == 2


def test_failed_upgrade_goes_back_to_the_balancers_image_that_worked(system: System) -> None:
    system.up("--image", "good")
    before = status(system)["environment"]["LB_BALANCER_IMAGE"]
    with (system.tree / "balancer" / "rotation.py").open("a") as module:
        module.write("# another version\n")
    system.up("--image", "bad", status=1)
    assert status(system)["environment"]["LB_BALANCER_IMAGE"] == before
    assert (system.state / "kernel_checks").read_text().count("\n") == 2, "each image is tried on this kernel"


def test_failed_update_of_a_project_whose_manager_was_stopped_applies_the_old_settings_again(system: System) -> None:
    system.up("--image", "good")
    for pid in system.processes():
        os.kill(pid, signal.SIGKILL)
    until(lambda: not system.processes(), "supervisor and manager have ended")
    system.up("--image", "bad", status=1)
    assert (settings(system)["LB_IMAGE"], status(system)["environment"]["LB_IMAGE_ID"]) == ("good", "sha256:good")
    assert "settings are unchanged" in system.up()


def test_new_version_of_the_manager_keeps_the_operators_settings_and_tries_a_refused_update_again(
    system: System,
) -> None:
    system.up("--image", "good")
    place, pid = system.run_dir / "balancer", status(system)["pid"]
    for name in ("operator_settings.json", "refused_update.json"):
        (place / name).write_text("{}")
    with (system.tree / "manager" / "core" / "what_if.py").open("a") as module:
        module.write("# another version\n")
    system.up()
    assert status(system)["pid"] != pid
    assert ((place / "operator_settings.json").exists(), (place / "refused_update.json").exists()) == (True, False)


def test_setting_that_an_earlier_version_did_not_have_is_no_changed_setting(system: System) -> None:
    system.up("--image", "good")
    settings_file = system.run_dir / "settings.json"
    older = settings(system)
    del older["LB_SPARES"]
    settings_file.write_text(json.dumps(older))
    operators = system.run_dir / "balancer" / "operator_settings.json"
    operators.write_text("{}")
    assert "Starting the manager" in system.up()
    assert operators.exists()


def test_failed_update_restores_the_number_of_backends(system: System) -> None:
    system.up("--image", "good")
    (system.run_dir / "balancer" / "fleet.json").write_text('{"desired": 5, "states": {}}')
    system.up("8", "--image", "bad", status=1)
    assert status(system)["arguments"] == ["--project", "p", "--backends", "5"]


def test_old_image_is_used_again_even_where_its_name_belongs_to_the_new_one(system: System) -> None:
    system.up("--image", "good")
    system.engine.ids["good"] = "sha256:bad"
    (system.state / "id-of-good").write_text("sha256:bad")
    stored = (system.run_dir / "settings.json").read_text()
    assert "what ran before is used again" in system.up(status=1)
    assert (system.run_dir / "settings.json").read_text() == stored
    assert status(system)["environment"]["LB_IMAGE_ID"] == "sha256:good"


def test_update_continues_after_a_start_with_no_wait(system: System) -> None:
    system.up("--image", "good")
    system.up("--image", "bad", "--no-wait")
    assert settings(system)["LB_IMAGE"] == "bad"
    until(lambda: status(system)["launches"]["update_given_up"], "the update is given up")
    given_up = "the update was given up: its container ended with exit code 3"
    assert given_up in system.script("run.sh", "--status", status=3)
    (system.run_dir / "balancer" / "refused_update.json").write_text("the manager writes it")
    old, reported = tokens(system), "An earlier update was given up; ./run.sh --status has the reason"
    assert reported in system.up()
    assert reported in system.up("--rotate-secrets"), "this can be done before the update is repeated"
    assert not tokens(system) & old
    assert "what ran before is used again" in system.up("--max", "9", status=1), "changed settings try it again"
    assert len(system.processes()) == 2


def test_changed_env_file_is_an_update_that_can_be_undone(system: System, tmp_path: Path) -> None:
    file = tmp_path / "a.env"
    file.write_text("PASSWORD=hunter2\n")
    system.up("--image", "good", "--env-file", str(file))
    first = status(system)["environment"]["LB_ENV_FILE"].strip("'")
    assert Path(first).read_text() == "PASSWORD=hunter2\n"
    assert settings(system)["LB_ENV_FILE"] == str(file)
    assert "settings are unchanged" in system.up()

    file.write_text("PASSWORD=hunter3\n")
    system.up("--image", "bad", status=1)
    assert status(system)["environment"]["LB_ENV_FILE"].strip("'") == first
    assert Path(first).read_text() == "PASSWORD=hunter2\n", "the file's content from before"

    system.up()
    second = status(system)["environment"]["LB_ENV_FILE"].strip("'")
    assert Path(second).read_text() == "PASSWORD=hunter3\n"
    assert {path.name for path in (system.run_dir / "secrets").iterdir()} == {Path(second).name, "balancer"}
    assert "hunter" not in (system.run_dir / "settings.json").read_text() + (system.run_dir / "run.log").read_text()
    system.down()
    assert not (system.run_dir / "secrets").exists()


def tokens(system: System) -> set[str]:
    """The manager's token and the balancer's: one text, unless they differ."""
    return {(system.run_dir / name).read_text() for name in ("token", "secrets/balancer/token")}


def test_rotated_token_is_that_of_the_next_manager_and_the_operators_limits_stay(system: System) -> None:
    system.up("--image", "good")
    pid, first = status(system)["pid"], tokens(system)
    kept = system.run_dir / "balancer" / "operator_settings.json"
    kept.write_text("{}")
    system.up("--rotate-secrets")
    second = tokens(system)
    assert (len(first), len(second), first & second) == (1, 1, set())
    assert status(system)["pid"] != pid
    assert kept.exists()
    assert "settings are unchanged" in system.up()
    system.up("--rotate-secrets", "--max", "9")
    assert not kept.exists(), "changed settings replace them"
    modes = [(system.run_dir / name).stat().st_mode & 0o777 for name in ("token", "secrets", "secrets/balancer/token")]
    assert modes == [0o600, 0o700, 0o644]


def test_manager_and_balancer_have_the_old_token_after_a_rotation_that_failed(system: System) -> None:
    system.up("--image", "good")
    old = tokens(system)
    system.up("--rotate-secrets", "--image", "bad", status=1)
    assert (len(old), tokens(system)) == (1, old)
    assert "settings are unchanged" in system.up()


# -- the manager's environment ---------------------------------------------------------------------------------------


def test_failed_upgrade_keeps_the_environment_of_the_running_manager(system: System) -> None:
    system.up("--image", "good")
    pid, venv = status(system)["pid"], system.tree / ".venv"
    (venv / "mark").touch()
    requirements = system.tree / "manager" / "requirements.txt"
    requirements.write_text(requirements.read_text() + "# changed\n")
    (system.state / "pip_status").write_text("1")
    system.up(status=1)
    assert (venv / "mark").exists()
    assert (venv / "bin" / "python").exists()
    assert status(system)["pid"] == pid
    (system.state / "pip_status").unlink()
    system.up()
    assert not (venv / "mark").exists()
    assert [path.name for path in system.tree.glob(".venv*")] == [".venv"]
    assert status(system)["pid"] != pid, "other packages are another manager"


def test_stop_repairs_an_environment_that_an_upgrade_of_python_broke(system: System) -> None:
    system.up("--image", "good")
    (system.tree / ".venv" / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    (system.tree / ".venv" / "stamp").write_text("of another version\n")
    system.down()
    assert system.nothing_left()


def test_virtual_environment_works_after_it_was_moved(tmp_path: Path) -> None:
    subprocess.run(["python3", "-m", "venv", "--without-pip", str(tmp_path / ".venv.new")], check=True)
    (tmp_path / ".venv.new").rename(tmp_path / ".venv")
    command = [str(tmp_path / ".venv/bin/python"), "-c", "import sys; print(sys.prefix, sys.prefix != sys.base_prefix)"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(tmp_path / ".venv"), "True"]


# -- stop.sh ---------------------------------------------------------------------------------------------------------


def test_manager_whose_files_were_deleted_is_stopped(system: System) -> None:
    system.up("--image", "good")
    shutil.rmtree(system.run_dir)
    assert "Stopping the manager" in system.down()
    assert system.nothing_left()


def test_only_the_manager_of_the_project_is_stopped(system: System, tmp_path: Path) -> None:
    other = System(tmp_path / "other", "q")
    shutil.rmtree(other.tree)
    other.tree.symlink_to(system.tree)
    system.up("--image", "good")
    (other.tree / "run" / "q").mkdir()
    for name in ("manager", "supervisor"):  # of another project
        shutil.copy(system.run_dir / f"{name}.pid", other.tree / "run" / "q")
    other.down()
    other.engine.close()
    assert len(system.processes()) == 2


def test_stop_keeps_a_network_that_a_foreign_container_is_attached_to(system: System) -> None:
    system.up("--image", "good")
    system.engine.networks[0]["Containers"] = {"their-id": {"Name": "theirs"}}
    assert "Keeping the network p, because these containers are attached: theirs" in system.down()
    assert len(system.engine.networks) == 1
    system.engine.networks[0]["Containers"] = {}
    system.down()
    assert system.nothing_left()


def test_stop_without_an_engine_ends_the_manager(system: System) -> None:
    system.up("--image", "good")
    environment = dict(system.environment)
    system.environment["DOCKER_HOST"] = f"unix://{system.state / 'nothing'}"
    before = settings(system)
    output = system.down(status=1)
    assert "may be left. When the engine answers, run ./stop.sh again" in output
    assert ("Project p is down" in output, system.processes()) == (False, [])
    assert settings(system) == before, "the next one needs the ports and the drain timeout"
    system.environment = environment
    system.down()
    assert system.nothing_left()
    assert not (system.run_dir / "settings.json").exists()


def test_container_that_is_being_removed_already_is_no_error(system: System) -> None:
    system.engine.removed_already = True
    (system.state / "check").touch()
    system.up("--image", "good")
    system.down()
    assert system.nothing_left()


def test_stop_fails_and_names_what_is_left(system: System) -> None:
    system.up("--image", "good")
    system.engine.extra.append("p-backend-7")
    output = system.down(status=1)
    assert "project p is not down, left: container p-backend-7; run ./stop.sh again" in output
    assert "Project p is down" not in output
    system.engine.extra.clear()
    system.down()


# -- the status, for programs ------------------------------------------------------------------------------------------


def test_status_of_a_stopped_project_is_json(system: System) -> None:
    never = json.loads(system.script("run.sh", "--status", "--json", status=1))
    assert (never["project"], never["state"]) == ("p", "down")
    system.up("--image", "good")
    found = json.loads(system.script("run.sh", "--status", "--json"))
    assert (found["state"], found["problems"]) == ("healthy", [])
    system.down()
    stopped = json.loads(system.script("run.sh", "--status", "--json", status=1))
    assert (stopped["state"], "no manager of project p answers" in stopped["problem"]) == ("down", True)


def test_manager_refuses_another_project_than_that_of_its_settings() -> None:
    command = [sys.executable, str(ROOT / "manager" / "script.py"), "--project", "q"]
    environment = {**os.environ, "LB_PROJECT": "p"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (2, "manager: --project is q, LB_PROJECT is p\n")
