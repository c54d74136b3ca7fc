"""The shell functions that run.sh, stop.sh and the tests share."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def shell(script: str, tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    text = f"set -euo pipefail\nLOG={tmp_path}/log; : >$LOG\n. '{ROOT}/manager/host.sh'\n{script}"
    environment = {**os.environ, **variables}
    return subprocess.run(
        ["bash", "-c", text], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=20, check=False
    )


def test_step_is_printed_with_its_seconds_and_its_output_goes_to_the_log(tmp_path: Path) -> None:
    done = shell("step 'Doing it' echo output", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "Doing it … 0 s\n", "")
    assert (tmp_path / "log").read_text() == "output\n"


def test_failed_step_prints_the_end_of_its_log_and_ends_the_script(tmp_path: Path) -> None:
    done = shell("step 'Doing it' bash -c 'seq 100; exit 3'; echo never", tmp_path)
    assert (done.returncode, done.stdout) == (1, "Doing it … failed\n")
    first, *lines, _, last = done.stderr.splitlines()
    assert first == f"--- the end of {tmp_path}/log:"
    assert lines == [str(n) for n in range(86, 101)]
    assert last.endswith("Doing it: failed with status 3")


def test_interrupted_run_sh_ends_with_130_and_leaves_no_ticker(tmp_path: Path) -> None:
    script = "trap 'end_step' EXIT; trap 'exit 130' INT; step 'Doing it' sh -c \"kill -INT $$\""
    text = f"set -euo pipefail\nLOG={tmp_path}/log\n. '{ROOT}/manager/host.sh'\n{script}"
    # What starts the tests in the background may ignore SIGINT, and no shell can trap a signal that it was to ignore.
    command = ["env", "--default-signal=INT", "bash", "-c", text]
    assert subprocess.run(command, capture_output=True, timeout=4, check=False).returncode == 130


def test_package_that_may_not_be_installed_is_named(tmp_path: Path) -> None:
    done = shell("need 'running containers' docker.io iptables; echo never", tmp_path, NO_INSTALL="1")
    line = "missing for running containers: docker.io iptables; install it, or leave --no-install out"
    assert (done.returncode, done.stdout) == (1, "")
    assert line in done.stderr


def test_engine_of_another_host_is_refused(tmp_path: Path) -> None:
    done = shell("ensure_engine; echo never", tmp_path, DOCKER_HOST="tcp://example:2375")
    assert (done.returncode, done.stdout) == (1, "")
    assert "DOCKER_HOST is tcp://example:2375; the engine has to be on this host" in done.stderr


@pytest.mark.parametrize("how", ["old. Minimum", "new. Maximum"])
def test_docker_command_that_the_engine_refuses_is_named_and_no_engine_is_started(tmp_path: Path, how: str) -> None:
    refusal = f"Error response from daemon: client version 1.41 is too {how} supported API version is 1.44"
    for program in ("docker", "dockerd"):
        (tmp_path / program).write_text(f"#!/bin/sh\necho '{refusal}' >&2; exit 1\n")
        (tmp_path / program).chmod(0o755)
    done = shell("ensure_engine; echo never", tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert (done.returncode, done.stdout) == (1, "")
    assert "the docker command and the engine are too different versions; upgrade the older one" in done.stderr


def test_engine_that_another_program_started_is_not_stopped(tmp_path: Path) -> None:
    done = shell('echo "started here: [$ENGINE_STARTED]"', tmp_path, ENGINE_STARTED="1")
    assert done.stdout == "started here: []\n"


def fake(place: Path, **programs: str) -> str:
    """A PATH with these programs before the others."""
    for name, text in programs.items():
        (place / name).write_text(f"#!/bin/bash\n{text}\n")
        (place / name).chmod(0o755)
    return f"{place}:{os.environ['PATH']}"


def fake_systemd(place: Path, state: str) -> str:
    """A PATH of a host whose engine answers when systemd has started it; its service is in that state before."""
    return fake(
        place,
        docker="case $1 in info) [ -e answers ] ;; ps) cat containers ;; *) exit 1 ;; esac",
        dockerd="exit 1",
        id="echo 0",
        systemctl=f'echo "$*" >>calls; case $1 in is-active) echo {state}; exit 3 ;; start) touch answers ;; esac',
    )


@pytest.mark.parametrize(
    ("state", "then", "stopped"),
    [
        ("inactive", "stop_unused_engine", True),
        ("active", "stop_unused_engine", False),  # it was too busy to answer
        ("activating", "stop_engine", False),
        ("inactive", "echo abc >containers; stop_unused_engine", False),
        ("inactive", "echo another >run/engine/boot; stop_engine", False),
    ],
)
def test_only_an_engine_that_this_boot_of_the_host_started_and_nobody_uses_is_stopped(
    tmp_path: Path, state: str, then: str, stopped: bool
) -> None:
    path = fake_systemd(tmp_path, state)
    before = "mkdir -p run/engine; echo systemd >run/engine/dockerd.pid; echo another >run/engine/boot"
    done = shell(f"{before}; SYSTEMD=$PWD; ensure_engine; {then}", tmp_path, PATH=path)
    assert (done.returncode, done.stderr) == (0, "")
    assert ("stop docker docker.socket" in (tmp_path / "calls").read_text()) == stopped


@pytest.mark.parametrize(("state", "started"), [("active", ""), ("inactive", "1")])
def test_engine_that_an_earlier_run_started_counts_as_started_by_this_run_only_if_it_was_stopped(
    tmp_path: Path, state: str, started: str
) -> None:
    path = fake_systemd(tmp_path, state)
    before = "mkdir -p run/engine; echo systemd >run/engine/dockerd.pid; cat $BOOT_ID >run/engine/boot"
    done = shell(f'{before}; SYSTEMD=$PWD; ensure_engine; echo "started: [$ENGINE_STARTED]"', tmp_path, PATH=path)
    assert f"started: [{started}]\n" in done.stdout


def test_engine_of_an_earlier_run_that_does_not_answer_is_not_started_a_second_time(tmp_path: Path) -> None:
    path = fake(tmp_path, docker="exit 1", dockerd="echo >>starts; exec -a dockerd sleep 60")
    script = "ENGINE_TIMEOUT=1 SYSTEMD=none; start_engine; start_engine; stop_engine; echo stopped"
    done = shell(f"set +e; {script}", tmp_path, PATH=path)
    assert done.stdout.endswith("does not answer after 1 s\nstopped\n")
    assert (tmp_path / "starts").read_text() == "\n"


def test_engine_that_starts_slowly_is_not_started_twice_and_can_be_stopped(tmp_path: Path) -> None:
    path = fake(tmp_path, docker="exit 1", dockerd="echo >>starts; exec -a dockerd sleep 60")
    script = "ENGINE_TIMEOUT=1 SYSTEMD=none; start_engine || echo failed; stop_engine; echo stopped"
    done = shell(script, tmp_path, PATH=path)
    assert (done.stdout, done.returncode) == ("failed\nstopped\n", 0)
    assert (tmp_path / "starts").read_text() == "\n"
    assert not (tmp_path / "run/engine").exists()


def test_engine_that_does_not_end_is_not_forgotten(tmp_path: Path) -> None:
    path = fake(tmp_path, docker="[ -e answers ]", dockerd="trap '' TERM; touch answers; exec -a dockerd sleep 10")
    script = "ENGINE_TIMEOUT=1 SYSTEMD=none; start_engine; stop_engine || kill -9 $(cat run/engine/dockerd.pid)"
    done = shell(script, tmp_path, PATH=path)
    assert done.stdout.endswith("has not ended after 1 s\n")
    assert done.returncode == 0


def test_engine_that_accepts_calls_but_does_not_answer_is_reported(tmp_path: Path) -> None:
    path = fake(tmp_path, docker="sleep 30", timeout='shift; exec /usr/bin/timeout 0.2 "$@"')
    done = shell("ensure_engine", tmp_path, PATH=path, DOCKER_HOST="unix:///x")
    assert "no engine answers at DOCKER_HOST=unix:///x" in done.stderr


def test_docker_command_uses_the_engine_of_this_host_whatever_its_context_is(tmp_path: Path) -> None:
    path = fake(tmp_path, docker='echo "$DOCKER_CONTEXT" >context')
    assert shell("ensure_engine", tmp_path, PATH=path, DOCKER_CONTEXT="far-away").returncode == 0
    assert (tmp_path / "context").read_text() == "default\n"


def test_environment_is_made_again_for_another_version_of_python(tmp_path: Path) -> None:
    (tmp_path / "manager").mkdir()
    (tmp_path / "manager" / "requirements.txt").touch()
    stamps = []
    for version in ("3 11", "3 13"):
        path = fake(tmp_path, python3=f"echo {version}")
        stamps.append(shell("wanted_stamp", tmp_path, PATH=path).stdout)
    assert stamps[0] != stamps[1]


def test_stop_engine_ends_no_process_that_reuses_the_engines_number(tmp_path: Path) -> None:
    script = "mkdir -p $ENGINE_DIR; sleep 5 & echo $! >$ENGINE_DIR/dockerd.pid; stop_engine; kill $!"
    done = shell(script, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "run/engine").exists()


@pytest.mark.parametrize(
    ("program", "arguments", "line"),
    [
        ("stop.sh", ["--colour"], "stop.sh: unrecognized arguments: --colour; ./stop.sh --help lists the flags"),
        (
            "stop.sh",
            ["--project", "A b"],
            "stop.sh: --project (LB_PROJECT) is 'A b'; allowed: a-z 0-9 _ -, 40 at most",
        ),
        ("run.sh", ["--min", "0"], "run.sh: --min (LB_MIN) is '0'; allowed: 1 to 1000"),
    ],
)
def test_bad_flag_is_one_line_and_exit_code_2(program: str, arguments: list[str], line: str) -> None:
    done = subprocess.run([str(ROOT / program), *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line + "\n")
